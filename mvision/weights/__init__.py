"""Saving a model's weights, loading them, and initialising a model from the weights of another one."""

from mvision.weights.files import (
    Weights,
    init_from,
    load,
    read_config,
    read_weights,
    resolve_weights,
    save_weights,
)

__all__ = ["Weights", "init_from", "load", "read_config", "read_weights", "resolve_weights", "save_weights"]

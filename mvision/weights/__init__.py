"""Weights: saving a model, loading it back, and starting a model from other weights."""

from mvision.weights.files import Weights, init_from, load, read_weights, resolve_weights, save_weights

__all__ = ["Weights", "init_from", "load", "read_weights", "resolve_weights", "save_weights"]

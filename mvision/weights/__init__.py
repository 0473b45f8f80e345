"""Saving a model's weights, loading them, and initialising a model from the weights of another one.

Attributes are loaded on first use, so that the table of published models (``zoo``) can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Weights", "init_from", "load", "read_config", "read_weights", "resolve_weights", "save_weights"]

if TYPE_CHECKING:
    from mvision.weights.files import (
        Weights,
        init_from,
        load,
        read_config,
        read_weights,
        resolve_weights,
        save_weights,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("mvision.weights.files"), name)
    raise AttributeError(f"module 'mvision.weights' has no attribute {name!r}")

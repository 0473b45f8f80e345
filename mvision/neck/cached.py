"""Tensors that depend on shapes alone, such as position embeddings, kept from one forward pass to the next.

On a GPU each of the many small operators that compute them costs a launch. Needs torch alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor, nn

LIMIT = 16
"""Shapes that are kept: more than the image sizes of a multi-scale training."""

Result = TypeVar("Result", bound="Tensor | tuple[Tensor, ...]")


class ShapeCache:
    """The results of the last calls by their keys; of more than ``LIMIT`` the one that was not used longest goes.

    Nothing is kept while a graph is compiled, exported or traced (the tensors then have no values), or while a CUDA
    graph is captured (they get their values only in a replay). Copies and pickles start empty. Several threads may use
    one cache.
    """

    def __init__(self) -> None:
        self._results: OrderedDict[Hashable, Tensor | tuple[Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ShapeCache], tuple[()]]:
        return ShapeCache, ()

    def get(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """The result of ``compute``, which must be a function of the key; the caller must not change it in place."""
        if in_graph():
            return compute()
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]  # type: ignore[return-value]
        # In a tensor of the inference mode autograd would refuse to compute later.
        with torch.inference_mode(False), torch.no_grad():
            result = compute()
        parts = result if isinstance(result, tuple) else (result,)
        on_gpu = any(part.is_cuda for part in parts)
        if all(map(has_values, parts)) and not (on_gpu and torch.cuda.is_current_stream_capturing()):
            if on_gpu:  # other threads may read it in other streams
                torch.cuda.current_stream(parts[0].device).synchronize()
            with self._lock:
                self._results[key] = result
                while len(self._results) > LIMIT:
                    self._results.popitem(last=False)
        return result

    def tensors(self) -> list[Tensor]:
        """All tensors that are kept."""
        with self._lock:
            results = list(self._results.values())
        return [part for result in results for part in (result if isinstance(result, tuple) else (result,))]


def has_values(tensor: Tensor) -> bool:
    """Whether it is a plain tensor, and not one that a tracer uses in place of values."""
    return type(tensor) is Tensor


def cached_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors in all caches of a module and its children.

    A CUDA graph that was captured with them reads their memory, so whoever replays it has to keep them.
    """
    caches = [value for part in module.modules() for value in vars(part).values() if isinstance(value, ShapeCache)]
    return [tensor for cache in caches for tensor in cache.tensors()]


def in_graph() -> bool:
    """Is this call being compiled, exported, traced or scripted?"""
    if torch.jit.is_scripting():
        return True
    else:
        return torch.compiler.is_compiling() or torch.jit.is_tracing()

"""A model as a graph: its outputs in a fixed order, and converters that keep quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mvision.model import Model


class FlatOutputs(nn.Module):
    """A model whose outputs are a tuple in a fixed order."""

    def __init__(self, model: Model, names: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        return tuple(outputs[task][name] for task, name in self.names)


class SimpleOutputs(FlatOutputs):
    """The same in operators that the converters for phones have, see ``_SimpleOperators``."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with _SimpleOperators():
            return super().forward(images)


class _SimpleOperators(TorchFunctionMode):
    """LiteRT's converter has no ``max`` that also returns indices, no ``argmax`` where there is one value only, no
    powers of tensors with five dimensions (which squares become), and sorts, which its runtime lacks, where the values
    of ``topk`` are used without their indices.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.max, Tensor.max) and (
            kwargs.keys() & {"dim"} or (len(args) > 1 and isinstance(args[1], int))
        ):
            values, *where = args
            return torch.return_types.max((values.amax(*where, **kwargs), self._argmax(values, *where, **kwargs)))
        if func in (torch.topk, Tensor.topk):
            dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
            indices = func(*args, **kwargs).indices
            return torch.return_types.topk((args[0].gather(dim, indices), indices))
        if func in (torch.square, Tensor.square):
            return args[0] * args[0]
        if func in (torch.argmax, Tensor.argmax):
            return self._argmax(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _argmax(values: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        if dim is not None and values.shape[dim] == 1:
            return torch.zeros_like(values if keepdim else values.squeeze(dim), dtype=torch.int64)
        return torch.argmax(values, dim, keepdim)


def output_names(model: Model, images: Tensor) -> list[tuple[str, str]]:
    """Task and name of every raw output, in the order in which exports have them."""
    with torch.no_grad():
        return [(task, name) for task, outputs in model(images).items() for name in outputs]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines, warnings and progress bars of the libraries that convert models."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

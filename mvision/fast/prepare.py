"""A PyTorch model prepared for fast prediction."""

from __future__ import annotations

from typing import Protocol, TypeVar, cast

import torch
from torch import nn

from mvision.compat import has_packed_convolutions
from mvision.fast.packed import pack
from mvision.inference.predict import Predictor
from mvision.machine import Precision, torch_dtype

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")  # that benchmarks compare on every device


class Fusable(Predictor, Protocol):
    """What preparing needs of a model besides being an ``nn.Module``; ``mvision.model.Model`` has it."""

    def fuse(self) -> object:
        """Re-parameterise for inference, in place."""


M = TypeVar("M", bound=nn.Module)


def prepare(model: M, precision: Precision = "fp32", packed: bool = True) -> M:
    """Fuse the model, convert its weights to ``precision`` and order them for convolutions, in place.

    With bf16 the weights themselves are converted, once; autocast would convert them in every call. Coordinates stay in
    float32. The model cannot be trained afterwards.

    Args:
        packed: on a CPU, also replace convolutions, see ``mvision.fast.packed``. Not before ``torch.compile``, which
            does the same itself.
    """
    like = cast(Fusable, model)
    like.fuse()
    model.eval().requires_grad_(False)
    model.to(torch_dtype(precision))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pack(model) if packed and like.device.type == "cpu" and has_packed_convolutions() else model

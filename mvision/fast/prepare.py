"""A PyTorch model prepared for fast prediction."""

from __future__ import annotations

from typing import Protocol, TypeVar, cast

import torch
from torch import nn

from mvision.compat import has_packed_convolutions
from mvision.errors import UserError
from mvision.fast.biases import join_biases
from mvision.fast.cuda_graphs import replay_graphs
from mvision.fast.packed import pack
from mvision.inference.predict import Predictor
from mvision.machine import Precision, computes_in_bf16, torch_dtype

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")  # that benchmarks compare on every device


class Fusable(Predictor, Protocol):
    """What preparing needs of a model besides being an ``nn.Module``; ``mvision.model.Model`` has it."""

    def fuse(self) -> object:
        """Re-parameterise for inference, in place."""


M = TypeVar("M", bound=nn.Module)


def prepare(model: M, precision: Precision = "fp32", packed: bool = True, compile: bool = False) -> M:
    """Fuse the model, convert its weights to ``precision`` and order them for convolutions, in place.

    The weights themselves are converted, once; autocast would convert them in every call. Coordinates stay in float32.
    The model cannot be trained afterwards. On a GPU predictions replay CUDA graphs, see ``mvision.fast.cuda_graphs``.

    Args:
        packed: also replace convolutions, see ``mvision.fast.packed`` (on a CPU) and ``mvision.fast.biases`` (on a
            GPU). Not before ``torch.compile``, which does the same itself.
        compile: let ``torch.compile`` compile the forward pass for every shape of images, when the first ones come.
            That takes about a minute, so it is for long work with one shape.

    Raises:
        UserError: fp16 on a CPU, which has no instructions for it.
    """
    like = cast(Fusable, model)
    if precision == "fp16" and like.device.type == "cpu":
        raise UserError("precision fp16: a CPU does not compute in fp16; use bf16 or fp32, or a GPU")
    like.fuse()
    model.eval().requires_grad_(False)
    model.to(torch_dtype(precision))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if packed and not compile:
        if like.device.type == "cuda":
            join_biases(model)
        elif (
            like.device.type == "cpu"
            and has_packed_convolutions()
            and (precision == "fp32" or computes_in_bf16(like.device))
        ):
            pack(model)
    if compile or like.device.type == "cuda":
        replay_graphs(model, compile)
    return model

"""What makes the training step itself faster: settings of the GPU's libraries, and compiled parts of the model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mvision.compat import compilation_error, room_for_graphs
from mvision.engine.trainer import Trainer
from mvision.errors import UserError


@contextmanager
def compiled(trainer: Trainer, sizes: int, backend: str = "inductor") -> Iterator[None]:
    """Backbone and neck are compiled in place, at their first call; names in files of weights stay as they are.

    The heads' forward and loss are not: they differ from batch to batch, with the number of objects.

    Args:
        sizes: of images in training. Each gets a graph of its own.

    Raises:
        UserError: backbone or neck cannot be compiled on this machine.
    """
    model = trainer.bare_model
    for part in (model.backbone, model.neck):
        part.compile(backend=backend, dynamic=False)
    trainer.compiles = True
    try:
        with room_for_graphs(4 * sizes):  # of either part, and in an evaluation too where there is no moving average
            yield
    except compilation_error() as error:
        reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
        raise UserError(
            f"train.compile: backbone and neck cannot be compiled here ({reason}); leave train.compile out, or install "
            "what the message names"
        ) from error


@contextmanager
def set_for_training(accelerator: Accelerator) -> Iterator[None]:
    """Inside this context the libraries of a GPU are set for training.

    cuDNN times its kernels for every new shape of convolution and takes the fastest. Where fp32 is asked for, products
    of matrices use TF32, as convolutions do anyway: 10 bits of mantissa instead of 23.
    """
    if accelerator.device.type != "cuda":
        yield
        return
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    if accelerator.mixed_precision == "no":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(precision)


def tell_compilation(trainer: Trainer, begin: float) -> None:
    """Print once in a run how long the first batch has taken, and so the compilation, since ``begin``."""
    if trainer.compiles:
        trainer.compiles = False
        if trainer.accelerator.is_main_process:
            tqdm.write(
                f"train.compile: backbone and neck compiled in {time.monotonic() - begin:.0f} s, with the first batch; "
                "every other size of images takes as long again, and the next run less"
            )

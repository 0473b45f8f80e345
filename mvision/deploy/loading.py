"""``mvision.load``: a model of any source, to train or to predict with, or an exported one, to predict with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mvision.deploy.exported import ExportedModel, is_exported
from mvision.errors import UserError
from mvision.machine import resolve_device
from mvision.model import Model
from mvision.weights import load as load_weights
from mvision.weights import push as push  # gives models their way to the Hub


def load(
    source: str | Path,
    tasks: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
) -> Model:
    """The model of a source of weights, in eval mode.

    Args:
        source: a run's folder, a ``.safetensors`` file, a folder in Hugging Face's format, or a Hub id (``user/name``,
            or ``user/name@revision`` for a branch, a tag or a commit); or an exported model: an ``.onnx``, ``.pte``
            or ``.tflite`` file, or a folder of OpenVINO. An exported model predicts, and refuses everything else.
        tasks: the tasks that the model keeps, or the name of one; None keeps all.
        device: exported models run on the CPU.
        family: of a ``.pth`` file of the authors: ``dfine``, ``deim``, ``rtdetrv4``, ``deim-rtdetrv2``, ``rtdetr`` or
            ``rtdetrv2``. Needed where neither its tensors nor its name tell it: they differ in an activation.

    Raises:
        UserError: no such source, no weights in it, damaged, not finite, or without one of the tasks; a device that
            cannot be used.
    """
    if not is_exported(source):
        return load_weights(source, tasks, device, family)
    # A known device is refused whether or not the machine has it; any other text gets the line about devices.
    if str(device).partition(":")[0] in ("cuda", "mps") or resolve_device(str(device)).type != "cpu":
        raise UserError(
            f"weights {source}: an exported model runs on the CPU, not on {device}; load its weights instead"
        )
    return ExportedModel(source, tasks)

"""A model as bytes, so that processes on other machines can open it: they may not see the files that it came from."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mvision.config import ModelConfig
from mvision.deploy.exported import ExportedModel, is_exported
from mvision.deploy.formats import runtime_of
from mvision.deploy.runtimes import open_fastest
from mvision.evaluation import Evaluated
from mvision.machine import PrecisionOption, inference_precision
from mvision.model import Model
from mvision.weights import save_weights

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class PortableModel:
    """A model of any source, with what decides how it computes.

    Attributes:
        files: the content by name: one file of weights, or those of an exported model.
        entry: the name that opens it: of a file, or "." for the folder.
        precision: of PyTorch and OpenVINO; ``auto`` is decided where it is opened.
        own_threads: whether its runtime uses all cores by itself.
        config: of the model, with the heads of its tasks alone.
        tasks: their names.
        digest: of all that decides on its results but the device.
    """

    files: dict[str, bytes]
    entry: str
    precision: PrecisionOption
    own_threads: bool
    config: ModelConfig
    tasks: list[str]
    digest: str

    def open(self, device: torch.device) -> Evaluated:
        """The model, ready to predict on this device.

        Raises:
            UserError: its runtime is not installed here, or the device has no such precision.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files.items():
                (Path(folder) / name).write_bytes(content)
            model, _ = open_fastest(str(Path(folder) / self.entry), self.tasks, device, self.precision)
        return model


def portable(
    model: Model, source: str, tasks: Sequence[str], on_cpu: bool, precision: PrecisionOption, family: str | None = None
) -> tuple[PortableModel, str]:
    """The model that ``open_fastest`` would open, and the line about its runtime.

    Args:
        model: what ``mvision.load`` has made of this source.
        source, tasks, family: see ``open_fastest``.
        on_cpu: of GPUs, each decides by itself on the precision ``auto``, and exports are not used.

    Raises:
        UserError: see ``open_fastest``.
    """
    chosen: PrecisionOption = precision
    line = "PyTorch on cuda"
    if on_cpu or is_exported(source):
        opened, line = open_fastest(source, tasks, torch.device("cpu"), precision, family)
        is_file = isinstance(opened, ExportedModel) and runtime_of(opened.path) is not None
        # One answer for all machines: "auto" is a measurement, and rows of one data set should not differ by it.
        chosen = "fp32" if is_file else inference_precision(precision, torch.device("cpu"))
        if isinstance(opened, ExportedModel):
            files = {file.name: file.read_bytes() for file in opened.files}
            entry = opened.path.name if is_file else "."
            return _described(files, entry, chosen, opened, hashlib.sha256(b"".join(files.values()))), line
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / WEIGHTS
        save_weights(model, file)
        files = {WEIGHTS: file.read_bytes()}
    return _described(files, WEIGHTS, chosen, model, _digest_of(model)), line


def _described(
    files: dict[str, bytes], entry: str, precision: PrecisionOption, model: Model, digest: hashlib._Hash
) -> PortableModel:
    digest.update(json.dumps([model.tasks, model.config.model_dump(mode="json")], sort_keys=True).encode())
    own = model.own_threads
    return PortableModel(files, entry, precision, own, model.config, list(model.tasks), digest.hexdigest())


def _digest_of(model: Model) -> hashlib._Hash:
    """By the tensors: safetensors writes the texts of its header in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest

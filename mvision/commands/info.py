"""``mvision info``: this machine and the installed versions, or the parts of a model."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mvision import __version__
from mvision.config import load_config, shipped_configs
from mvision.deploy.exported import ExportedModel, is_exported
from mvision.errors import UserError
from mvision.evaluation.tables import text_table
from mvision.machine import cores, cpu_field, cpu_name, resolve_device, resolve_precision
from mvision.model import Model
from mvision.structures.coco_names import coco_with_keypoints
from mvision.weights import load

PACKAGES = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "accelerate", "albumentations", "hotcoco")


@dataclass(frozen=True)
class Part:
    """One part of a model: modules that own parameters, parameters, and FLOPs for one image."""

    name: str
    layers: int
    parameters: int
    flops: int


def info_text(model: str | None = None, weights: str | None = None, family: str | None = None) -> str:
    """The parts of a model, what is in an export, or machine and versions if neither a model nor weights are given.

    Args:
        model: a shipped model or a timm backbone.
        weights: any source that ``mvision.load`` takes, exported models too.
        family: of a ``.pth`` file of the authors, where its name does not tell it.

    Raises:
        UserError: both are given, or one is unknown.
    """
    if model is not None and weights is not None:
        raise UserError("--model and --weights: give one of them")
    if weights is not None and is_exported(weights):
        return exported_text(ExportedModel(weights))
    if weights is not None:
        return model_text(load(weights, family=family), weights)
    if model is not None:
        config = load_config(model).model
        config.categories = config.categories or coco_with_keypoints()
        config.backbone.forget_weights()  # the counts do not depend on them
        return model_text(Model(config), model)
    return machine_text()


def machine_text() -> str:
    """Machine, devices and versions, one per line."""
    device = resolve_device(None)
    rows = [
        ("mvision", f"{__version__} in {Path(__file__).parents[1]}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in PACKAGES),
        ("cpu", f"{cpu_name()}, {cores()} cores, torch uses {torch.get_num_threads()}"),
        ("cpu bf16", _cpu_bf16()),
        ("cuda", _cuda()),
        ("mps", "available" if torch.backends.mps.is_available() else "not available"),
        ("default", f"--device {device.type} --precision {resolve_precision('auto', device)}"),
        ("models", f"{', '.join(shipped_configs())}, or any timm feature backbone"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def model_text(model: Model, name: str) -> str:
    """Layers, parameters and FLOPs by part, before and after ``model.fuse()``, which is called here."""
    height, width = model.config.image_size
    trained = count_parts(model)
    fused = {part.name: part for part in count_parts(model.fuse())}
    header = ("part", "layers", "parameters", "GFLOPs", "fused: parameters", "GFLOPs")
    rows = [
        (
            part.name,
            f"{part.layers:,}",
            f"{part.parameters:,}",
            f"{part.flops / 1e9:.4g}",
            f"{fused[part.name].parameters:,}",
            f"{fused[part.name].flops / 1e9:.4g}",
        )
        for part in trained
    ]
    backbone = model.backbone
    maps = ", ".join(f"{channels} at 1/{stride}" for channels, stride in zip(backbone.channels, backbone.strides))
    if backbone.laterals:
        maps += "; for heads " + ", ".join(f"{channels} at 1/{s}" for s, channels in backbone.laterals.items())
    config = model.config
    lines = text_table([header, *rows])
    rule = "-" * len(lines[0])
    return "\n".join(
        [
            f"{name}: {', '.join(model.tasks)}; {len(model.categories)} classes; images {height} high, {width} wide",
            f"backbone {config.backbone.name}: channels {maps}; neck: {config.neck.embed_dim} channels on every scale",
            "",
            *(lines[0], rule, *lines[1:-1], rule, lines[-1]),
            "",
            "FLOPs of one image, a multiply-add counts as two; convolutions, linear layers and attention are counted.",
        ]
    )


def exported_text(model: ExportedModel) -> str:
    """What an exported model takes and returns, and what it was made from."""
    session, described = model.session, model.session.description
    height, width = model.config.image_size
    any_size = None in session.images[2:]
    made_from = f"SHA-256 {described.weights}" if described.weights else "not stored (an older export, or edited)"
    rows = [
        ("runtime", f"{session.runtime}, on the CPU"),
        ("tasks", ", ".join(model.tasks)),
        ("classes", str(len(model.categories))),
        ("images", f"{height} high, {width} wide{'; other multiples of 32 too' if any_size else ''}, any batch size"),
        ("precision", described.precision),
        ("size", f"{sum(file.stat().st_size for file in model.files) / 1e6:.1f} MB"),
        ("backbone", model.config.backbone.name),
        ("written by", f"mvision {described.version or 'of an unknown version'}"),
        ("made from", f"weights file, {made_from}"),
        *((f"output {name}", _shape(shape)) for name, shape in session.outputs.items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{model.path}", "", *(f"{name:<{width}}  {value}" for name, value in rows)])


def _shape(sides: tuple[int | None, ...]) -> str:
    return " x ".join("any" if side is None else str(side) for side in sides)


def count_parts(model: Model) -> list[Part]:
    """Backbone, neck, every head and the total, on one image of the model's size."""
    model.eval()
    image = torch.zeros(1, 3, *model.config.image_size, device=model.device)
    counter = FlopCounterMode(display=False)
    # FLOPs of fused attention cannot be counted on every device; the plain kernel consists of matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    counts = counter.get_flop_counts()
    parts: list[tuple[str, nn.Module]] = [("backbone", model.backbone), ("neck", model.neck)]
    parts += [(f"heads.{task}", model.head(task)) for task in model.heads]
    root = type(model).__name__
    counted = [_part(name, module, sum(counts.get(f"{root}.{name}", {}).values())) for name, module in parts]
    return [*counted, _part("total", model, counter.get_total_flops())]


def _part(name: str, module: nn.Module, flops: int) -> Part:
    own = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return Part(name, len(own), sum(parameter.numel() for parameter in module.parameters()), flops)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_bf16() -> str:
    flags = set((cpu_field("flags") or cpu_field("Features")).split())
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}
    names = [name for flag, name in units.items() if flag in flags]
    return f"in hardware ({', '.join(names)})" if names else "no hardware support found"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return (
            f"not available (torch is built for CUDA {torch.version.cuda})" if torch.version.cuda else "not available"
        )
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{d.name} {d.total_memory / 2**30:.0f} GiB" for d in devices)
    return f"{torch.version.cuda}: {names}"

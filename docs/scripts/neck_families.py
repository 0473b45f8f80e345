"""A table of timm backbone families under the hybrid encoder: forward, backward, export, and an odd image size.

    python docs/scripts/neck_families.py [--only NAME]...

Weights are random and nothing is downloaded. Every row is one family with another embed_dim and number of maps. A cell
is "ok" or the error; it starts with "backbone:" where the backbone fails without the neck. The odd size is 333 x 517
unless the backbone accepts multiples of its patch size only.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mvision.neck import HybridEncoder

TOLERANCE = 1e-3  # relative to the largest output: exported graphs reorder float32 sums of random, deep networks


@dataclass
class Family:
    """A timm model, and how to give it a neck."""

    name: str
    model: str
    embed_dim: int
    levels: int
    size: int = 224
    odd_size: tuple[int, int] = (333, 517)
    options: dict[str, Any] = field(default_factory=dict)


ANY_SIZE_VIT = {"dynamic_img_size": True, "dynamic_img_pad": True}
ANY_SIZE_SWIN = {"strict_img_size": False}

FAMILIES = [
    Family("ResNet", "resnet18", 256, 3),
    Family("ResNet-D", "resnet50d", 192, 2),
    Family("RegNet", "regnety_002", 96, 4),
    Family("RepVGG", "repvgg_a0", 64, 3),
    Family("MobileOne", "mobileone_s0", 96, 4),
    Family("CSPNet", "cspresnet50", 256, 1),
    Family("HGNetV2", "hgnetv2_b0", 256, 3),
    Family("EfficientNet", "efficientnet_b0", 192, 4),
    Family("MobileNetV3", "mobilenetv3_small_100", 64, 3),
    Family("MobileNetV4", "mobilenetv4_conv_small", 96, 2),
    Family("GhostNetV2", "ghostnetv2_100", 64, 1),
    Family("RepViT", "repvit_m0_9", 96, 3),
    Family("StarNet", "starnet_s1", 64, 4),
    Family("ConvNeXt", "convnext_atto", 192, 4),
    Family("ConvNeXt V2", "convnextv2_atto", 256, 3),
    Family("MambaOut", "mambaout_femto", 96, 4),
    Family("PoolFormer", "poolformer_s12", 192, 3),
    Family("FastViT", "fastvit_t8", 64, 4),
    Family("EdgeNeXt", "edgenext_xx_small", 96, 3),
    Family("NextViT", "nextvit_small", 192, 3),
    Family("EfficientViT (MIT)", "efficientvit_b0", 256, 2),
    Family("EfficientViT (MSRA)", "efficientvit_m0", 64, 3),
    Family("MobileViT", "mobilevit_xxs", 96, 3),
    Family("PVT v2", "pvt_v2_b0", 192, 4),
    Family("TinyViT", "tiny_vit_5m_224", 256, 4),
    Family("MaxViT", "maxvit_rmlp_pico_rw_256", 64, 3, size=256),
    Family("CoAtNet", "coatnet_pico_rw_224", 96, 4),
    Family("Hiera", "hiera_tiny_224", 192, 4),
    Family("Swin", "swin_tiny_patch4_window7_224", 192, 4, odd_size=(332, 516), options=ANY_SIZE_SWIN),
    Family("Swin V2", "swinv2_tiny_window8_256", 256, 3, size=256, odd_size=(332, 516), options=ANY_SIZE_SWIN),
    Family("FocalNet", "focalnet_tiny_srf", 96, 2),
    Family("DaViT", "davit_tiny", 64, 3),
    Family("ViT", "vit_tiny_patch16_224", 192, 3, options=ANY_SIZE_VIT),
    Family("DeiT III", "deit3_small_patch16_224", 96, 2, options=ANY_SIZE_VIT),
    Family("DINOv2", "vit_small_patch14_reg4_dinov2", 256, 4, options={"img_size": 224, **ANY_SIZE_VIT}),
    Family("DINOv3", "vit_small_patch16_dinov3", 64, 3, options={"img_size": 224, **ANY_SIZE_VIT}),
    Family("EVA-02", "eva02_tiny_patch14_224", 96, 1, options=ANY_SIZE_VIT),
]


class Encoder(nn.Module):
    """The last maps of a timm backbone, channels first, and the neck on them."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.backbone = timm.create_model(family.model, pretrained=False, features_only=True, **family.options)
        info = self.backbone.feature_info
        self.levels = min(family.levels, len(info.channels()))
        self.neck = HybridEncoder(
            info.channels()[-self.levels :], info.reduction()[-self.levels :], family.embed_dim, depth=1
        )

    def maps(self, images: Tensor) -> list[Tensor]:
        maps = list(self.backbone(images))[-self.levels :]
        if str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC"):
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return maps

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.neck(self.maps(images))


class BackboneAlone(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.encoder.maps(images)


def check_forward(model: Encoder, size: tuple[int, int]) -> None:
    with torch.no_grad():
        images = torch.randn(2, 3, *size)
        maps, outputs = model.maps(images), model(images)
    strides = zip(model.neck.in_strides, model.neck.strides)
    for x, y, (before, after) in zip(maps, outputs, strides):
        expected = x.shape[-2:]
        if before > after:
            expected = torch.Size(n * before // after for n in expected)
        elif before < after:
            expected = torch.Size(-(-n * before // after) for n in expected)
        assert y.shape == (2, model.neck.embed_dim, *expected), f"{tuple(x.shape)} became {tuple(y.shape)}"
        assert y.isfinite().all(), "not finite"


def check_backward(model: Encoder, size: tuple[int, int]) -> None:
    model.train()
    sum(x.square().mean() for x in model(torch.randn(2, 3, *size))).backward()
    for name, parameter in model.neck.named_parameters():
        assert parameter.grad is not None, f"no gradient: {name}"
        assert parameter.grad.isfinite().all(), f"gradient not finite: {name}"
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters()), "nothing in the backbone"
    model.zero_grad()
    model.eval()


def check_export(model: nn.Module, size: tuple[int, int]) -> None:
    """Exported with a batch of two, run with three."""
    with torch.no_grad():
        shapes = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(model, (torch.randn(2, 3, *size),), dynamic_shapes=shapes, strict=False)
        images = torch.randn(3, 3, *size)
        for x, y in zip(model(images), program.module()(images)):
            assert (x - y).abs().max() <= TOLERANCE * x.abs().max(), "other numbers"


def outcome(check: Callable[[], Any], backbone_alone: Callable[[], Any]) -> str:
    """ "ok", or the error, marked if the backbone by itself raises one too."""
    try:
        check()
    except Exception as error:  # noqa: BLE001 (the table reports whatever happens)
        try:
            backbone_alone()
        except Exception as own:  # noqa: BLE001
            return f"backbone: {brief(own)}"
        return f"**{brief(error)}**"
    return "ok"


def brief(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}".replace("|", "/")[:90]


def row(family: Family) -> list[str]:
    torch.manual_seed(0)
    start = time.perf_counter()
    model = Encoder(family).eval()
    alone, size = BackboneAlone(model), (family.size, family.size)
    odd_images = torch.randn(2, 3, *family.odd_size)
    cells = [
        outcome(lambda: check_forward(model, size), lambda: alone(torch.randn(2, 3, *size))),
        outcome(lambda: check_backward(model, size), lambda: alone.train()(torch.randn(2, 3, *size))),
        outcome(lambda: check_export(model, size), lambda: check_export(alone, size)),
        outcome(lambda: check_forward(model, family.odd_size), lambda: alone(odd_images)),
    ]
    if cells[-1] == "ok":
        cells[-1] = "{} × {}".format(*family.odd_size)
    neck = model.neck
    shape = f"{neck.in_strides} → {neck.strides}" if neck.in_strides != neck.strides else f"{neck.strides}"
    seconds = f"{time.perf_counter() - start:.0f}"
    return [family.name, f"`{family.model}`", str(family.embed_dim), str(model.levels), shape, *cells, seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="a family or model; may be repeated")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    header = ["family", "model", "embed_dim", "maps", "strides", "forward", "backward", "export", "odd size", "s"]
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for family in FAMILIES:
        if only is None or family.name in only or family.model in only:
            print("| " + " | ".join(row(family)) + " |", flush=True)
            gc.collect()


if __name__ == "__main__":
    main()

"""Outputs of the original D-FINE, DEIM, RT-DETRv4 and DEIM-RT-DETRv2 models, into a file for the tests.

    git clone https://github.com/Intellindust-AI-Lab/DEIM && git -C DEIM checkout 09d35d5
    git clone https://github.com/RT-DETRs/RT-DETRv4 && git -C RT-DETRv4 checkout df44122
    python docs/scripts/golden_originals.py DEIM RT-DETRv4

The original code is imported from those folders and run as it is, in float64. Of its packages only the files of the
models are imported; what they need of others stands in here. Images are square, as in the authors' trainings: of others
the original encoder mixes up the rows and columns of its position embedding, which transformers has mended.
``--check FOLDER`` writes every model as a ``.pth`` file too, reads it with mvision, and prints the differences; this
includes sizes that are not in the file for the tests.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mvision import load
from tests.original_files import CASES, CLASSES, GOLDEN, KEPT, make_images, make_tensor, packed

FROM = "Intellindust-AI-Lab/DEIM 09d35d5, RT-DETRs/RT-DETRv4 df44122"
HGNETS = {"B0": [256, 512, 1024], "B2": [384, 768, 1536], "B4": [512, 1024, 2048], "B5": [512, 1024, 2048]}
AFFINE = ("B0", "B2")
ANCHORS = ("dfine", "deim")
"""Cases whose anchors are in the file."""
MORE = {
    "dfine L": {**CASES["deim"], "backbone": "B4", "act": "relu", "neck": 64, "dim": 64},
    "deim X": {**CASES["rtdetrv4"], "backbone": "B5", "reg_scale": 8.0, "teacher": 0},
    "deim-rtdetrv2 R34": {**CASES["deim-rtdetrv2"], "backbone": 34},
    "deim-rtdetrv2 R50": {**CASES["deim-rtdetrv2"], "backbone": 50, "expansion": 1.0},
    "deim-rtdetrv2 R101": {**CASES["deim-rtdetrv2"], "backbone": 101, "neck": 48},
}
"""What ``--check`` looks at beside the cases of the tests."""


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deim", type=Path, help="checkout of DEIM")
    parser.add_argument("rtdetrv4", type=Path, help="checkout of RT-DETRv4")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="read the models as .pth files in this folder")
    options = parser.parse_args()
    engines = {"deim": options.deim / "engine", "rtv4": options.rtdetrv4 / "engine"}
    arrays: dict[str, np.ndarray] = {"made by": np.array(f"docs/scripts/golden_originals.py from {FROM}")}
    shapes: dict[str, dict[str, list[int]]] = {}
    for case, settings in {**CASES, **(MORE if options.check else {})}.items():
        model = build(settings, engines)
        outputs = model(make_images(case) if case in CASES else images_of(settings))
        if case in CASES:
            shapes[case] = {name: list(x.shape) for name, x in model.state_dict().items() if not is_given(name)}
            arrays |= {f"{case} {key}": value for key, value in described(model, outputs, case).items()}
        if options.check:
            options.check.mkdir(parents=True, exist_ok=True)
            print(f"{case}: {difference(model, outputs, case, settings, options.check / 'model.pth')}")
    arrays["shapes"] = packed(shapes)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


def build(settings: dict[str, Any], engines: dict[str, Path]) -> nn.Module:
    """The original model of a case with drawn weights."""
    package = "rtv4" if "teacher" in settings else "deim"
    model = Original(settings, package, engines[package]).double().eval()
    decoder = model.decoder
    decoder.anchors, decoder.valid_mask = decoder._generate_anchors(dtype=torch.float64)
    state = model.state_dict()
    for name, tensor in state.items():
        if not is_given(name):
            tensor.copy_(make_tensor(name, tuple(tensor.shape)))
    return model


class Original(nn.Module):
    """Backbone, encoder and decoder of the original code under the names of the original model."""

    def __init__(self, settings: dict[str, Any], package: str, engine: Path) -> None:
        super().__init__()
        parts = original_modules(package, engine)
        levels, backbone = settings["levels"], settings["backbone"]
        strides = [8, 16, 32][-levels:]
        size = list(settings["size"])
        is_resnet = isinstance(backbone, int)
        if is_resnet:
            self.backbone = parts["presnet"].PResNet(backbone, return_idx=[1, 2, 3], pretrained=False)
            channels = self.backbone.out_channels
        else:
            self.backbone = parts["hgnetv2"].HGNetv2(
                backbone, backbone in AFFINE, [1, 2, 3][-levels:], freeze_norm=False, pretrained=False
            )
            channels = HGNETS[backbone][-levels:]
        teacher = {"distill_teacher_dim": settings["teacher"]} if settings.get("teacher") else {}
        self.encoder = parts["hybrid_encoder"].HybridEncoder(
            channels, strides, settings["neck"], dim_feedforward=settings["ffn"], use_encoder_idx=[levels - 1],
            expansion=settings["expansion"], depth_mult=settings["depth"], eval_spatial_size=size,
            version="rt_detrv2" if is_resnet else "dfine", **teacher,
        )  # fmt: skip
        for index in (0, 1, 2):  # a table in float32, of which the rounding would be seen
            if hasattr(self.encoder, f"pos_embed{index}"):
                setattr(self.encoder, f"pos_embed{index}", exact_positions(size, strides[index], settings["neck"]))
        common = {
            "num_classes": CLASSES, "hidden_dim": settings["dim"], "feat_channels": [settings["neck"]] * levels,
            "feat_strides": strides, "num_levels": levels, "num_points": settings["points"],
            "num_layers": settings["layers"], "dim_feedforward": settings["ffn"] + 8, "activation": settings["act"],
            "mlp_act": settings["act"], "eval_spatial_size": size,
        }  # fmt: skip
        if is_resnet:
            self.decoder = parts["rtdetrv2_decoder"].RTDETRTransformerv2(**common, query_pos_method="as_reg")
        else:
            self.decoder = parts["dfine_decoder"].DFINETransformer(**common, reg_scale=settings["reg_scale"])

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``pred_logits`` and ``pred_boxes``."""
        return self.decoder(self.encoder(self.backbone(images)))


def exact_positions(size: list[int], stride: int, width: int) -> Tensor:
    """The position embedding of the original encoder, in float64."""
    height, length = size[0] // stride, size[1] // stride
    rates = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    x = torch.arange(length, dtype=torch.float64)[:, None].expand(length, height).flatten()[:, None] * rates
    y = torch.arange(height, dtype=torch.float64)[None].expand(length, height).flatten()[:, None] * rates
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1)[None]


def original_modules(package: str, engine: Path) -> dict[str, types.ModuleType]:
    """The modules of the models, from the files in ``engine`` alone."""
    root = f"original_{package}"
    for name, path in (
        (root, engine),
        (f"{root}.backbone", engine / "backbone"),
        (f"{root}.{package}", engine / package),
    ):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules.setdefault(name, module)
    core = types.ModuleType(f"{root}.core")
    core.register = lambda: lambda cls: cls  # type: ignore[attr-defined]
    sys.modules[core.__name__] = core
    places = {"presnet": "backbone", "hgnetv2": "backbone", "hybrid_encoder": package, "dfine_decoder": package}
    places["rtdetrv2_decoder"] = package
    return {name: importlib.import_module(f"{root}.{place}.{name}") for name, place in places.items()}


def is_given(name: str) -> bool:
    """Whether a tensor is not drawn."""
    return name.endswith(("anchors", "valid_mask", "num_points_scale", "reg_scale", ".up"))


def described(model: nn.Module, outputs: dict[str, Tensor], case: str) -> dict[str, np.ndarray]:
    """The tensors that are not drawn (anchors of two cases alone), and the outputs."""
    given = {f"tensor {name}": tensor.numpy() for name, tensor in model.state_dict().items() if is_given(name)}
    kept = {"logits": outputs["pred_logits"], "boxes": outputs["pred_boxes"]}
    return {
        **{name: array for name, array in given.items() if "decoder.anchors" not in name and "valid" not in name},
        **({"tensor decoder.anchors": given["tensor decoder.anchors"].astype(np.float32)} if case in ANCHORS else {}),
        **{name: values[:, KEPT].numpy() for name, values in kept.items()},
    }


def images_of(settings: dict[str, Any]) -> Tensor:
    """The images of a case with the same size."""
    return make_images(next(name for name, other in CASES.items() if other["size"] == settings["size"]))


def difference(
    model: nn.Module, outputs: dict[str, Tensor], case: str, settings: dict[str, Any], path: Path
) -> dict[str, float]:
    """Largest differences between the original and mvision's model of the file."""
    torch.save({"model": model.state_dict()}, path)
    ours = load(path, family=case.partition(" ")[0]).double()
    with torch.no_grad():
        found = ours(images_of(settings))["detection"]
    return {
        "logits": float((found["logits"] - outputs["pred_logits"]).abs().max()),
        "boxes": float((found["boxes"] - outputs["pred_boxes"]).abs().max()),
        "spread of logits": float(outputs["pred_logits"].std()),
    }


if __name__ == "__main__":
    main()

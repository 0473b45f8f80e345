"""Outputs of the original ECDet, ECSeg, ECPose and DETRPose models, into a file for the tests.

    git clone https://github.com/Intellindust-AI-Lab/EdgeCrafter && git -C EdgeCrafter checkout 706d037
    git clone https://github.com/SebastianJanampa/DETRPose && git -C DETRPose checkout a6ca202
    python docs/scripts/golden_edgecrafter.py EdgeCrafter DETRPose

The original code is imported from those folders and run as it is, in float64; tables that it keeps in float32 stay so.
Of its packages only the files of the models are imported; what they need of others stands in here. Images are square,
as in the authors' trainings: of others ECDet's encoder mixes up the rows and columns of its position embedding. ECSeg
runs its first mask block alone, as its published figures were measured, and, as its export prepares it, all of them.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mvision.weights.edgecrafter import MEAN, STD
from tests.edgecrafter_files import (
    CASES,
    DEPTH,
    DETRPOSE,
    GOLDEN,
    KEPT,
    LARGE,
    MASKS,
    SHALLOW,
    description,
    family_of,
    has_poses,
    make_images,
    make_tensor,
)
from tests.original_files import packed

FROM = "Intellindust-AI-Lab/EdgeCrafter 706d037, SebastianJanampa/DETRPose a6ca202"
CHANNELS = [256, 512, 1024]
"""Of the maps of DETRPose's smallest backbone."""


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edgecrafter", type=Path, help="checkout of EdgeCrafter")
    parser.add_argument("detrpose", type=Path, help="checkout of DETRPose")
    options = parser.parse_args()
    arrays: dict[str, np.ndarray] = {"made by": np.array(f"docs/scripts/golden_edgecrafter.py from {FROM}")}
    shapes: dict[str, dict[str, list[int]]] = {}
    for case, settings in CASES.items():
        for side in settings["sizes"]:
            images = make_images(case, side)
            torch.set_default_dtype(torch.float64)
            model = DETRPose(case, side, options.detrpose) if case in DETRPOSE else EC(case, side, options.edgecrafter)
            state = model.double().eval().state_dict()
            for name, tensor in state.items():
                if not is_given(name):
                    tensor.copy_(make_tensor(name, tuple(tensor.shape)))
            exact = np.float32 if case in LARGE else np.float64
            outputs = run(model, case, images)
            arrays |= {f"{case} {kind} {side}": array.astype(exact) for kind, array in outputs.items()}
            torch.set_default_dtype(torch.float32)
            if side == settings["sizes"][0]:
                shapes[case] = {name: list(x.shape) for name, x in state.items() if not is_given(name)}
                kept = {name: x.numpy() for name, x in state.items() if is_given(name)}
                kept = {name: x for name, x in kept.items() if not is_left_out(name, case)}
                arrays |= {f"{case} tensor {name}": x.astype(np.float32) for name, x in kept.items()}
    arrays["shapes"] = packed(shapes)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


class EC(nn.Module):
    """Backbone, encoder and decoder of EdgeCrafter, built from a description as on the Hub."""

    def __init__(self, case: str, side: int, checkout: Path) -> None:
        super().__init__()
        config, self.has_masks = description(case), family_of(case) == "ecseg"
        config["decoder"]["eval_spatial_size"] = [side, side]
        depth = SHALLOW if case in LARGE else DEPTH
        config["backbone"] |= {
            "skip_load_backbone": True, "depth": depth, "interaction_indexes": [depth - 2, depth - 1],
        }  # fmt: skip
        root = f"original_{'ecpose' if has_poses(case) else 'ecdetseg'}"
        place = checkout / root.removeprefix("original_") / "engine"
        make_package(root, place, ("edgecrafter",), types.ModuleType(f"{root}.misc"))
        self.backbone = load(f"{root}.edgecrafter.ecvit").ViTAdapter(**config["backbone"])
        self.encoder = load(f"{root}.edgecrafter.hybrid_encoder").HybridEncoder(**config["encoder"])
        if has_poses(case):
            self.decoder = load(f"{root}.edgecrafter.detrpose_transformer").DETRTransformer(**config["decoder"])
        else:
            self.decoder = load(f"{root}.edgecrafter.decoder").ECTransformer(**config["decoder"])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs for images in 0..1."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        maps = self.encoder(self.backbone((images - mean) / std))
        return self.decoder(maps, None, **({"spatial_feat": maps[0]} if self.has_masks else {}))


class DETRPose(nn.Module):
    """Backbone, encoder and transformer of DETRPose."""

    def __init__(self, case: str, side: int, checkout: Path) -> None:
        super().__init__()
        settings, root = CASES[case], "original_detrpose"
        levels = settings["levels"]
        strides, channels = [8, 16, 32][-levels:], CHANNELS[-levels:]
        make_package(root, checkout / "src", ("models", "models.detrpose", "nn", "nn.backbone"))
        self.backbone = load(f"{root}.nn.backbone.hgnetv2").HGNetv2(
            settings["backbone"], True, [1, 2, 3][-levels:], freeze_norm=False, pretrained=False
        )
        self.encoder = load(f"{root}.models.detrpose.hybrid_encoder").HybridEncoder(
            channels, strides, levels, settings["neck"], dim_feedforward=settings["ffn"], use_encoder_idx=[levels - 1],
            expansion=settings["expansion"], depth_mult=settings["depth"], eval_spatial_size=[side, side],
        )  # fmt: skip
        self.transformer = load(f"{root}.models.detrpose.transformer").Transformer(
            settings["neck"], 8, settings["queries"], settings["layers"], settings["dim_ffn"],
            return_intermediate_dec=True, num_feature_levels=levels, dec_n_points=settings["points"],
            learnable_tgt_init=True, two_stage_type="standard", num_body_points=settings["people"],
            two_stage_class_embed_share=False, two_stage_bbox_embed_share=False, feat_strides=strides,
            eval_spatial_size=[side, side], reg_scale=settings["reg_scale"],
        )  # fmt: skip

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs for images in 0..1."""
        return self.transformer(self.encoder(self.backbone(images)), None)


def make_package(root: str, place: Path, parts: tuple[str, ...], misc: types.ModuleType | None = None) -> None:
    """Packages without their own ``__init__``, and stand-ins for what the models' files import besides."""
    for name in ("", *parts):
        module = types.ModuleType(f"{root}.{name}".rstrip("."))
        module.__path__ = [str(place / name.replace(".", "/"))]
        sys.modules.setdefault(module.__name__, module)
    core, misc = types.ModuleType(f"{root}.core"), misc or types.ModuleType(f"{root}.misc")
    core.register = lambda *_: lambda cls: cls  # type: ignore[attr-defined]
    misc.__path__ = [str(place / "misc")]
    misc.dist_utils = None  # type: ignore[attr-defined]
    sys.modules |= {core.__name__: core, misc.__name__: misc}


def load(name: str) -> types.ModuleType:
    """A module of the original code."""
    return importlib.import_module(name)


def is_given(name: str) -> bool:
    """Whether a tensor is not drawn."""
    given = ("anchors", "valid_mask", "num_points_scale", "reg_scale", ".up", "dim_t", "periods")
    return name.endswith(given)


def is_left_out(name: str, case: str) -> bool:
    """Whether a tensor is not kept; what files have twice or for every layer is kept of the small models alone."""
    if case in LARGE and re.search(r"\.[1-9]\.cross_attn\.num_points_scale$|decoder\.decoder\.(up|reg_scale)$", name):
        return True
    return name.endswith(("valid_mask", "dim_t", "periods"))


@torch.no_grad()
def run(model: nn.Module, case: str, images: Tensor) -> dict[str, np.ndarray]:
    """What is kept of the outputs; of persons without the class that no label has."""
    out: dict[str, Any] = model(images)
    if has_poses(case):
        points = out["pred_keypoints"].unflatten(-1, (-1, 2))
        return {"logits": out["pred_logits"][:, KEPT, 1:].numpy(), "points": points[:, KEPT].numpy()}
    kept = {"logits": out["pred_logits"][:, KEPT].numpy(), "boxes": out["pred_boxes"][:, KEPT].numpy()}
    if family_of(case) == "ecseg":
        kept["masks, first"] = out["pred_masks"][MASKS].numpy()
        model.decoder.decoder.segmentation_head.export()
        kept["masks, all"] = model(images)["pred_masks"][MASKS].numpy()
    return kept


if __name__ == "__main__":
    main()

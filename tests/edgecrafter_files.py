"""Files as the authors of EdgeCrafter and DETRPose write them: weights that follow from the names in the authors' code.

``docs/scripts/golden_edgecrafter.py`` gives the same weights to the original code.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.drawn_weights import drawn
from tests.original_files import read_golden
from tests.reference import random_images

GOLDEN = Path(__file__).with_name("golden_edgecrafter.npz")
CLASSES = 3
KEPT = slice(0, 300, 20)
"""The queries whose outputs are kept; of masks some of these, and every eighth row and column."""
MASKS = (slice(None), slice(0, 300, 100), slice(None, None, 8), slice(None, None, 8))
BLOCKS = ("first", "all")
"""The forms of ECSeg's masks."""

# Name in the original code -> width, attention heads and relative width of the feed-forward networks.
VITS = {"ecvitt": (192, 3, 4), "ecvits": (384, 6, 4), "ecvitsplus": (384, 6, 6)}
DEPTH, SHALLOW = 12, 2
"""Numbers of blocks of the published backbones, and of those of L and X here, whose blocks are large."""

EC = ("ecdet", "ecseg", "ecpose")
# Case -> settings of the original code: backbones as wide as published, the rest narrow and shallow. ``sizes``: of the
# sides of the images; the first is that of the file.
CASES: dict[str, dict[str, Any]] = {
    "ecdet": {
        "sizes": (128, 160), "proj": None, "neck": 192, "ffn": 48, "expansion": 0.34, "depth": 0.67, "dim_ffn": 40,
        "layers": 2, "points": [3, 6, 3],
    },
    "ecseg": {
        "sizes": (128, 160), "proj": 32, "neck": 32, "ffn": 40, "expansion": 0.75, "depth": 1, "dim_ffn": 48,
        "layers": 3, "points": [3, 6, 3],
    },
    "ecpose": {
        "sizes": (128, 160), "proj": 32, "neck": 32, "ffn": 40, "expansion": 1.5, "depth": 0.67, "dim_ffn": 48,
        "layers": 2, "points": 4, "people": 17, "queries": 40,
    },
    "detrpose-n": {
        "sizes": (160, 256), "backbone": "B0", "levels": 2, "neck": 32, "ffn": 40, "expansion": 0.34, "depth": 0.5,
        "dim_ffn": 48, "layers": 2, "points": 6, "people": 17, "queries": 30, "reg_scale": 4.0,
    },
    "detrpose-s": {
        "sizes": (128, 160), "backbone": "B0", "levels": 3, "neck": 32, "ffn": 40, "expansion": 0.5, "depth": 0.34,
        "dim_ffn": 48, "layers": 3, "points": 4, "people": 14, "queries": 40, "reg_scale": 8.0,
    },
}  # fmt: skip
_SIZES = {
    "l": {"vit": "ecvits", "proj": 32, "neck": 32, "expansion": 0.75, "depth": 1, "layers": 4},
    "x": {"vit": "ecvitsplus", "proj": 32, "neck": 32, "expansion": 1.5, "depth": 1, "layers": 4},
}
LARGE = {f"{family}-{size}": {**CASES[family], **large} for size, large in _SIZES.items() for family in EC}
CASES |= LARGE
DETRPOSE = ("detrpose-n", "detrpose-s")
_NORM = re.compile(r"(bn|norm|norm\d|norm_in|(within|across|enc_output)_norm)\.weight$|lab\.scale$")


@cache  # the backbones of several cases are the same
def make_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """By the name in the original code, numbers of float32 in float64; scales are around 1, convolutions keep sizes.

    Of the two classes of persons the first, which no label has, never wins.
    """
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if _NORM.search(name):
        values = drawn(f"{name} as norm.weight", shape)
    else:
        values = drawn(name, shape) * (1.7 if len(shape) == 4 and name.startswith("backbone") else 1.0)
    if re.search(r"(class_embed(\.\d+)?)\.bias$", name):
        values[0] = -40.0
    return values.float().double()


def family_of(case: str) -> str:
    """``ecdet``, ``ecseg``, ``ecpose`` or ``detrpose``."""
    return case.partition("-")[0]


def has_poses(case: str) -> bool:
    """Whether the model of a case predicts poses, else it does boxes."""
    return family_of(case) in ("ecpose", "detrpose")


def make_images(case: str, side: int) -> Tensor:
    """Two images."""
    return random_images(2, side, side, dtype=torch.float64)


def golden(case: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """All tensors of the original model, and what it gave, ``KIND SIDE`` -> numbers of the queries of ``KEPT``."""
    tensors, outputs = _golden(case)
    return dict(tensors), outputs


@cache
def _golden(case: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    tensors, outputs = read_golden(GOLDEN, case, make_tensor)
    return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}, outputs


def write_original(path: Path, case: str, **parts: Any) -> Path:
    """A file with the averaged weights of a case, beside what a checkpoint of a training has."""
    tensors, _ = golden(case)
    content = {"date": "2026-03-01T12:00:00", "last_epoch": 3, "ema": {"module": tensors, "updates": 5}, **parts}
    torch.save(content, path)
    return path


def description(case: str) -> dict[str, Any]:
    """``config.json`` of a case, with the keys that the authors' folders have."""
    settings = CASES[case]
    width, side = settings["neck"], settings["sizes"][0]
    vit = settings.get("vit", "ecvitt")
    dim, heads, ratio = VITS[vit]
    config: dict[str, Any] = {
        "backbone": {
            "name": vit, "skip_load_backbone": False, "interaction_indexes": [10, 11], "embed_dim": dim,
            "num_heads": heads, "patch_size": 16, "proj_dim": settings["proj"], "num_levels": 3,
            "embed_layer": "ConvPyramidPatchEmbed", "ffn_layer": "mlp", "ffn_ratio": ratio,
        },
        "encoder": {
            "in_channels": [width] * 3, "feat_strides": [8, 16, 32], "hidden_dim": width, "nhead": 8,
            "dim_feedforward": settings["ffn"], "dropout": 0.0, "use_encoder_idx": [2], "num_encoder_layers": 1,
            "pe_temperature": 10000, "expansion": settings["expansion"], "depth_mult": settings["depth"],
            "act": "silu", "eval_spatial_size": None, "csp_type": "csp2", "fuse_op": "sum",
        },
        "postprocessor": {"num_classes": CLASSES},
    }  # fmt: skip
    if has_poses(case):
        config["decoder"] = {
            "hidden_dim": width, "dropout": 0.0, "nhead": 8, "num_queries": settings["queries"],
            "dim_feedforward": settings["dim_ffn"], "num_decoder_layers": settings["layers"], "normalize_before": False,
            "return_intermediate_dec": True, "activation": "relu", "num_feature_levels": 3,
            "dec_n_points": settings["points"], "learnable_tgt_init": True, "two_stage_type": "standard",
            "num_body_points": settings["people"], "aux_loss": True, "dec_pred_class_embed_share": False,
            "dec_pred_pose_embed_share": False, "two_stage_class_embed_share": False,
            "two_stage_bbox_embed_share": False, "cls_no_bias": False, "feat_strides": [8, 16, 32], "reg_max": 32,
            "reg_scale": 4, "eval_spatial_size": [side, side],
        }  # fmt: skip
        return config
    config["decoder"] = {
        "num_classes": CLASSES, "hidden_dim": width, "num_queries": 300, "feat_channels": [width] * 3,
        "feat_strides": [8, 16, 32], "num_levels": 3, "num_points": settings["points"], "nhead": 8,
        "num_layers": settings["layers"], "dim_feedforward": settings["dim_ffn"], "dropout": 0.0, "activation": "silu",
        "num_denoising": 100, "label_noise_ratio": 0.5, "box_noise_scale": 1.0, "learn_query_content": False,
        "eval_spatial_size": [side, side], "eval_idx": -1, "eps": 1e-2, "aux_loss": True,
        "cross_attn_method": "default", "query_select_method": "default", "reg_max": 32, "reg_scale": 4,
        "layer_scale": 1, "share_bbox_head": False, "share_score_head": False,
        "mask_downsample_ratio": 4 if family_of(case) == "ecseg" else None,
    }  # fmt: skip
    return config


def write_folder(folder: Path, case: str) -> Path:
    """A folder as on the Hub."""
    tensors, _ = golden(case)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description(case)), encoding="utf-8")
    return folder

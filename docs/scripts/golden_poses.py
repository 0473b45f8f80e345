"""Outputs of the original pose decoders of ECPose and DETRPose on ``tests/pose_inputs.py``, into a file for the tests.

    git clone https://github.com/Intellindust-AI-Lab/EdgeCrafter && git -C EdgeCrafter checkout 706d037
    git clone https://github.com/SebastianJanampa/DETRPose && git -C DETRPose checkout a6ca202
    python docs/scripts/golden_poses.py EdgeCrafter DETRPose

The original code is imported from those folders and run as it is, but in float64 and with denoising queries that are
given. Of its package, only the files of the decoder are imported; the rest stands in here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.decoder_inputs import make_weight
from tests.pose_inputs import CLASSES, FAMILIES, SIZES, make_denoising, make_maps

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden_poses.json"
COMMITS = {"ECPose": "Intellindust-AI-Lab/EdgeCrafter 706d037", "DETRPose": "SebastianJanampa/DETRPose a6ca202"}
PLACES = {
    "ECPose": ("ecpose/engine/edgecrafter", "detrpose_transformer", "DETRTransformer"),
    "DETRPose": ("src/models/detrpose", "transformer", "Transformer"),
}
# Names of the originals -> ours.
NAMES = [
    (r"^enc_output\.", "memory_proj.0."),
    (r"^enc_output_norm\.", "memory_proj.1."),
    (r"^enc_out_class_embed\.", "memory_class."),
    (r"^enc_pose_embed\.", "memory_points."),
    (r"^keypoint_embedding\.weight", "point_tokens"),
    (r"^instance_embedding\.weight", "instance_token"),
    (r"^tgt_embed\.weight", "query_embed"),
    (r"^pose_enc\.weight", "point_label_embed"),
    (r"^class_embed\.", "class_heads."),
    (r"^pose_embed\.", "point_heads."),
    (r"^pre_pose_embed\.", "pre_points."),
    (r"^lqe_embed\.(\d)\.reg_conf\.", r"quality_heads.\1."),
    (r"^decoder\.half_pose_ref_point_head\.", "position."),
    (r"^decoder\.layers\.", "layers."),
    (r"\.norm2\.", ".norm3."),
    (r"\.within_attn\.", ".within."),
    (r"\.within_norm\.", ".norm1."),
    (r"\.across_attn\.", ".across."),
    (r"\.across_norm\.", ".norm2."),
    (r"\.cross_attn\.", ".cross_attention."),
    (r"\.gateway\.gate\.", ".gate.linear."),
    (r"\.gateway\.norm\.", ".gate.norm."),
    (r"\.linear1\.", ".ffn.layers.0."),
    (r"\.linear2\.", ".ffn.layers.1."),
]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edgecrafter", type=Path, help="checkout of EdgeCrafter")
    parser.add_argument("detrpose", type=Path, help="checkout of DETRPose")
    options = parser.parse_args()
    folders = {"ECPose": options.edgecrafter, "DETRPose": options.detrpose}
    families = {family: {size: golden(family, folders[family], size) for size in SIZES[family]} for family in FAMILIES}
    made_by = {"script": "docs/scripts/golden_poses.py", "from": COMMITS, "torch": torch.__version__}
    FILE.write_text(json.dumps({"made by": made_by, "families": families}) + "\n")
    print(f"{len(families)} families in {FILE}, {FILE.stat().st_size} bytes")


def original(folder: Path, family: str) -> types.ModuleType:
    """The module of the original decoder, imported from its folder alone."""
    place, module, _ = PLACES[family]
    root = f"original_{family}"
    packages = {root: [], f"{root}.zoo": [], f"{root}.zoo.own": [str(folder / place)]}
    for package, path in packages.items():
        sys.modules.setdefault(package, types.ModuleType(package)).__path__ = path
    for parent in (root, f"{root}.zoo"):  # one of them imports from its parent, the other from the parent of that
        core, misc = types.ModuleType(f"{parent}.core"), types.ModuleType(f"{parent}.misc")
        core.register = lambda: lambda cls: cls  # type: ignore[attr-defined]
        operators = types.ModuleType(f"{parent}.misc.keypoint_ops")
        operators.keypoint_xyzxyz_to_xyxyzz = None  # type: ignore[attr-defined]  # imported and never used
        sys.modules |= {found.__name__: found for found in (core, misc, operators)}
    return importlib.import_module(f"{root}.zoo.own.{module}")


def golden(family: str, folder: Path, size: str) -> dict[str, Any]:
    """The outputs of all layers, with denoising queries."""
    settings, points = FAMILIES[family]
    module = original(folder, family)
    levels = len(SIZES[family][size])
    model = getattr(module, PLACES[family][2])(
        hidden_dim=settings["embed_dim"],
        nhead=settings["num_heads"],
        num_queries=settings["num_queries"],
        num_decoder_layers=settings["num_layers"],
        dim_feedforward=settings["ffn_dim"],
        return_intermediate_dec=True,
        num_feature_levels=levels,
        dec_n_points=settings["num_points"],
        learnable_tgt_init=settings["learned_queries"],
        two_stage_type="standard",
        num_classes=CLASSES,
        two_stage_class_embed_share=False,
        two_stage_bbox_embed_share=False,
        num_body_points=points,
        feat_strides=[8, 16, 32][-levels:],
        reg_max=settings["num_bins"],
        reg_scale=settings["bin_scale"],
    ).double()
    fill(model)
    model.train()  # for the outputs of all layers
    width = settings["embed_dim"]
    given = make_denoising(points, settings["num_queries"])
    labels = make_weight("label_embed.weight", torch.Size([CLASSES + 1, width]))[given.labels].unsqueeze(2)
    of_points = make_weight("point_label_embed", torch.Size([points, width])).expand(1, labels.shape[1], -1, -1)
    module.prepare_for_cdn = lambda **_: (  # type: ignore[attr-defined]
        torch.cat((labels, of_points), 2),
        module.inverse_sigmoid(given.points),
        ~given.mask,
        {"pad_size": labels.shape[1]},
    )
    maps = make_maps(width, SIZES[family][size])
    half = width // 2
    model.decoder.dim_t = 10000 ** (2 * (torch.arange(half, dtype=torch.float64) // 2) / half)
    # Its anchors are in float32 too, whose rounding the steep random maps would make a thousand times larger.
    with torch.no_grad(), patch.object(torch, "float32", torch.float64):
        outputs = model(maps, targets=[], samples=maps[0])
    found = {f"layer {index}": layer for index, layer in enumerate(outputs["aux_outputs"])}
    found[f"layer {len(found)}"] = outputs
    found |= {"pre": outputs["aux_pre_outputs"], "encoder": outputs["aux_interm_outputs"][0]}
    found |= {f"denoising {index}": layer for index, layer in enumerate(outputs["dn_aux_outputs"])}
    return {
        name: {"logits": rounded(layer["pred_logits"]), "points": rounded(layer["pred_keypoints"])}
        for name, layer in found.items()
    }


def fill(model: nn.Module) -> None:
    """Give the original the weights that ours gets under its own names."""
    for name, tensor in model.named_parameters():
        if name in ("up", "reg_scale", "label_enc.weight"):
            continue
        ours = name
        for pattern, replacement in NAMES:
            ours = re.sub(pattern, replacement, ours)
        if ".in_proj_" in ours:
            of_parts = (ours.replace("in_proj_", f"{part}_proj.") for part in "qkv")
            shape = torch.Size([len(tensor) // 3, *tensor.shape[1:]])
            values = torch.cat([make_weight(part, shape) for part in of_parts])
        else:
            values = make_weight(ours, tensor.shape)
        tensor.data.copy_(values)


def rounded(values: Tensor) -> Any:
    """As lists, of the first image."""
    return [[round(value, 10) for value in row] for row in values[0].flatten(1).tolist()]


if __name__ == "__main__":
    main()

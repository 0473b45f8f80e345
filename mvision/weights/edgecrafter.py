"""Reading published ECDet, ECSeg and ECPose: the authors' own files (``.pth``), and their folders on the Hub.

Such a folder has ``config.json``, with the three dictionaries from which the authors' code builds a model, and
``model.safetensors`` with the names of their code. All three have the backbone ECViT and the neck of EdgeCrafter;
ECDet's decoder is D-FINE's with a few differences, ECSeg adds masks, ECPose has DETRPose's decoder. No tensor tells the
activations or that images are normalised with ImageNet's mean and standard deviation: these are the family's.

Source: Liu et al., "EdgeCrafter: Compact ViTs for Edge Dense Prediction via Task-Specialized Distillation", 2026;
github.com/Intellindust-AI-Lab/EdgeCrafter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvision.errors import UserError
from mvision.structures.coco_names import COCO
from mvision.weights import detrpose, originals, poses
from mvision.weights.dfine import read_bins
from mvision.weights.published import TASK, Published, categories, check, get, label_names, parse, read_object
from mvision.weights.stored import read_header, read_tensors
from mvision.weights.structure import HEADS, STRIDES, Structure, points_of_levels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: what these models' images are normalised with."""
MASKS = "instance-seg"
_MARK = "backbone.backbone.register_token"
_SEGMENTATION = "decoder.decoder.segmentation_head."

# Width of the backbone and of its feed-forward networks -> network.
_NETWORKS = {(192, 768): "ecvit_t", (256, 1024): "ecvit_t_plus", (384, 1536): "ecvit_s", (384, 2304): "ecvit_s_plus"}
_DEPTH = 12
_ATTENTION_HEADS = {"ecvit_t": 3, "ecvit_t_plus": 4, "ecvit_s": 6, "ecvit_s_plus": 6}
"""Of the backbone, which no tensor tells."""

_LEFT_OUT = re.compile(
    r"^decoder\.(anchors|valid_mask|decoder\.(up|reg_scale|dim_t))$|\.num_points_scale$|\.pos_embed\d+$"
    r"|^backbone\.backbone\.rope_embed\.periods$"
)
_BACKBONE = [
    (r"^backbone\.backbone\.register_token$", "backbone.net.cls_token"),
    (r"^backbone\.backbone\.", "backbone.net."),
    (r"^backbone\.projector\.", "neck.projections."),
]
_MASK_HEAD = [
    (r"^blocks\.(\d+)\.dwconv\.", r"blocks.\1.depthwise."),
    (r"^blocks\.(\d+)\.pwconv1\.", r"blocks.\1.linear."),
    (r"^spatial_features_proj\.", "spatial."),
    (r"^query_features_block\.norm_in\.", "query_mlp.norm."),
    (r"^query_features_block\.layers\.0\.", "query_mlp.layers.0."),
    (r"^query_features_block\.layers\.2\.", "query_mlp.layers.1."),
    (r"^query_features_proj\.", "query."),
]

# How these models were trained, and what of their decoder no tensor tells.
_BOXES = {"act": "silu", "position_once": True, "shared_matches": True, "class_loss": "mal", "gamma": 1.5}
_MASKS = {
    "mask_form": "refine", "mask_blocks": "first", "mask_points": 1600,
    "class_weight": 2.0, "box_weight": 1.0, "giou_weight": 1.0,
}  # fmt: skip

# Settings of config.json that mvision's model does not have, because every published model has the same value.
_FIXED_BACKBONE = {
    "patch_size": 16, "interaction_indexes": [10, 11], "num_levels": 3, "embed_layer": "ConvPyramidPatchEmbed",
    "ffn_layer": "mlp",
}  # fmt: skip
_FIXED_ENCODER = {
    "feat_strides": [8, 16, 32], "use_encoder_idx": [2], "num_encoder_layers": 1, "pe_temperature": 10000,
    "act": "silu", "csp_type": "csp2", "fuse_op": "sum", "nhead": HEADS,
}  # fmt: skip
_FIXED_DECODER = {
    "activation": "silu", "learn_query_content": False, "eval_idx": -1, "eps": 1e-2, "cross_attn_method": "default",
    "query_select_method": "default", "layer_scale": 1, "share_bbox_head": False, "share_score_head": False,
    "feat_strides": [8, 16, 32], "num_levels": 3, "nhead": HEADS,
}  # fmt: skip
_FIXED_POSE = {
    "activation": "relu", "normalize_before": False, "two_stage_type": "standard", "dec_pred_class_embed_share": False,
    "dec_pred_pose_embed_share": False, "two_stage_class_embed_share": False, "two_stage_bbox_embed_share": False,
    "cls_no_bias": False, "feat_strides": [8, 16, 32], "num_feature_levels": 3, "nhead": HEADS,
}  # fmt: skip


def family_of(tensors: Mapping[str, Tensor]) -> str | None:
    """``ecdet``, ``ecseg`` or ``ecpose``, by the names of tensors in the file; None if it is none of these."""
    if _MARK not in tensors:
        return None
    if f"decoder.{poses.MARK}" in tensors:
        return "ecpose"
    return "ecseg" if any(name.startswith(_SEGMENTATION) for name in tensors) else "ecdet"


def is_description(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is EdgeCrafter's: it has no name of a kind of models, but these dictionaries."""
    return "model_type" not in config and {"backbone", "encoder", "decoder"} <= set(config)


def read_folder(folder: Path) -> Published:
    """The model of a folder with ``config.json`` and ``model.safetensors``.

    Raises:
        UserError: a file cannot be read, is not one of these models, has a part that mvision does not have, or the
            description contradicts the tensors.
    """
    path = folder / "config.json"
    described = read_object(path)
    read_header(folder / "model.safetensors")  # checks its size before it is read
    loaded = read_tensors(folder / "model.safetensors")
    if family_of(loaded) is None:
        raise UserError(f"{path}: describes a model of EdgeCrafter, but the tensors beside it are not one's")
    published = read_edgecrafter(loaded, [], folder)
    _check_description(described, published, path)
    head = next(iter(published.config.heads.values()))
    queries = get(described["decoder"], "num_queries", getattr(head, "num_queries", None), int, path)
    size = get(described["decoder"], "eval_spatial_size", list(published.config.image_size), list, path)
    sections = published.config.model_dump(mode="json")
    sections["heads"][next(iter(sections["heads"]))]["num_queries"] = queries
    sections["image_size"] = size
    return Published(parse(sections, path), published.tensors, published.notes)


def read_edgecrafter(loaded: Mapping[str, Tensor], notes: list[str], path: Path) -> Published:
    """The model of tensors by the names of the authors' code.

    Args:
        loaded: of which ``family_of`` knows the family.
        notes: what ``state_dict`` said.
        path: for messages.

    Raises:
        UserError: they are not whole, or have a part that mvision does not have.
    """
    family = family_of(loaded)
    of_decoder = "ReLU" if family == "ecpose" else "SiLU"
    notes = [*notes, f"read as {family}: {of_decoder} in the decoder, images normalised as for ImageNet"]
    points = points_of_levels(loaded, path)
    if points is None and family != "ecpose":
        raise UserError(
            f"weights {path}: a tensor is missing: decoder.decoder.layers.0.cross_attn.num_points_scale, which tells "
            "how many points each level has; convert the authors' file again with all of its tensors"
        )
    kept = {name: tensor for name, tensor in loaded.items() if not _LEFT_OUT.search(name)}
    last_only = not any(name.startswith("backbone.projector.1.") for name in kept)
    tensors = originals.renamed(kept, lambda name: mvision_name(name, last_only, family == "ecpose"), path)
    structure = Structure(tensors, path, len(STRIDES))
    sections: dict[str, Any] = {
        "backbone": {"name": _network(structure), "strides": list(STRIDES), "normalize": "auto"},
        "neck": structure.neck() | {"attention_act": "silu", "projections": "last" if last_only else True},
    }
    for key, values in (("mean", MEAN), ("std", STD)):
        tensors[f"backbone.{key}"] = torch.tensor(values).view(3, 1, 1)
    if family == "ecpose":
        return detrpose.finish(sections, tensors, structure, loaded.get("decoder.anchors"), notes, path)
    bins, _ = read_bins(tensors)
    names = label_names({}, tensors, path)
    if len(names) == len(COCO):
        names = [category.name for category in COCO]
        notes.append("its 80 classes, which have no names, taken for those of COCO")
    task, more = (MASKS, _MASKS) if family == "ecseg" else (TASK, {})
    sections |= {
        "heads": {task: structure.decoder(points) | bins | _BOXES | more},
        "categories": categories(names),
        "image_size": originals.image_size_of(loaded.get("decoder.anchors")),
    }
    tensors = {name.replace(f"heads.{TASK}.", f"heads.{task}.", 1): tensor for name, tensor in tensors.items()}
    return Published(parse(sections, path), tensors, notes)


def mvision_name(name: str, last_only: bool, is_pose: bool) -> str:
    """mvision's name of a tensor of the file, but for fused attention weights, which become three tensors.

    Args:
        last_only: whether the coarsest map alone is projected.
    """
    if last_only:
        name = name.replace("backbone.projector.0.", f"backbone.projector.{len(STRIDES) - 1}.", 1)
    if name.startswith("backbone."):
        for pattern, replacement in _BACKBONE:
            name = re.sub(pattern, replacement, name)
        return name
    if name.startswith(_SEGMENTATION):
        name = name.removeprefix(_SEGMENTATION)
        for pattern, replacement in _MASK_HEAD:
            name = re.sub(pattern, replacement, name)
        return f"heads.{TASK}.refine.{name}"
    if name.startswith("decoder.") and is_pose:
        return poses.pose_name(name)
    # The norm after the feed-forward network, the second one of these layers, is called the third elsewhere.
    name = re.sub(r"^(decoder\.decoder\.layers\.\d+)\.norm2\.", r"\1.norm3.", name)
    return originals.mvision_name(name)


def _network(structure: Structure) -> str:
    """The network of the backbone, by its widths."""
    found = structure.rows("backbone.net.blocks.0.norm1.weight"), structure.rows("backbone.net.blocks.0.mlp.fc1.weight")
    depth = structure.count("backbone.net.blocks.")
    if found not in _NETWORKS or depth != _DEPTH:
        raise UserError(
            f"weights {structure.source}: the backbone is an ECViT of {depth} blocks of widths {found[0]} and "
            f"{found[1]}; of {_DEPTH} blocks {', '.join(map(str, _NETWORKS))} can be read"
        )
    return _NETWORKS[found]


def _check_description(described: dict[str, Any], published: Published, path: Path) -> None:
    """Raise UserError where the description is of another model than the tensors, or has a value that is not known."""
    parts = {part: get(described, part, {}, dict, path) for part in ("backbone", "encoder", "decoder")}
    config, neck = published.config, published.config.neck
    (task, settings), is_pose = next(iter(config.heads.items())), poses.TASK in config.heads
    head = settings.model_dump()
    network = config.backbone.name
    width, ffn = next(sizes for sizes, name in _NETWORKS.items() if name == network)
    levels = 3 * [neck.embed_dim]
    expected = {
        "backbone": _FIXED_BACKBONE
        | {
            "embed_dim": width, "ffn_ratio": ffn // width, "num_heads": _ATTENTION_HEADS[network],
            "proj_dim": None if neck.projections == "last" else neck.embed_dim,
        },
        "encoder": _FIXED_ENCODER
        | {"hidden_dim": neck.embed_dim, "in_channels": levels, "dim_feedforward": neck.ffn_dim},
        "decoder": (_FIXED_POSE if is_pose else _FIXED_DECODER)
        | {"hidden_dim": head["embed_dim"], "dim_feedforward": head["ffn_dim"], "reg_max": head["num_bins"]},
    }  # fmt: skip
    if is_pose:
        points = len(config.categories[0].keypoints)
        expected["decoder"] |= {
            "num_decoder_layers": head["num_layers"], "dec_n_points": head["num_points"], "num_body_points": points,
            "learnable_tgt_init": head["learned_queries"],
        }  # fmt: skip
    else:
        expected["decoder"] |= {
            "num_layers": head["num_layers"], "num_points": head["num_points"], "num_classes": len(config.categories),
            "feat_channels": levels, "mask_downsample_ratio": 4 if task == MASKS else None,
        }  # fmt: skip
    for part, values in expected.items():
        check(parts[part], values, path, f"{part}.")

"""The pose decoder of DETRPose, which ECPose has too: its names, and its settings as the tensors tell them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvision.errors import UserError
from mvision.neck.layers import MLP
from mvision.structures.oks import PERSONS
from mvision.weights.structure import HEADS, Structure

TASK = "keypoints"
DECODER = f"heads.{TASK}.decoder."
BINS = {f"{DECODER}reg_scale": "bin_scale", f"{DECODER}up": "bin_reach"}
"""Tensors that are settings in mvision -> the setting."""
MARK = "keypoint_embedding.weight"
"""A tensor that no other decoder has."""

# Name in the file, with ``head.`` for the name of the decoder there -> name in mvision.
RULES = [
    (r"^head\.decoder\.half_pose_ref_point_head\.", "head.position."),
    (r"^head\.decoder\.layers\.", "head.layers."),
    (r"^(head\.layers\.\d+)\.norm2\.", r"\1.norm3."),
    (r"^(head\.layers\.\d+)\.within_norm\.", r"\1.norm1."),
    (r"^(head\.layers\.\d+)\.across_norm\.", r"\1.norm2."),
    (r"^(head\.layers\.\d+)\.(within|across)_attn\.", r"\1.\2."),
    (r"^(head\.layers\.\d+)\.cross_attn\.", r"\1.cross_attention."),
    (r"^(head\.layers\.\d+)\.gateway\.gate\.", r"\1.gate.linear."),
    (r"^(head\.layers\.\d+)\.gateway\.norm\.", r"\1.gate.norm."),
    (r"^(head\.layers\.\d+)\.linear1\.", r"\1.ffn.layers.0."),
    (r"^(head\.layers\.\d+)\.linear2\.", r"\1.ffn.layers.1."),
    (r"^head\.keypoint_embedding\.weight$", "head.point_tokens"),
    (r"^head\.instance_embedding\.weight$", "head.instance_token"),
    (r"^head\.tgt_embed\.weight$", "head.query_embed"),
    (r"^head\.pose_enc\.weight$", "head.point_label_embed"),
    (r"^head\.label_enc\.", "head.label_embed."),
    (r"^head\.enc_output\.", "head.memory_proj.0."),
    (r"^head\.enc_output_norm\.", "head.memory_proj.1."),
    (r"^head\.enc_out_class_embed\.", "head.memory_class."),
    (r"^head\.enc_pose_embed\.", "head.memory_points."),
    (r"^head\.class_embed\.", "head.class_heads."),
    (r"^head\.pose_embed\.", "head.point_heads."),
    (r"^head\.pre_pose_embed\.", "head.pre_points."),
    (r"^head\.lqe_embed\.(\d+)\.reg_conf\.", r"head.quality_heads.\1."),
    (r"^head\.", DECODER),
]
LEFT_OUT = re.compile(r"^(decoder|transformer)\.(anchors|valid_mask|decoder\.dim_t)$")

# What no tensor tells: how these models were trained.
_TRAINING = {"act": "relu", "visibility": False, "num_denoising": 20, "shared_matches": True}


def pose_name(name: str) -> str:
    """mvision's name of a tensor of the decoder, which is called ``decoder`` or ``transformer`` in the file."""
    name = re.sub(r"^(decoder|transformer)\.", "head.", name)
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def decoder_settings(tensors: Mapping[str, Tensor], structure: Structure, levels: int) -> dict[str, Any]:
    """The section ``keypoints`` of the heads, but for the bins' values."""
    layer = f"{DECODER}layers.0."
    samples = structure.rows(f"{layer}cross_attention.attention_weights.weight")  # of all heads together
    return {
        "kind": "query",
        "embed_dim": structure.rows(f"{layer}norm1.weight"),
        "num_queries": structure.rows(f"{DECODER}query_embed") if f"{DECODER}query_embed" in tensors else 60,
        "learned_queries": f"{DECODER}query_embed" in tensors,
        "num_layers": structure.count(f"{DECODER}layers."),
        "num_heads": HEADS,
        "ffn_dim": structure.rows(f"{layer}ffn.layers.0.weight"),
        "num_points": max(1, samples // (HEADS * levels)),
        "num_bins": structure.rows(f"{DECODER}point_heads.0.layers.2.weight") // 2 - 1,
        **_TRAINING,
    }


def people(tensors: dict[str, Tensor], structure: Structure, path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The classes, with the names of their points, after the rows of other classes were taken out of ``tensors``.

    These models score as many classes as the highest id of a class in their data is plus one: of COCO's persons (id 1)
    two, of which no label ever was the first.

    Returns:
        The categories, and notes.
    """
    heads = [name for name in tensors if re.match(rf"{re.escape(DECODER)}(memory_class|class_heads\.\d+)\.", name)]
    rows = {len(tensors[name]) if tensors[name].ndim else 0 for name in heads}
    if len(rows) != 1 or (count := rows.pop()) < 1:
        raise UserError(f"weights {path}: its classifiers have different numbers of classes: not a whole pose model")
    first = 1 if count > 1 else 0
    for name in heads:
        tensors[name] = tensors[name][first:]
    label = f"{DECODER}label_embed.weight"
    if label in tensors and tensors[label].ndim == 2 and len(tensors[label]) >= count:
        padding = torch.zeros_like(tensors[label][:1])
        tensors[label] = torch.cat((tensors[label][first:count], padding))
    number = structure.rows(f"{DECODER}point_tokens")
    notes = [] if first == 0 else ["left out: the first class, which no label of its data has"]
    known = PERSONS.get(number)
    if known is None:
        skeleton: dict[str, Any] = {"keypoints": [f"point_{index}" for index in range(number)]}
        notes.append(f"its {number} points, which have no names, are called point_0 to point_{number - 1}")
    else:
        skeleton = {"keypoints": list(known[0]), "sigmas": list(known[0].values())}
        notes.append(f"its {number} points, which have no names, taken for those of {known[1]}")
    classes = ["person"] if count - first == 1 else [f"LABEL_{index}" for index in range(first, count)]
    ids = [1] if len(classes) == 1 else range(first, count)
    return [{"id": i, "name": name, **skeleton} for i, name in zip(ids, classes)], notes


def add_box_head(tensors: dict[str, Tensor], dim: int) -> str:
    """Add the layers that predict boxes, which these models do not have; a note that says so.

    They start as in a new model: the box is the extent of the points until they are trained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same weights every time that a file is read
        head = MLP(dim, dim, 4, 3, act="relu")
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    tensors |= {f"{DECODER}box_head.{name}": tensor for name, tensor in head.state_dict().items()}
    return "boxes are the extent of the points, as nothing in it predicts them, until they are trained"


def size_of_centres(anchors: Tensor | None) -> tuple[int, int] | None:
    """(rows, columns) of the finest map, by the first of the cells' centres; None without them.

    Args:
        anchors: (1, S, 2) logits of the centres x, y in 0..1, finest map first.
    """
    if anchors is None or anchors.ndim != 3 or anchors.shape[-1] != 2 or not anchors.shape[1]:
        return None
    x, y = anchors[0, 0].to(torch.float64).sigmoid().tolist()
    return (round(0.5 / y), round(0.5 / x)) if min(x, y) > 1e-5 else None

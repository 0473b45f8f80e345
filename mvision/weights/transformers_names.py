"""Names of tensors and settings that the models of ``transformers`` have in common, and mvision's names for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mvision.weights.published import DECODER

Rule = tuple[str, str]
"""A regular expression, and what takes the place of its match."""

# (?:a|b) and (?:a)? are the names in older and newer versions of transformers.
_SHARED: list[Rule] = [
    (r"^model\.encoder\.(?:encoder|aifi)\.", "neck.aifi."),
    (r"^model\.encoder\.fpn_blocks\.", "neck.top_down."),
    (r"^model\.encoder\.pan_blocks\.", "neck.bottom_up."),
    (r"^model\.encoder\.", "neck."),
    (r"^model\.encoder_input_proj\.(\d+)\.0\.", r"neck.projections.\1.conv."),
    (r"^model\.encoder_input_proj\.(\d+)\.1\.", r"neck.projections.\1.norm."),
    (r"^(neck\.aifi\.\d+\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.attention_norm."),
    (r"^(neck\.aifi\.\d+\.layers\.\d+)\.final_layer_norm\.", r"\1.ffn_norm."),
    (r"^(neck\.aifi\.\d+\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"\.bottlenecks\.(\d+)\.conv1\.", r".blocks.\1.conv3x3."),
    (r"\.bottlenecks\.(\d+)\.conv2\.", r".blocks.\1.conv1x1."),
    (r"^model\.decoder_input_proj\.(\d+)\.0\.", r"head.input_proj.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d+)\.1\.", r"head.input_proj.\1.norm."),
    (r"^model\.enc_output\.", "head.memory_proj."),
    (r"^model\.enc_score_head\.", "head.memory_class."),
    (r"^model\.enc_bbox_head\.", "head.memory_box."),
    (r"^model\.denoising_class_embed\.", "head.label_embed."),
    (r"^(?:model\.decoder\.)?class_embed\.", "head.class_heads."),
    (r"^(?:model\.decoder\.)?bbox_embed\.", "head.box_heads."),
    (r"^model\.decoder\.query_pos_head\.", "head.position."),
    (r"^model\.decoder\.layers\.", "head.layers."),
    (r"^(head\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(head\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"^(head\.layers\.\d+)\.self_attn\.", r"\1.self_attention."),
    (r"^(head\.layers\.\d+)\.encoder_attn\.", r"\1.cross_attention."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.(?:mlp\.layers\.0|(?:mlp\.)?fc1)\.", ".ffn.layers.0."),
    (r"\.(?:mlp\.layers\.1|(?:mlp\.)?fc2)\.", ".ffn.layers.1."),
]


def renamed(name: str, before: Iterable[Rule], after: Iterable[Rule]) -> str:
    """mvision's name of a tensor.

    Args:
        before: the family's own rules that are applied first.
        after: those that are applied to what the shared rules give, in which the decoder is called ``head``.
    """
    for pattern, replacement in (*before, *_SHARED, *after, (r"^head\.", DECODER)):
        name = re.sub(pattern, replacement, name)
    return name


# mvision's key -> (key in config.json, value if it is absent there)
_OF_HEAD: dict[str, tuple[str, Any]] = {
    "num_queries": ("num_queries", 300),
    "dropout": ("dropout", 0.0),
    "sampling": ("decoder_method", "default"),
    "offset_scale": ("decoder_offset_scale", 0.5),
    "num_denoising": ("num_denoising", 100),
    "label_noise": ("label_noise_ratio", 0.5),
    "box_noise": ("box_noise_scale", 1.0),
    "alpha": ("focal_loss_alpha", 0.75),
    "gamma": ("focal_loss_gamma", 2.0),
    "class_weight": ("weight_loss_vfl", 1.0),
    "box_weight": ("weight_loss_bbox", 5.0),
    "giou_weight": ("weight_loss_giou", 2.0),
}


def head_settings(published: Mapping[str, Any], own: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Settings of the head and of its training, from a description.

    Args:
        own: those that the family has besides the shared ones: mvision's key -> (key there, value if it is absent).
    """
    return {name: published.get(key, default) for name, (key, default) in {**_OF_HEAD, **own}.items()}

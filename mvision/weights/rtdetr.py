"""Published RT-DETR weights: a folder in Hugging Face's format becomes a config and a state dict of ours.

Read are ``RTDetrForObjectDetection`` and ``RTDetrV2ForObjectDetection`` on ResNet-18/34/50/101 "vd", as written by any
version of ``transformers`` (version 5 renamed tensors). Their backbones are timm's ``resnet18d`` and so on; the two
small ones have one more convolution, see ``BackboneConfig.stage1_shortcut``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mvision.config import ModelConfig, parse_model_config
from mvision.errors import UserError
from mvision.structures.coco_names import coco_categories

_RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18d",
    ("basic", (3, 4, 6, 3)): "resnet34d",
    ("bottleneck", (3, 4, 6, 3)): "resnet50d",
    ("bottleneck", (3, 4, 23, 3)): "resnet101d",
}

# What is the same in every published model, and taken for granted here. An absent key has this value.
_FIXED = {
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "encoder_activation_function": "gelu",
    "normalize_before": False,
    "with_box_refine": True,
    "use_focal_loss": True,
    "positional_encoding_temperature": 10000,
    "batch_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "feat_strides": [8, 16, 32],
    "num_feature_levels": 3,
    "decoder_n_levels": 3,
    "eval_size": None,
    "learn_initial_query": False,
}
_FIXED_BACKBONE = {
    "model_type": "rt_detr_resnet",
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "out_indices": [2, 3, 4],
}

# Buffers that are computed here.
_COMPUTED = re.compile(r"(anchors|valid_mask|n_points_scale)$")

# Every rule is applied, in this order. Alternatives in groups are the older and the newer name of the same thing.
_RENAMED = [
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.convolution", "backbone.net.conv1.0"),
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.normalization", "backbone.net.conv1.1"),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.convolution", "backbone.net.conv1.3"),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.normalization", "backbone.net.conv1.4"),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.convolution", "backbone.net.conv1.6"),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.normalization", "backbone.net.bn1"),
    (r"^model\.encoder\.(?:encoder|aifi)\.", "neck.aifi."),
    (r"^model\.encoder\.fpn_blocks\.", "neck.top_down."),
    (r"^model\.encoder\.pan_blocks\.", "neck.bottom_up."),
    (r"^model\.encoder\.", "neck."),
    (r"^model\.encoder_input_proj\.(\d)\.0\.", r"neck.projections.\1.conv."),
    (r"^model\.encoder_input_proj\.(\d)\.1\.", r"neck.projections.\1.norm."),
    (r"(neck\.aifi\.\d\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.attention_norm."),
    (r"(neck\.aifi\.\d\.layers\.\d+)\.final_layer_norm\.", r"\1.ffn_norm."),
    (r"(neck\.aifi\.\d\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(neck\.\w+\.\d)\.bottlenecks\.(\d+)\.conv1\.", r"\1.blocks.\2.conv3x3."),
    (r"^(neck\.\w+\.\d)\.bottlenecks\.(\d+)\.conv2\.", r"\1.blocks.\2.conv1x1."),
    (r"^model\.decoder_input_proj\.(\d)\.0\.", r"head.input_proj.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d)\.1\.", r"head.input_proj.\1.norm."),
    (r"^model\.enc_output\.", "head.memory_proj."),
    (r"^model\.enc_score_head\.", "head.memory_class."),
    (r"^model\.enc_bbox_head\.", "head.memory_box."),
    (r"^model\.denoising_class_embed\.", "head.label_embed."),
    (r"^(?:model\.decoder\.)?class_embed\.", "head.class_heads."),
    (r"^(?:model\.decoder\.)?bbox_embed\.", "head.box_heads."),
    (r"^model\.decoder\.query_pos_head\.", "head.position."),
    (r"^model\.decoder\.layers\.", "head.layers."),
    (r"(head\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(head\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2."),
    (r"(head\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"(head\.layers\.\d+)\.self_attn\.", r"\1.self_attention."),
    (r"(head\.layers\.\d+)\.encoder_attn\.", r"\1.cross_attention."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.(?:mlp\.)?fc1\.", ".ffn.layers.0."),
    (r"\.(?:mlp\.)?fc2\.", ".ffn.layers.1."),
    (r"^head\.", "heads.detection.decoder."),
]
_STAGE = re.compile(
    r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)\.(convolution|normalization)\."
)


def read_published(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and state dict of a folder with ``config.json`` and ``model.safetensors``.

    ``num_batches_tracked`` of norms may be absent: the reference freezes its backbone's.

    Raises:
        UserError: not an RT-DETR model, or one with a part that is not implemented.
    """
    described = _json(folder / "config.json")
    tensors = {}
    try:
        for name, tensor in load_file(folder / "model.safetensors").items():
            if not _COMPUTED.search(name):
                tensors[our_name(name)] = tensor
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'}: cannot be read ({error})") from error
    processor = folder / "preprocessor_config.json"
    images = _json(processor) if processor.is_file() else {}
    config = _model_config(described, images, tensors, folder / "config.json")
    if images.get("do_normalize", False):
        config.backbone.normalize = "auto"
        for name, key in (("mean", "image_mean"), ("std", "image_std")):
            tensors[f"backbone.{name}"] = torch.tensor(images[key]).view(3, 1, 1)
    return config, tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def our_name(name: str) -> str:
    """Our name of a tensor."""
    match = _STAGE.match(name)
    if match:
        stage, layer, place, kind = match.groups()
        if place.startswith("shortcut"):
            module = "downsample.1" if kind == "convolution" else "downsample.2"
        else:
            number = int(place.removeprefix("layer.")) + 1
            module = f"conv{number}" if kind == "convolution" else f"bn{number}"
        return f"backbone.net.layer{int(stage) + 1}.{layer}.{module}.{name[match.end() :]}"
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _model_config(
    described: dict[str, Any], images: dict[str, Any], tensors: dict[str, Tensor], path: Path
) -> ModelConfig:
    if described.get("model_type") not in ("rt_detr", "rt_detr_v2"):
        raise UserError(f"{path}: model_type is {described.get('model_type')!r}; rt_detr and rt_detr_v2 can be read")
    _check(described, _FIXED, path)
    backbone = _backbone(described.get("backbone_config") or {}, path)
    size = images.get("size") or {}
    sections = {
        "backbone": backbone,
        "neck": _neck(described),
        "heads": {"detection": _head(described)},
        "categories": _categories(described.get("id2label") or {}, tensors, path),
        "image_size": [size.get("height", 640), size.get("width", 640)],
    }
    try:
        return parse_model_config(sections)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _backbone(described: dict[str, Any], path: Path) -> dict[str, Any]:
    if not described:
        raise UserError(f"{path}: has no backbone_config; only RT-DETR's own ResNets can be read")
    _check(described, _FIXED_BACKBONE, path, "backbone_config.")
    kind = described.get("layer_type", "bottleneck")
    depths = tuple(described.get("depths", (3, 4, 6, 3)))
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    _check(described, {"hidden_sizes": widths}, path, "backbone_config.")
    if (kind, depths) not in _RESNETS:
        raise UserError(f"{path}: backbone_config: a {kind} ResNet of depths {depths} is not one of {_RESNETS}")
    return {"name": _RESNETS[kind, depths], "normalize": "none", "stage1_shortcut": kind == "basic"}


def _neck(described: dict[str, Any]) -> dict[str, Any]:
    levels = list(described.get("encode_proj_layers", [2]))
    return {
        "embed_dim": described.get("encoder_hidden_dim", 256),
        "attention_levels": "coarsest" if levels == [2] else levels,
        "share_attention": len(levels) == 1,
        "num_heads": described.get("encoder_attention_heads", 8),
        "num_layers": described.get("encoder_layers", 1),
        "ffn_dim": described.get("encoder_ffn_dim", 1024),
        "dropout": described.get("dropout", 0.0),
        "expansion": described.get("hidden_expansion", 1.0),
    }


def _head(described: dict[str, Any]) -> dict[str, Any]:
    ours = {
        "embed_dim": ("d_model", 256),
        "num_queries": ("num_queries", 300),
        "num_layers": ("decoder_layers", 6),
        "num_heads": ("decoder_attention_heads", 8),
        "ffn_dim": ("decoder_ffn_dim", 1024),
        "num_points": ("decoder_n_points", 4),
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
    return {name: described.get(theirs, default) for name, (theirs, default) in ours.items()}


def _categories(labels: dict[str, str], tensors: dict[str, Tensor], path: Path) -> list[dict[str, Any]]:
    """COCO's own ids and names if they are COCO's classes (in any spelling), else the names numbered from 0."""
    bias = tensors.get("heads.detection.decoder.class_heads.0.bias")
    if bias is None:
        raise UserError(f"{path.parent}: the weights have no classifier: not a model for object detection")
    names = [labels.get(str(index), f"LABEL_{index}") for index in range(len(bias))]
    known = coco_categories(names)
    if known is not None:
        return [category.model_dump() for category in known]
    return [{"id": index, "name": name} for index, name in enumerate(names)]


def _check(described: dict[str, Any], expected: dict[str, Any], path: Path, prefix: str = "") -> None:
    for key, value in expected.items():
        found = described.get(key, value)
        if found != value and not (isinstance(value, list) and list(found) == value):
            raise UserError(f"{path}: {prefix}{key} is {found!r}, and only {value!r} can be read")

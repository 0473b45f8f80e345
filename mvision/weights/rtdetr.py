"""Reading published RT-DETR weights: a folder in Hugging Face's format gives a config and a state dict of mvision.

It reads ``RTDetrForObjectDetection`` and ``RTDetrV2ForObjectDetection`` on ResNet-18/34/50/101 "vd", as written by any
version of ``transformers`` (version 5 renamed tensors). Their backbones are timm's ``resnet18d``, ``resnet34d`` etc.;
the two small ones have one more convolution, see ``BackboneConfig.stage1_shortcut``.
"""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

from torch import Tensor

from mvision.config import ModelConfig
from mvision.errors import UserError
from mvision.weights.published import (
    TASK,
    Published,
    categories,
    check,
    get,
    image_size,
    label_names,
    normalise,
    parse,
    read_object,
    read_processor,
)
from mvision.weights.stored import read_header, read_tensors
from mvision.weights.structure import RESNETS
from mvision.weights.transformers_names import head_settings, renamed

__all__ = ["TASK", "mvision_name", "read_published"]

# Settings that mvision's model does not have, because every published model has the same value. A key that is absent
# from config.json has this value too.
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

# Buffers that mvision computes instead of loading them.
_COMPUTED = re.compile(r"(anchors|valid_mask|n_points_scale)$")

# Name in the file -> name in mvision, before and after the rules that all models of transformers share.
_BEFORE = [
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.convolution", "backbone.net.conv1.0"),
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.normalization", "backbone.net.conv1.1"),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.convolution", "backbone.net.conv1.3"),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.normalization", "backbone.net.conv1.4"),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.convolution", "backbone.net.conv1.6"),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.normalization", "backbone.net.bn1"),
]
_AFTER = [(r"^(head\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2.")]
_STAGE = re.compile(
    r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)\.(convolution|normalization)\."
)


def read_published(folder: Path) -> Published:
    """The model of a folder with ``config.json`` and ``model.safetensors``.

    Raises:
        UserError: a file cannot be read, or it is not an RT-DETR model, or one with a part that mvision does not have.
    """
    path = folder / "config.json"
    published, processor = read_object(path), read_processor(folder)
    read_header(folder / "model.safetensors")  # checks its size before it is read
    loaded = read_tensors(folder / "model.safetensors")
    tensors = {mvision_name(name): tensor for name, tensor in loaded.items() if not _COMPUTED.search(name)}
    config = _model_config(published, processor, tensors, path)
    normalise(config, tensors, processor, folder)
    return Published(config, tensors)


def mvision_name(name: str) -> str:
    """mvision's name of a tensor of the file."""
    match = _STAGE.match(name)
    if match:
        stage, layer, place, kind = match.groups()
        if place.startswith("shortcut"):
            module = "downsample.1" if kind == "convolution" else "downsample.2"
        else:
            number = int(place.removeprefix("layer.")) + 1
            module = f"conv{number}" if kind == "convolution" else f"bn{number}"
        return f"backbone.net.layer{int(stage) + 1}.{layer}.{module}.{name[match.end() :]}"
    return renamed(name, _BEFORE, _AFTER)


def _model_config(
    published: dict[str, Any], processor: dict[str, Any], tensors: dict[str, Tensor], path: Path
) -> ModelConfig:
    check(published, _FIXED, path)
    sections = {
        "backbone": _backbone(get(published, "backbone_config", {}, dict, path), path),
        "neck": _neck(published, path),
        "heads": {TASK: _head(published)},
        "categories": categories(label_names(get(published, "id2label", {}, dict, path), tensors, path)),
        "image_size": image_size(processor, path.parent),
    }
    return parse(sections, path)


def _backbone(published: dict[str, Any], path: Path) -> dict[str, Any]:
    if not published:
        raise UserError(f"{path}: has no backbone_config; only RT-DETR's own ResNets can be read")
    check(published, _FIXED_BACKBONE, path, "backbone_config.")
    kind = get(published, "layer_type", "bottleneck", str, path)
    depths = get(published, "depths", [3, 4, 6, 3], list, path)
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    check(published, {"hidden_sizes": widths}, path, "backbone_config.")
    name = next((name for known, name in RESNETS.items() if known == (kind, tuple(depths))), None)
    if name is None:
        shown = f"{kind[:40]} ResNet of depths {reprlib.repr(tuple(depths))}"
        raise UserError(f"{path}: backbone_config: a {shown} is not one of {RESNETS}")
    return {"name": name, "normalize": "none", "stage1_shortcut": kind == "basic"}


def _neck(published: dict[str, Any], path: Path) -> dict[str, Any]:
    levels = get(published, "encode_proj_layers", [2], list, path)
    return {
        "embed_dim": published.get("encoder_hidden_dim", 256),
        "attention_levels": "coarsest" if levels == [2] else levels,
        "share_attention": len(levels) == 1,
        "num_heads": published.get("encoder_attention_heads", 8),
        "num_layers": published.get("encoder_layers", 1),
        "ffn_dim": published.get("encoder_ffn_dim", 1024),
        "dropout": published.get("dropout", 0.0),
        "expansion": published.get("hidden_expansion", 1.0),
    }


def _head(published: dict[str, Any]) -> dict[str, Any]:
    sizes = {
        "embed_dim": ("d_model", 256),
        "num_layers": ("decoder_layers", 6),
        "num_heads": ("decoder_attention_heads", 8),
        "ffn_dim": ("decoder_ffn_dim", 1024),
        "num_points": ("decoder_n_points", 4),
    }
    return head_settings(published, sizes)

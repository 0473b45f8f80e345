"""Reading published D-FINE weights: a folder in Hugging Face's format gives a config and a state dict of mvision.

It reads ``DFineForObjectDetection`` on HGNetV2, as written by any version of ``transformers`` (version 5 renamed
tensors). Its backbones are timm's ``hgnetv2_b0`` to ``hgnetv2_b6``. Sizes follow from the tensors, see ``Structure``;
the description is read for what no tensor tells, and has to agree with them.

Source: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from mvision.errors import UserError
from mvision.weights.published import (
    DECODER,
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
from mvision.weights.structure import HEADS, STRIDES, Structure, points_of_levels, scalar
from mvision.weights.transformers_names import head_settings, renamed

MODEL_TYPE = "d_fine"

# Settings that mvision's model does not have, because every published model has the same value. A key that is absent
# from config.json has this value too.
_FIXED = {
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "normalize_before": False,
    "with_box_refine": True,
    "use_focal_loss": True,
    "positional_encoding_temperature": 10000,
    "batch_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "eval_size": None,
    "learn_initial_query": False,
    "layer_scale": 1,
    "top_prob_values": 4,
}
_FIXED_BACKBONE = {
    "model_type": "hgnet_v2",
    "num_channels": 3,
    "hidden_act": "relu",
    "stage_downsample": [False, True, True, True],
    "stage_downsample_strides": [2, 2, 2, 2],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_light_block": [False, False, True, True],
    "stem_strides": [2, 1, 1, 2, 1],
}

BINS = {f"{DECODER}reg_scale": "bin_scale", f"{DECODER}up": "bin_reach"}
"""Tensors that are settings in mvision: the name that the readers give them -> the setting."""

# Buffers that mvision computes instead of loading them.
_COMPUTED = re.compile(r"(anchors|valid_mask|num_points_scale)$")

# Name in the file -> name in mvision, before and after the rules that all models of transformers share.
_BEFORE = [
    (r"^model\.backbone\.model\.embedder\.", "backbone.net.stem."),
    (r"^model\.backbone\.model\.encoder\.stages\.(\d+)\.", r"backbone.net.stages_\1."),
    (r"^(backbone\..*)\.convolution\.", r"\1.conv."),
    (r"^(backbone\..*)\.normalization\.", r"\1.bn."),
    (r"^model\.encoder\.downsample_convs\.(\d+)\.conv1\.", r"neck.downsample_convs.\1.pointwise."),
    (r"^model\.encoder\.downsample_convs\.(\d+)\.conv2\.", r"neck.downsample_convs.\1.depthwise."),
    (r"^model\.decoder\.(up$|reg_scale$)", r"head.\1"),
]
_AFTER = [
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.conv2\.", r"\1.branch1.conv."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.conv3\.", r"\1.branch2.conv."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.conv4\.", r"\1.conv2."),
    (r"^(neck\.(?:top_down|bottom_up)\.\d+)\.csp_rep([12])\.", r"\1.branch\2.csp."),
    (r"^model\.decoder\.pre_bbox_head\.", "head.pre_box."),
    (r"^model\.decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"head.quality_heads.\1."),
    (r"^(head\.layers\.\d+)\.gateway\.gate\.", r"\1.gate.linear."),
    (r"^(head\.layers\.\d+)\.gateway\.norm\.", r"\1.gate.norm."),
]


def read_dfine(folder: Path) -> Published:
    """The model of a folder with ``config.json`` and ``model.safetensors``.

    Raises:
        UserError: a file cannot be read, is not a D-FINE model, has a part that mvision does not have, or the
            description contradicts the tensors.
    """
    path = folder / "config.json"
    published, processor = read_object(path), read_processor(folder)
    check(published, _FIXED, path)
    check(get(published, "backbone_config", {}, dict, path), _FIXED_BACKBONE, path, "backbone_config.")
    read_header(folder / "model.safetensors")  # checks its size before it is read
    loaded = read_tensors(folder / "model.safetensors")
    points = points_of_levels(loaded, folder) or _points(published, path)
    tensors = {mvision_name(name): tensor for name, tensor in loaded.items() if not _COMPUTED.search(name)}
    bins, notes = read_bins(tensors, {"bin_scale": published.get("reg_scale"), "bin_reach": published.get("up")})
    structure = Structure(tensors, folder)
    names = label_names(get(published, "id2label", {}, dict, path), tensors, path)
    sections: dict[str, Any] = {
        "backbone": structure.backbone(),
        "neck": structure.neck(published.get("hidden_expansion"), published.get("encoder_attention_heads", HEADS)),
        "heads": {TASK: structure.decoder(points) | bins},
        "categories": categories(names),
        "image_size": image_size(processor, folder),
    }
    _check_description(published, sections, path)
    sections["neck"] |= _of_neck(published)
    sections["heads"][TASK] |= _of_head(published)
    config = parse(sections, path)
    normalise(config, tensors, processor, folder)
    return Published(config, tensors, notes)


def mvision_name(name: str) -> str:
    """mvision's name of a tensor of the file."""
    return renamed(name, _BEFORE, _AFTER)


def read_bins(
    tensors: dict[str, Tensor], described: dict[str, Any] | None = None
) -> tuple[dict[str, float], list[str]]:
    """Take the settings of the box distributions out of the tensors, whatever a description says.

    Returns:
        The settings, and a note for each that has another value in ``described``.
    """
    bins, notes = {}, []
    for name, key in BINS.items():
        value = scalar(tensors.pop(name, None))
        if value is None:
            continue
        bins[key] = value
        given = (described or {}).get(key)
        if given is not None and given != value:
            notes.append(f"{key} is {value:g} as the tensors say, not {given} as config.json does")
    return bins, notes


def _points(published: dict[str, Any], path: Path) -> list[int] | None:
    """Points of every level as described, for files without the buffer that tells them."""
    points = published.get("decoder_n_points", 4)
    if isinstance(points, list) and points and all(isinstance(number, int) and number > 0 for number in points):
        return points
    if isinstance(points, int):
        return None
    raise UserError(f"{path}: decoder_n_points is {str(points)[:100]!r}, and has to be a number or a list of them")


def _check_description(published: dict[str, Any], sections: dict[str, Any], path: Path) -> None:
    """Raise UserError where the description is of another model than the tensors.

    It is that of another file then, and what it says of things that no tensor tells cannot be trusted.
    """
    neck, head = sections["neck"], sections["heads"][TASK]
    levels = len(sections["backbone"]["strides"])
    last = head["num_layers"] - 1
    of_tensors = {
        "encoder_hidden_dim": neck["embed_dim"],
        "encoder_layers": neck["num_layers"],
        "encoder_ffn_dim": neck["ffn_dim"],
        "encode_proj_layers": [levels - 1],
        "num_feature_levels": levels,
        "feat_strides": list(STRIDES[-levels:]),
        "d_model": head["embed_dim"],
        "decoder_layers": head["num_layers"],
        "decoder_ffn_dim": head["ffn_dim"],
        "decoder_attention_heads": head["num_heads"],
        "max_num_bins": head.get("num_bins"),
    }
    for key, value in of_tensors.items():
        if published.get(key, value) != value:
            raise UserError(f"{path}: {key} is {str(published[key])[:100]}, but by the tensors it is {value}")
    if published.get("eval_idx", -1) not in (-1, last):
        raise UserError(f"{path}: eval_idx is {str(published['eval_idx'])[:100]}, and only the last layer can predict")


def _of_neck(published: dict[str, Any]) -> dict[str, Any]:
    """What no tensor tells of the neck."""
    return {
        "attention_act": published.get("encoder_activation_function", "gelu"),
        "dropout": published.get("dropout", 0.0),
    }


def _of_head(published: dict[str, Any]) -> dict[str, Any]:
    """What no tensor tells of the head and of its training."""
    weights = {"fgl_weight": ("weight_loss_fgl", 0.15), "ddf_weight": ("weight_loss_ddf", 1.5)}
    return {"act": "relu", "shared_matches": True, **head_settings(published, weights)}

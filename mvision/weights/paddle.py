"""Reading published Mask-RT-DETR: PaddleDetection's files (``.pdparams``) of the models on HGNetV2.

The tensors have the names and layouts of Paddle: linear layers have their inputs first, and norms call their statistics
``_mean`` and ``_variance``. No tensor tells on which map the neck's attention is: the authors' two small models have it
on that of stride 16, the others on the coarsest one. Nor do the small models have the scaled activations that timm's
networks of these names have; scales of 1 and offsets of 0 stand for that.

Source: github.com/PaddlePaddle/PaddleDetection, configs/mask_rtdetr; Zhao et al., "DETRs Beat YOLOs on Real-time Object
Detection", CVPR 2024.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvision.errors import UserError
from mvision.storage.paddle_pickles import load_arrays
from mvision.structures.coco_names import COCO
from mvision.weights import originals
from mvision.weights.published import DECODER, TASK, Published, categories, parse
from mvision.weights.structure import AFFINE, Structure

FAMILY = "mask-rtdetr"
SUFFIX = ".pdparams"
MASKS = "instance-seg"
_HEAD = f"heads.{TASK}."
_MARK = "transformer.mask_query_head.layers.0.weight"
_EMBEDDING = "transformer.denoising_class_embed.weight"
_SMALL = {"hgnetv2_b1", "hgnetv2_b2"}

# Name in the file -> name in mvision, or in RT-DETR's PyTorch files, whose rules follow. All are applied, in order.
_NAMES = [
    (r"\._mean$", ".running_mean"),
    (r"\._variance$", ".running_var"),
    (r"^backbone\.(.*)\.aggregation_squeeze_conv\.", r"backbone.\1.aggregation.0."),
    (r"^backbone\.(.*)\.aggregation_excitation_conv\.", r"backbone.\1.aggregation.1."),
    (r"^neck\.(.*)\.bn\.", r"neck.\1.norm."),
    (r"^neck\.mask_feat_head\.output_conv\.", f"{_HEAD}pixels.merge."),
    (r"^neck\.enc_mask_lateral\.", f"{_HEAD}pixels.lateral."),
    (r"^neck\.enc_mask_output\.0\.", f"{_HEAD}pixels.refine."),
    (r"^neck\.enc_mask_output\.1\.", f"{_HEAD}pixels.out."),
    (r"^transformer\.mask_query_head\.", f"{_HEAD}mask_embed."),
    (r"^transformer\.dec_norm\.", f"{DECODER}output_norm."),
    (r"^transformer\.score_head\.", f"{DECODER}memory_class."),
    (r"^transformer\.bbox_head\.", f"{DECODER}memory_box."),
    (r"^neck\.", "encoder."),
    (r"^transformer\.", "decoder."),
]
# Every second module of these is the enlargement, which has no tensors.
_SCALE = re.compile(r"^neck\.mask_feat_head\.scale_heads\.(\d+)\.(\d+)\.0\.(?:(conv)|bn)\.")
_ACTIVE = re.compile(r"^(backbone\.net\..*)(?<!\.downsample)(?<!\.conv1)\.bn\.weight$")
"""Norms with an activation after them: all but those of strided layers and of the first half of light layers."""


def read_paddle(path: Path) -> Published:
    """The model of a ``.pdparams`` file.

    Raises:
        UserError: it cannot be read, has something else in it than arrays, or is of another model.
    """
    arrays = load_arrays(path)
    if _MARK not in arrays or not any(name.startswith("backbone.stem.stem1.") for name in arrays):
        raise UserError(
            f"weights {path}: not a Mask-RT-DETR on HGNetV2, of which alone {SUFFIX} files can be read; RT-DETR itself "
            "is read from its PyTorch files (mvision models lists them)"
        )
    tensors = originals.renamed({name: _tensor(name, array) for name, array in arrays.items()}, mvision_name, path)
    structure = Structure(tensors, path)
    notes = ["read as Mask-RT-DETR: images in 0..1"]
    network = structure.hgnet_by_sizes()
    if network in AFFINE and not structure.has("backbone.net.stem.stem1.lab."):
        tensors |= _identity_scales(tensors)
        structure = Structure(tensors, path)
        notes.append("activations of the backbone get scales of 1 and offsets of 0, of which the file has none")
    if network in _SMALL:
        notes.append("attention on the map of stride 16, as in the authors' small models")
    count = structure.rows(f"{DECODER}memory_class.bias")
    if len(labels := tensors.get(f"{DECODER}label_embed.weight", torch.empty(0))) == count:
        # The last row is what queries have that stand for no object; Paddle takes zeros.
        tensors[f"{DECODER}label_embed.weight"] = torch.cat([labels, torch.zeros_like(labels[:1])])
    names = [f"LABEL_{index}" for index in range(count)]
    if count == len(COCO):
        names = [category.name for category in COCO]
        notes.append("its 80 classes, which have no names, taken for those of COCO")
    sections: dict[str, Any] = {
        "backbone": structure.backbone(),
        "neck": structure.neck() | ({"attention_levels": [1]} if network in _SMALL else {}),
        "heads": {MASKS: structure.decoder(None) | _mask_settings(structure)},
        "categories": categories(names),
        "image_size": [640, 640],
    }
    moved = {name.replace(_HEAD, f"heads.{MASKS}.", 1): tensor for name, tensor in tensors.items()}
    return Published(parse(sections, path), moved, notes)


def mvision_name(name: str) -> str:
    """mvision's name of an array of the file, but for fused attention weights, which become three tensors."""
    if match := _SCALE.match(name):
        level, module, conv = match.groups()
        kind = "conv" if conv else "norm"
        name = f"{_HEAD}pixels.scales.{level}.{int(module) // 2}.{kind}.{name[match.end() :]}"
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name if name.startswith(_HEAD) else originals.mvision_name(name)


def _tensor(name: str, array: np.ndarray) -> Tensor:
    """An array in PyTorch's layout, in memory of its own."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        tensor = torch.from_numpy(array.astype(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    is_linear = tensor.ndim == 2 and name != _EMBEDDING
    return tensor.T.contiguous() if is_linear else tensor


def _identity_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales and offsets that change nothing, for every activation of the backbone."""
    places = [match[1] for match in map(_ACTIVE.match, tensors) if match]
    scales = {f"{place}.lab.scale": torch.ones(1) for place in places}
    return scales | {f"{place}.lab.bias": torch.zeros(1) for place in places}


def _mask_settings(structure: Structure) -> dict[str, Any]:
    """What Mask-RT-DETR has otherwise than RT-DETR."""
    pixels = f"{_HEAD}pixels."
    return {
        "mask_form": "prototypes",
        "boxes_from_masks": True,
        "shared_class_head": True,
        "shared_box_head": True,
        "output_norm": True,
        "pixel_dim": structure.rows(f"{pixels}scales.0.0.conv.weight"),
        "fine_dim": structure.rows(f"{pixels}merge.conv.weight"),
        "mask_dim": structure.rows(f"{pixels}out.weight"),
        "class_weight": 4.0,
    }

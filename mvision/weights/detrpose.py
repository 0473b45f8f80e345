"""Reading the authors' own files (``.pth``) of DETRPose: poses of persons, for COCO's and CrowdPose's points.

The neck is D-FINE's, but for its position embedding and an activation after its lateral layers, of which no tensor
tells: both are this family's. Images are in 0..1, without mean and standard deviation.

Source: Janampa and Pattichis, "DETRPose: Real-time end-to-end transformer model for multi-person pose estimation",
2025; github.com/SebastianJanampa/DETRPose.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mvision.weights import originals, poses
from mvision.weights.published import Published, parse
from mvision.weights.structure import Structure, scalar

FAMILY = "detrpose"


def is_detrpose(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors, by their names in the file, are DETRPose's."""
    return f"transformer.{poses.MARK}" in tensors


def read_detrpose(loaded: Mapping[str, Tensor], notes: list[str], path: Path) -> Published:
    """The model of a ``.pth`` file.

    Args:
        loaded, notes: what ``state_dict`` gave.
        path: for messages.

    Raises:
        UserError: it is not whole, or has a part that mvision does not have.
    """
    notes = [*notes, f"read as {FAMILY}: ReLU in the decoder, images in 0..1"]
    kept = {name: tensor for name, tensor in loaded.items() if not poses.LEFT_OUT.match(name)}
    tensors = originals.renamed(kept, mvision_name, path)
    structure = Structure(tensors, path)
    sections: dict[str, Any] = {
        "backbone": structure.backbone(),
        "neck": structure.neck() | {"lateral_act": True, "position": "fraction"},
    }
    return finish(sections, tensors, structure, loaded.get("transformer.anchors"), notes, path)


def finish(
    sections: dict[str, Any],
    tensors: dict[str, Tensor],
    structure: Structure,
    anchors: Tensor | None,
    notes: list[str],
    path: Path,
) -> Published:
    """The model, given the sections of backbone and neck; DETRPose and ECPose differ in these alone.

    Args:
        tensors: by mvision's names; changed in place.
        anchors: see ``poses.size_of_centres``.
    """
    bins = {key: value for name, key in poses.BINS.items() if (value := scalar(tensors.pop(name, None))) is not None}
    head = poses.decoder_settings(tensors, structure, structure.levels) | bins
    sections["heads"] = {poses.TASK: head}
    sections["categories"], more = poses.people(tensors, structure, path)
    size = poses.size_of_centres(anchors)
    count = 0 if anchors is None else anchors.shape[1]
    sections["image_size"] = [640, 640] if size is None else originals.size_of_map(*size, count)
    more.append(poses.add_box_head(tensors, head["embed_dim"]))
    return Published(parse(sections, path), tensors, [*notes, *more])


def mvision_name(name: str) -> str:
    """mvision's name of a tensor of the file, but for fused attention weights, which become three tensors."""
    if name.startswith("transformer."):
        return poses.pose_name(name)
    return originals.mvision_name(name)

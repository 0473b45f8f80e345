"""The labels of one image, as a model is trained on them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Targets:
    """Labels of one image, as the model is trained on them (after every augmentation).

    They stay on the CPU in training; heads move what they need, see ``mvision.heads.base.Head``.

    Attributes:
        boxes: (N, 4) float32 cxcywh in fractions of the input image, 0..1.
        labels: (N,) int64, index into the list of categories (not the data set's category id).
        areas: (N,) float32, area of the object (its mask if the data has one, else its box) as a fraction of the image.
        masks: (N, h, w) uint8 of 0 and 1 in the geometry of the input image, or None if the data has none. A mask
            without a pixel stands for an object whose mask is not known: it is not supervised.
        keypoints: (N, K, 3) float32 x, y in fractions of the input image and visibility 0, 1 or 2, or None.
        image_id: the data set's id of the image.
        size: height and width of the original image in pixels.
        labelled_classes: (C,) bool: the classes whose objects were labelled in this image; objects of the other
            classes may be in it without a label. (1,) applies to all classes; None: all are labelled.
        tasks: the tasks that the image is labelled for; None: all for which it has labels.
        ignored: (h, w) uint8, 1 in regions of many objects that are not labelled one by one (``iscrowd``): they are no
            background. None: there are none, or the data has no masks.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    image_id: int = 0
    size: tuple[int, int] = (0, 0)
    labelled_classes: Tensor | None = None
    tasks: frozenset[str] | None = None
    ignored: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same labels on another device."""
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items()})

    def only(self, names: Collection[str]) -> Targets:
        """The same image with the labels in ``names`` alone: some of ``boxes``, ``masks`` and ``keypoints``.

        Without boxes there is no object left, and no class counts as labelled.
        """
        has_boxes = "boxes" in names
        changed: dict[str, Any] = {n: None for n in ("masks", "keypoints") if not has_boxes or n not in names}
        if "masks" in changed:
            changed["ignored"] = None
        if not has_boxes:
            changed |= {name: getattr(self, name)[:0] for name in ("boxes", "labels", "areas")}
            changed["labelled_classes"] = torch.zeros(1, dtype=torch.bool, device=self.labels.device)
        return replace(self, **changed)

"""The two types that travel between the rooms: what an image is labelled with, and what was found in it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import supervision

from mvision.errors import UserError
from mvision.settings import Settings
from mvision.structures.masks import Masks


class Category(Settings):
    """One class of objects: its id in the data set's files, its name, and what its keypoints are called.

    Attributes:
        skeleton: pairs of 0-based keypoint indices.
        sigmas: standard deviation of each keypoint as a fraction of the object's scale; empty: COCO's or one for all
            (see ``mvision.structures.oks.keypoint_sigmas``).
        flip_pairs: pairs of 0-based keypoint indices that change places in a mirror; None: by names such as
            ``left_eye``.
    """

    id: int
    name: str
    keypoints: list[str] = []
    skeleton: list[tuple[int, int]] = []
    sigmas: list[float] = []
    flip_pairs: list[tuple[int, int]] | None = None


@dataclass
class Targets:
    """Labels of one image, as the model is trained on them (after every augmentation).

    Attributes:
        boxes: (N, 4) float32 cxcywh in fractions of the input image, 0..1.
        labels: (N,) int64, index into the list of categories (not the data set's category id).
        areas: (N,) float32, area of the object (its mask if the data has one, else its box) as a fraction of the image.
        masks: (N, h, w) uint8 of 0 and 1 in the geometry of the input image, or None if the data has none.
        keypoints: (N, K, 3) float32 x, y in fractions of the input image and visibility 0, 1 or 2, or None.
        image_id: the data set's id of the image.
        size: height and width of the original image in pixels.
        known: (C,) bool: the classes that were looked for in this image; of the others nothing is known, neither that
            they are there nor that they are not. (1,) is all of them, None: all are known.
        tasks: the tasks that the image is labelled for; None: all for which it has labels.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    image_id: int = 0
    size: tuple[int, int] = (0, 0)
    known: Tensor | None = None
    tasks: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same labels on another device."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def only(self, names: Collection[str]) -> Targets:
        """The same image with these of ``boxes``, ``masks`` and ``keypoints`` alone; without boxes nothing is known."""
        masks = self.masks if "masks" in names else None
        keypoints = self.keypoints if "keypoints" in names else None
        if "boxes" in names:
            return replace(self, masks=masks, keypoints=keypoints)
        return replace(
            self,
            boxes=self.boxes[:0],
            labels=self.labels[:0],
            areas=self.areas[:0],
            masks=None,
            keypoints=None,
            known=torch.zeros(1, dtype=torch.bool, device=self.labels.device),
        )


@dataclass
class Instances:
    """What was found in one image, sorted by falling score, in pixels of the original image.

    Attributes:
        boxes: (N, 4) float32 xyxy in pixels, inside the image.
        scores: (N,) float32 in 0..1.
        labels: (N,) int64, index into ``names``.
        names: the class names.
        size: height and width of the image in pixels.
        masks: (N, H, W) bool, kept as run lengths (see ``Masks``; an array is converted), or None.
        keypoints: (N, K, 3) float32 x, y in pixels and a score in 0..1, or None.
        categories: the full description of the classes (ids, keypoint names, skeleton).
        path: the file or source that the image came from, if any.
        regions: of a joint model with objects and semantic-seg: one entry with a mask for each class in the image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    size: tuple[int, int]
    categories: list[Category] = field(default_factory=list)
    masks: Masks | None = None
    keypoints: np.ndarray | None = None
    path: str | None = None
    regions: Instances | None = None

    def __post_init__(self) -> None:
        if isinstance(self.masks, np.ndarray):
            self.masks = Masks.from_array(self.masks)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Class names; ``labels`` index into it."""
        return [category.name for category in self.categories]

    def filter(self, keep: np.ndarray) -> Instances:
        """The instances that ``keep`` (bool mask or indices) selects."""
        masks = None if self.masks is None else self.masks[keep]
        keypoints = None if self.keypoints is None else self.keypoints[keep]
        return replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            masks=masks,
            keypoints=keypoints,
        )

    def to_coco(self, image_id: Any) -> list[dict[str, Any]]:
        """Entries of COCO's result format, in the order of the instances.

        Each has image_id, category_id (the data set's, not the label), bbox as xywh in pixels, score, and where present
        segmentation (compressed run lengths of the whole image) and keypoints (x, y, score of one after another, as
        many as the class has; none where it has none and others do). Those of ``regions`` follow, marked by
        ``"region": True``.
        """
        corners = self.boxes.astype(np.float64).reshape(-1, 4)
        boxes = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1).tolist()
        ids = [category.id for category in self.categories]
        results: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score}
            for label, box, score in zip(self.labels.tolist(), boxes, self.scores.tolist())
        ]
        if self.masks is not None:
            for entry, rle in zip(results, self.masks.rles):
                entry["segmentation"] = rle
        if self.keypoints is not None:
            flat = self.keypoints.reshape(len(self), 3 * self.keypoints.shape[1])  # -1 is ambiguous without instances
            # Evaluators want as many points as the class has; here all classes have as many as the richest of them.
            counts = [3 * len(category.keypoints) for category in self.categories]
            for entry, label, points in zip(results, self.labels.tolist(), flat.tolist()):
                if counts[label] or not any(counts):  # beside classes with keypoints, one without has none
                    entry["keypoints"] = points[: counts[label] or None]
        if self.regions is not None:
            results += [{**entry, "region": True} for entry in self.regions.to_coco(image_id)]
        return results

    def to_supervision(self) -> supervision.Detections:
        """Boxes, scores, labels, masks and class names as ``supervision.Detections``.

        Keypoints have a type of their own there: ``to_supervision_keypoints``, row by row the same instances.
        """
        return _import_supervision().Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            confidence=self.scores,
            class_id=self.labels.astype(int),
            mask=None if self.masks is None else np.asarray(self.masks),
            data={"class_name": self._class_names()},
        )

    def to_supervision_keypoints(self) -> supervision.KeyPoints:
        """Keypoints, labels and class names as ``supervision.KeyPoints``; UserError if the instances have none."""
        if self.keypoints is None:
            raise UserError("to_supervision_keypoints(): these instances have no keypoints; use to_supervision()")
        return _import_supervision().KeyPoints(
            self.keypoints[..., :2].astype(np.float32),
            self.labels.astype(int),
            self.keypoints[..., 2].astype(np.float32),  # by position: the argument's name differs between versions
            data={"class_name": self._class_names()},
        )

    def draw(self, image: np.ndarray) -> np.ndarray:
        """A copy of ``image`` ((H, W, 3) uint8 RGB) with the instances drawn on it."""
        from mvision.drawing.draw import draw_instances

        return draw_instances(image, self)

    def _class_names(self) -> np.ndarray:
        names = self.names
        return np.array([names[label] for label in self.labels.tolist()], dtype=object)


def _import_supervision() -> Any:
    try:
        import supervision
    except ImportError as error:
        raise UserError("this conversion needs the package supervision: pip install supervision") from error
    return supervision

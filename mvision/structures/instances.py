"""The objects of one image: predictions, or ground truth in the same form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mvision.drawing import draw_instances
from mvision.errors import UserError
from mvision.structures.category import Category
from mvision.structures.masks import Masks, encode_logits
from mvision.structures.tracks import NO_TRACK, Tracks

if TYPE_CHECKING:
    import supervision


@dataclass
class Instances:
    """The objects of one image, sorted by falling score, in pixels of the original image.

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
        regions: of a joint model with objects and semantic-seg: one instance with a mask for each class of region in
            the image.
        query: (N,) int64, the index of the query that found each instance, or None. In a joint model whose poses share
            the queries of the objects it says which pose is whose.
        tracks: of a frame of a video that was tracked: which object each instance is.
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
    query: np.ndarray | None = None
    tracks: Tracks | None = None

    def __post_init__(self) -> None:
        if isinstance(self.masks, np.ndarray):
            self.masks = Masks.from_array(self.masks)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Class names; ``labels`` index into it."""
        return [category.name for category in self.categories]

    @property
    def class_names(self) -> list[str]:
        """The class name of every instance."""
        names = self.names
        return [names[label] for label in self.labels.tolist()]

    @property
    def track_ids(self) -> np.ndarray | None:
        """(N,) int64: the number of the object in the video, from 1 on, or -1 without a track; None: not tracked."""
        return None if self.tracks is None else self.tracks.ids

    def filter(self, keep: np.ndarray) -> Instances:
        """The instances that ``keep`` (bool mask or indices) selects."""
        names = ("boxes", "scores", "labels", "masks", "keypoints", "query", "tracks")
        parts = {name: getattr(self, name) for name in names}
        kept: dict[str, Any] = {name: part[keep] for name, part in parts.items() if part is not None}
        return replace(self, **kept)

    def resized(self, size: tuple[int, int]) -> Instances:
        """The same instances on the image at another size (height, width)."""
        y, x = size[0] / self.size[0], size[1] / self.size[1]
        masks = keypoints = None
        if self.masks is not None:
            # Interpolated and cut at one half: enlarged by the nearest pixel, outlines would have steps.
            masks = Masks((encode_logits(mask - np.float32(0.5), size) for mask in self.masks), size)
        if self.keypoints is not None:
            keypoints = self.keypoints * np.array([x, y, 1], np.float32)
        boxes = self.boxes * np.array([x, y, x, y], np.float32)
        regions = None if self.regions is None else self.regions.resized(size)
        tracks = None if self.tracks is None else self.tracks.scaled(x, y)
        return replace(self, boxes=boxes, size=size, masks=masks, keypoints=keypoints, regions=regions, tracks=tracks)

    def to_coco(self, image_id: Any) -> list[dict[str, Any]]:
        """Entries of COCO's result format, in the order of the instances, then those of ``regions``.

        Each has image_id, category_id (the data set's id, not the label), bbox as xywh in pixels and score; with masks
        also segmentation (compressed run lengths of the whole image), with keypoints also keypoints (x, y, score of
        each of the class's points in a flat list; left out for a class without keypoints if other classes have some),
        and with tracks track_id (left out for an instance without one).
        Entries of ``regions`` have ``"region": True`` besides.
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
            # Evaluators expect as many points as the class has; rows here are as long as the longest class needs.
            counts = [3 * len(category.keypoints) for category in self.categories]
            for entry, label, points in zip(results, self.labels.tolist(), flat.tolist()):
                if counts[label] or not any(counts):
                    entry["keypoints"] = points[: counts[label] or None]
        if self.tracks is not None:
            for entry, track_id in zip(results, self.tracks.ids.tolist()):
                if track_id != NO_TRACK:
                    entry["track_id"] = track_id
        if self.regions is not None:
            results += [{**entry, "region": True} for entry in self.regions.to_coco(image_id)]
        return results

    def to_supervision(self) -> supervision.Detections:
        """Boxes, scores, labels, masks, class names and the ids of tracks as ``supervision.Detections``.

        Keypoints have a type of their own there: ``to_supervision_keypoints``, row by row the same instances.
        """
        import supervision

        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            confidence=self.scores,
            class_id=self.labels.astype(int),
            mask=None if self.masks is None else np.asarray(self.masks),
            tracker_id=None if self.tracks is None else self.tracks.ids.astype(int),
            data={"class_name": np.array(self.class_names, dtype=object)},
        )

    def to_supervision_keypoints(self) -> supervision.KeyPoints:
        """Keypoints, labels and class names as ``supervision.KeyPoints``.

        Raises:
            UserError: the instances have no keypoints.
        """
        if self.keypoints is None:
            raise UserError("to_supervision_keypoints(): these instances have no keypoints; use to_supervision()")
        import supervision

        return supervision.KeyPoints(
            xy=self.keypoints[..., :2].astype(np.float32),
            class_id=self.labels.astype(int),
            keypoint_confidence=self.keypoints[..., 2].astype(np.float32),
            data={"class_name": np.array(self.class_names, dtype=object)},
        )

    def draw(self, image: np.ndarray) -> np.ndarray:
        """A copy of ``image`` ((H, W, 3) uint8 RGB) with the instances drawn on it.

        Raises:
            UserError: the image is of another size or kind than the one that the instances were found in.
        """
        if isinstance(image, np.ndarray) and image.ndim >= 2 and image.shape[:2] != tuple(self.size):
            (height, width), own = image.shape[:2], f"{self.size[1]} x {self.size[0]}"
            raise UserError(
                f"draw: the picture is {width} x {height}, and these instances are for one of {own}; "
                f"give that one, or draw instances.resized(({height}, {width}))"
            )
        return draw_instances(image, self)

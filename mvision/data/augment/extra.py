"""Transforms of albumentations that a config names (``data.augment.extra``), applied to pixels and labels alike."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from pydantic import ValidationError

from mvision.compat import albumentations_alone
from mvision.config.schema import TransformConfig
from mvision.data.augment.geometry import draw_masks, stays_labelled, swap_keypoints
from mvision.data.formats.labels import WHOLE, PictureLabels
from mvision.errors import UserError, did_you_mean
from mvision.structures.images import resize_image
from mvision.structures.masks import encode_mask

with albumentations_alone():
    import albumentations as A
    from albumentations.augmentations.crops.transforms import CropSizeError

KEY = "data.augment.extra"
TARGETS = {"Image", "Mask", "BBoxes", "Keypoints"}  # what a transform that moves pixels has to move
# They cut a picture into pieces that are shuffled, or take functions, which a config cannot hold.
REFUSED = {"RandomGridShuffle", "Lambda"}


class ExtraTransforms:
    """The transforms of a config, one after the other.

    A transform that moves pixels moves boxes and keypoints as albumentations does it. Masks are drawn before, at the
    picture's size, and are the objects' outlines from then on: distortions have no closed form for polygons.
    """

    def __init__(self, configs: Sequence[TransformConfig], swap: np.ndarray | None = None) -> None:
        """Build them.

        Args:
            configs: at least one.
            swap: see ``geometry.mirror_keypoints``.

        Raises:
            UserError: see ``build_transforms``.
        """
        transforms = build_transforms(configs)
        self.swap = swap
        self.only_colours = all(isinstance(transform, A.ImageOnlyTransform) for transform in transforms)
        if self.only_colours:
            self.compose = A.Compose(transforms)
        else:
            self.compose = A.Compose(
                transforms,
                bbox_params=A.BboxParams("albumentations", clip=True),
                keypoint_params=A.KeypointParams("xy", remove_invisible=False),
            )

    def __call__(
        self, image: np.ndarray, labels: PictureLabels, rng: np.random.Generator
    ) -> tuple[np.ndarray, PictureLabels]:
        """Transform a picture; objects of which too little is left are dropped, as by ``geometry.place``.

        Args:
            image: (H, W, 3) uint8 RGB.
            labels: with boxes of at least a pixel.
            rng: the only source of chance.

        Returns:
            (H, W, 3) uint8, resized to the size that it had where a transform changes it, and the labels. Boxes and
            areas of objects with outlines are for ``geometry.tighten`` to measure.

        Raises:
            UserError: a transform fails on this picture, or its result is no colour image.
        """
        self.compose.set_random_seed(int(rng.integers(2**31)))
        if self.only_colours:
            return self._run(image, {"image": image})["image"], labels
        keypoints = np.zeros((len(labels), 0, 3)) if labels.keypoints is None else labels.keypoints
        # The corners first: a distortion loses a point where another one is drawn on it later.
        corners = labels.boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]
        points = np.concatenate((corners.reshape(-1, 2), keypoints[..., :2].reshape(-1, 2)))
        data: dict[str, Any] = {
            "image": image,
            "bboxes": _numbered(labels.boxes),
            "keypoints": _numbered(points * (image.shape[1], image.shape[0])),
        }
        drawn = np.zeros(0, dtype=np.int64)
        if labels.outlines is not None:
            drawn = np.array([i for i, outline in enumerate(labels.outlines) if outline is not None], dtype=np.int64)
        if len(drawn):  # empty arrays of masks crash
            data["masks"] = draw_masks(labels, (image.shape[0], image.shape[1]), drawn)
        moved = self._run(image, data)
        outlines = labels.outlines
        if outlines is not None:
            outlines = np.empty(len(labels), dtype=object)
            outlines[drawn] = [encode_mask(mask) for mask in moved.get("masks", ())]
        labels = replace(labels, outlines=outlines, cut=np.isin(np.arange(len(labels)), drawn))
        points = np.full_like(points, np.nan)
        left = np.asarray(moved["keypoints"], dtype=np.float64).reshape(-1, 3)
        points[left[:, 2].astype(np.int64)] = left[:, :2] / (moved["size"][1], moved["size"][0])
        split = 4 * len(labels)
        return moved["image"], self._moved(
            labels,
            np.asarray(moved["bboxes"], dtype=np.float64).reshape(-1, 5),
            points[:split].reshape(corners.shape),
            points[split:].reshape(keypoints[..., :2].shape),
        )

    def _moved(
        self, labels: PictureLabels, boxes: np.ndarray, corners: np.ndarray, places: np.ndarray
    ) -> PictureLabels:
        """Labels at their new place; everything in fractions of the picture.

        Args:
            labels: as before, but with the new outlines.
            boxes: (M, 5) xyxy inside the picture, and the row of the object.
            corners: (N, 4, 2) those of the box (top left, top right, bottom left, bottom right), not clipped, and NaN
                where a distortion loses them.
            places: (N, K, 2) of the keypoints, in the same way.
        """
        rows = boxes[:, 4].astype(np.int64)
        boxes, before, labels, corners = boxes[:, :4], labels.boxes[rows], labels[rows], corners[rows]
        right, down = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        turned = right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0]  # area of the moved box, negative in a mirror
        whole = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)
        visible = np.nan_to_num(_area(boxes) / np.maximum(_area(whole), 1e-12), nan=1.0).clip(max=1)
        size = np.nan_to_num(np.abs(turned) / np.maximum(_area(before), 1e-12), nan=1.0)
        count = len(labels)
        labels = replace(
            labels,
            boxes=boxes,
            areas=labels.areas * size * visible,
            windows=np.tile(np.array(WHOLE), (count, 1)),
            scale=np.ones((count, 2)),
            offset=np.zeros((count, 2)),
            keypoints=None if labels.keypoints is None else self._keypoints(labels, places[rows], turned < 0),
        )
        return labels[stays_labelled(visible, boxes, np.array(WHOLE), labels.crowd)]

    def _keypoints(self, labels: PictureLabels, places: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """(N, K, 3) keypoints at their new ``places`` (N, K, 2); zeros where they are not labelled, or outside."""
        assert labels.keypoints is not None
        keypoints = np.concatenate((places, labels.keypoints[..., 2:]), axis=-1)
        inside = ((places >= 0) & (places <= 1)).all(axis=-1)
        keypoints[~inside | (keypoints[..., 2] <= 0)] = 0
        if self.swap is not None and mirrored.any():
            keypoints[mirrored] = swap_keypoints(keypoints[mirrored], self.swap[labels.labels[mirrored]])
        return keypoints

    def _run(self, image: np.ndarray, data: dict[str, Any]) -> dict[str, Any]:
        """The transformed ``data``, ``size`` (its height and width), and the image at the size that it had."""
        names = ", ".join(type(transform).__name__ for transform in self.compose.transforms)
        try:
            moved = self.compose(**data)
        except (ValueError, CropSizeError, cv2.error) as error:
            raise UserError(f"{KEY} ({names}): {' '.join(str(error).split())}") from error
        result = moved["image"]
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.shape[2:] != (3,):
            kind = f"{result.dtype} of shape {tuple(result.shape)}"
            raise UserError(f"{KEY} ({names}): the result is {kind}, not a colour image of bytes; leave it out")
        moved["size"] = result.shape[:2]
        if result.shape != image.shape:
            moved["image"] = resize_image(result, (image.shape[0], image.shape[1]))
        return moved


def build_transforms(configs: Sequence[TransformConfig]) -> list[A.BasicTransform]:
    """The transforms that a config names.

    Raises:
        UserError: an unknown name or argument (with the nearest known one), a value that the transform refuses, or a
            transform that does not move all labels or needs more than a picture and its labels.
    """
    return [_build(config, f"{KEY}.{number}") for number, config in enumerate(configs)]


def _build(config: TransformConfig, key: str) -> A.BasicTransform:
    usable = {name: kind for name, kind in vars(A).items() if _is_usable(kind) and name not in REFUSED}
    if config.name not in usable:
        if isinstance(vars(A).get(config.name), type):
            raise UserError(f"{key}.name: {config.name} does not take a picture and its boxes, masks and keypoints")
        raise UserError(
            f"{key}.name: albumentations has no transform '{config.name}': {did_you_mean(config.name, usable)}"
        )
    kind = usable[config.name]
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "strict")]
    for name in config.args:
        if name not in known:
            raise UserError(f"{key}.args.{name}: {config.name} has no such argument: {did_you_mean(name, known)}")
    try:
        transform = _construct(kind, config.args)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}.{_reason(error, config.name)}") from error
    if missing := set(transform.targets_as_params) - {"image", "bboxes"}:
        raise UserError(
            f"{key}.name: {config.name} needs {', '.join(sorted(missing))} besides the picture and its boxes"
        )
    return transform


def _construct(kind: type[A.BasicTransform], args: dict[str, Any]) -> A.BasicTransform:
    try:
        # Without ``strict`` some mistakes are only a warning, and the defaults take the place of all arguments.
        return kind(**args, strict=True)
    except TypeError:  # the few classes that do not check their arguments do not know ``strict`` either
        return kind(**args)


def _is_usable(kind: Any) -> bool:
    if not isinstance(kind, type) or kind in (A.ImageOnlyTransform, A.DualTransform):
        return False
    if issubclass(kind, A.ImageOnlyTransform):
        return True
    return issubclass(kind, A.DualTransform) and {t.value for t in getattr(kind, "_targets", ())} >= TARGETS


def _reason(error: Exception, name: str) -> str:
    """The end of a line that names the argument and what is wrong with it."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return f"args: {name}: {' '.join(str(error).split())}"
    first = cause.errors()[0]
    argument = str(first["loc"][0]) if first["loc"] else None
    messages = [e["msg"].removeprefix("Value error, ") for e in cause.errors() if e["loc"][:1] == first["loc"][:1]]
    text = ", or: ".join(dict.fromkeys(messages))
    return f"args{f'.{argument}' if argument else ''}: {name}: {text[:1].lower()}{text[1:]}"


def _numbered(values: np.ndarray) -> np.ndarray:
    """With the number of the row as a further column: transforms may leave rows out."""
    return np.column_stack((values, np.arange(len(values)))).astype(np.float32)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)

"""One part of a data set, such as ``train``: where its files lie, and its annotations as a COCO dictionary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvision.data.formats.problems import Problems
from mvision.data.formats.yolo import YoloSet, read_yolo_split
from mvision.errors import UserError

FIELDS = frozenset({"boxes", "masks", "keypoints"})
"""The fields of ``Targets`` that annotations can fill."""


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        name: such as ``train`` or ``val``.
        images: the folder that the images' file names are relative to.
        annotations: the COCO file, or the YOLO ``data.yaml``.
        keypoints: a second COCO file whose keypoints belong to the same annotation ids (COCO's own layout has two).
        yolo: set where the annotations are YOLO's; they are converted when they are read.
        fraction, seed: only this share of the images, drawn with this seed; a smaller share is part of a larger one.
    """

    name: str
    images: Path
    annotations: Path
    keypoints: Path | None = None
    yolo: YoloSet | None = None
    fraction: float = 1.0
    seed: int = 0

    def load(self, problems: Problems | None = None) -> dict[str, Any]:
        """The annotations as a COCO dictionary, read from the files at every call.

        Args:
            problems: gets what was left out or mended while the files were read; None where nobody will look at it.

        Raises:
            UserError: a file that is missing, malformed or no COCO (or YOLO) file.
        """
        raw = self._load(Problems() if problems is None else problems)
        return raw if self.fraction >= 1 else _some_images(raw, self.fraction, self.seed)

    def _load(self, problems: Problems) -> dict[str, Any]:
        if self.yolo is not None:
            return read_yolo_split(self.yolo, self.name, problems)
        raw = read_json(self.annotations)
        if self.keypoints is not None:
            _join_keypoints(raw, read_json(self.keypoints))
        return raw


def read_json(path: Path) -> dict[str, Any]:
    """A COCO file as it is; its lists ``images``, ``annotations`` and ``categories`` are there.

    Raises:
        UserError: the file is missing, is no JSON (with line and column) or is no COCO dictionary.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a COCO file: the top level is a {type(raw).__name__}, not an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw.get(key), list):
            found = ", ".join(map(str, list(raw)[:10])) or "nothing"
            raise UserError(f"{path}: not a COCO file: no list '{key}' in it (found: {found})")
    return raw


def _join_keypoints(instances: dict[str, Any], persons: dict[str, Any]) -> None:
    """Give the objects of ``instances`` the keypoints that ``persons`` has under the same ids, in place."""
    points = {annotation.get("id"): annotation.get("keypoints") for annotation in persons["annotations"]}
    for annotation in instances["annotations"]:
        found = points.get(annotation.get("id"))
        if found:
            annotation["keypoints"] = found
    about_points = {
        key: v for key, v in (persons.get("info") or {}).items() if key in ("keypoint_sigmas", "flip_pairs")
    }
    instances["info"] = {**(instances.get("info") or {}), **about_points}
    described = {category.get("id"): category for category in persons["categories"]}
    for category in instances["categories"]:
        for key in ("keypoints", "skeleton", "keypoint_sigmas", "sigmas", "flip_pairs"):
            value = described.get(category.get("id"), {}).get(key)
            if value is not None:
                category[key] = value


def _some_images(raw: dict[str, Any], fraction: float, seed: int) -> dict[str, Any]:
    """The annotations of a share of the images, at least one of them, in their order."""
    count = len(raw["images"])
    chosen = np.random.default_rng(seed).permutation(count)[: max(1, round(count * fraction))]
    images = [raw["images"][index] for index in sorted(chosen.tolist())]
    # Only annotations of images that were left out go: broken ones stay, for ``CocoSplit`` to report.
    everywhere, kept = ({image.get("id") for image in of if isinstance(image, dict)} for of in (raw["images"], images))
    annotations = [
        entry
        for entry in raw["annotations"]
        if not isinstance(entry, dict) or entry.get("image_id") not in everywhere - kept
    ]
    return {**raw, "images": images, "annotations": annotations}

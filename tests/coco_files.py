"""Small data sets on disk for the tests of ``mvision.data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

CATEGORIES: list[dict[str, Any]] = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
POINTS = ["nose", "left_eye", "right_eye"]
PEOPLE: list[dict[str, Any]] = [{"id": 1, "name": "person", "keypoints": POINTS, "skeleton": [[1, 2], [1, 3]]}]


def picture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 that differs everywhere: a gradient and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack((x * 255 // width, y * 255 // height, np.full((height, width), 40 * seed % 255)), axis=-1)
    return (base * 0.8 + rng.integers(0, 50, (height, width, 3))).astype(np.uint8)


def write_picture(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1])


def annotation(image_id: int = 1, bbox: list[float] | None = None, category_id: int = 3, **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox or [8, 8, 20, 16], "iscrowd": 0, **more}


def coco(
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]] | None = None,
    images: int = 1,
    size: tuple[int, int] = (48, 64),
) -> dict[str, Any]:
    """A COCO dictionary with images 1.png, 2.png, ... of one (height, width); annotations are numbered from 1."""
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": size[0], "width": size[1]} for n in range(1, images + 1)
        ],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, start=1)],
        "categories": CATEGORIES if categories is None else categories,
    }


def write_set(root: Path, tree: dict[str, Any], split: str = "train", pictures: bool = True) -> Path:
    """``images/`` + ``annotations/{split}.json``; every image with a picture of its own."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(tree))
    (root / "images").mkdir(exist_ok=True)
    for entry in tree["images"] if pictures else []:
        write_picture(root / "images" / entry["file_name"], picture(entry["height"], entry["width"], entry["id"]))
    return root

"""Small YOLO data sets on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from tests.coco_files import picture, write_picture

SIZE = (100, 200)  # height and width of the pictures
BOXES = ("0 0.5 0.5 0.2 0.4", "1 0.25 0.3 0.1 0.2")
NAMES = {"train": ("a", "b", "c"), "val": ("d", "e")}


def yolo_set(
    root: Path,
    lines: Sequence[str] | Callable[[str], Sequence[str]] = BOXES,
    images: str = "images/{split}",
    labels: str = "labels/{split}",
    **more: object,
) -> Path:
    """Three pictures in train and two in val, with a label file each, and ``data.yaml``.

    Args:
        root: the folder.
        lines: of every label file, or a function of the picture's name.
        images, labels: the folders, relative to ``root``.
        more: keys of ``data.yaml`` besides train, val and names (cat, dog).
    """
    for split, names in NAMES.items():
        for number, name in enumerate(names):
            write_picture(root / images.format(split=split) / f"{name}.png", picture(*SIZE, seed=number))
            file = root / labels.format(split=split) / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines(name) if callable(lines) else lines) + "\n")
    tree = {split: images.format(split=split) for split in NAMES}
    (root / "data.yaml").write_text(yaml.safe_dump({**tree, "names": ["cat", "dog"], **more}))
    return root


def read(root: Path, split: str = "train", fields: Sequence[str] = ("boxes",)) -> CocoSplit:
    """The split as training reads it."""
    return CocoSplit(find_layout(root).split(split, fields), fields)


def said(split: CocoSplit) -> dict[str, tuple[int, list[str]]]:
    """What was left out or mended: by kind, how often, and where."""
    return {problem.kind: (problem.count, problem.examples) for problem in split.problems}

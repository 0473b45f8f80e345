"""YOLO data sets (``data.yaml`` and one text file per image) to COCO dictionaries, in memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mvision.data.formats.problems import Problems
from mvision.errors import UserError
from mvision.structures.images import IMAGE_SUFFIXES, BadImage, image_size

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class YoloSet:
    """A ``data.yaml``, read.

    Attributes:
        file: the YAML file.
        names: class names; a label file's first number is the position.
        sources: by split, the folders or list files that hold the images.
        folders: by split, the folder that all images of the split lie in.
        keypoint_names: of every class with keypoints; empty for boxes and polygons.
        keypoint_dims: numbers per keypoint in the label files, 2 (x, y) or 3 (x, y, visibility).
    """

    file: Path
    names: list[str]
    sources: dict[str, list[Path]]
    folders: dict[str, Path]
    keypoint_names: list[str]
    keypoint_dims: int


def is_yolo_file(path: Path) -> bool:
    """Whether a YAML file describes a YOLO data set, which has ``names`` and at least one split."""
    if path.suffix not in (".yaml", ".yml"):
        return False
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return path.stem == "data"  # by its name it is one, and reading it gives the user the reason
    return isinstance(tree, dict) and "names" in tree and any(name in tree for name in SPLIT_NAMES)


def yolo_splits(file: Path) -> YoloSet:
    """Read a ``data.yaml``: path, train, val, test, names, kpt_shape, flip_idx, kpt_names.

    Raises:
        UserError: the file is no YAML, or a split's images are not there.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or "names" not in tree:
        raise UserError(f"{file}: not a YOLO data set: it has no 'names'")
    names = _class_names(tree["names"], file)
    sources: dict[str, list[Path]] = {}
    for key, name in SPLIT_NAMES.items():
        if tree.get(key) and name not in sources:
            sources[name] = _sources(tree, key, file)
    if not sources:
        raise UserError(f"{file}: names no train, val or test images")
    folders = {name: _common_folder(paths) for name, paths in sources.items()}
    points, dims = _keypoints(tree, file)
    return YoloSet(file, names, sources, folders, points, dims)


def read_yolo_split(yolo: YoloSet, split: str, problems: Problems) -> dict[str, Any]:
    """One split as a COCO dictionary: boxes, polygons or keypoints, whatever its label files hold.

    An image without a label file, or with an empty one, is an image without objects. Images that cannot be read are
    kept without size, so that they are named like those of any other data set.

    Args:
        problems: gets what was left out or mended.

    Raises:
        UserError: no images, a class that ``names`` lacks, or a line that is neither box, polygon nor pose.
    """
    folder = yolo.folders[split]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path in _image_files(yolo.sources[split]):
        record: dict[str, Any] = {"id": len(images) + 1, "file_name": path.relative_to(folder).as_posix()}
        images.append(record)
        try:
            record["height"], record["width"], _ = image_size(path)
        except BadImage:
            continue
        labels = label_file(path)
        if not labels.is_file():
            continue
        for number, line in enumerate(labels.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                annotation = _annotation(line.split(), record, yolo, f"{labels}, line {number}")
                annotations.append({"id": len(annotations) + 1, "image_id": record["id"], "iscrowd": 0, **annotation})
    if not images:
        raise UserError(f"{yolo.file}: no images in {', '.join(map(str, yolo.sources[split]))}")
    return {"images": images, "annotations": annotations, "categories": _categories(yolo)}


def label_file(image: Path) -> Path:
    """The text file of an image: the last ``images`` in its path becomes ``labels``, the suffix ``.txt``."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _annotation(words: list[str], record: dict[str, Any], yolo: YoloSet, where: str) -> dict[str, Any]:
    try:
        label, values = int(float(words[0])), [float(word) for word in words[1:]]
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: numbers expected, found '{' '.join(words[:6])}'") from error
    if not 0 <= label < len(yolo.names):
        raise UserError(f"{where}: class {label}, but {yolo.file} names {len(yolo.names)} classes (0 is the first)")
    width, height = record["width"], record["height"]
    annotation: dict[str, Any] = {"category_id": label}
    points = len(yolo.keypoint_names)
    if len(values) == 4 or (points and len(values) == 4 + points * yolo.keypoint_dims):
        cx, cy, w, h = values[:4]
        annotation["bbox"] = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        if len(values) > 4:
            annotation["keypoints"] = _pixel_keypoints(values[4:], yolo.keypoint_dims, width, height)
    elif not points and len(values) >= 6 and len(values) % 2 == 0:
        annotation["segmentation"] = [[v * (height if i % 2 else width) for i, v in enumerate(values)]]
    else:
        form = f"a pose of {4 + points * yolo.keypoint_dims} numbers" if points else "a polygon of six or more"
        raise UserError(f"{where}: {len(values)} numbers after the class: neither a box of 4 nor {form}")
    return annotation


def _pixel_keypoints(values: list[float], dims: int, width: int, height: int) -> list[float]:
    keypoints: list[float] = []
    for start in range(0, len(values), dims):
        x, y = values[start], values[start + 1]
        # Without a third number, a point at the origin stands for "not labelled".
        visible = values[start + 2] if dims == 3 else (0.0 if x == 0 and y == 0 else 2.0)
        keypoints += [x * width, y * height, visible] if visible > 0 else [0.0, 0.0, 0.0]
    return keypoints


def _categories(yolo: YoloSet) -> list[dict[str, Any]]:
    extra: dict[str, Any] = {"keypoints": yolo.keypoint_names} if yolo.keypoint_names else {}
    return [{"id": label, "name": name, **extra} for label, name in enumerate(yolo.names)]


def _class_names(names: Any, file: Path) -> list[str]:
    if isinstance(names, dict):
        try:
            numbered = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError) as error:
            raise UserError(f"{file}: names has to be a list, or numbers with names, not {names!r}") from error
        if sorted(numbered) != list(range(len(numbered))):
            raise UserError(f"{file}: the numbers under names have gaps: {sorted(numbered)}")
        names = [numbered[key] for key in sorted(numbered)]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: names has to be a list of class names, not {names!r}")
    return [str(name) for name in names]


def _sources(tree: dict[str, Any], key: str, file: Path) -> list[Path]:
    entries = tree[key] if isinstance(tree[key], list) else [tree[key]]
    base = Path(os.path.normpath(file.parent / str(tree.get("path") or ".")))
    found = []
    for entry in map(str, entries):
        # Roboflow writes ../train/images in a file that lies beside train/: last, try it without the leading dots.
        stripped = entry
        while stripped.startswith("../"):
            stripped = stripped[3:]
        candidates = [base / entry, file.parent / entry, file.parent / stripped]
        path = next((Path(os.path.normpath(c)) for c in candidates if c.exists()), None)
        if path is None:
            raise UserError(f"{file}: {key}: {entry} is not there (looked in {base} and {file.parent})")
        found.append(path)
    return found


def _common_folder(paths: list[Path]) -> Path:
    """The folder that file names are made relative to: the source itself, or the common parent of several."""
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in paths]
    files = [path for path in paths if path.is_file()]
    folders += [image.parent for path in files for image in _listed(path)]
    return Path(os.path.commonpath(folders))


def _image_files(sources: list[Path]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        if source.is_file():
            files += _listed(source)
        else:
            found = source.resolve().rglob("*")
            files += sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    return files


def _listed(file: Path) -> list[Path]:
    """Images named in a text file, one a line, relative to the file."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [Path(os.path.normpath(file.resolve().parent / line)) for line in lines if line]


def _keypoints(tree: dict[str, Any], file: Path) -> tuple[list[str], int]:
    """Names of the keypoints, and numbers per keypoint in the label files."""
    shape = tree.get("kpt_shape")
    if not shape:
        return [], 0
    if not isinstance(shape, list) or len(shape) != 2 or shape[1] not in (2, 3) or int(shape[0]) < 1:
        raise UserError(f"{file}: kpt_shape has to be [number of keypoints, 2 or 3], not {shape!r}")
    count = int(shape[0])
    names = tree.get("kpt_names")
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    if isinstance(names, list) and len(names) == count:
        return [str(name) for name in names], int(shape[1])
    return _names_from_flip(tree.get("flip_idx"), count, file), int(shape[1])


def _names_from_flip(flip: Any, count: int, file: Path) -> list[str]:
    """Names with ``left_`` and ``right_`` for the pairs of ``flip_idx``: augmentation recognises pairs by name."""
    if not flip:
        return [f"point_{index}" for index in range(count)]
    if (
        not isinstance(flip, list)
        or sorted(flip) != list(range(count))
        or any(flip[flip[i]] != i for i in range(count))
    ):
        raise UserError(f"{file}: flip_idx has to list, for each of the {count} keypoints, its mirror image: {flip!r}")
    sides = {True: "left", False: "right"}
    return [
        f"point_{index}" if other == index else f"{sides[index < other]}_point_{min(index, other)}"
        for index, other in enumerate(flip)
    ]

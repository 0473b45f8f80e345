"""The built-in set on disk: ordinary COCO files, written once into the user's cache."""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from mvision.builtin.drawing import draw_all
from mvision.builtin.scene import CATEGORY_IDS
from mvision.builtin.skeleton import KEYPOINTS
from mvision.errors import UserError
from mvision.storage.cache import cache_dir

VERSION = 1
TRAIN_IMAGES, VAL_IMAGES = 1200, 240
# COCO's person skeleton, 1-based.
SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip
_STAMP = "builtin.json"  # written last; holds the version and the settings of the folder
_STALE_SECONDS = 24 * 3600
Progress = Callable[[int, int], None]
Log = Callable[[str], None]


def say(line: str) -> None:
    """Print a line for the user to standard error."""
    print(line, file=sys.stderr, flush=True)


def ensure_builtin(
    root: Path | None = None,
    *,
    train: int = TRAIN_IMAGES,
    val: int = VAL_IMAGES,
    seed: int = 0,
    progress: Progress | None = None,
    log: Log = say,
) -> Path:
    """Folder of the built-in data set, which is generated first when it is absent, incomplete or of another version.

    Args:
        root: folder that holds it, by default the cache folder (`MVISION_CACHE` or `~/.cache/mvision`).
        train, val: number of images of each split. Other numbers or another seed live in a folder of their own. More
            images begin with the same ones.
        seed: a different seed gives different pictures.
        progress: called with (images done, images in all) while generating.
        log: called with a line about processes that ended before their work did; what they left is done here.

    Returns:
        A folder with `images/*.jpg`, `annotations/train.json` and `annotations/val.json`.

    The folder appears whole or not at all: it is generated beside its final place and renamed, so that neither an
    interruption nor a full disk nor a second process that does the same at the same time leaves half of it behind.

    Raises:
        UserError: the folder can't be written.
    """
    root = cache_dir() if root is None else Path(root)
    folder = root / _name(train, val, seed)
    if _is_complete(folder, train, val, seed):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        temporary = _sibling(folder)
        try:
            temporary.mkdir()
            generate_builtin(temporary, train, val, seed, progress, log)
            _move_into_place(temporary, folder, lambda: _is_complete(folder, train, val, seed))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"Cannot write the built-in data set to {folder}: {reason}. "
            f"Set MVISION_CACHE to a writable folder with {_megabytes(train + val)} MB free."
        ) from error
    return folder


def has_builtin(train: int = TRAIN_IMAGES) -> bool:
    """Whether the built-in data set with so many training images is in the cache, so that nothing has to be drawn."""
    return _is_complete(cache_dir() / _name(train, VAL_IMAGES, 0), train, VAL_IMAGES, 0)


def generate_builtin(
    root: Path,
    train: int = TRAIN_IMAGES,
    val: int = VAL_IMAGES,
    seed: int = 0,
    progress: Progress | None = None,
    log: Log = say,
) -> None:
    """Write the data set into an existing folder; see `ensure_builtin` for the safe way.

    Raises:
        OSError: a file can't be written.
    """
    (root / "images").mkdir(exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    # Closing ends the processes that draw: after an error none of them goes on writing.
    with closing(draw_all(root / "images", seed, train, val, log)) as records:
        for done, (split, record) in enumerate(records, start=1):
            splits[split].append(record)
            if progress is not None:
                progress(done, train + val)
    for split, offset in (("train", 0), ("val", train)):
        content = json.dumps(_coco(split, seed, splits[split], offset), separators=(",", ":"))
        (root / "annotations" / f"{split}.json").write_text(content, encoding="utf-8")
    (root / _STAMP).write_text(json.dumps(_stamp(train, val, seed)), encoding="utf-8")


def _name(train: int, val: int, seed: int) -> str:
    default = (train, val, seed) == (TRAIN_IMAGES, VAL_IMAGES, 0)
    return f"builtin-v{VERSION}" if default else f"builtin-v{VERSION}-{train}-{val}-seed{seed}"


def _megabytes(images: int) -> int:
    """What a folder with so many pictures needs, 25 kB each, rounded up to 50."""
    return 50 * -(-images * 25 // 50_000)


def _coco(split: str, seed: int, records: list[dict[str, Any]], offset: int) -> dict[str, Any]:
    """The COCO file of one split. Image and annotation ids are unique across both splits."""
    images, annotations = [], []
    for number, record in enumerate(records, start=offset + 1):
        images.append({"id": number, **{key: record[key] for key in ("file_name", "width", "height")}, "license": 1})
        # 100 ids per image keep ids unique without counting the annotations of the other split.
        items = enumerate(record["annotations"], start=1)
        annotations += [{"id": 100 * number + k, "image_id": number, **item} for k, item in items]
    categories: list[dict[str, Any]] = [
        {"id": number, "name": name, "supercategory": "thing"} for name, number in CATEGORY_IDS.items()
    ]
    categories[0] |= {"keypoints": list(KEYPOINTS), "skeleton": [list(edge) for edge in SKELETON]}
    return {
        "info": {"description": f"mvision built-in data set, {split} split", "version": str(VERSION), "seed": seed},
        "licenses": [{"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _stamp(train: int, val: int, seed: int) -> dict[str, int]:
    return {"version": VERSION, "train": train, "val": val, "seed": seed}


def _is_complete(folder: Path, train: int, val: int, seed: int) -> bool:
    """Whether the folder holds what is asked for; images that were deleted later are noticed."""
    try:
        if json.loads((folder / _STAMP).read_text(encoding="utf-8")) != _stamp(train, val, seed):
            return False
        files = sum(entry.name.endswith(".jpg") for entry in os.scandir(folder / "images"))
    except (OSError, ValueError):
        return False
    return files == train + val and all((folder / "annotations" / f"{s}.json").is_file() for s in ("train", "val"))


def _sibling(folder: Path) -> Path:
    """A hidden name beside the folder, on the same disk, that nobody else uses."""
    return folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:12]}")


def _move_into_place(temporary: Path, folder: Path, is_complete: Callable[[], bool]) -> None:
    for _ in range(2):
        try:
            temporary.rename(folder)
        except OSError:
            if is_complete():  # another process was faster
                return
        else:
            return
        # What lies there is damaged or of another version. A rename can't replace a full folder: put that aside first.
        waste = _sibling(folder)
        with suppress(FileNotFoundError):  # another process has just done so
            folder.rename(waste)
        shutil.rmtree(waste, ignore_errors=True)
    temporary.rename(folder)


def _remove_stale(root: Path) -> None:
    """Remove folders that killed processes left more than a day ago."""
    for path in root.glob(".builtin-v*-*"):
        with suppress(FileNotFoundError):  # another process removed it
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

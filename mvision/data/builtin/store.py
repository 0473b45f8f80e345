"""The built-in set on disk: ordinary COCO files, written once into the user's cache."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2

from mvision.data.builtin.scene import CATEGORY_IDS, generate_image
from mvision.data.builtin.skeleton import KEYPOINTS
from mvision.errors import UserError

VERSION = 1
TRAIN_IMAGES, VAL_IMAGES = 1200, 240
# COCO's person skeleton, 1-based.
SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip
_JPEG_QUALITY = 88
_STAMP = "builtin.json"  # written last; says which version and settings the folder holds
_STALE_SECONDS = 24 * 3600
Progress = Callable[[int, int], None]


def cache_dir() -> Path:
    """`$MVISION_CACHE`, or `~/.cache/mvision`."""
    if folder := os.environ.get("MVISION_CACHE"):
        return Path(folder).expanduser()
    try:
        return Path.home() / ".cache" / "mvision"
    except RuntimeError as error:
        raise UserError(
            "No home folder to keep the built-in data set in: set MVISION_CACHE to a writable folder."
        ) from error


def ensure_builtin(
    root: Path | None = None,
    *,
    train: int = TRAIN_IMAGES,
    val: int = VAL_IMAGES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Folder of the built-in data set, which is generated first when it is absent, incomplete or of another version.

    Args:
        root: folder that holds it, by default the cache folder (`MVISION_CACHE` or `~/.cache/mvision`).
        train, val: number of images of each split. Other numbers or another seed live in a folder of their own.
        seed: a different seed gives different pictures.
        progress: called with (images done, images in all) while generating.

    Returns:
        A folder with `images/*.jpg`, `annotations/train.json` and `annotations/val.json`.

    The folder appears whole or not at all: it is generated beside its final place and renamed, so an interruption, a full
    disk or a second process that does the same at the same time can't leave half of it behind.

    Raises:
        UserError: the folder can't be written.
    """
    root = cache_dir() if root is None else Path(root)
    default = (train, val, seed) == (TRAIN_IMAGES, VAL_IMAGES, 0)
    folder = root / (f"builtin-v{VERSION}" if default else f"builtin-v{VERSION}-{train}-{val}-seed{seed}")
    if _is_complete(folder, train, val, seed):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        try:
            generate_builtin(temporary, train, val, seed, progress)
            _move_into_place(temporary, folder, lambda: _is_complete(folder, train, val, seed))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"Cannot write the built-in data set to {folder}: {reason}. Set MVISION_CACHE to a writable folder with 50 MB free."
        ) from error
    return folder


def generate_builtin(
    root: Path, train: int = TRAIN_IMAGES, val: int = VAL_IMAGES, seed: int = 0, progress: Progress | None = None
) -> None:
    """Write the data set into an existing folder; see `ensure_builtin` for the safe way.

    Raises:
        OSError: a file can't be written.
    """
    (root / "images").mkdir(exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    jobs = [("train", i) for i in range(train)] + [("val", i) for i in range(val)]
    records: dict[str, list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {"train": [], "val": []}
    for done, (split, record) in enumerate(_draw_all(root, seed, jobs), start=1):
        records[split].append(record)
        if progress is not None:
            progress(done, len(jobs))
    for split, offset in (("train", 0), ("val", train)):
        content = _coco(split, seed, records[split], offset)
        (root / "annotations" / f"{split}.json").write_text(
            json.dumps(content, separators=(",", ":")), encoding="utf-8"
        )
    (root / _STAMP).write_text(json.dumps(_stamp(train, val, seed)), encoding="utf-8")


def _draw_all(
    root: Path, seed: int, jobs: list[tuple[str, int]]
) -> Iterator[tuple[str, tuple[dict[str, Any], list[dict[str, Any]]]]]:
    """Images and annotations in the order of the jobs.

    Threads, not processes: OpenCV lets go of the interpreter while it draws, and threads need neither a guarded main module
    nor a fork that could copy locks held by other libraries.
    """

    def draw(job: tuple[str, int]) -> tuple[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
        split, index = job
        image, annotations = generate_image(seed, index, split)
        name = f"{split}_{index:06d}.jpg"
        done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        if not done:
            raise OSError(f"OpenCV could not encode {name}")
        (root / "images" / name).write_bytes(data.tobytes())
        height, width = image.shape[:2]
        return split, ({"file_name": name, "width": width, "height": height}, annotations)

    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    try:
        yield from pool.map(draw, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _coco(
    split: str, seed: int, records: list[tuple[dict[str, Any], list[dict[str, Any]]]], offset: int
) -> dict[str, Any]:
    """The COCO file of one split. Image and annotation ids are unique across both splits."""
    images, annotations = [], []
    for number, (image, items) in enumerate(records, start=offset + 1):
        images.append({"id": number, **image, "license": 1})
        # Room for 100 annotations an image keeps ids unique without counting through the other split.
        annotations += [{"id": 100 * number + k, "image_id": number, **item} for k, item in enumerate(items, start=1)]
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


def _move_into_place(temporary: Path, folder: Path, is_complete: Callable[[], bool]) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if is_complete():  # another process was faster
            return
        if not folder.exists():
            raise
        # What lies there is of another version or damaged: put it aside first, because a rename can't replace a full folder.
        temporary.rename(_put_aside(folder))


def _put_aside(folder: Path) -> Path:
    waste = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    folder.rename(waste / "old")
    shutil.rmtree(waste, ignore_errors=True)
    return folder


def _remove_stale(root: Path) -> None:
    """Clear away what killed processes left behind more than a day ago."""
    for path in root.glob(f".builtin-v*-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)

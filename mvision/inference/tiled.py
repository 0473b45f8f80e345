"""Prediction on tiles: windows of a picture go through the model like pictures of their own, and what is found in them
becomes one list of results.

Tiles of several pictures share batches. A picture that is not larger than a tile is predicted on as without tiles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from mvision.errors import UserError
from mvision.inference.large_images import ArrayPicture, Picture, PreparedPicture, open_large, small_input
from mvision.inference.passes import MOST_PASSES
from mvision.inference.pictures import as_list, for_threads, picture_array
from mvision.inference.pipeline import ordered_map
from mvision.inference.predict import WORKERS, Predictor, Prepared, eval_mode, infer
from mvision.inference.selection import DEFAULT_THRESHOLD, AskedThreshold, Selection, resolve_threshold
from mvision.inference.tile_merge import Merged
from mvision.inference.tile_results import merge_tiles
from mvision.inference.tiles import Grid, Tiling, limited_size
from mvision.structures import Instances
from mvision.structures.decoding import BIG
from mvision.structures.images import BadImage, image_size, resize_image

T = TypeVar("T")
WHOLE = -1  # in place of the number of a tile: the whole picture


@dataclass
class _Open(Generic[T]):
    """A picture whose tiles are being read.

    Attributes:
        key: what identifies it to the caller.
        picture: None: it cannot be read.
        left: windows that have not been read yet.
        read: set when there are none.
        problem: what went wrong with one of them.
    """

    key: T
    picture: Picture | None
    grid: Grid
    left: int
    read: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    problem: BadImage | None = None

    def done(self) -> None:
        """One more window was read; after the last one the picture is released."""
        with self.lock:
            self.left -= 1
            if self.left == 0:
                if self.picture is not None:
                    self.picture.release()
                self.read.set()


@dataclass
class _Job(Generic[T]):
    """A tile, or with ``WHOLE`` the whole picture, of the one that is open."""

    opened: _Open[T]
    number: int
    is_last: bool


Found = Instances | Merged
"""The results of a picture: as the model gives them where it is a single tile, else those of its tiles merged."""


def infer_tiled(
    model: Predictor,
    pictures: Iterable[tuple[T, Picture | None]],
    tiling: Tiling,
    chosen: Sequence[Selection],
    batch_size: int | None = None,
    tiles: int | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Generator[tuple[T, list[Found] | BadImage | None], None, None]:
    """As ``infer``, on tiles.

    Args:
        pictures: what identifies each to the caller, and the picture; None: it cannot be read.
        tiles: how many there are to come in all; None: not known.
        tick: is called after each tile.

    Yields:
        For every picture, in order, what identifies it and its results, once for every selection; None if there is no
        picture; or what is wrong with it.
    """
    size = model.config.image_size
    regions = all(model.head(task).kind == "regions" for task in model.tasks)
    prepared = ordered_map(partial(_prepare, size), _jobs(pictures, tiling), WORKERS)
    results = infer(model, prepared, chosen, batch_size, tiles)
    gathered = _gather(results, tick)
    merge = partial(_merge, chosen, regions)
    with closing(ordered_map(merge, gathered, workers=1, ahead=1)) as merged:
        yield from merged


def predict_tiled(
    model: Predictor,
    images: Sequence[str | Path | Image.Image | np.ndarray],
    tiling: Tiling,
    threshold: AskedThreshold = DEFAULT_THRESHOLD,
    batch_size: int | None = None,
    *,
    multi_label: bool = False,
    nms: float | None = None,
) -> list[Instances]:
    """``predict_images`` on tiles: one result for each image, in pixels of it.

    A TIFF of more than 64 million pixels is read in parts where its format and the extra ``tiles`` allow it.

    Args:
        model, images, threshold, multi_label, nms: see ``predict_images``.
        batch_size: tiles per forward pass; None: 1 on a CPU and 8 elsewhere.

    Raises:
        UserError: as ``predict_images``.
    """
    selection = Selection(resolve_threshold(threshold, model), multi_label, nms)
    selection.check(model.config.categories)
    images = as_list(images)
    wanted = None
    if isinstance(images, Sized):  # looking through an iterator would use it up
        wanted = count_tiles((_size_of(image) for image in images), tiling, batch_size or 1)
    opened = ordered_map(partial(_open, model.config.pixel_range, tiling), for_threads(images), workers=2, ahead=2)
    results = []
    with eval_mode(model), closing(infer_tiled(model, opened, tiling, [selection], batch_size, wanted)) as found:
        for path, of_image in found:
            if isinstance(of_image, BadImage):
                raise UserError(str(of_image)) from of_image
            assert of_image is not None
            results.append(replace(as_instances(of_image[0]), path=path))
    return results


def as_instances(found: Found) -> Instances:
    """In pixels of the picture."""
    return found.instances() if isinstance(found, Merged) else found


def count_tiles(sizes: Iterable[tuple[int, int] | None], tiling: Tiling, batch_size: int) -> int | None:
    """How many tiles pictures of these sizes (height, width) have, as far as it matters: above a number that keeps all
    passes of a CPU busy (see ``forward_passes``) they are not counted any more. None where a size is not known."""
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += len(tiling.grid(size))
        if total > MOST_PASSES * batch_size:
            break
    return total


def file_size(path: str | Path) -> tuple[int, int] | None:
    """(height, width) from a file's header; None where it does not tell."""
    try:
        height, width, _ = image_size(path)
    except BadImage:
        return None
    return height, width


def _open(
    pixel_range: tuple[float, float] | None, tiling: Tiling, image: str | Path | Image.Image | np.ndarray
) -> tuple[str | None, Picture]:
    if not isinstance(image, str | Path):
        return None, ArrayPicture(picture_array(image, pixel_range))
    try:
        large = open_large(image, tiling.size[0], pixel_range)
    except BadImage as error:
        raise UserError(str(error)) from error
    return str(image), ArrayPicture(picture_array(image, pixel_range)) if large is None else large


def _size_of(image: str | Path | Image.Image | np.ndarray) -> tuple[int, int] | None:
    if isinstance(image, str | Path):
        return file_size(image)
    if isinstance(image, Image.Image):
        shape: tuple[int, ...] = image.size[::-1]
    else:
        shape = getattr(image, "shape", ())
    return (shape[0], shape[1]) if len(shape) in (2, 3) and min(shape[:2]) > 0 else None


def _jobs(pictures: Iterable[tuple[T, Picture | None]], tiling: Tiling) -> Generator[_Job[T], None, None]:
    """The windows of every picture, row by row; of large pictures one at a time is held."""
    former: _Open[T] | None = None
    try:
        for key, picture in pictures:
            if picture is None or isinstance(picture, PreparedPicture):
                grid = Grid(size := (0, 0) if picture is None else picture.size, size, [0], [0])
            else:
                grid = tiling.grid(picture.size)
            numbers = [*range(len(grid)), *([WHOLE] if tiling.whole and len(grid) > 1 else [])]
            opened = _Open(key, picture, grid, len(numbers))
            if picture is not None and picture.size[0] * picture.size[1] > BIG:
                if former is not None:
                    former.read.wait()
                former = opened
            for number in numbers:
                yield _Job(opened, number, number == numbers[-1])
    finally:
        if isinstance(pictures, Generator):
            pictures.close()


def _prepare(size: tuple[int, int], job: _Job[T]) -> Prepared[_Job[T]]:
    """The model's input of a tile; none if it cannot be read."""
    opened, picture = job.opened, job.opened.picture
    try:
        if picture is None or opened.problem is not None:
            return job, None, (0, 0)
        if job.number == WHOLE:
            return job, small_input(picture, size), limited_size(picture.size)
        left, top, right, bottom = opened.grid.window(job.number)
        return job, resize_image(picture.window(left, top, right, bottom), size), (bottom - top, right - left)
    except BadImage as error:
        opened.problem = error
        return job, None, (0, 0)
    finally:
        opened.done()


Gathered = tuple[_Open[T], list[list[Instances]], "list[Instances] | None"]
"""A picture, the results of every tile by selection, and those of the whole picture by selection."""


def _gather(
    results: Generator[tuple[_Job[T], list[Instances] | None], None, None], tick: Callable[[], object]
) -> Iterator[Gathered[T]]:
    tiles: list[list[Instances]] = []
    whole: list[Instances] | None = None
    with closing(results):
        for job, found in results:
            tick()
            if found is not None and job.number == WHOLE:
                whole = found
            elif found is not None:
                tiles.append(found)
            if job.is_last:
                yield job.opened, tiles, whole
                tiles, whole = [], None


def _merge(
    chosen: Sequence[Selection], regions: bool, gathered: Gathered[T]
) -> tuple[T, list[Found] | BadImage | None]:
    opened, tiles, whole = gathered
    if opened.problem is not None:
        return opened.key, opened.problem
    if opened.picture is None:
        return opened.key, None
    if len(opened.grid) == 1:
        return opened.key, list(tiles[0])
    return opened.key, [
        merge_tiles(
            opened.grid,
            [of_tile[number] for of_tile in tiles],
            None if whole is None else whole[number],
            regions,
            selection,
        )
        for number, selection in enumerate(chosen)
    ]

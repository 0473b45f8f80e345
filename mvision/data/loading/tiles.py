"""Training and evaluation on tiles: each window of a picture is a sample of its own, with the labels that it shows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mvision.config import AugmentConfig
from mvision.config.tiles import TileConfig
from mvision.data.augment.geometry import Placement, place, stays_labelled
from mvision.data.formats.coco import CocoSplit, ImageRecord
from mvision.data.formats.labels import PictureLabels
from mvision.data.loading.cache import ImageCache
from mvision.data.loading.dataset import ASPECT_TOLERANCE, Dataset, SampleKey
from mvision.data.loading.samplers import EvalBatches
from mvision.inference.large_images import open_large
from mvision.inference.tiles import Grid, Tiling, limited_size
from mvision.structures.decoding import BIG
from mvision.structures.images import BadImage, PixelRange

EMPTY = 3  # so that the choice of empty tiles draws other numbers from the seed than shuffling does
CHUNK = 4096  # tiles whose objects are looked for at a time
WHOLE_PICTURE = -1  # in place of the number of a tile


@dataclass
class TileCounts:
    """What became of the objects of a split.

    Attributes:
        pictures, tiles: that there are.
        empty, left_out: tiles without objects, and those of them that are not used.
        objects: labelled objects of the split, no crowds.
        whole, cut: how often one is in a tile, uncut and cut.
        dropped: parts that are too small to be kept.
        lost: objects that are in no tile.
        most: objects in one tile.
        classes: by label, how often objects of a class are in a tile, whole or cut.
    """

    pictures: int = 0
    tiles: int = 0
    empty: int = 0
    left_out: int = 0
    objects: int = 0
    whole: int = 0
    cut: int = 0
    dropped: int = 0
    lost: int = 0
    most: int = 0
    classes: list[int] = field(default_factory=list)


class TiledDataset(Dataset):
    """The tiles of a split as the images of a data set; see ``Dataset`` for the arguments that both have.

    For evaluation (without ``augment``) the tiles of a picture follow each other, and a picture of several tiles is
    there as a whole too where the settings ask for it. ``Targets.image_id`` is then the number of the tile.

    Attributes:
        pictures: the data set whose images are divided.
        records: of every tile.
        counts: what became of the objects.
    """

    def __init__(
        self,
        split: CocoSplit,
        tiles: TileConfig,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        mask_stride: int | None = 1,
        cache: ImageCache | None = None,
        tasks: Collection[str] | None = None,
        reduce: bool = True,
        pixel_range: PixelRange | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__(split, augment, seed, mask_stride, None, validate, tasks, reduce, pixel_range)
        self.pictures = Dataset(split, None, seed, None, cache, False, None, reduce, pixel_range)
        self.tiling: Tiling = tiles.tiling
        self.settings = tiles
        self.counts = TileCounts(len(split.records))
        self._grids = [self.tiling.grid((record.height, record.width)) for record in split.records]
        shown = np.zeros(len(split.categories), np.int64)
        every = [self._tiles_of(index, grid, shown) for index, grid in enumerate(self._grids)]
        self.counts.classes = shown.tolist()
        chosen = np.concatenate(every) if every else np.zeros((0, 3), np.int64)
        if self.augmented:
            chosen = chosen[self._used(chosen[:, 2] > 0)]
        self._picture, self._number = chosen[:, 0], chosen[:, 1]
        self.records = [self._record(index) for index in range(len(chosen))]

    def labels(self, index: int) -> PictureLabels:
        """Those objects of which the tile shows enough, in fractions of it; and crowd regions."""
        picture = int(self._picture[index])
        labels = self.pictures.labels(picture)
        grid = self._grids[picture]
        if len(grid) == 1 or self._number[index] == WHOLE_PICTURE:
            return labels
        left, top, right, bottom = grid.window(int(self._number[index]))
        boxes = labels.boxes * np.tile(grid.size[::-1], 2)
        keep, visible = self._kept(boxes, np.array([[left, top, right, bottom]]))
        keep = keep[0] | (labels.crowd & (visible[0] > 0))
        size = (bottom - top, right - left)
        return place(labels[keep], Placement((left, top, right, bottom), (0, 0, *size[::-1]), grid.size, size))

    def image(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """(h, w, 3) uint8 RGB of one tile; of a large TIFF nothing else is decoded where that is possible.

        Raises:
            BadImage: see ``Dataset.image``.
        """
        picture, number = int(self._picture[index]), int(self._number[index])
        grid = self._grids[picture]
        (height, width), record = grid.size, self.records[index]
        if height * width > BIG and len(grid) > 1:
            found = self._window(picture, number)
            if found is not None:
                return found
        if at_least is not None:  # of the tile; the picture is so much larger
            at_least = (-(-at_least[0] * height // record.height), -(-at_least[1] * width // record.width))
        image = self.pictures.image(picture, at_least)
        if number == WHOLE_PICTURE or len(grid) == 1:
            return image
        left, top, right, bottom = _scaled(grid, number, image.shape[:2])
        return image[top:bottom, left:right]

    def place(self, number: int) -> tuple[int, Grid, int | None]:
        """Of the tile that ``Targets.image_id`` names: the data set's id of the picture, its tiles, and the number of
        this one among them; None: it is the whole picture."""
        picture, tile = int(self._picture[number]), int(self._number[number])
        return self.pictures.records[picture].id, self._grids[picture], None if tile == WHOLE_PICTURE else tile

    def count_samples(self, number: int) -> int:
        """How many samples the picture of a sample has in all."""
        grid = self._grids[int(self._picture[number])]
        return len(grid) + (self.tiling.whole and len(grid) > 1)

    def of_pictures(self, pictures: Collection[int]) -> list[int]:
        """The numbers of all samples of these pictures, given by their positions in the split."""
        return np.flatnonzero(np.isin(self._picture, list(pictures))).tolist()

    def lines(self, name: str) -> list[str]:
        """What the pictures and objects have become, for the user of a training or an evaluation."""
        counts, settings = self.counts, self.settings
        height, width = settings.size
        used = len(self.records)
        empty = f"{counts.empty} without objects" + (
            f", of which {counts.left_out} are left out: data.tile.empty {settings.empty:g}" if counts.left_out else ""
        )
        return [
            f"{name}: {counts.pictures} images are {used} tiles of {width} x {height} pixels, overlap "
            f"{settings.overlap:g} ({empty}); {counts.objects} objects are in them {counts.whole} times whole and "
            f"{counts.cut} times cut, up to {counts.most} in one",
            *(f"  ! {problem}" for problem in self.problems()),
        ]

    def problems(self) -> list[str]:
        """What is not learned of the objects."""
        counts, visible, lines = self.counts, self.settings.visible, []
        if counts.dropped:
            lines.append(
                f"{counts.dropped} x tile that shows less of an object than data.tile.visible {visible:g}: not "
                "labelled there"
            )
        if counts.lost:
            lines.append(
                f"{counts.lost} x object of which no tile shows {visible:g}: never learned; larger tiles or a smaller "
                "data.tile.visible show it"
            )
        return lines

    def _tiles_of(self, picture: int, grid: Grid, shown: np.ndarray) -> np.ndarray:
        """(T, 3): the picture, the number of the tile, and how many objects are in it. Counts what becomes of them,
        by class in ``shown`` (C,)."""
        labels = self.pictures.labels(picture)
        objects = labels.labels[~labels.crowd]
        boxes = labels.boxes[~labels.crowd] * np.tile(grid.size[::-1], 2)
        windows, found = grid.windows(), np.zeros(len(grid), np.int64)
        seen = np.zeros(len(boxes), dtype=bool)
        for begin in range(0, len(grid), CHUNK):
            keep, visible = self._kept(boxes, windows[begin : begin + CHUNK])
            found[begin : begin + CHUNK] = keep.sum(axis=1)
            seen |= keep.any(axis=0)
            np.add.at(shown, objects, keep.sum(axis=0))
            is_whole = visible >= 1 - 1e-6
            self.counts.whole += int((keep & is_whole).sum())
            self.counts.cut += int((keep & ~is_whole).sum())
            self.counts.dropped += int((~keep & (visible > 0)).sum())
        self.counts.most = max(self.counts.most, int(found.max(initial=0)))
        self.counts.tiles += len(grid)
        self.counts.objects += len(boxes)
        self.counts.empty += int((found == 0).sum())
        self.counts.lost += int((~seen).sum())
        tiles = np.stack((np.full(len(grid), picture), np.arange(len(grid)), found), axis=1)
        if self.augmented or len(grid) == 1 or not self.tiling.whole:
            return tiles
        return np.concatenate((tiles, [[picture, WHOLE_PICTURE, len(boxes)]]))

    def _kept(self, boxes: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, N) bool: which objects stay in which windows, and (T, N) the share of each that is visible there."""
        low, high = windows[:, None, :2], windows[:, None, 2:]
        clipped = np.concatenate((boxes[None, :, :2].clip(low, high), boxes[None, :, 2:].clip(low, high)), axis=-1)
        inside = (clipped[..., 2:] - clipped[..., :2]).prod(axis=-1)
        visible = inside / (boxes[:, 2:] - boxes[:, :2]).prod(axis=-1).clip(min=1e-9)
        covers = stays_labelled(np.zeros(inside.size), clipped.reshape(-1, 4), windows[0])
        return (visible >= self.settings.visible) | covers.reshape(inside.shape), visible

    def _used(self, with_objects: np.ndarray) -> np.ndarray:
        """The tiles that are trained on: those with objects, and a share of the others."""
        full, empty = np.flatnonzero(with_objects), np.flatnonzero(~with_objects)
        most = round(self.settings.empty * len(full)) if len(full) else len(empty)
        if len(empty) > most:
            empty = np.random.default_rng((self.seed, EMPTY)).choice(empty, most, replace=False)
        self.counts.left_out = int((~with_objects).sum()) - len(empty)
        return np.sort(np.concatenate((full, empty)))

    def _record(self, index: int) -> ImageRecord:
        picture = self.pictures.records[int(self._picture[index])]
        grid, number = self._grids[int(self._picture[index])], int(self._number[index])
        height, width = limited_size(grid.size) if number == WHOLE_PICTURE else grid.tile
        return ImageRecord(index, picture.file, height, width)

    def _window(self, picture: int, number: int) -> np.ndarray | None:
        """A tile of a large picture that is read in parts; None where it has to be decoded whole."""
        path, grid = self.pictures.path(picture), self._grids[picture]
        large = open_large(path, self.tiling.size[0], self.pixel_range)
        if large is None or not large.in_parts:
            return None
        try:
            height, width = large.size
            if abs(width / height * grid.size[0] / grid.size[1] - 1) > ASPECT_TOLERANCE:
                raise BadImage(path, f"is {width} x {height}, its annotations are for {grid.size[1]} x {grid.size[0]}")
            return large.reduced() if number == WHOLE_PICTURE else large.window(*_scaled(grid, number, large.size))
        finally:
            large.release()


class TileBatches(EvalBatches):
    """Every tile once, in order; process r of n takes all tiles of the pictures r, r + n, r + 2n, ..."""

    def __init__(
        self, dataset: TiledDataset, batch_size: int, image_size: tuple[int, int], rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(0, batch_size, image_size, rank, world_size)
        own = dataset.of_pictures(range(rank, len(dataset.pictures), world_size))
        self.keys = [SampleKey(0, index, image_size) for index in own]


def _scaled(grid: Grid, number: int, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The window of a tile in a picture that is read at another size than its annotations are for."""
    left, top, right, bottom = grid.window(number)
    y, x = size[0] / grid.size[0], size[1] / grid.size[1]
    left, top = min(round(left * x), size[1] - 1), min(round(top * y), size[0] - 1)
    return left, top, max(round(right * x), left + 1), max(round(bottom * y), top + 1)


def lines_of_tiles(train: object, *validation: object) -> list[str]:
    """What the pictures and objects of a run's loaders have become, where they have tiles."""
    named = (("train", train), *(("val", one) for one in validation))
    return [line for name, loader in named for tiled in tiled_datasets(loader) for line in tiled.lines(name)]


def tiled_datasets(loader: object) -> list[TiledDataset]:
    """The data sets of a loader in their order, where they have tiles; else none."""
    dataset = getattr(loader, "dataset", None)
    return [part for part in getattr(dataset, "datasets", [dataset]) if isinstance(part, TiledDataset)]


def is_read_in_parts(path: Path, tiles: TileConfig) -> bool:
    """Whether a picture is one whose tiles are decoded alone."""
    try:
        picture = open_large(path, tiles.size[0])
    except BadImage:
        return False
    if picture is None or not picture.in_parts:
        return False
    picture.release()
    return True

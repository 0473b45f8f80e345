"""The part of ``mvision data check`` on ``data.tile``: what pictures and objects become when pictures are divided."""

from __future__ import annotations

from dataclasses import dataclass

from mvision.config import AugmentConfig
from mvision.config.tiles import TileConfig
from mvision.data.formats.coco import CocoSplit
from mvision.data.loading.tiles import TileCounts, TiledDataset


@dataclass
class TileReport:
    """The tiles of one split.

    Attributes:
        settings: as the config has them.
        used: tiles (with the whole pictures, where an evaluation looks at these too) that are shown.
        trained: in an epoch of the training; else in an evaluation.
        counts: of tiles and objects.
        classes: how often an epoch shows objects of each class in its tiles, by name.
        problems: what is not learned of the objects.
    """

    settings: TileConfig
    used: int
    trained: bool
    counts: TileCounts
    classes: dict[str, int]
    problems: list[str]

    def lines(self) -> list[str]:
        """For the terminal; the classes are the reader's to add."""
        counts, (height, width) = self.counts, self.settings.size
        what = "in an epoch" if self.trained else "in an evaluation" + ", whole pictures included" * self.settings.whole
        left_out = f"; {counts.left_out} are left out of an epoch (data.tile.empty {self.settings.empty:g})"
        return [
            f"tiles        {self.used} of {width} x {height} pixels {what}, overlap {self.settings.overlap:g}",
            f"empty tiles  {counts.empty} of {counts.tiles} show no object" + left_out * (counts.left_out > 0),
            f"in tiles     {counts.whole + counts.cut} times an object: {counts.whole} whole, {counts.cut} cut by a "
            f"border; at most {counts.most} in a tile",
        ]


def report_tiles(split: CocoSplit, settings: TileConfig, trained: bool, seed: int) -> TileReport:
    """Divide the pictures of a split as a training or an evaluation does.

    Raises:
        UserError: a picture has too many tiles.
    """
    # The default augmentation will do: which tiles there are does not depend on it.
    tiled = TiledDataset(split, settings, AugmentConfig() if trained else None, seed, validate=False)
    classes = {category.name: count for category, count in zip(split.categories, tiled.counts.classes)}
    return TileReport(settings, len(tiled), trained, tiled.counts, classes, tiled.problems())

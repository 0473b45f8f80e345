"""Results of tiles on their way to metrics, which are of whole pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from mvision.inference.tile_results import merge_tiles
from mvision.inference.tiles import Grid
from mvision.structures import Instances

Predicted = dict[str, list[Instances]]
"""By task: one result for each sample of a batch."""


class Tiles(Protocol):
    """What is read of a data set of tiles; ``mvision.data.loading.tiles.TiledDataset`` is one."""

    def place(self, number: int) -> tuple[int, Grid, int | None]:
        """Of a sample: the id of its picture, the picture's tiles, and its number among them; None: all of it."""

    def count_samples(self, number: int) -> int:
        """How many samples the picture of a sample has."""


class TileCollector:
    """Keeps the results of a picture's tiles until all of them are there. The samples of a picture come in succession.

    A picture of which a tile cannot be read never becomes complete, so it is left out, as one without tiles is.
    """

    def __init__(self, tiles: Tiles, regions: Sequence[str]) -> None:
        """``regions``: the tasks that find regions and not objects."""
        self.tiles, self.regions = tiles, frozenset(regions)
        self._picture: int | None = None
        self._found: dict[int | None, dict[str, Instances]] = {}

    def complete(self, numbers: Sequence[int], predicted: Predicted) -> Iterator[tuple[int, dict[str, Instances]]]:
        """Take the results of some samples; yields the ids of pictures that are complete, with their results."""
        for row, number in enumerate(numbers):
            picture, grid, tile = self.tiles.place(number)
            if picture != self._picture:
                self._picture, self._found = picture, {}
            self._found[tile] = {task: results[row] for task, results in predicted.items()}
            if len(self._found) == self.tiles.count_samples(number):
                yield picture, {task: self._merged(task, grid) for task in predicted}
                self._found = {}

    def _merged(self, task: str, grid: Grid) -> Instances:
        found = [self._found[number][task] for number in range(len(grid))]
        if len(found) == 1:
            return found[0]
        whole = self._found[None][task] if None in self._found else None
        return merge_tiles(grid, found, whole, task in self.regions).instances()

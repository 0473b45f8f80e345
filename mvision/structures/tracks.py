"""Which object of a video each instance of a frame is, and where that object has been."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

NO_TRACK = -1


@dataclass(frozen=True)
class Tracks:
    """The tracks of the instances of one frame, row by row.

    Attributes:
        ids: (N,) int64 from 1 on, unique within a video over all classes; ``NO_TRACK`` (-1) for an instance that
            belongs to no track, or to none yet.
        trails: for each instance (P, 2) float32 x, y in pixels: the middle of its box in the latest frames in which it
            was found, oldest first, this frame last. Empty without a track.
    """

    ids: np.ndarray
    trails: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, keep: np.ndarray) -> Tracks:
        """The rows that ``keep`` (bool mask or indices) selects."""
        return Tracks(self.ids[keep], [self.trails[row] for row in np.arange(len(self))[keep].tolist()])

    def scaled(self, x: float, y: float) -> Tracks:
        """The same tracks on pictures of another size: ``x``, ``y`` times as wide and high."""
        return replace(self, trails=[trail * np.array([x, y], np.float32) for trail in self.trails])

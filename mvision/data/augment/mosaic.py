"""A mosaic of four whole images that are turned, shifted and scaled together: many objects in one picture.

Source: Huang et al., "DEIM: DETR with Improved Matching for Fast Convergence", CVPR 2025, section 3.2 (dense one-to-one
matching), and the strengths of its published recipes. Where those let images of different shapes leave gaps between
them, every image is stretched over its quarter here, as it is over the whole picture without a mosaic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mvision.data.augment.affine import rotation, turn_labels, warp
from mvision.data.augment.geometry import FILL, PixelRect, fit, paint, place
from mvision.data.formats.labels import WHOLE, PictureLabels, join_labels

SCALES = (0.5, 1.5)  # at 1 the four images fill the picture
ANGLE = math.radians(10)
SHIFT = 0.1  # of the picture's sides


@dataclass(frozen=True)
class Turn:
    """How a mosaic lies in the picture.

    Attributes:
        scale: 1 where it is as large as the picture.
        angle: in radians, clockwise.
        shift: x, y in sides of the picture.
    """

    scale: float
    angle: float
    shift: tuple[float, float]

    @classmethod
    def draw(cls, rng: np.random.Generator, angle: float = ANGLE) -> Turn:
        """A random one, turned by at most ``angle``, in radians."""
        scale, angle = rng.uniform(*SCALES), rng.uniform(-angle, angle)
        x, y = rng.uniform(-SHIFT, SHIFT, size=2)
        return cls(float(scale), float(angle), (float(x), float(y)))

    def quarter(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels of each of the four images in a picture of this size."""
        height, width = size
        return max(round(height * self.scale / 2), 1), max(round(width * self.scale / 2), 1)

    def matrix(self, size: tuple[int, int], aspect: float) -> np.ndarray:
        """(2, 3) from pixels of the mosaic of four quarters to pixels of the picture; corners at whole numbers.

        Args:
            size: (height, width) of the picture.
            aspect: width by height of what the picture shows before it is stretched: there an angle is an angle.
        """
        height, width = size
        rows, columns = self.quarter(size)
        turn = rotation(self.angle, size, aspect)
        centre = np.array((width * (0.5 + self.shift[0]), height * (0.5 + self.shift[1])))
        return np.column_stack((turn, centre - turn @ (columns, rows)))


def mosaic_of_whole(
    pictures: Sequence[tuple[np.ndarray, PictureLabels]],
    turn: Turn,
    size: tuple[int, int],
    aspect: float,
    around_points: bool = False,
) -> tuple[np.ndarray, PictureLabels]:
    """Four images side by side, top left, top right, bottom left, bottom right, then turned.

    Args:
        pictures: (H, W, 3) uint8 and labels in fractions of it.
        size: (height, width) of the picture.
        aspect: see ``Turn.matrix``.
        around_points: see ``affine.turn_labels``: for angles beyond those of DEIM.

    Returns:
        (height, width, 3) uint8, grey where the mosaic does not reach, and the labels in fractions of it; those of
        which nearly nothing is left are dropped. Where ``cut`` is set, box and area are for ``tighten`` to measure.
    """
    rows, columns = turn.quarter(size)
    whole = (2 * rows, 2 * columns)
    canvas = np.full((*whole, 3), FILL, dtype=np.uint8)
    quarters: list[PixelRect] = [(x, y, x + columns, y + rows) for y in (0, rows) for x in (0, columns)]
    placed = []
    for (image, labels), window in zip(pictures, quarters, strict=True):
        placement = fit(WHOLE, (image.shape[0], image.shape[1]), window, whole)
        assert placement is not None
        canvas = paint(image, placement, canvas)
        placed.append(place(labels, placement, window))
    matrix = turn.matrix(size, aspect)
    return warp(canvas, matrix, size, FILL), turn_labels(join_labels(placed), matrix, whole, size, around_points)

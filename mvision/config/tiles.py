"""The key ``data.tile``: training and evaluation on tiles of large pictures."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from mvision.inference.tiles import DEFAULT_OVERLAP, LARGEST, MOST_OVERLAP, SMALLEST, Tiling
from mvision.settings import Settings


class TileConfig(Settings):
    """How the pictures of a data set are divided. ``data.tile: 640`` stands for ``data.tile: {size: 640}``.

    Attributes:
        size: (height, width) of a tile in pixels of the picture; one number stands for both.
        overlap: of neighbouring tiles, see ``mvision.inference.tiles.Tiling``.
        visible: a tile has those objects of which it shows at least this share (of the box), 0.25..1 (augmentation
            leaves smaller rests out everywhere), and parts of larger objects that cover a tenth of the tile. Smaller
            parts are left out, and their number is said.
        empty: of the tiles without objects, so many for each tile with some are trained on, drawn with the run's seed;
            the others are left out. Evaluation takes all.
        whole: evaluate with the whole picture at low resolution besides, see ``Tiling``.
    """

    size: tuple[int, int]
    overlap: float = Field(DEFAULT_OVERLAP, ge=0, le=MOST_OVERLAP)
    visible: float = Field(0.3, ge=0.25, le=1)
    empty: float = Field(1.0, ge=0, le=1e6)
    whole: bool = True

    @model_validator(mode="before")
    @classmethod
    def _from_size(cls, value: Any) -> Any:
        return {"size": value} if isinstance(value, int | str | list | tuple) else value

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("size")
    @classmethod
    def _in_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not all(SMALLEST <= side <= LARGEST for side in value):
            raise ValueError(f"sides of {SMALLEST} to {LARGEST} pixels are possible")
        return value

    @property
    def tiling(self) -> Tiling:
        """The same for a prediction."""
        return Tiling(self.size, self.overlap, self.whole)

"""A class of objects, as the data set describes it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from mvision.settings import Settings


class Category(Settings):
    """One class of objects: its id in the data set's files, its name, and what its keypoints are called.

    Attributes:
        skeleton: pairs of 0-based keypoint indices.
        sigmas: standard deviation of each keypoint as a fraction of the object's scale; empty: by the names of the
            points, or one for all (see ``mvision.structures.oks.keypoint_sigmas``).
        flip_pairs: pairs of 0-based keypoint indices that change places in a mirror; None: by names such as
            ``left_eye``.
    """

    id: int = Field(ge=-(2**63), lt=2**63)
    name: str
    keypoints: list[str] = []
    skeleton: list[tuple[int, int]] = []
    sigmas: list[float] = []
    flip_pairs: list[tuple[int, int]] | None = None

    @field_validator("*")
    @classmethod
    def _not_huge(cls, value: Any) -> Any:
        return value  # unlike settings, ids of annotation files are often large: hashes, times

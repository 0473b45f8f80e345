"""Words for the parts of a data set, as folders and files are called."""

from __future__ import annotations

WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
DIGITS = "0123456789"


def split_of(name: str) -> str | None:
    """The split that a name stands for as a whole: ``Train``, ``valid``, ``val2017``; None for another name."""
    return WORDS.get(name.casefold().rstrip(DIGITS).rstrip("_-"))

"""Text of labels: the class names, in a font of this system that has their characters, or numbers in their place."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ALWAYS = frozenset(".0123456789 ")  # characters of every label: the score
VARIATION_SELECTORS = range(0xFE00, 0xFE10)


class Labels(NamedTuple):
    """How the classes of a model are written.

    ``texts``: of each class; ``font``: the file of the font; ``numbered``: the number that is written, by the name of
    each class whose characters no font has.
    """

    texts: list[str]
    font: str
    numbered: dict[str, str]


def unwritable(categories: Sequence[Any]) -> dict[str, str]:
    """The number that labels show for a class, by the name of each class that cannot be written, in their order.

    Args:
        categories: with ``name`` and ``id``.
    """
    return label_texts(categories).numbered


def label_texts(categories: Sequence[Any]) -> Labels:
    """How to write class names: in the font that has the characters of the most of them.

    The others become the number of the class in the data set (``category_id`` in ``predictions.json``): a font draws
    one and the same box for every character that it lacks.
    """
    return _label_texts(tuple((category.name, str(category.id)) for category in categories))


@lru_cache(maxsize=64)
def _label_texts(classes: tuple[tuple[str, str], ...]) -> Labels:
    # A class name may hold line breaks and other commands; a label is one line.
    names = [" ".join("".join(" " if _is_command(c) else c for c in name).split()) for name, _ in classes]
    font = font_with(tuple(dict.fromkeys(names)))
    has = _characters_of(font)
    texts, numbered = [], {}
    for name, (original, number) in zip(names, classes):
        missing = _needed(name) - has
        texts.append(number if missing or not name else name)
        if missing:
            numbered[original] = number
    return Labels(texts, font, numbered)


@lru_cache(maxsize=64)
def font_with(names: tuple[str, ...]) -> str:
    """The file of the font that can write the most of these names; of equal ones the first of ``_fonts``."""
    needed = [_needed(name) | ALWAYS for name in names]
    best, most = default_font(), -1
    for path in _fonts():
        has = _characters_of(path)
        count = sum(characters <= has for characters in needed)
        if count > most and _can_be_drawn(path):
            best, most = path, count
        if count == len(needed):
            break
    return best


def default_font() -> str:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic, symbols."""
    import matplotlib as mpl

    return str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf")


def _needed(name: str) -> set[str]:
    """The characters of a name that have a shape of their own."""
    return {c for c in name if unicodedata.category(c) not in ("Cf", "Zs") and ord(c) not in VARIATION_SELECTORS}


def _is_command(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


@lru_cache(maxsize=256)
def _characters_of(path: str) -> frozenset[str]:
    """The characters that a font has; none of one that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # damaged, or a kind that FreeType does not know
        return frozenset()
    if font.family_name.startswith("Last Resort"):  # has a box with the name of the script for every character
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) | {" "}


def _can_be_drawn(path: str) -> bool:
    """Fonts of coloured pictures (emoji) exist in one size only, which Pillow refuses to change."""
    from PIL import ImageFont

    try:
        ImageFont.truetype(path, 13)
    except OSError:
        return False
    return True


def _fonts() -> Iterator[str]:
    """The default font, then those of the system and of matplotlib: bold ones first, without serifs before others."""
    import matplotlib as mpl

    yield default_font()
    # Looked up each time, in 0.1 s: matplotlib's own list is a file that does not know of fonts installed since. The
    # import may have to write that file.
    from matplotlib.font_manager import findSystemFonts

    found = {*findSystemFonts(), *map(str, (Path(mpl.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))}
    yield from sorted(found, key=_last_choice)


def _last_choice(path: str) -> tuple[bool, bool, bool, str]:
    name = Path(path).stem.lower()
    return "sans" not in name, "bold" not in name, "italic" in name or "oblique" in name, path

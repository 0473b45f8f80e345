"""Class names in labels: a font that has their characters, or a number in their place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from mvision.drawing import draw_instances, fonts, unwritable
from mvision.drawing.fonts import default_font, font_with, label_texts
from mvision.structures import Category
from tests.test_draw import GREY, instances

CHINESE, THAI = "行人", "แมว"


def make_font(path: Path, characters: str) -> Path:
    """A font with a black square for each of these characters, and for no others."""
    builder = FontBuilder(1000, isTTF=True)
    names = {character: f"glyph{number}" for number, character in enumerate(characters)}
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(character): name for character, name in names.items()})
    pen = TTGlyphPen(None)
    for place in ((0, 0), (0, 800), (800, 800), (800, 0)):
        (pen.moveTo if place == (0, 0) else pen.lineTo)(place)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys([".notdef", *names.values()], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (900, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fonts of the system, to be filled; before them comes the default one."""
    paths: list[str] = []
    monkeypatch.setattr(fonts, "_fonts", lambda: iter([default_font(), *paths]))
    for cached in (fonts.font_with, fonts._label_texts):
        cached.cache_clear()
    yield paths
    for cached in (fonts.font_with, fonts._label_texts):
        cached.cache_clear()


def classes(*names: str) -> list[Category]:
    return [Category(id=10 * number, name=name) for number, name in enumerate(names, start=1)]


def test_latin_greek_cyrillic_and_signs_are_in_the_default_font(system: list[str]) -> None:
    names = ("cat", "größe", "Ωж", "✓ ok", "two\nlines", "tag\U000e0041", "heart\ufe0f")
    labels = label_texts(classes(*names))
    assert labels.font == default_font()
    assert labels.texts == ["cat", "größe", "Ωж", "✓ ok", "two lines", "tag\U000e0041", "heart\ufe0f"]
    assert not labels.numbered


def test_a_class_without_a_font_becomes_its_number(system: list[str]) -> None:
    categories = classes("cat", CHINESE, THAI)
    labels = label_texts(categories)
    assert labels.texts == ["cat", "20", "30"]
    assert unwritable(categories) == {CHINESE: "20", THAI: "30"}
    drawn = draw_instances(GREY, instances([[50, 60, 150, 120]], categories=categories, labels=np.array([1])))
    number = draw_instances(GREY, instances([[50, 60, 150, 120]], categories=classes("x", "20"), labels=np.array([1])))
    assert np.array_equal(drawn, number)


def test_the_font_that_has_most_of_the_names_is_taken(system: list[str], tmp_path: Path) -> None:
    latin = "abcdefghijklmnopqrstuvwxyz.0123456789 "
    one = make_font(tmp_path / "one.ttf", latin + CHINESE)
    both = make_font(tmp_path / "both.ttf", latin + CHINESE + THAI)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    system += [str(tmp_path / "broken.ttf"), str(tmp_path / "gone.ttf"), str(one), str(both)]
    labels = label_texts(classes("cat", CHINESE, THAI))
    assert (labels.font, labels.texts, labels.numbered) == (str(both), ["cat", CHINESE, THAI], {})
    assert font_with((CHINESE,)) == str(one)
    # No font has the Greek name as well: the one that can write two of three is taken.
    labels = label_texts(classes(CHINESE, THAI, "Ω"))
    assert (labels.font, labels.numbered) == (str(both), {"Ω": "30"})


def test_a_font_without_digits_is_of_no_use(system: list[str], tmp_path: Path) -> None:
    system.append(str(make_font(tmp_path / "letters.ttf", CHINESE)))
    assert unwritable(classes(CHINESE)) == {CHINESE: "10"}


def test_fonts_of_one_size_are_passed_over(system: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fonts of coloured pictures: Pillow refuses to open them at another size than their own."""
    system.append(str(make_font(tmp_path / "emoji.ttf", "🐈.0123456789 ")))
    assert label_texts(classes("🐈")).font == system[0]
    for cached in (fonts.font_with, fonts._label_texts):
        cached.cache_clear()
    monkeypatch.setattr(fonts, "_can_be_drawn", lambda path: path != system[0])
    assert unwritable(classes("🐈")) == {"🐈": "10"}


def test_control_characters_are_not_drawn(system: list[str]) -> None:
    assert label_texts(classes("red\x1b[31m", "\x07", "a\u2028b")).texts == ["red [31m", "20", "a b"]


def test_fonts_of_the_system_are_found_and_the_last_resort_is_not(tmp_path: Path) -> None:
    found = list(fonts._fonts())
    assert found[0] == default_font()
    assert any("STIX" in path for path in found)
    last = next(path for path in found if "LastResort" in path)
    assert not fonts._characters_of(last)


def test_a_newly_installed_font_is_found(tmp_path: Path) -> None:
    """Without a list of fonts that was made before."""
    home = tmp_path / "home"
    (home / ".fonts").mkdir(parents=True)
    font = make_font(home / ".fonts" / "new.ttf", f".0123456789 {CHINESE}")
    code = f"from mvision.drawing.fonts import font_with; print(font_with(({CHINESE!r},)))"

    environment = {**os.environ, "HOME": str(home), "PYTHONIOENCODING": "utf-8"}
    environment.pop("XDG_DATA_HOME", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == str(font), done.stderr

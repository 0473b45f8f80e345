"""The figures of the site are drawn from the tables of its pages, by scripts that are kept."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.pages import DOCS, README, ROOT, pages, read


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


figures, pictures = script("site_figures"), script("pictures")


def test_figures_have_the_numbers_of_the_tables() -> None:
    drawn = figures.all_figures()
    above, below = drawn["blood_cells"].lines
    assert (below.label, below.x[0], below.y[0], below.x[-1], below.y[-1]) == ("AP", 140, 0.534, 2476, 0.652)
    assert all(a > b for a, b in zip(above.y, below.y))
    masks, _ = drawn["nuclei"].lines
    assert (masks.x, masks.y) == ([140, 412, 648], [0.524, 0.605, 0.645])
    assert drawn["pretrained"].lines[0].y == [0.019, 0.147, 0.224]
    assert max(line.y[-1] for line in drawn["pretrained"].lines) == 0.461
    assert [line.y[-1] for line in drawn["starts"].lines] == [0.422, 0.061, 0.173, 0.345, 0.363, 0.150, 0.336]


def test_a_table_that_is_gone_is_named() -> None:
    with pytest.raises(SystemExit, match=r"learning.md: no table with the columns seconds, lions"):
        figures.find_table("learning.md", ("seconds", "lions"))


def test_a_figure_is_drawn(tmp_path: Path) -> None:
    figures.all_figures()["nuclei"].save(tmp_path / "nuclei.png")
    assert Image.open(tmp_path / "nuclei.png").size == Image.open(DOCS / "figures" / "nuclei.png").size


def test_every_picture_of_the_pages_comes_from_a_script() -> None:
    """Or from a command of mvision, whose help names the file."""
    shown = {name for page in pages() for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", read(page))}
    own = {f"figures/{name}.png" for name in figures.all_figures()}
    made = "\n".join(read(path) for path in [*DOCS.glob("scripts/*.py"), *(ROOT / "cli").glob("*.py")])
    for name in shown - own:
        # Those of a script that draws one for each task and data set lie in a folder of its name.
        assert Path(name).name in made or (DOCS / "scripts" / f"{Path(name).parent.name}.py").is_file(), name
    assert own <= shown


def test_the_strip_is_cut_out_of_the_sheets() -> None:
    kept = Image.open(DOCS / "hero.jpg")
    parts = [Image.open(DOCS / file).crop(place) for file, *place in pictures.PARTS]
    assert kept.size == pictures.in_rows(parts, rows=1).size
    for file, left, top, right, bottom in pictures.PARTS:
        width, height = Image.open(DOCS / file).size
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    assert "docs/hero.jpg" in read(README)


def test_rows_are_as_wide_as_the_sheet() -> None:
    sheet = pictures.in_rows([Image.new("RGB", size, "red") for size in ((30, 20), (20, 30), (40, 40))], rows=2)
    assert sheet.width == pictures.WIDTH
    assert sheet.getpixel((pictures.WIDTH - 1, 5)) == (255, 0, 0)
    assert sheet.getpixel((pictures.WIDTH - 1, sheet.height - 1)) == (255, 0, 0)

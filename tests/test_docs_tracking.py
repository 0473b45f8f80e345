"""The code in docs/tracking.md runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import mvision
from mvision.inference.tracking import METHODS, TRAIL, WEAK
from tests.tracked_videos import FRAMES, TrackingModel, crossing, write_crossing

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tracking.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def test_the_code_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mvision, "load", lambda source: TrackingModel(), raising=False)
    write_crossing(tmp_path / "street.mp4")
    names: dict[str, Any] = {"frames": [crossing(frame) for frame in range(FRAMES)]}
    loop, own, counting = BLOCKS
    exec(loop, names)
    assert capsys.readouterr().out.splitlines()[-1].startswith("0.92 s [")
    assert names["picture"].shape == names["image"].shape
    exec(own, names)
    assert [sorted(ids) for ids in names["ids"][1:]] == [[1, 2]] * (FRAMES - 1)
    assert capsys.readouterr().out == "{'red': 1, 'green': 1}\n"
    exec(counting, names)
    assert capsys.readouterr().out == "1 to the right, 1 to the left\n{'red': 1}\n"


def test_the_figures_of_the_page() -> None:
    text = " ".join(PAGE.split())
    assert re.findall(r"^\| `(\w+)` \| \[", PAGE, flags=re.M) == list(METHODS)
    assert f"down to {WEAK}, start none" in text
    assert f"in the last {TRAIL} frames" in text

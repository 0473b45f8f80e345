"""The list of planted faults is of the code as it is: running all of them takes hours, and is not done each time."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_every_fault_can_be_planted() -> None:
    """Its text is in its file, once, and would be changed; its tests are there."""
    faults = yaml.safe_load((ROOT / "docs/scripts/mutations.yaml").read_text(encoding="utf-8"))
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in {fault["file"] for fault in faults}}
    assert [fault["name"] for fault in faults if texts[fault["file"]].count(fault["old"]) != 1] == []
    assert [fault["name"] for fault in faults if fault["old"] == fault["new"]] == []
    names = [fault["name"] for fault in faults]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    missing = []
    for place in {place for fault in faults for place in fault["tests"]}:
        file, *parts = place.split("::")
        text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
        named = [part.split("[")[0] for part in parts]
        if not text or not all(f"def {name}(" in text or f"class {name}" in text for name in named):
            missing.append(place)
    assert missing == []

"""The commands of docs/labelling.md run as they are written there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from mvision.cli.main import run
from mvision.commands.label import REVIEW, THRESHOLD
from mvision.data.formats.label_formats import FORMATS
from mvision.data.formats.labelled import POINT_THRESHOLD, RELATIVE_TOLERANCE, TOLERANCE
from mvision.data.tools.label import LOWEST
from mvision.weights import save_weights
from tests.conftest import write_squares
from tests.test_weights import make_model

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "labelling.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    for line in block.splitlines()
    if line.startswith("mvision ")
]


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_weights(make_model(), tmp_path / "runs" / "detection" / "1" / "best.safetensors")
    write_squares(tmp_path / "squares", images=5, splits=("train",))
    (tmp_path / "squares" / "images").rename(tmp_path / "photos")
    assert [command[0] for command in COMMANDS] == ["label", "data", "train", "label"]
    names = [category.name for category in make_model().config.categories]
    for command in COMMANDS:
        arguments = [text.replace("person=", f"{names[0]}=") for text in command]
        if command[0] == "label":
            arguments += ["--device", "cpu", *(["--threshold", "0"] if "--threshold" not in command else [])]
        if command[0] == "train":
            arguments += ["--epochs", "1", "--device", "cpu", "--workers", "0", "--output", "run"]
        assert run(arguments) == 0, command
        if command[0] == "label" and not Path("corrected").exists():
            shutil.copytree("for_cvat", "corrected")
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_the_figures() -> None:
    for text in (
        f"score from {THRESHOLD} on are written",
        f"below {REVIEW} (`--review`)",
        f"from a score of {LOWEST} on",
        f"by {TOLERANCE} pixels at most",
        f"{100 * RELATIVE_TOLERANCE:.1f} % of the object's size",
        f"score below {POINT_THRESHOLD} are written as not labelled",
        *(f"| `{name}` |" for name in FORMATS),
    ):
        assert text in " ".join(PAGE.split()), text

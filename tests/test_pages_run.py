"""The pages' commands and code, run as they are written there, on small data and with models of random weights."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

import mvision
from mvision.cli import main
from mvision.cli.main import run
from mvision.engine import epoch
from tests.page_faults import add_faults
from tests.page_place import make_place
from tests.pages import DOCS, README, ROOT, Block, blocks, commands, read

# Their blocks of the language console have what is printed.
PRINTED = (DOCS / "data.md", DOCS / "troubleshooting.md")
CODE = ("detection", "instance-seg", "keypoints", "semantic-seg", "joint", "quickstart", "python", "sharing", "tiles")
# On these pages the commands are run that take a second: they read data, or predict with a small model.
RUN = [DOCS / f"{name}.md" for name in ("quickstart", "data", "augmentation", "prediction", "weights")]
SHORT = {
    "data": (),
    "val": ("--device", "cpu", "--workers", "0"),
    "predict": ("--device", "cpu"),
    "models": (),
    "info": (),
}
# What the small folder lacks, or another page tries.
ELSEWHERE = ("s3://", "map.tif", ".mp4", "dfine-s", "user/name", ".onnx", ".pth", "rtdetr_r18")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which everything runs, without a network."""
    root = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("MVISION_CACHE", str(root / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
        # Pages load the same runs: a model that has predicted once is ready for the next page.
        patch.setattr(mvision, "load", once(mvision.load), raising=False)
        make_place(root)
        add_faults(root)
        yield root


def once(load: Callable[..., mvision.Model]) -> Callable[..., mvision.Model]:
    """``mvision.load`` that keeps what it has loaded."""
    loaded: dict[str, mvision.Model] = {}

    def loading(*given: Any, **more: Any) -> mvision.Model:
        name = str((given, more))
        if name not in loaded:
            loaded[name] = load(*given, **more)
        return loaded[name]

    return loading


def sessions(block: Block) -> list[tuple[str, list[str]]]:
    """Each command of a console block with the lines that follow it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ mvision "), []))
        else:
            found[-1][1].append(line)
    return found


SESSIONS = [session for page in PRINTED for block in blocks(page, "console") for session in sessions(block)]


def pattern(lines: list[str]) -> str:
    """``...`` alone on a line is any number of lines, inside a line it is any text."""
    parts = [".*" if line == "..." else re.escape(line).replace(r"\.\.\.", "[^\n]*") + "\n" for line in lines]
    return "".join(parts).replace(".*", "(?:[^\n]*\n)*")


@pytest.mark.parametrize(("command", "lines"), SESSIONS, ids=[command for command, _ in SESSIONS])
def test_what_is_printed(place: Path, capsys: pytest.CaptureFixture[str], command: str, lines: list[str]) -> None:
    (place / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff" + 100 * b"x")
    code = run(shlex.split(command))
    (place / "photos" / "broken.jpg").unlink()
    captured = capsys.readouterr()
    # Progress bars redraw their line.
    text = re.sub(r"^.*\r", "", captured.out + captured.err, flags=re.M)
    assert re.match(pattern(lines if lines[0] == "..." else [*lines, "..."]), text), text
    assert code == (2 if re.search(r"^(?:error|not usable): ", text, flags=re.M) else 0)


def test_a_pattern_notices_other_text() -> None:
    assert re.match(pattern(["...", "error: a ... c"]), "first\nsecond\nerror: a b c\n")
    assert not re.match(pattern(["...", "error: a ... c"]), "first\nerror: a b d\n")
    assert not re.match(pattern(["error: a"]), "first\nerror: a\n")


def short_commands() -> list[list[str]]:
    """Every short command of the pages once."""
    found: dict[tuple[str, ...], None] = {}
    for page in RUN:
        for block in blocks(page, "bash"):
            for arguments in commands(block):
                if arguments[0] in SHORT and not any(part in word for word in arguments for part in ELSEWHERE):
                    found[tuple(arguments)] = None
    return [list(arguments) for arguments in found]


@pytest.mark.parametrize("arguments", short_commands(), ids=" ".join)
def test_short_commands_run(place: Path, arguments: list[str]) -> None:
    if any("fold2" in word for word in arguments):
        pytest.skip("tests/test_folds.py trains the folds")
    for output in (word for word in arguments if word in ("plain_coco", "val.jpg")):
        assert not (place / output).exists(), "a command that was run before has written it"
    assert run([*arguments, *SHORT[arguments[0]]]) == 0


@pytest.mark.parametrize("page", [*(DOCS / f"{name}.md" for name in CODE), README], ids=lambda page: page.stem)
def test_code_runs(place: Path, page: Path) -> None:
    """All blocks of a page, one after the other; what they take as given is here."""
    picture = np.asarray(Image.open(place / "street.jpg"))
    names: dict[str, Any] = {"array": picture, "pil_image": Image.fromarray(picture), "image_id": 1}
    names["images"] = [picture] * 2
    for block in blocks(page, "python"):
        if "HybridEncoder" in block.text:  # tests/test_packaging.py
            continue
        exec(block.text, names)
    assert any(name in names for name in ("found", "r", "model"))
    if page.stem == "python":
        assert names["loss"].isfinite()
        assert names["outputs"]["detection"]["boxes"].shape[-1] == 4


def test_messages_that_no_small_folder_brings_about() -> None:
    """Out of memory, divergence, missing packages: the page has the text of the code."""
    page = " ".join(line for block in blocks(DOCS / "troubleshooting.md", "text") for line in block.text.splitlines())
    code = "".join(
        read(ROOT / "mvision" / file)
        for file in (
            "engine/zero_shot.py",
            "engine/epoch.py",
            "data/loading/loader.py",
            "deploy/sessions.py",
            "inference/tracking.py",
        )
    )
    plain = re.sub(r'"\s*f?"', "", code)  # strings that go on in the next line
    for part in (
        "nothing is found, though these weights know ",
        "or the weights are damaged (mvision val with the data that they were trained on)",
        "the gradient is not finite; step left out",
        "training diverged: no finite gradient in ",
        "lower train.lr or use --precision fp32",
        "a loading process ended unexpectedly: out of memory, or of shared memory? Try fewer --workers; 0 loads in",
        " is missing: pip install ",
        "the package trackers is missing: pip install 'trackers>=2.6' (mvision's extra [tracking])",
    ):
        assert part in page, part
        assert part in plain, part
    assert main._OUT_OF_MEMORY in page
    line = main._bad_input_line(type("OutOfMemoryError", (Exception,), {})("CUDA out of memory. Tried"))
    assert line is not None
    assert line.partition(" (")[0] in page
    assert epoch.MAX_BAD_STEPS > 1


@pytest.mark.parametrize("block", blocks(DOCS / "data.md", "text"), ids=lambda block: block.text.split("/")[0])
def test_the_files_of_the_layouts_are_there(place: Path, block: Block) -> None:
    files = block.text.split()
    assert files
    for file in files:
        assert (place / file).is_file(), file

"""The command line: what it prints, what it answers mistakes with, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import cv2
import numpy as np
import pytest

from mvision import __version__
from mvision.cli.main import cli, run
from mvision.cli.options import ImageSize

ROOT = Path(__file__).resolve().parent.parent


def _leaves(command: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from _leaves(below, (*path, name))
    else:
        yield path


COMMANDS = sorted(_leaves())
# A model and a run that take a second.
SMALL_RUN = {
    "train.val_interval": 1,
    "model.backbone.name": "test_resnet",
    "model.neck.embed_dim": 32,
    "model.neck.num_heads": 2,
    "model.neck.ffn_dim": 32,
    "model.heads.detection.embed_dim": 32,
    "model.heads.detection.num_heads": 2,
    "model.heads.detection.ffn_dim": 32,
    "model.heads.detection.num_queries": 10,
    "model.heads.detection.num_layers": 1,
}
SMALL = ["--image-size=64", "--batch-size=4", "--epochs=1", "--workers=0", "--device=cpu", "--precision=fp32"]
SMALL += [argument for key, value in SMALL_RUN.items() for argument in ("-o", f"{key}={value}")]


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run; check that it ends with code 2 and one line on stderr, and return that line."""
    assert run(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1, line
    return line


def _process(*arguments: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "mvision", *arguments], **{**pipes, **options})  # type: ignore[call-overload]


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4 to see a child's CPU time")
def test_help_takes_less_than_half_a_second() -> None:
    """Seconds of CPU, the best of three: the wall clock of a busy machine says nothing about the program."""

    def seconds() -> float:
        child = _process("--help", stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = status
        assert status == 0
        return usage.ru_utime + usage.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"mvision {__version__}\n"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_that_parses(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    example = lines[lines.index("  Example:") + 1].split()
    assert example[: len(path) + 1] == ["mvision", *path]
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    command.make_context(" ".join(path), example[len(path) + 1 :])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian': did you mean 'train'?"),
        (["data", "chek"], "no command 'chek': did you mean 'check'?"),
        (
            ["xyzzy"],
            "choose one of benchmark, data, demo, export, info, label, models, predict, push, train, transfer, val",
        ),
        (["train", "--epoch", "3"], "--epochs"),
        (["train", "--wieghts", "x"], "no such option"),
        (["val"], "missing option '--weights'"),
        (["train", "--precision", "bf61"], "'bf61' is unknown: did you mean 'bf16'?"),
        (["train", "--freeze", "bakbone"], "'bakbone' is unknown: did you mean 'backbone'?"),
        (["train", "--image-size", "48ox640"], "'48ox640' is neither N nor HxW"),
        (["train", "--epochs", "many"], "'many' is not a valid integer"),
        (["train", "--config", "none.yaml"], "'none.yaml' does not exist"),
        (["predict", "--threshold", "1.5"], "1.5 is not in the range"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(capsys, *arguments)
    assert message in line
    assert "(help: mvision" in line


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ([], ["data"]):
        assert run(path) == 0
        assert capsys.readouterr().out.startswith(" ".join(["Usage: mvision", *path]))


@pytest.mark.parametrize(("text", "size"), [("640", (640, 640)), ("480x640", (480, 640)), ("480X640", (480, 640))])
def test_image_size_is_height_and_width(text: str, size: tuple[int, int]) -> None:
    assert ImageSize().convert(text, None, None) == size


def _write_data(folder: Path) -> Path:
    """Eight pictures with a light box on black, half of them for validation."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, first in (("train", 0), ("val", 4)):
        images, annotations = [], []
        for number in range(first, first + 4):
            x, y, size = 8 + 4 * number, 40 - 4 * number, 24
            picture = np.zeros((80, 96, 3), np.uint8)
            picture[y : y + size, x : x + size] = 200
            cv2.imwrite(str(folder / "images" / f"{number}.png"), picture)
            images.append({"id": number, "file_name": f"{number}.png", "height": 80, "width": 96})
            box = {"id": number + 1, "image_id": number, "category_id": 7, "bbox": [x, y, size, size]}
            annotations.append({**box, "area": size**2, "iscrowd": 0})
        tree = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "box"}]}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_data(tmp_path_factory.mktemp("data") / "boxes")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestBadInput:
    """One line and code 2 for what a user can mend, with the thing named and the way out."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("train --task detectoin", ["detectoin", "detection"]),
            ("train --model resnt50", ["--model resnt50", "tiny", "resnet50"]),
            ("train -o train.epoch=3", ["'train.epoch'", "'epochs'"]),
            ("train -o train.lr", ["-o train.lr", "key.sub=value"]),
            ("train --epochs 0", ["train.epochs", "greater than or equal to 1", "0"]),
            ("train --image-size 100", ["model.image_size", "multiples of 32"]),
            ("train --data nowhere --precision fp32", ["nowhere", "no such folder"]),
            ("train --device gpu", ["--device gpu", "cpu"]),
            ("train --resume .", ["--resume .", "config.yaml"]),
            ("train --init nothing", ["nothing", "no such file or folder"]),
            ("train --init text.safetensors", ["text.safetensors", "not a safetensors file"]),
            ("val --weights nothing", ["nothing", "no such file or folder"]),
            ("val --weights text.safetensors", ["text.safetensors", "not a safetensors file"]),
            ("val --weights model.pth", ["model.pth", "never read"]),
            ("predict", ["no run", "mvision train --task detection", "--weights"]),
            ("predict --task detectoin", ["detectoin", "detection"]),
            ("info --model resnt50", ["--model resnt50", "resnet50"]),
            ("info --model tiny --weights x", ["--model", "--weights"]),
            ("data check nowhere", ["nowhere", "no such folder"]),
            ("data show text.safetensors", ["text.safetensors"]),
        ],
    )
    def test_is_one_line(
        self, arguments: str, words: list[str], elsewhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("text.safetensors", "model.pth"):
            (elsewhere / name).write_text("some text", encoding="utf-8")
        line = _refused(capsys, *arguments.split())
        for word in words:
            assert word in line
        assert not (elsewhere / "runs").exists()

    @pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="a GPU is here")
    def test_no_gpu(self, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--device cuda" in _refused(capsys, "train", "--device", "cuda")

    def test_unknown_key_in_a_file(self, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (elsewhere / "mine.yaml").write_text("train: {epoch: 3}", encoding="utf-8")
        line = _refused(capsys, "train", "--config", "mine.yaml")
        assert line == "error: config mine.yaml: unknown key 'train.epoch': did you mean 'epochs'?\n"

    @pytest.mark.parametrize("content", ["", "{]", "[]", '{"images": []}'])
    def test_malformed_annotations(self, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = _write_data(tmp_path / "data") / "annotations" / "train.json"
        file.write_text(content, encoding="utf-8")
        assert str(file) in _refused(capsys, "train", "--data", str(tmp_path / "data"), *SMALL)
        assert run(["data", "check", str(tmp_path / "data"), "--quick"]) == 2
        assert "not usable" in capsys.readouterr().out

    def test_output_that_cannot_be_a_folder(
        self, data: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (elsewhere / "file").write_text("", encoding="utf-8")
        line = _refused(capsys, "train", "--data", str(data), "--output", "file/run", *SMALL)
        assert "file/run" in line

    def test_resume_excludes_what_the_run_decides(self, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = _refused(capsys, "train", "--resume", ".", "--model", "tiny")
        assert "leave --model out" in line


class TestRun:
    """A run from training to pictures, as a user goes through it."""

    @pytest.fixture(scope="class")
    def place(self, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        """A working folder with one trained run."""
        place = tmp_path_factory.mktemp("place")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            assert run(["train", "--task", "detection", "--data", str(data), *SMALL]) == 0
            yield place

    def test_leaves_what_the_page_promises(self, place: Path) -> None:
        folder = place / "runs" / "detection" / "1"
        page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
        for name in sorted({path.name for path in folder.iterdir()}):
            assert f"`{name}`" in page or f"`{name}/`" in page
        assert {path.name for path in folder.iterdir()} == {
            ".lock",
            "best.safetensors",
            "calibration.png",
            "config.yaml",
            "confusion_matrix.png",
            "curves.json",
            "curves.png",
            "last",
            "metrics.json",
            "metrics.jsonl",
            "predictions.jpg",
            "results.png",
        }

    def test_val_repeats_the_figures_of_training(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert (
            run(["val", "--weights", "runs/detection/1", "--output", "val", "--workers", "0", "--device", "cpu"]) == 0
        )
        assert "AP50" in capsys.readouterr().out
        again = json.loads((place / "val" / "metrics.json").read_text())
        figures = json.loads((place / "runs" / "detection" / "1" / "metrics.json").read_text())
        assert again == {task: pytest.approx(values, abs=1e-6) for task, values in figures.items()}

    def test_predict_takes_the_newest_run_and_its_images(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["predict", "--task", "detection", "--threshold", "0", "--device", "cpu"]) == 0
        assert "4 images" in capsys.readouterr().out
        assert {path.name for path in (place / "predictions").iterdir()} == {
            "4.png",
            "5.png",
            "6.png",
            "7.png",
            "predictions.json",
        }
        results = json.loads((place / "predictions" / "predictions.json").read_text())
        assert {entry["category_name"] for entry in results} == {"box"}

    def test_info_counts_every_part(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["info", "--weights", "runs/detection/1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = {line.split()[0]: line.split()[1:] for line in lines if line}
        parts = [rows[name] for name in ("backbone", "neck", "heads.detection")]
        for column in (0, 1, 3):
            sums = sum(int(row[column].replace(",", "")) for row in parts)
            assert sums == int(rows["total"][column].replace(",", ""))
        assert all(float(row[2]) > 0 for row in [*parts, rows["total"]])

    def test_the_architecture_comes_with_init(self, data: Path, place: Path) -> None:
        from mvision.commands.train import run_config

        config = run_config(init="runs/detection/1", options={"train.epochs": 2})
        assert (config.model.backbone.name, config.model.neck.embed_dim) == ("test_resnet", 32)
        assert (config.model.image_size, config.train.epochs) == ((64, 64), 2)
        assert list(config.model.heads) == ["detection"]
        assert run_config(init="runs/detection/1", model="tiny").model.neck.embed_dim != 32

    def test_resume_takes_the_config_of_the_run(self, place: Path) -> None:
        from mvision.commands.train import run_config

        config = run_config(resume=Path("runs/detection/1"), options={"train.epochs": 2})
        assert (config.model.backbone.name, config.train.epochs) == ("test_resnet", 2)


@pytest.mark.timeout(600)
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group")
def test_ctrl_c_ends_a_training_with_130_and_leaves_whole_files(data: Path, tmp_path: Path) -> None:
    from mvision import load
    from mvision.storage.run_folder import RunFolder

    options = [option for option in SMALL if option != "--workers=0"]
    child = _process("train", "--data", str(data), *options, "--epochs=1000", cwd=tmp_path, start_new_session=True)
    folder = tmp_path / "runs" / "detection" / "1"
    try:
        deadline = time.monotonic() + 300
        while not (folder / "best.safetensors").is_file() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(child.pid, signal.SIGINT)  # to every process of the terminal's foreground, as the key does
        _, errors = child.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left of the group where all is well
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 130, errors
    line = "stopped by Ctrl-C; go on with: mvision train --resume runs/detection/1"
    assert errors.splitlines()[-1] == line
    assert "Traceback" not in errors
    load(folder)
    RunFolder.resume(folder)
    assert all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())

"""The transfer matrix: its starts and shares, how it continues, and its page."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mvision import Model, UserError, load
from mvision.commands import transfer as matrix
from mvision.commands.transfer_report import first_reach, page, plot
from mvision.config import Config
from mvision.engine.train import train
from mvision.storage.atomic import _place, write_text
from mvision.storage.run_folder import RunFolder
from mvision.structures import Category
from mvision.weights import save_weights
from tests.small_runs import fast_config


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a run with random weights of a detector."""
    config = fast_config(tmp_path)
    config.model.categories = [Category(id=0, name="blue"), Category(id=1, name="red")]
    save_weights(Model(config.model), tmp_path / "source" / "best.safetensors")
    return tmp_path / "source"


class Trainings:
    """Takes the place of ``train``: writes what a training leaves, with one evaluation per ``val_interval``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Config, dict[str, Any]]] = []
        self.stop_at = 0

    def __call__(self, config: Config, **arguments: Any) -> None:
        self.calls.append((config, arguments))
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        print("in the log")
        folder = arguments["output"]
        folder.mkdir()
        for epoch in range(config.train.epochs):
            record: dict[str, Any] = {"epoch": epoch, "step": epoch + 1, "loss": {}, "seconds": 2.0 * epoch}
            if (epoch + 1) % config.train.val_interval == 0:
                record["metrics"] = {"detection": {"AP": epoch / 10, "AP50": 0.9}}
            RunFolder(folder).log(record)
        (folder / "metrics.json").write_text(json.dumps({"detection": {"AP": 0.7}}))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    fake = Trainings()
    monkeypatch.setattr(matrix, "train", fake)
    monkeypatch.setattr(matrix, "plot", lambda records, path: None)  # most of the time of these tests
    return fake


def run(source: Path, output: Path, messages: list[str] | None = None, **more: Any) -> str:
    settings: dict = {"tasks": ["detection"], "seeds": 1, "epochs": 1, "fractions": (1.0, 0.5), **more}
    log = [].append if messages is None else messages.append
    return matrix.transfer_matrix(str(source), output=output, data="somewhere/data", device="cpu", log=log, **settings)


def test_the_starts_of_a_matrix(source: Path, tmp_path: Path, trainings: Trainings) -> None:
    run(source, tmp_path / "matrix", fractions=(1.0,), assignments=["train.lr=0.5"])
    taken = [(arguments["init"], arguments["init_parts"], config.train.freeze) for config, arguments in trainings.calls]
    weights = str(source)
    assert taken == [
        (None, None, []),
        (weights, ("backbone",), []),
        (weights, ("backbone", "neck"), []),
        (weights, ("backbone", "neck"), ["backbone", "neck"]),
    ]
    for config, arguments in trainings.calls:
        assert (config.data.root, config.train.lr, arguments["device"]) == ("somewhere/data", 0.5, "cpu")
        assert config.model.neck.embed_dim == 32  # the architecture of the weights


def test_a_share_of_the_images_gets_more_epochs(source: Path, tmp_path: Path, trainings: Trainings) -> None:
    run(source, tmp_path / "matrix", fractions=(1.0, 0.25), epochs=4, seeds=2)
    settings = [(c.train.seed, c.data.fraction, c.train.epochs, c.train.val_interval) for c, _ in trainings.calls[::4]]
    assert settings == [(0, 1.0, 4, 1), (0, 0.25, 16, 3), (1, 1.0, 4, 1), (1, 0.25, 16, 3)]
    records = [json.loads(line) for line in (tmp_path / "matrix" / "cells.jsonl").read_text().splitlines()]
    assert [point["score"] for point in records[0]["curve"]] == [0.0, 0.1, 0.2, 0.3]
    assert [point["epoch"] for point in records[4]["curve"]] == [3, 6, 9, 12, 15]
    assert records[0]["best"] == {"AP": 0.7}


def test_a_stopped_matrix_continues(
    source: Path, tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "plot", plot)
    output = tmp_path / "matrix"
    trainings.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        run(source, output)
    assert len((output / "cells.jsonl").read_text().splitlines()) == 3
    partial = output / f".curves.png.{_place()}-{2**22 + 1}-{12 * '0'}.partial"
    partial.write_bytes(b"half")  # of a process that was killed
    messages: list[str] = []
    text = run(source, output, messages)
    assert not partial.exists()
    assert len(trainings.calls) == 4 + 5  # the stopped one again, and the four that were missing
    assert messages[0] == f"8 cells, 3 of them finished: {output / 'cells.jsonl'}"
    assert len(messages) == 1 + 5
    records = [json.loads(line) for line in (output / "cells.jsonl").read_text().splitlines()]
    cells = [(record["start"], record["fraction"]) for record in records]
    assert cells == list(itertools.chain(*(zip(matrix.STARTS, [fraction] * 4) for fraction in (1.0, 0.5))))
    assert text == (output / "README.md").read_text()
    assert "| detection | 50% |" in text
    assert (output / "curves.png").stat().st_size > 10000
    assert not list((output / "runs").glob("*/"))
    assert (output / "runs" / "detection-random-1-0.log").read_text() == "in the log\n"
    run(source, output)
    assert len(trainings.calls) == 9
    with pytest.raises(UserError, match="its cells were made with epochs 1, now it is 2; choose another --output"):
        run(source, output, epochs=2)


def test_starts_take_their_parts(source: Path, squares: Path, tmp_path: Path) -> None:
    trained = load(source).state_dict()
    options = {"train__epochs": 1, "train__lr": 1e-12, "train__weight_decay": 0.0, "train__ema_decay": 0.0}
    for number, (parts, frozen) in enumerate(matrix.STARTS.values()):
        config = fast_config(squares, **options, train__freeze=["backbone", "neck"] if frozen else [])
        init = str(source) if parts else None
        path = train(config, output=tmp_path / str(number), init=init, init_parts=parts or None, device="cpu")
        state = load(path).state_dict()
        for name, weight in state.items():
            if not name.endswith("conv.weight") and not name.endswith("proj.weight"):
                continue
            taken = torch.allclose(weight, trained[name], atol=1e-6)
            assert taken == name.startswith(parts), (parts, name)


def test_a_share_of_the_images(squares: Path) -> None:
    from dataclasses import replace

    from mvision.data import CocoSplit, find_layout

    split = find_layout(squares).split("train")
    half, quarter = (CocoSplit(replace(split, fraction=f, seed=1)) for f in (0.5, 0.25))
    assert (len(half), len(quarter)) == (2, 1)
    assert {r.id for r in quarter.records} < {r.id for r in half.records}
    assert len(half.coco_dict["annotations"]) == 4
    others = {tuple(r.id for r in CocoSplit(replace(split, fraction=0.5, seed=s)).records) for s in range(8)}
    assert len(others) > 1


def test_when_a_curve_reaches_a_value() -> None:
    curve = [(2, 0.1), (4, 0.3), (6, 0.2)]
    assert first_reach(curve, 0.2) == 3
    assert first_reach(curve, 0.05) == 2
    assert first_reach(curve, 0.4) is None


def test_the_page_has_means_and_shares_of_epochs() -> None:
    assert "No cell is finished" in page([], "x.png")
    setup = {"source": "detection", "backbone": "b", "image_size": [64, 96], "data": "d", "epochs": 4, "options": []}

    def cell(start: str, seed: int, *scores: float) -> dict:
        curve = [{"epoch": 2 * (i + 1), "step": i, "seconds": 1.0, "score": s} for i, s in enumerate(scores)]
        return {"task": "t", "start": start, "fraction": 1.0, "seed": seed, "figure": "AP", "curve": curve,
                "machine": "m", "setup": setup}  # fmt: skip

    records = [cell("random", 0, 0.1, 0.2), cell("random", 1, 0.1, 0.4), cell("frozen", 0, 0.2, 0.4)]
    text = page(records, "x.png")
    assert "| t | 100% | 0.300 \u00b1 0.141 | 0.400 |" in text
    assert "| t | 100% | 0.75 |" in text  # 3 of 4 epochs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fractions": (0.0,)}, "--fraction 0"),
        ({"fractions": (1.5,)}, "--fraction 1.5"),
        ({"fractions": (float("nan"),)}, "--fraction nan"),
        ({"fractions": (1e-300,)}, "--fraction 1e-300: 1 epochs over all images would be more than"),
        ({"tasks": []}, "--task"),
        ({"assignments": ["train.epoch=3"]}, "'epochs'"),
        (
            {"assignments": ["train.epochs=3"]},
            "-o train.epochs=3: every cell .* has its own train.epochs; use --epochs",
        ),
        ({"assignments": ["train.freeze=[neck]"]}, "has its own train.freeze; use the start frozen"),
    ],
)
def test_bad_input(source: Path, tmp_path: Path, trainings: Trainings, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(source, tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()
    assert not trainings.calls


def test_a_damaged_line_is_named(source: Path, tmp_path: Path, trainings: Trainings) -> None:
    (tmp_path / "cells.jsonl").write_text('{"task": "detec')
    with pytest.raises(UserError, match="cells.jsonl: a line is not JSON .*; remove that line"):
        run(source, tmp_path)
    run(source, tmp_path / "matrix")
    file = tmp_path / "matrix" / "cells.jsonl"
    good = file.read_text().splitlines()[0]
    for damaged in ("5", "{}", good.replace('"curve": [', '"curve": [{}, '), good.replace('"random"', '"chance"')):
        file.write_text(f"{good}\n{damaged}\n")
        with pytest.raises(UserError, match="cells.jsonl, line 2: not a finished cell of a matrix; remove that line"):
            run(source, tmp_path / "matrix")


def test_a_task_or_share_that_is_named_twice_is_trained_once(
    source: Path, tmp_path: Path, trainings: Trainings
) -> None:
    run(source, tmp_path / "matrix", tasks=["detection", "detection"], fractions=(1.0, 1.0))
    assert len(trainings.calls) == len(matrix.STARTS)


def test_an_interrupted_writing_keeps_the_finished_cells(
    source: Path, tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == "cells.jsonl" and text.count("\n") == 3:
            raise OSError(28, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr(matrix, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run(source, tmp_path / "matrix")
    assert len(matrix.read_cells(tmp_path / "matrix" / "cells.jsonl")) == 2


def test_the_page_shows_names_as_they_are() -> None:
    hostile = "a|b`c`[d](http://e)<img src=x>\x1b[31m\n# f_g"
    setup = {"source": hostile, "backbone": hostile, "image_size": [64, 96], "data": hostile, "epochs": 4}
    curve = [{"epoch": 1, "step": 1, "seconds": 1.0, "score": 0.5}]
    record = {"task": hostile, "start": "random", "fraction": 1.0, "seed": 0, "figure": "AP", "curve": curve}
    text = page([{**record, "machine": hostile, "setup": {**setup, "options": [hostile]}}], "x.png")
    shown = r"a\|b\`c\`\[d\](http://e)\<img src=x\>\\x1b\[31m\\n\# f\_g"
    assert text.count(shown) == 7
    assert "\x1b" not in text
    assert "\n# f" not in text

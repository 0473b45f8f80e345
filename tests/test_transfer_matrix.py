"""The transfer matrix: what the starts take, going on where it stopped, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mvision import UserError, load
from mvision.commands import transfer as matrix
from mvision.commands.transfer_report import first_reach, page
from mvision.engine.train import train
from tests.small_runs import fast_config

OPTIONS = ["train.batch_size=2", "train.precision=fp32", "data.workers=0", "train.warmup_steps=2"]


@pytest.fixture
def source(squares: Path, tmp_path: Path) -> Path:
    return train(fast_config(squares, train__epochs=1), output=tmp_path / "source", device="cpu")


def run(source: Path, squares: Path, output: Path, **more: object) -> str:
    settings: dict = {"tasks": ["detection"], "seeds": 1, "epochs": 1, "fractions": (1.0, 0.5), **more}
    messages: list[str] = []
    return matrix.transfer_matrix(
        str(source),
        output=output,
        data=str(squares),
        device="cpu",
        assignments=OPTIONS,
        log=messages.append,
        **settings,
    )


def test_a_stopped_matrix_goes_on(source: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stopping(config, **arguments):
        calls.append((config.data.fraction, config.train.epochs, arguments["init_parts"], config.train.freeze))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(config, **arguments)

    monkeypatch.setattr(matrix, "train", stopping)
    output = tmp_path / "matrix"
    with pytest.raises(KeyboardInterrupt):
        run(source, squares, output)
    assert calls == [
        (1.0, 1, None, []),
        (1.0, 1, ("backbone",), []),
        (1.0, 1, ("backbone", "neck"), []),
        (1.0, 1, ("backbone", "neck"), ["backbone", "neck"]),
    ]
    assert len((output / "cells.jsonl").read_text().splitlines()) == 3
    text = run(source, squares, output)
    assert len(calls) == 9
    assert calls[-1][:2] == (0.5, 2)  # half of the images, twice as often
    records = [json.loads(line) for line in (output / "cells.jsonl").read_text().splitlines()]
    assert len({(r["task"], r["start"], r["fraction"], r["seed"]) for r in records}) == len(records) == 8
    assert text == (output / "README.md").read_text()
    assert "| detection | 50% |" in text
    assert (output / "curves.png").stat().st_size > 10000
    assert not list((output / "runs").glob("*/"))
    run(source, squares, output)
    assert len(calls) == 9
    with pytest.raises(UserError, match="its cells were made with epochs 1, now it is 2; choose another --output"):
        run(source, squares, output, epochs=2)


def test_starts_take_what_they_say(source: Path, squares: Path, tmp_path: Path) -> None:
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
    assert len(half.objects) == 4
    assert len(half.coco_dict["annotations"]) == 4
    others = {tuple(r.id for r in CocoSplit(replace(split, fraction=0.5, seed=s)).records) for s in range(8)}
    assert len(others) > 1


def test_when_a_curve_reaches_a_value() -> None:
    curve = [(2, 0.1), (4, 0.3), (6, 0.2)]
    assert first_reach(curve, 0.2) == 3
    assert first_reach(curve, 0.05) == 2
    assert first_reach(curve, 0.4) is None


def test_the_page_says_what_is_missing() -> None:
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


@pytest.mark.parametrize(("fraction", "tasks", "words"), [(0.0, ["detection"], "--fraction 0"), (1.0, [], "--task")])
def test_bad_input(source: Path, squares: Path, tmp_path: Path, fraction: float, tasks: list, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(source, squares, tmp_path / "m", fractions=(fraction,), tasks=tasks)
    assert not (tmp_path / "m").exists()

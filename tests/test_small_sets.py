"""Scripts that compare trainings on small data sets: lengths, starts, and rows of several commands in one folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mvision.data.loading.samplers import TrainBatches
from tests.small_runs import fast_config, run_in_process

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs" / "scripts"))

import ablation
import imagenet_weights
import learning
import pretrained
import small_sets
import starts


def options(out: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(out=out, only=[], set=[], device="cpu", **more)


@pytest.mark.parametrize("pictures", [3, 40, 292, 1000])
def test_every_data_set_gets_the_same_steps(pictures: int) -> None:
    keys = small_sets.length(300, 10, 16, pictures)
    batches = TrainBatches([(pictures, keys["data.weight"])], 16, (64, 64))
    assert (keys["train.epochs"], len(batches)) == (10, 30)


def test_a_single_data_set_has_a_weight_too(squares: Path, tmp_path: Path) -> None:
    once, twice = (
        run_in_process(squares, tmp_path / str(weight), train__epochs=1, data__weight=weight) for weight in (1.0, 2.0)
    )
    steps = [json.loads((run / "metrics.jsonl").read_text())["step"] for run in (once, twice)]
    assert steps[1] == 2 * steps[0]


def test_warm_up_and_average_are_shares_of_the_steps() -> None:
    found = small_sets.shares(2000, 0.02)
    assert found["train.warmup_steps"] == 100
    assert found["train.ema_decay"] == pytest.approx(1 - 1 / 40)
    assert found["train.ema_warmup"] == 10


def test_starts_of_a_backbone(tmp_path: Path) -> None:
    chosen = options(tmp_path, backbone="net", weights=tmp_path / "file")
    random, frozen, small, equal = (
        pretrained.settings(chosen, "muon", start, pretrained.FROZEN)
        for start in (pretrained.RANDOM, pretrained.FROZEN, pretrained.SMALL, pretrained.EQUAL)
    )
    assert "model.backbone.weights" not in random
    assert frozen["train.freeze"] == ["backbone"]
    assert small["train.backbone_lr"] == pytest.approx(8e-4)
    assert "train.backbone_lr" not in equal
    assert all(one["model.backbone.freeze_norms"] for one in (frozen, small, equal))


def test_when_a_training_learns() -> None:
    row = {"clock": [(10, 1.0), (20, 2.0), (100, 9.0)], "curve": [(1, 0.01), (2, 0.04), (3, 0.5)]}
    assert starts.learning(row) == ["at 100%", "0.040 at 20%"]
    assert starts.learning({**row, "curve": [(1, 0.0)] * 3})[0] == "never"


def test_tensors_are_renamed_by_their_order() -> None:
    theirs = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(2)}
    own = {"x.weight": torch.zeros(2, 3), "y.bias": torch.zeros(2)}
    assert list(imagenet_weights.renamed(theirs, own)) == ["x.weight", "y.bias"]
    with pytest.raises(SystemExit, match=r"a\.weight \(2, 3\) does not fit x\.weight \(3, 2\)"):
        imagenet_weights.renamed(theirs, {**own, "x.weight": torch.zeros(3, 2)})


def test_commands_share_a_folder(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trains what its pattern names, and keeps the rows that the other wrote meanwhile."""
    config = fast_config(squares)
    trials = [ablation.Trial({"recipe": recipe}, config) for recipe in ("a", "b")]
    first, second = (options(tmp_path) for _ in range(2))
    first.only, second.only = ["*-a-0"], ["*-b-0"]
    done = []

    def train(trial: ablation.Trial, run: Path, device: str | None) -> Any:
        done.append(trial.variant["recipe"])
        run.mkdir(parents=True)
        if trial is trials[0]:  # the other command begins and ends meanwhile
            ablation.run_trials(second, trials, lambda rows: str(len(rows)))
        return [[(1, 0.5)]], [(7, 3.0)]

    monkeypatch.setattr(ablation, "_train", train)
    ablation.run_trials(first, trials, lambda rows: str(len(rows)))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["recipe"], row["clock"]) for row in rows] == [("b", [[7, 3.0]]), ("a", [[7, 3.0]])]
    assert (tmp_path / "table.md").read_text() == "2"
    ablation.run_trials(options(tmp_path), trials, lambda rows: str(len(rows)))
    assert done == ["a", "b"]


def rows_of_two_seeds() -> list[dict[str, Any]]:
    base = {"task": "detection", "data": "cells", "pictures": 40, "model": "tiny", "start": "random", "steps": 20}
    base |= {"size": 64, "machine": "a CPU", "clock": [[2, 1.0], [10, 5.0], [20, 9.0]]}
    curves = [[[1, 0.1], [2, 0.2], [3, 0.3]], [[1, 0.3], [2, 0.4], [3, 0.5]]]
    return [{**base, "seed": seed, "curve": curve} for seed, curve in enumerate(curves)]


def test_report_on_learning_fills_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = learning.MARKS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    rows = rows_of_two_seeds()
    rows.append({**rows[0], "model": "other", "clock": [[2, 3.0], [10, 15.0], [20, 27.0]]})
    for _ in range(2):
        learning.report(rows, tmp_path, page)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n\n### cells, detection, 40 pictures")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "| tiny | random | 64 | 20 | 9 | 0.200 | 0.300 | 0.400 | 0.300 to 0.500 | 2 | a CPU |" in text
    assert "| other | random | 64 | 20 | 27 | 0.100 | 0.200 | 0.300 | 0.300 to 0.300 | 1 | a CPU |" in text
    assert (tmp_path / "page" / "detection-cells-40.png").stat().st_size > 1000
    assert "(page/detection-cells-40.png)" in text


def test_page_of_the_report_has_its_marks() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "learning.md"
    assert learning.with_figures(page.read_text(encoding="utf-8"), "new").count("new") >= 1
    with pytest.raises(SystemExit, match="lacks one of the marks"):
        learning.with_figures("no marks", "new")


def test_rows_of_another_program_need_all_columns(tmp_path: Path) -> None:
    file = tmp_path / "others.jsonl"
    row = rows_of_two_seeds()[0]
    del row["clock"]
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="line 1: lacks clock"):
        learning.read_others(file)

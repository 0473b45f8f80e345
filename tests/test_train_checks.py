"""What a training refuses or says before its first step: changed data, nothing to measure, batches of one image."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from mvision.commands.train import run_config
from mvision.config import load_config
from mvision.data.formats.coco import CocoSplit
from mvision.data.formats.layouts import find_layout
from mvision.engine import train as train_module
from mvision.engine.checks import check_same_run, single_value, tell_unmirrored_keypoints, warn_of_nothing_to_measure
from mvision.engine.train import train
from mvision.errors import Stopped, UserError
from mvision.storage.run_folder import RunFolder
from mvision.structures import Category
from tests.conftest import write_squares
from tests.small_runs import add_corners, run_in_process

FACTS: dict[str, Any] = {
    "tasks": ["detection"],
    "classes": [{"name": name, "keypoints": []} for name in ("cat", "dog", "cow", "hen", "pig")],
    "images": [[20, 4]],
    "batches": {"number": 5, "size": 4, "seed": 0},
    "optimizer": "adamw",
    "image_size": [64, 64],
    "steps_of_epoch": 5,
    "drawn": {},
}


def changed(**more: Any) -> dict[str, Any]:
    return {**copy.deepcopy(FACTS), **more}


def named(*names: str, keypoints: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [{"name": name, "keypoints": list(keypoints)} for name in names]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (changed(tasks=["detection", "keypoints"]), "the run is of detection, its config now says detection, keypoint"),
        (changed(optimizer="muon"), "train.optimizer adamw, not muon"),
        (changed(classes=named("cat", "dog", "cow", "hen", "pig", "ox")), r"classes have changed .*\(new 'ox'\)"),
        (changed(classes=named("cat", "cow", "hen", "pig")), r"\(missing 'dog'\)"),
        (changed(classes=named("cat", "wolf", "cow", "hen", "pig")), r"\(new 'wolf'; missing 'dog'\)"),
        (
            changed(classes=named("a", "b", "c", "d", "e")),
            r"\(new 'a', 'b', 'c' and 2 more; missing 'cat', 'dog', 'cow'",
        ),
        (
            changed(classes=named("dog", "cat", "cow", "hen", "pig")),
            "another order.*'dog', 'cat', 'cow' and 2 more, not",
        ),
        (changed(classes=named("cat", "dog", "cow", "hen", "pig", keypoints=("nose",))), "keypoints of class 'cat'"),
        (changed(images=[[19, 4]]), r"had 20 \+ 4 .* and has 19 \+ 4 now"),
        (changed(images=[[20, 5]]), r"20 \+ 4 .* 20 \+ 5"),
        (changed(images=[[20, 4], [1, 1]]), r"20 \+ 4, 1 \+ 1"),
    ],
)
def test_a_run_goes_on_with_the_same_data_only(now: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"--resume runs/x: .*{message}.*--init runs/x/best\.safetensors"):
        check_same_run(Path("runs/x"), FACTS, now, inside_epoch=False)
    check_same_run(Path("runs/x"), now, now, inside_epoch=True)


def test_another_batch_size_only_between_epochs() -> None:
    other = changed(batches={"number": 10, "size": 2, "seed": 0})
    check_same_run(Path("runs/x"), FACTS, other, inside_epoch=False)
    message = "inside an epoch of 5 batches of 4 with seed 0, which would now have 10 batches of 2 with seed 0; go on"
    with pytest.raises(UserError, match=message):
        check_same_run(Path("runs/x"), FACTS, other, inside_epoch=True)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_whose_data_has_changed_is_refused_and_left_as_it_is(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes swapped and added; afterwards, with its own data, it goes on, to its end and beyond."""
    run = run_in_process(squares, tmp_path / "run", train__epochs=1)
    assert ", 2 classes, 1 epoch, fp32 on 1 x cpu" in capsys.readouterr().out
    before, annotations = files_of(run), squares / "annotations"
    own = {name: json.loads((annotations / name).read_text())["categories"] for name in ("train.json", "val.json")}
    swapped = [{**entry, "name": {"red": "blue", "blue": "red"}[entry["name"]]} for entry in own["train.json"]]
    third = [*own["train.json"], {"id": 90, "name": "green"}]
    more = run_config(resume=run, options={"train.epochs": 2})
    for categories, message in ((swapped, "in another order"), (third, r"new 'green'")):
        for name in own:
            edit(annotations / name, categories=categories)
        with pytest.raises(UserError, match=message):
            train(more.model_copy(deep=True), resume=run, device="cpu")
        assert files_of(run) == before
    for name in own:
        edit(annotations / name, categories=own[name])

    monkeypatch.setattr(train_module, "read_data_sources", None)  # not needed to see that there is nothing to do
    capsys.readouterr()
    assert train(run_config(resume=run), resume=run, device="cpu") == run
    text = capsys.readouterr().out
    assert "nothing to do, it is trained to its end (1 epoch). To train on, add --epochs N with more than 1" in text
    assert files_of(run) == before
    monkeypatch.undo()
    train(more, resume=run, device="cpu")
    assert [record["epoch"] for record in RunFolder(run).records()] == [0, 1]
    assert "resumed after 1 epoch\n" in capsys.readouterr().out
    assert RunFolder(run).is_finished(2)


def test_a_real_run_stopped_within_an_epoch_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything that is random: augmentation, sizes of batches, denoising queries."""
    data = write_squares(tmp_path / "data", images=6)
    settings = {"train__epochs": 2, "data__augment__multi_scale": 0.5, "data__augment__mosaic": 0.5}
    monkeypatch.setattr("mvision.engine.checkpoint.plot_run", lambda records, path: None)
    whole = run_in_process(data, tmp_path / "whole", **settings)
    forward, calls = train_module.Model.loss, []

    def loss(self: Any, outputs: Any, targets: Any) -> Any:
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, outputs, targets)

    monkeypatch.setattr(train_module.Model, "loss", loss)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM; go on with: mvision train --resume .*broken") as stopped:
        run_in_process(data, tmp_path / "broken", **settings)
    assert stopped.value.code == 143
    torch.manual_seed(12345)
    resumed = train(load_config(file=tmp_path / "broken" / "config.yaml"), resume=tmp_path / "broken", device="cpu")
    assert len(calls) == 6
    first, second = ([{**r, "seconds": 0} for r in RunFolder(run).records()] for run in (whole, resumed))
    assert first == second
    for name in ("best.safetensors", "last/state.safetensors"):
        tensors, others = load_file(whole / name), load_file(resumed / name)
        assert tensors.keys() == others.keys()
        assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
    assert (whole / "metrics.json").read_bytes() == (resumed / "metrics.json").read_bytes()


def test_validation_without_objects_keeps_the_newest_weights(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(squares / "annotations" / "val.json", annotations=[])
    monkeypatch.setattr("mvision.engine.checkpoint.plot_run", lambda records, path: None)
    monkeypatch.setattr(train_module, "evaluate_all", lambda *_, **__: {"detection": {"AP": -1.0}})
    monkeypatch.setattr(train_module, "tables", lambda validation: [])
    run = run_in_process(squares, tmp_path / "run", train__epochs=2, train__patience=1)
    text = capsys.readouterr().out
    assert "nothing is measured, the newest weights count as the best" in text
    assert f"newest weights (epoch 2): {run / 'best.safetensors'}" in text
    assert ", detection AP -\n" in text


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (["keypoints"], "the 4 validation images have no object to measure keypoints with: the best weights are those"),
        (
            ["detection", "keypoints"],
            "no object to measure keypoints with: the best weights are chosen by detection al",
        ),
        (["detection"], None),
    ],
)
def test_tasks_that_cannot_be_measured_are_said(
    tasks: list[str], expected: str | None, squares: Path, tmp_path: Path
) -> None:
    """Classes with keypoints, in the validation images only objects without a labelled one."""
    add_corners(squares)
    content = json.loads((squares / "annotations" / "val.json").read_text())
    for entry in content["annotations"]:
        entry["keypoints"] = [0] * len(entry["keypoints"])
    edit(squares / "annotations" / "val.json", **content)
    layout, model = find_layout(squares), mock.Mock(tasks=tasks)
    train_split, val = (CocoSplit(layout.split(name), ("boxes", "keypoints")) for name in ("train", "val"))
    model.head.side_effect = lambda task: mock.Mock(classes=train_split.categories)
    lines: list[str] = []
    warn_of_nothing_to_measure(model, [mock.Mock(tasks=tasks, train=train_split, val=val)], lines.append)
    assert len(lines) == (expected is not None)
    assert expected is None or expected in lines[0]


def test_a_run_notes_keypoints_without_left_and_right() -> None:
    classes = [Category(id=1, name="tube", keypoints=["a", "b"]), Category(id=2, name="eyes", keypoints=["L", "R"])]
    model, lines = mock.Mock(heads=["detection", "keypoints"]), list[str]()
    model.head.side_effect = lambda task: mock.Mock(
        classes=classes, needs={"boxes", "keypoints"} if task == "keypoints" else {"boxes"}
    )
    tell_unmirrored_keypoints(load_config("tiny"), model, lines.append)
    (line,) = lines
    assert line.startswith("note: class 'tube': no left and right among its keypoints (a, b)")
    tell_unmirrored_keypoints(load_config("tiny", overrides={"data.augment.flip": 0}), model, lines.append)
    assert len(lines) == 1


def test_a_resumed_run_has_no_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output .*other: a resumed run stays in its folder, .*run; leave"):
        train(load_config("tiny"), output=tmp_path / "other", resume=tmp_path / "run")


def test_batches_of_one_small_image_are_refused_at_the_start(squares: Path, tmp_path: Path) -> None:
    message = r"train\.batch_size: 1 image of 32 x 32 in a step .*larger --batch-size .* larger --image-size"
    settings = {"train__batch_size": 1, "train__epochs": 1, "data__augment__crop": 0}
    for more in ({"model__image_size": 32}, {"model__image_size": 64, "data__augment__multi_scale": 0.5}):
        with pytest.raises(UserError, match=message):
            run_in_process(squares, tmp_path / "run", **settings, **more)
        assert not (tmp_path / "run").exists()


def test_other_errors_are_not_taken_for_a_single_value() -> None:
    assert single_value(ValueError("something else"), 1, (32, 32)) is None
    norm = torch.nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        norm(torch.zeros(1, 2))
    assert str(single_value(caught.value, 1, (32, 64))).startswith("train.batch_size: 1 image of 64 x 32 in a step")

"""``predictions.json`` of ``val`` and of ``predict --data``: pycocotools gets from them the figures of ``val``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from mvision import create_model
from mvision.commands import predict as predict_module
from mvision.commands import results
from mvision.commands import val as val_module
from mvision.commands.predict import predict_job
from mvision.commands.val import validate
from mvision.errors import UserError
from mvision.evaluation import BoxMetric, KeypointMetric, MaskMetric, Metric
from mvision.storage import atomic
from mvision.storage.atomic import whole_file
from mvision.structures import Category, Instances
from mvision.structures.masks import Masks, encode_mask
from mvision.structures.oks import DEFAULT_SIGMA
from mvision.weights import save_weights
from tests.conftest import write_squares
from tests.fake_model import FakeModel, paint, save
from tests.small_runs import add_corners

METRICS: dict[str, list[type[Metric]]] = {
    "detection": [BoxMetric],
    "instance-seg": [MaskMetric, BoxMetric],
    "keypoints": [KeypointMetric],
}
POINTS = ["a", "b", "c", "d"]
FILES = ["calibration.png", "confusion_matrix.png", "curves.json", "curves.png", "metrics.json", "predictions.json"]
CLASSES = {"red": 31, "green": 7, "blue": 90}  # the data set's numbers; the model has others


class Painter(FakeModel):
    """Finds painted rectangles a little beside their places, with masks or corners for the task."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.tasks = [task]
        points = POINTS if task == "keypoints" else []
        self.categories = [c.model_copy(update={"keypoints": points}) for c in self.categories]
        self.config.categories = self.categories
        self.config.pixel_range = None

    def head(self, task: str) -> Any:
        return type("Head", (), {"classes": self.categories})

    def evaluators(self, task: str) -> list[type[Metric]]:
        return METRICS[task]

    def postprocess(
        self, outputs: Tensor, sizes: Sequence[tuple[int, int]], threshold: Any, **options: Any
    ) -> list[Instances]:
        return [self._moved(found) for found in super().postprocess(outputs, sizes, threshold, **options)]

    def results(
        self, outputs: Tensor, sizes: Sequence[tuple[int, int]], threshold: float
    ) -> dict[str, list[Instances]]:
        return {self.tasks[0]: self.postprocess(outputs, sizes, threshold)}

    def _moved(self, found: Instances) -> Instances:
        height, width = found.size
        shift = np.float32(0.07) * (found.boxes[:, :2] % 5) + np.float32(1 / 3)
        boxes = found.boxes + np.concatenate((shift, shift), axis=1)
        boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
        masks = points = None
        if self.tasks == ["instance-seg"]:
            masks = Masks([encode_mask(rectangle(box, found.size)) for box in boxes], found.size)
        if self.tasks == ["keypoints"]:
            corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2)
            points = np.concatenate((corners + shift[:, None], np.full((len(boxes), 4, 1), 0.8)), axis=2)
            points = points.astype(np.float32)
        return Instances(boxes, found.scores, found.labels, found.size, self.categories, masks, points)


def rectangle(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    x0, y0, x1, y1 = box.round().astype(int)
    mask[y0:y1, x0:x1] = 1
    return mask


def write_data(root: Path) -> Path:
    """Painted pictures whose ids have gaps and are in no order; two are larger, one has nothing."""
    rng = np.random.default_rng(5)
    images, annotations = [], []
    for number, image_id in enumerate((40, 7, 19, 2)):
        size = (192, 256) if number == 1 else (96, 128)
        rectangles = []
        for column in range(0 if number == 3 else 3):
            side = rng.integers(12, 30, 2)
            x, y = column * 42 + int(rng.integers(2, 8)), int(rng.integers(2, 60))
            rectangles.append((int(rng.integers(3)), (x, y, x + int(side[0]), y + int(side[1]))))
        scale = size[0] // 96
        stored = (192, 256) if number == 2 else size  # the annotations are for the picture at half of its size
        picture = cv2.resize(paint((96, 128), rectangles), stored[::-1], interpolation=cv2.INTER_NEAREST)
        save(root / "val" / f"{image_id}.png", picture)
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": size[0], "width": size[1]})
        for label, box in rectangles:
            x0, y0, x1, y1 = (value * scale for value in box)
            annotations.append(
                {
                    "id": 100 - len(annotations),
                    "image_id": image_id,
                    "category_id": list(CLASSES.values())[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    "keypoints": [x0, y0, 2, x1, y0, 2, x0, y1, 2, x1, y1, 1],
                    "num_keypoints": 4,
                }
            )
    categories = [{"id": number, "name": name, "keypoints": POINTS} for name, number in CLASSES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return root / "annotations" / "instances_val.json"


def pycocotools_ap(truth: Path, results: list[dict[str, Any]], kind: str, sigmas: Any = None) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(truth))
        evaluator = COCOeval(gt, gt.loadRes(results), kind)
        if kind == "keypoints":
            evaluator.params.kpt_oks_sigmas = np.asarray(sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return float(evaluator.stats[0])


@pytest.mark.parametrize("task", METRICS)
def test_pycocotools_gets_the_figures_of_val(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = write_data(tmp_path / "data")
    model = Painter(task)
    monkeypatch.setattr(val_module, "_open", lambda *_: (model, "runtime"))
    monkeypatch.setattr(predict_module, "open_fastest", lambda *_: (model, "runtime"))
    data = str(tmp_path / "data")
    validate("w", data=data, output=tmp_path / "val", workers=0, device="cpu")
    predict_job(weights="w", data=data, output=tmp_path / "predict", device="cpu", log=lambda _: None)
    figures = json.loads((tmp_path / "val" / "metrics.json").read_text())[task]
    of_val = json.loads((tmp_path / "val" / "predictions.json").read_text())
    of_predict = json.loads((tmp_path / "predict" / "predictions.json").read_text())
    assert {entry["image_id"] for entry in of_val} == {40, 7, 19}
    assert {entry["category_id"] for entry in of_val} <= set(CLASSES.values())
    shared = ["image_id", "category_id", "bbox", "score", "segmentation", "keypoints"]
    pick = lambda entries: sorted(json.dumps([entry.get(key) for key in shared]) for entry in entries)  # noqa: E731
    assert pick(of_predict) == pick(of_val)
    kinds = {"detection": ["bbox"], "instance-seg": ["segm", "bbox"], "keypoints": ["keypoints"]}[task]
    for number, kind in enumerate(kinds):
        ap = pycocotools_ap(truth, of_val, kind, [DEFAULT_SIGMA] * 4)
        assert 0.1 < ap < 0.99
        assert figures["AP" if number == 0 else f"{kind}/AP"] == pytest.approx(ap, abs=1e-9)


SMALL = {"image_size": 64, "neck__embed_dim": 32}


def small_weights(path: Path, tasks: Sequence[str], classes: list[Category]) -> Path:
    torch.manual_seed(0)
    model = create_model("tiny", tasks, categories=classes, **SMALL)
    save_weights(model, path)
    return path


@pytest.mark.parametrize("tasks", [["detection"], ["instance-seg"], ["keypoints"], ["detection", "keypoints"]])
def test_predict_on_a_data_set_writes_what_val_evaluates(tasks: list[str], tmp_path: Path) -> None:
    data = write_squares(tmp_path / "squares", images=3)
    add_corners(data)
    numbers = {2: Category(id=0, name="blue", keypoints=["centre"])}
    corners = ["left_top", "right_top", "left_end", "right_end"]
    classes = [*numbers.values(), Category(id=1, name="red", keypoints=corners)]
    weights = str(small_weights(tmp_path / "w.safetensors", tasks, classes))
    options: dict[str, Any] = {"weights": weights, "data": str(data), "device": "cpu"}
    validate(output=tmp_path / "val", workers=0, batch_size=1, precision="fp32", **options)
    names = ["predictions.json"] if len(tasks) == 1 else [f"predictions-{task}.json" for task in tasks]
    jsons = sorted(path.name for path in (tmp_path / "val").iterdir() if path.suffix == ".json")
    assert jsons == sorted(["curves.json", "metrics.json", *names])
    written = [json.loads((tmp_path / "val" / name).read_text()) for name in names]
    for entries in written:
        assert {entry["image_id"] for entry in entries} == {1, 2, 3}
        assert {entry["category_id"] for entry in entries} <= {2, 5}
    if len(tasks) == 1:
        lines: list[str] = []
        summary = predict_job(output=tmp_path / "out", precision="fp32", log=lines.append, **options)
        found = json.loads((tmp_path / "out" / "predictions.json").read_text())
        assert len(found) == len(written[0])
        for ours, theirs in zip(found, written[0]):
            assert ours["file_name"] == f"val_{ours['image_id'] - 1}.jpg"
            assert {key: ours[key] for key in theirs} == theirs
        assert summary.images == 3
        # The pictures and the summary are of the usual threshold.
        assert summary.instances.total() < len(found)
        assert not summary.unknown


def test_classes_that_the_data_set_lacks_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of the model's class may be that of another class in the data set."""
    truth = write_data(tmp_path / "data")
    content = json.loads(truth.read_text())
    content["categories"] = [
        c | {"id": 3} for c in content["categories"] if c["name"] == "blue"
    ]  # 3 is red in the model
    content["annotations"] = [
        a | {"category_id": 3} for a in content["annotations"] if a["category_id"] == CLASSES["blue"]
    ]
    truth.write_text(json.dumps(content))
    model = Painter("detection")
    monkeypatch.setattr(val_module, "_open", lambda *_: (model, "runtime"))
    monkeypatch.setattr(predict_module, "open_fastest", lambda *_: (model, "runtime"))
    data = str(tmp_path / "data")
    text = validate("w", data=data, output=tmp_path / "val", workers=0, device="cpu")
    summary = predict_job(weights="w", data=data, output=tmp_path / "predict", device="cpu", log=lambda _: None)
    blue = len(content["annotations"])
    for folder in ("val", "predict"):
        entries = json.loads((tmp_path / folder / "predictions.json").read_text())
        assert [entry["category_id"] for entry in entries] == [3] * blue
    assert f"predictions.json: {9 - blue} results left out, of classes that the data set does not have" in text
    assert summary.unknown.total() == 9 - blue
    assert f"not in predictions.json: {9 - blue} results of classes that the data lacks" in str(summary)


def test_a_split_of_the_run_and_mistakes(tmp_path: Path) -> None:
    data = write_squares(tmp_path / "squares", images=2)
    weights = str(small_weights(tmp_path / "w.safetensors", ["detection"], [Category(id=2, name="blue")]))
    options: dict[str, Any] = {"weights": weights, "device": "cpu", "log": lambda _: None, "output": tmp_path / "out"}
    (data / "images" / "train_1.jpg").write_bytes(b"damaged")
    summary = predict_job(data=str(data), split="train", **options)
    assert summary.images == 1
    assert "train_1.jpg" in summary.skipped[0][0]
    with pytest.raises(UserError, match="no split 'test'"):
        predict_job(data=str(data), split="test", **options)
    with pytest.raises(UserError, match="either sources or --data"):
        predict_job([str(data / "images")], data=str(data), **options)


def test_an_interrupted_evaluation_leaves_the_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data")
    model = Painter("detection")
    monkeypatch.setattr(val_module, "_open", lambda *_: (model, "runtime"))
    options: dict[str, Any] = {
        "data": str(tmp_path / "data"),
        "output": tmp_path / "out",
        "workers": 0,
        "device": "cpu",
    }
    validate("w", **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == FILES

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        validate("w", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_what_a_killed_evaluation_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data")
    monkeypatch.setattr(val_module, "_open", lambda *_: (Painter("detection"), "runtime"))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: ended.pid)
        left = tmp_path / "out" / atomic._partial_name("predictions.json")
    left.parent.mkdir()
    left.write_bytes(b"half")
    validate("w", data=str(tmp_path / "data"), output=left.parent, workers=0, device="cpu")
    assert sorted(path.name for path in left.parent.iterdir()) == FILES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("count", [1, 1000])
def test_a_full_disk_is_one_line(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Met at the end, when the buffer is written, or in the middle."""

    @contextlib.contextmanager
    def full(path: Path) -> Iterator[Path]:
        with whole_file(path) as temporary:
            temporary.unlink()
            temporary.symlink_to("/dev/full")
            yield temporary

    monkeypatch.setattr(results, "whole_file", full)
    category = Category(id=1, name="cat")
    message = r"predictions\.json: cannot be written \(No space left"
    with (
        pytest.raises(UserError, match=message),
        results.ResultsFile(tmp_path / "predictions.json", [category], [category]) as file,
    ):
        file.add([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}] * count)
    assert not list(tmp_path.iterdir())


def test_names_of_several_files(tmp_path: Path) -> None:
    first = results.results_path(tmp_path, "data", "keypoints")
    assert first.name == "predictions-data-keypoints.json"
    assert (
        results.results_path(tmp_path, "data", "keypoints", taken=[first]).name == "predictions-data-keypoints-2.json"
    )
    assert results.results_path(tmp_path).name == "predictions.json"

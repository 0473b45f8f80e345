"""Evaluation over batches and processes."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

from mvision.data import Batch
from mvision.evaluation import BoxMetric, Metric, Validation, evaluate, evaluate_all, make_metrics, tables
from mvision.structures import Category, Instances, Targets
from tests.fake_model import CATEGORIES, SIZE, FakeModel, paint

COUNT = 11


class Data:
    """Painted images whose labels are a little off, as a split with ``coco_dict`` and as batches of a rank."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.images = []
        self.coco_dict: dict = {
            "images": [{"id": 7 * i, "height": 2 * SIZE[0], "width": SIZE[1]} for i in range(COUNT)],
            "annotations": [],
            "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
        }
        for index in range(COUNT):
            rectangles = []
            for slot in range(int(rng.integers(0, 4))):
                x, y, w, h = 30 * slot, int(rng.integers(0, 40)), int(rng.integers(8, 28)), int(rng.integers(8, 50))
                rectangles.append((int(rng.integers(0, 3)), (x, y, x + w, y + h)))
                shift, stretch = rng.integers(-3, 4), rng.uniform(0.8, 1.2)
                self.coco_dict["annotations"].append(
                    {
                        "id": len(self.coco_dict["annotations"]),
                        "image_id": 7 * index,
                        "category_id": CATEGORIES[rectangles[-1][0]].id,
                        "bbox": [float(x + shift), 2.0 * y, float(w * stretch), 2.0 * h],
                        "area": float(w * stretch) * 2.0 * h,
                        "iscrowd": 0,
                    }
                )
            self.images.append(paint(SIZE, rectangles))

    def batches(self, rank: int = 0, ranks: int = 1, size: int = 2) -> Iterator[Batch]:
        """As samplers do it: every rank gets as many, the first images fill up the end."""
        padded = list(range(COUNT))
        padded += padded[: -COUNT % ranks]
        mine = padded[rank::ranks]
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            images = torch.from_numpy(np.stack([self.images[i] for i in part])).permute(0, 3, 1, 2)
            empty = torch.zeros(0)
            targets = [
                Targets(empty.reshape(0, 4), empty.long(), empty, image_id=7 * i, size=(2 * SIZE[0], SIZE[1]))
                for i in part
            ]
            yield Batch(images, targets)


def figures(data: Data, batches: Iterator[Batch], **options) -> dict[str, float]:
    model = FakeModel()
    return evaluate(model, batches, make_metrics(model, data), progress=False, **options)["detection"]


def test_figures_are_those_of_the_results() -> None:
    data = Data()
    expected = BoxMetric(data.coco_dict, CATEGORIES)
    model = FakeModel().eval()
    with torch.no_grad():
        for batch in data.batches(size=COUNT):
            found = model.postprocess(model(batch.images), [t.size for t in batch.targets], 0.0)
            results = [e for t, f in zip(batch.targets, found) for e in f.to_coco(t.image_id)]
            expected.update(results, [t.image_id for t in batch.targets])
    assert 0.1 < expected.compute()["AP"] < 0.95
    assert figures(data, data.batches()) == expected.compute()


def test_repeated_images_count_once() -> None:
    data = Data()
    twice = (batch for _ in range(2) for batch in data.batches())
    assert figures(data, twice) == figures(data, data.batches())


def test_metrics_can_be_used_again() -> None:
    data, model = Data(), FakeModel()
    metrics = make_metrics(model, data)
    first = evaluate(model, data.batches(), metrics, progress=False)
    evaluate(model, iter([]), metrics, progress=False)
    assert metrics["detection"][0].compute()["AP"] == -1
    assert evaluate(model, data.batches(), metrics, progress=False) == first


def test_the_mode_of_every_module_is_kept() -> None:
    data, model = Data(), FakeModel()
    model.train()
    model.part.eval()  # a frozen part
    evaluate(model, data.batches(), make_metrics(model, data), progress=False)
    assert model.training
    assert not model.part.training
    assert torch.is_grad_enabled()


def test_unreadable_images_are_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    data = Data()
    bad = Batch(torch.zeros(0, 3, *SIZE, dtype=torch.uint8), [], skipped=[("broken.jpg", "truncated")])
    first, *_ = data.batches()
    assert figures(data, iter([first, bad])) == figures(data, iter([first]))
    assert "broken.jpg" in "".join(capsys.readouterr())


def test_conversion_keeps_up_with_many_boxes() -> None:
    """72 images with 300 boxes each; generous, as the machine may be busy."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 300, (300, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(1, 99, (300, 2))), axis=1).astype(np.float32)
    scores = np.sort(rng.uniform(0, 1, 300))[::-1].astype(np.float32)
    found = Instances(boxes, scores, rng.integers(0, 3, 300), (400, 400), CATEGORIES)
    coco_dict = {
        "images": [{"id": i, "height": 400, "width": 400} for i in range(72)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 3, "bbox": [9, 9, 50, 50], "area": 2500, "iscrowd": 0}
            for i in range(72)
        ],
        "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
    }
    metric = BoxMetric(coco_dict, CATEGORIES)
    started = time.perf_counter()
    for image_id in range(72):
        metric.update(found.to_coco(image_id), [image_id])
    assert time.perf_counter() - started < 0.5


def _one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    data = Data()
    result = figures(data, data.batches(rank, 2), accelerator=accelerator)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_one_of_two, (port, str(tmp_path)), nprocs=2)
    data = Data()
    alone = figures(data, data.batches())
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


def test_metrics_follow_the_heads() -> None:
    data, model = Data(), FakeModel()
    model.categories = [*CATEGORIES, Category(id=99, name="unseen")]
    metrics = make_metrics(model, data)
    assert list(metrics) == ["detection"]
    assert metrics["detection"][0].name == "bbox"
    assert metrics["detection"][0].compute()["AP/unseen"] == -1


class TwoMetrics(FakeModel):
    """Reports a second metric besides its main one."""

    def evaluators(self, task: str) -> list[type[Metric]]:
        return [BoxMetric, Second]


class Second(Metric):
    """The number of results with a score of at least one half."""

    name = "second"

    def measure(self, image_id: object, results: list[dict]) -> int:
        return sum(entry["score"] >= 0.5 for entry in results)

    def compute(self) -> dict[str, float]:
        return {"count": float(sum(self.measured.values()))}

    def table(self) -> str:
        return f"count {self.compute()['count']:.0f}"


def test_figures_of_further_metrics_have_the_name_of_the_metric() -> None:
    data, model = Data(), TwoMetrics()
    found = evaluate(model, data.batches(), make_metrics(model, data), progress=False)["detection"]
    expected = figures(data, data.batches())
    assert {name: found[name] for name in expected} == expected
    assert set(found) - set(expected) == {"second/count"}
    assert found["second/count"] > 0


def test_figures_on_further_data_sets_have_the_name_of_the_data_set() -> None:
    data, model = Data(), FakeModel()
    first = list(data.batches())[:2]
    parts = [
        Validation(name, batches, make_metrics(model, data, tasks))
        for name, batches, tasks in (("a", first, None), ("b", list(data.batches()), None), ("c", [], []))
    ]
    found = evaluate_all(model, parts)["detection"]
    on_a, on_b = figures(data, iter(first)), figures(data, data.batches())
    assert on_a != on_b
    assert found == {**on_a, **{f"b/{name}": value for name, value in on_b.items()}}


def test_tables_have_headings_if_there_are_several() -> None:
    data, model = Data(), TwoMetrics()
    one = Validation("a", data.batches(), make_metrics(FakeModel(), data))
    assert tables([one])[0].startswith("Average Precision")
    two = Validation("b", data.batches(), make_metrics(model, data))
    assert [text.splitlines()[0] for text in tables([two])] == ["detection, bbox", "detection, second"]
    assert [text.splitlines()[0] for text in tables([one, two])] == [
        "a, detection, bbox",
        "b, detection, bbox",
        "b, detection, second",
    ]


def test_only_the_tasks_that_a_data_set_is_used_for_get_metrics() -> None:
    assert make_metrics(FakeModel(), Data(), []) == {}


def test_a_metric_measures_every_image_once_and_only_when_it_was_seen() -> None:
    metric = Second({}, CATEGORIES)
    entry = {"image_id": 7, "score": 0.9}
    metric.update([entry, entry], [7, 8])
    assert metric.measured == {7: 2, 8: 0}
    metric.update([entry], [7])
    metric.merge({7: 5, 9: 1})
    assert metric.measured == {7: 2, 8: 0, 9: 1}
    with pytest.raises(ValueError, match="image id 7, which is not in image_ids"):
        metric.update([entry], [8])
    metric.reset()
    assert metric.measured == {}

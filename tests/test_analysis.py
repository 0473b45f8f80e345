"""Confusion matrix, curves, best thresholds and calibration of results whose figures were worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mvision.evaluation import BoxMetric, CocoMetric, KeypointMetric, MaskMetric, Validation
from mvision.evaluation.analyses import (
    analyse_all,
    best_thresholds,
    with_analyses,
    write_curves,
)
from mvision.evaluation.analysis import Analysis, Curve, analyse, between
from mvision.evaluation.ground_truth import _encode
from mvision.evaluation.pictures import write_pictures
from mvision.structures import Category

METRICS = {"bbox": BoxMetric, "segm": MaskMetric, "keypoints": KeypointMetric}
POINTS = ["left_top", "right_top", "right_end", "left_end"]
CATEGORIES = [
    Category(id=4, name="cat", keypoints=POINTS, sigmas=[0.1] * 4),
    Category(id=9, name="dog", keypoints=POINTS, sigmas=[0.1] * 4),
    Category(id=5, name="not in the data", keypoints=POINTS, sigmas=[0.1] * 4),
]
CAT, DOG, OTHER = 4, 9, 5
OBJECTS = [  # image, class, corner, crowd
    (1, CAT, (0, 0), 0),
    (1, DOG, (60, 60), 0),
    (2, CAT, (0, 0), 0),
    (2, CAT, (60, 60), 0),
    (3, DOG, (0, 0), 0),
    (3, CAT, (60, 60), 1),
    (4, CAT, (30, 30), 0),
]
RESULTS = [  # image, class, corner, score
    (1, CAT, (0, 0), 0.9),
    (1, DOG, (0, 0), 0.85),  # the same place under a second name: nobody sees it
    (1, DOG, (60, 60), 0.8),
    (2, CAT, (0, 0), 0.7),
    (2, DOG, (60, 60), 0.6),  # is a cat
    (3, DOG, (0, 0), 0.5),
    (3, CAT, (60, 60), 0.95),  # in a crowd: neither right nor wrong
    (4, CAT, (70, 70), 0.75),
    (4, CAT, (70, 0), 0.3),
    (4, CAT, (0, 70), 0.04),  # too low for the calibration
    (4, OTHER, (0, 0), 0.99),  # is not evaluated
]
SIDE = 20


@pytest.fixture(params=["pycocotools", "hotcoco"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "hotcoco":
        pytest.importorskip("hotcoco")
    return request.param


def shape(corner: tuple[int, int], visible: int = 2) -> dict[str, Any]:
    """A square as box, mask and points."""
    x, y = corner
    corners = [(x, y), (x + SIDE, y), (x + SIDE, y + SIDE), (x, y + SIDE)]
    return {
        "bbox": [float(x), float(y), float(SIDE), float(SIDE)],
        "segmentation": [[float(value) for point in corners for value in point]],
        "keypoints": [float(value) for point in corners for value in (*point, visible)],
    }


def measured(kind: str, backend: str = "pycocotools", results: Any = RESULTS, objects: Any = OBJECTS) -> CocoMetric:
    size = {"width": 100, "height": 100}
    annotations = [
        {"id": number, "image_id": image, "category_id": label, "iscrowd": crowd, "area": float(SIDE**2)}
        | shape(corner, 0 if crowd else 2)
        for number, (image, label, corner, crowd) in enumerate(objects, start=1)
    ]
    tree = {
        "images": [{"id": image, **size} for image in (1, 2, 3, 4)],
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name, "keypoints": POINTS} for c in CATEGORIES[:2]],
    }
    metric = METRICS[kind](tree, CATEGORIES, backend=backend)  # type: ignore[arg-type]
    entries = [
        {"image_id": image, "category_id": label, "score": score, **shape(corner)}
        for image, label, corner, score in results
    ]
    for entry in entries:
        entry["segmentation"] = _encode(entry["segmentation"], size)
    metric.update(entries, [1, 2, 3, 4])
    return metric


@pytest.mark.parametrize("kind", METRICS)
class TestByHand:
    @pytest.fixture
    def found(self, kind: str, backend: str) -> Analysis:
        return analyse(measured(kind, backend))

    def test_confusion_matrix(self, found: Analysis) -> None:
        assert found.names == ["cat", "dog"]
        assert found.confusion.tolist() == [[2, 1, 1], [0, 2, 0], [1, 0, 0]]

    def test_best_thresholds(self, found: Analysis) -> None:
        cat, dog = found.best
        assert cat is not None
        assert dog is not None
        # Cats: 0.9 right, 0.75 wrong, 0.7 right, then wrong ones; four objects. Dogs: right, wrong, right; two objects.
        assert (cat.threshold, cat.precision, cat.recall) == (0.5, 2 / 3, 0.5)
        assert (dog.threshold, dog.precision, dog.recall) == (0.25, 2 / 3, 1.0)
        assert (cat.f1, dog.f1) == pytest.approx((4 / 7, 0.8))
        assert found.thresholds == {"cat": 0.5, "dog": 0.25}

    def test_curves(self, found: Analysis) -> None:
        curve = found.curves[0]
        assert curve is not None
        assert curve.scores.tolist() == [0.9, 0.75, 0.7, 0.3, 0.04]
        assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4, 2 / 5])
        assert curve.recall.tolist() == pytest.approx([1 / 4, 1 / 4, 2 / 4, 2 / 4, 2 / 4])
        at = curve.at(np.array([0.0, 0.7, 0.71, 0.9, 0.91]))
        assert at.precision.tolist() == pytest.approx([2 / 5, 2 / 3, 1 / 2, 1, 1])
        assert at.recall.tolist() == pytest.approx([2 / 4, 2 / 4, 1 / 4, 1 / 4, 0])

    def test_calibration(self, found: Analysis) -> None:
        scores = [0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9]
        right = [0, 1, 0, 1, 0, 1, 1]
        assert found.calibration.scores.tolist() == pytest.approx(scores)
        assert found.calibration.precision.tolist() == right
        assert found.calibration.counts.tolist() == [1] * 7
        assert found.calibration.error == pytest.approx(np.mean(np.abs(np.subtract(scores, right))))

    def test_figures(self, found: Analysis) -> None:
        figures = found.figures()
        assert figures["F1"] == pytest.approx((4 / 7 + 0.8) / 2)
        assert figures["threshold/cat"] == 0.5
        assert figures["recall/dog"] == 1
        assert figures["recall"] == 0.75
        # Cats have an F1 of 4 / 7 from 0.7 on, dogs of 0.8 up to 0.5: together the best is where both are near that.
        of_all = {t: sum(curve.at(np.array([t])).f1[0] for curve in found.curves if curve) for t in (0.31, 0.5, 0.7)}
        assert figures["threshold"] == 0.31
        assert max(of_all, key=lambda t: of_all[t]) == 0.31
        assert all(isinstance(value, float) for value in figures.values())


def test_results_of_one_score_are_taken_together() -> None:
    """A threshold cannot take the right one of two with 0.6 alone."""
    objects = [(1, CAT, (0, 0), 0)]
    results = [(1, CAT, (0, 0), 0.6), (2, CAT, (0, 0), 0.6), (3, CAT, (0, 0), 0.2)]
    best = analyse(measured("bbox", results=results, objects=objects)).best[0]
    assert best is not None
    assert (best.threshold, best.precision, best.recall) == (0.4, 0.5, 1)


def test_two_results_of_one_class_in_one_box_both_count() -> None:
    results = [(1, CAT, (0, 0), 0.6), (1, CAT, (0, 0), 0.5)]
    found = analyse(measured("bbox", results=results))
    assert found.calibration.counts.tolist() == [1, 1]
    assert found.calibration.precision.tolist() == [0, 1]


def test_without_results_and_without_objects() -> None:
    nothing = analyse(measured("bbox", results=[]))
    assert nothing.confusion.tolist() == [[0, 0, 4], [0, 0, 2], [0, 0, 0]]
    assert nothing.thresholds == {}
    assert (nothing.figures()["F1"], nothing.figures()["D-ECE"], nothing.figures()["threshold/cat"]) == (0, -1, -1)
    found = analyse(measured("bbox", objects=[(1, DOG, (60, 60), 0)]))
    assert found.curves[0] is None
    assert found.figures()["F1/cat"] == -1
    # Cats have no best threshold, so those with a score of 0.5 or more are in the matrix.
    assert found.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [4, 0, 0]]


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.3, 0.7, 0.5), (0.0, 0.5, 0.25), (0.123, 0.124, 0.1235), (0.2, 0.2, 0.2)]
)
def test_a_threshold_is_a_short_number_between_two_scores(low: float, high: float, expected: float) -> None:
    assert between(low, high) == expected
    tight = between(np.nextafter(0.6, 0), 0.6)
    assert np.nextafter(0.6, 0) < tight <= 0.6


def test_a_curve_without_a_right_result_has_no_best_threshold() -> None:
    assert Curve(np.array([0.5]), np.array([0.0]), np.array([0.0])).best() is None


def validation(name: str, **metrics: CocoMetric) -> Validation:
    return Validation(name, [], {task: [metric] for task, metric in metrics.items()})


def test_several_data_sets_and_tasks(tmp_path: Path) -> None:
    first, other = measured("bbox"), measured("bbox", objects=[(4, CAT, (70, 0), 0)])
    analyses = analyse_all(
        [validation("one", detection=first), validation("two", detection=other, keypoints=measured("keypoints"))]
    )
    figures = with_analyses({"detection": {"AP": 0.5}, "keypoints": {}}, analyses)
    assert figures["detection"]["AP"] == 0.5
    assert figures["detection"]["threshold/cat"] == 0.5
    assert figures["detection"]["two/threshold/cat"] == 0.17
    assert best_thresholds(analyses) == {
        "detection": {"cat": 0.5, "dog": 0.25},
        "keypoints": {"cat": 0.5, "dog": 0.25},
    }
    names = {path.name for path in write_curves(analyses, tmp_path)}
    assert len(names) == 10
    text = (tmp_path / "curves.json").read_text()
    assert json.loads(text) == {
        "detection": analyses[0].analysis.lists(),
        "two/detection": analyses[1].analysis.lists(),
        "keypoints": analyses[2].analysis.lists(),
    }
    assert json.loads(text)["detection"]["confusion_matrix"]["classes"] == ["cat", "dog", "background"]
    assert "[2, 1, 1]" in text
    assert {"curves-one-detection.png", "calibration-two-keypoints.png"} <= names


@pytest.mark.parametrize("count", [4, 130])
def test_pictures_of_odd_names_and_of_many_classes(count: int, tmp_path: Path) -> None:
    names = ["$a$ $\\frac$", "_hidden", "\u732b", "x" * 500, *(f"class {number}" for number in range(count))][:count]
    found = analyse(measured("bbox"))
    found.names, found.objects = names, np.ones(count, dtype=np.int64)
    found.curves, found.best = found.curves[:1] * count, found.best[:1] * count
    found.precision = np.repeat(found.precision[:, :1], count, 1)
    found.confusion = np.eye(count + 1, dtype=np.int64)
    for path in write_pictures(found, tmp_path):
        picture = cv2.imread(str(path))
        assert picture is not None
        assert 300 < picture.shape[0] < 3000

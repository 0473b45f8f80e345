"""The share of keypoints that were found."""

import numpy as np
import pytest

from mvision.evaluation import BoxMetric, KeypointMetric
from mvision.evaluation.pck import correct_points
from mvision.structures import Category


def make_object(x, y, visible=(2, 1), category_id=1):
    """A box 10 x 20 with its upper and lower end as points: 2 px is a tenth of its longer side."""
    points = [x + 5, y, visible[0], x + 5, y + 20, visible[1]]
    return {"category_id": category_id, "bbox": [x, y, 10, 20], "keypoints": points}


def result(x, y, shift=(0.0, 0.0)):
    return [x + 5 + shift[0], y, 0.9, x + 5 + shift[1], y + 20, 0.9]


def counted(objects, results, scores=None, classes=None):
    scores = np.linspace(0.9, 0.1, len(results)) if scores is None else np.array(scores)
    return correct_points(objects, scores, np.ones(len(results)) if classes is None else np.array(classes), results)


@pytest.mark.parametrize(("shift", "correct"), [((0, 1.9), 2), ((0, -2.1), 1), ((3, 3), 0)])
def test_a_point_is_correct_within_a_tenth_of_the_longer_side(shift, correct):
    assert counted([make_object(0, 0)], [result(0, 0, shift)]) == (correct, 2)


def test_points_without_label_do_not_count():
    assert counted([make_object(0, 0, (2, 0))], [result(0, 0, (0, 9))]) == (1, 1)
    assert counted([make_object(0, 0, (0, 0))], [result(0, 0)]) == (0, 0)


def test_the_best_result_stands_for_an_object_and_no_other_one_does():
    worse_is_nearer = [result(0, 0, (1, 3)), result(0, 0)]
    assert counted([make_object(0, 0)], worse_is_nearer) == (1, 2)
    assert counted([make_object(0, 0)], worse_is_nearer, scores=[0.1, 0.9]) == (2, 2)


def test_objects_that_were_not_found_count():
    objects = [make_object(0, 0), make_object(100, 0), make_object(0, 50, category_id=2)]
    assert counted(objects, [result(0, 0), result(0, 50), result(60, 0)]) == (2, 6)
    assert counted(objects, []) == (0, 6)


def test_it_is_among_the_figures():
    category = Category(id=7, name="tube", keypoints=["top", "end"])
    entry = {"id": 1, "image_id": 3, "area": 200, "iscrowd": 0, **make_object(0, 0, category_id=7)}
    data = {"images": [{"id": n, "height": 50, "width": 50} for n in (3, 4)], "annotations": [entry]}
    metric = KeypointMetric({**data, "categories": [{"id": 7, "name": "tube"}]}, [category])
    metric.update([{"image_id": 3, "category_id": 7, "score": 0.5, "keypoints": result(0, 0, (0, 5))}], [3, 4])
    assert metric.compute()["PCK@0.1"] == 0.5
    assert any("PCK" in line and line.endswith("0.500") for line in metric.table().splitlines())
    assert "PCK@0.1" not in BoxMetric({**data, "categories": [{"id": 7, "name": "tube"}]}, [category]).compute()


def test_predictions_after_the_twentieth_do_not_count():
    wrong = [result(1000, 0)] * 19
    assert counted([make_object(0, 0)], [*wrong, result(0, 0)]) == (2, 2)
    assert counted([make_object(0, 0)], [*wrong, result(1000, 0), result(0, 0)]) == (0, 2)


@pytest.mark.parametrize(("shift", "correct"), [(9.9, 1), (10.1, 0)])
def test_a_prediction_half_a_box_away_is_of_another_object(shift, correct):
    """One point is right; the mean distance of both decides whether the prediction is of this object."""
    assert counted([make_object(0, 0)], [result(0, 0, (0, 2 * shift))]) == (correct, 2)

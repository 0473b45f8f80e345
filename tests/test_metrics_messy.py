"""COCO's figures on data that differs from COCO's: very many objects in a picture, keypoints in another order."""

import numpy as np
import pytest

from mvision.evaluation import BoxMetric, KeypointMetric
from mvision.structures import Category
from tests.test_metrics import backend  # noqa: F401 - a fixture


def dense_data(count: int) -> tuple[dict, list[dict]]:
    """One picture with ``count`` cells side by side and one cat, and a result with a falling score on each of them."""
    places = [[12.0 * (n % 40), 12.0 * (n // 40), 10.0, 10.0] for n in range(count + 1)]
    classes = [1] * count + [2]
    annotations = [
        {"id": n + 1, "image_id": 5, "category_id": c, "bbox": box, "area": 100.0, "iscrowd": 0}
        for n, (box, c) in enumerate(zip(places, classes))
    ]
    results = [
        {"image_id": 5, "category_id": c, "bbox": box, "score": 1 - n / 1000}
        for n, (box, c) in enumerate(zip(places, classes))
    ]
    categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "cat"}]
    return {
        "images": [{"id": 5, "height": 400, "width": 500}],
        "annotations": annotations,
        "categories": categories,
    }, results


CELL_AND_CAT = [Category(id=1, name="cell"), Category(id=2, name="cat")]


def test_a_perfect_detector_is_perfect_in_dense_pictures_too(backend: str) -> None:  # noqa: F811
    annotations, results = dense_data(350)
    metric = BoxMetric(annotations, CELL_AND_CAT, backend=backend)
    metric.update(results, [5])
    figures = metric.compute()
    assert figures["AP"] == figures["AP/cell"] == figures["AP_small"] == figures["AR_small"] == pytest.approx(1)
    # The figures with a number in their name keep it: 100 of 350 cells, and the cat.
    assert figures["AR100"] == pytest.approx((100 / 350 + 1) / 2)
    assert "maxDets=350" in metric.table()
    assert "note: an image has 350 objects of class 'cell': 350 results per image and class count" in metric.table()


def test_the_limit_is_that_of_coco_where_it_is_enough(backend: str) -> None:  # noqa: F811
    annotations, results = dense_data(100)
    false_positives = [{**results[0], "bbox": [0.0, 380.0, 5.0, 5.0], "score": 2.0}] * 20
    metric = BoxMetric(annotations, CELL_AND_CAT, backend=backend)
    metric.update(results + false_positives, [5])
    assert metric.max_results == (1, 10, 100)
    assert metric.compute()["AR100"] == pytest.approx((80 / 100 + 1) / 2)
    assert metric.notes == []


def test_many_persons_with_keypoints(backend: str) -> None:  # noqa: F811
    annotations, results = dense_data(30)
    for entry in annotations["annotations"] + results:
        x, y, w, h = entry["bbox"]
        entry["keypoints"] = [x, y, 2, x + w, y + h, 2]
    annotations["categories"][0]["keypoints"] = ["top", "tip"]
    cell = Category(id=1, name="cell", keypoints=["top", "tip"])
    for entry in annotations["annotations"]:
        entry["area"] = 2000.0  # COCO's figures of keypoints leave small objects out
    metric = KeypointMetric({**annotations, "categories": annotations["categories"][:1]}, [cell], backend=backend)
    metric.update(results, [5])
    assert metric.max_results == (20, 30)
    assert metric.compute()["AP"] == metric.compute()["PCK@0.1"] == pytest.approx(1)


def keypoint_data(names: list[str], sigmas: list[float]) -> dict:
    """One object; its points called top, mid and tip are on the diagonal, others where their position puts them."""
    places = {"top": (10, 10), "mid": (50, 50), "tip": (90, 90)}
    values = [v for n, name in enumerate(names) for v in (*places.get(name, list(places.values())[n]), 2)]
    category = {"id": 1, "name": "bird", "keypoints": names, "keypoint_sigmas": sigmas}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "area": 5000.0, "iscrowd": 0}
    return {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "annotations": [{**annotation, "keypoints": values}],
        "categories": [category],
    }


def found_bird(metric: KeypointMetric, shift_of_top: float = 0.0) -> dict[str, float]:
    points = [10 + shift_of_top, 10, 1, 50, 50, 1, 90, 90, 1]
    metric.update([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0, "keypoints": points}], [1])
    return metric.compute()


@pytest.mark.parametrize("order", [["top", "mid", "tip"], ["tip", "top", "mid"]])
def test_keypoints_meet_by_name(order: list[str], backend: str) -> None:  # noqa: F811
    bird = Category(id=1, name="bird", keypoints=["top", "mid", "tip"])
    sigma_of = {"top": 1.0, "mid": 0.01, "tip": 0.01}
    data = keypoint_data(order, [sigma_of[name] for name in order])
    assert found_bird(KeypointMetric(data, [bird], backend=backend))["AP"] == pytest.approx(1)
    # The sigma of "top" allows it to be 20 pixels away; that of another point would not.
    shifted = found_bird(KeypointMetric(data, [bird], backend=backend), shift_of_top=20)
    oks = (np.exp(-(20**2) / 2 / 4 / 5000) + 2) / 3
    assert shifted["AP"] == pytest.approx(float(np.mean(oks >= np.linspace(0.5, 0.95, 10))))


def test_keypoints_with_other_names_are_compared_in_their_order_and_it_is_said() -> None:
    bird = Category(id=1, name="bird", keypoints=["top", "mid", "tip"])
    metric = KeypointMetric(keypoint_data(["beak", "mid", "tail"], [0.1] * 3), [bird])
    assert found_bird(metric)["AP"] == pytest.approx(1)
    assert metric.notes == [
        "keypoints of 'bird' have other names in the data than in the model and are compared in their order: "
        "'beak' for 'top', 'tail' for 'tip'"
    ]

"""OKS against pycocotools' own, and where the tolerances of points come from."""

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mvision.structures import Category
from mvision.structures.oks import (
    COCO_SIGMAS,
    CROWDPOSE_SIGMAS,
    DEFAULT_SIGMA,
    check_sigmas,
    describe_default_sigmas,
    keypoint_sigmas,
    oks,
    point_similarity,
)


def reference(pred: np.ndarray, gt: np.ndarray, areas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """COCOeval.computeOks of every predicted object with every labelled one, (pred, gt)."""
    data, results = COCO(), COCO()
    entry = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0}
    labelled = [
        {**entry, "id": n, "area": float(area), "keypoints": points.ravel().tolist(), "num_keypoints": 1}
        for n, (points, area) in enumerate(zip(gt, areas), start=1)
    ]
    predicted = [
        # Falling scores: computeOks sorts by them.
        {**entry, "id": n, "score": 1 - n / 100, "keypoints": points.ravel().tolist()}
        for n, points in enumerate(pred, start=1)
    ]
    for coco, annotations in ((data, labelled), (results, predicted)):
        coco.dataset = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": annotations}
        coco.createIndex()
    evaluator = COCOeval(data, results, "keypoints")
    evaluator.params.kpt_oks_sigmas = sigmas
    evaluator._prepare()
    return evaluator.computeOks(1, 1)


@pytest.mark.parametrize("count", [1, 5, 17])
def test_oks_is_that_of_pycocotools(count: int) -> None:
    rng = np.random.default_rng(count)
    gt = np.concatenate((rng.uniform(0, 200, (6, count, 2)), rng.integers(0, 3, (6, count, 1))), -1)
    gt[:, 0, 2] = 2  # without a labelled point COCO measures the distance to a box instead
    pred = np.concatenate((gt[:4, :, :2] + rng.normal(0, 6, (4, count, 2)), np.ones((4, count, 1))), -1)
    areas, sigmas = rng.uniform(0, 20000, 6), rng.uniform(0.02, 0.2, count)
    areas[5] = 0.0
    expected = reference(pred, gt, areas, sigmas)
    value = oks(*(torch.from_numpy(x) for x in (pred[:, None, :, :2], gt[None], areas[None], sigmas)))
    assert expected.max() > 0.3
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_points_without_label_do_not_count() -> None:
    gt = torch.tensor([[0.0, 0, 2], [9, 9, 0]])
    assert oks(torch.zeros(2, 2), gt, torch.tensor(4.0), torch.tensor([0.1, 0.1])) == 1
    gt[0, 2] = 0
    assert oks(torch.zeros(2, 2), gt, torch.tensor(4.0), torch.tensor([0.1, 0.1])) == 0


def test_gradients_are_finite_at_the_extremes() -> None:
    """An object without area, and points that are exact or far away."""
    pred = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]], requires_grad=True)
    point_similarity(pred, torch.zeros(2, 2, 2), torch.tensor([0.0, 1e-6]), torch.full((2,), 0.02)).sum().backward()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()


def test_sigmas_are_the_data_sets_else_cocos_else_one_for_all() -> None:
    own = Category(id=1, name="a", keypoints=["x", "y"], sigmas=[0.1, 0.2])
    assert keypoint_sigmas(own) == (0.1, 0.2)
    person = Category(id=1, name="person", keypoints=list(COCO_SIGMAS))
    assert keypoint_sigmas(person) == tuple(COCO_SIGMAS.values())
    assert keypoint_sigmas(Category(id=1, name="a", keypoints=["nose", "tail"])) == (DEFAULT_SIGMA,) * 2
    assert keypoint_sigmas(Category(id=1, name="a"), 3) == (DEFAULT_SIGMA,) * 3


def test_sigmas_of_crowdposes_points_go_by_their_names() -> None:
    names = [*reversed(list(CROWDPOSE_SIGMAS)[:-2]), "Neck", "top head"]
    person = Category(id=1, name="person", keypoints=names)
    body = (0.089, 0.089, 0.087, 0.087, 0.107, 0.107, 0.062, 0.062, 0.072, 0.072, 0.079, 0.079)
    assert keypoint_sigmas(person) == (*body, 0.079, 0.079)
    assert describe_default_sigmas(person) is None
    # One of the points is another one: nothing is known of this set.
    other = person.model_copy(update={"keypoints": [*names[:-1], "tail"]})
    assert keypoint_sigmas(other) == (DEFAULT_SIGMA,) * 14


def test_default_sigmas_are_told() -> None:
    category = Category(id=1, name="dot", keypoints=["a"])
    line = describe_default_sigmas(category)
    assert line is not None
    assert "'dot' uses sigma 0.067" in line
    assert "its only point" in line
    assert "each of its 2 points" in str(describe_default_sigmas(Category(id=1, name="dot", keypoints=["a", "b"])))
    assert describe_default_sigmas(category.model_copy(update={"sigmas": [0.1]})) is None
    assert describe_default_sigmas(Category(id=1, name="without")) is None


@pytest.mark.parametrize(
    ("sigmas", "problem"),
    [
        ([0.1], "1 sigmas for 2"),
        ([0.1, 0.0], "0.0 is not above 0"),
        ([0.1, float("nan")], "nan is not a finite"),
        ([0.1, float("inf")], "inf is not a finite"),
        ([0.1, 0.2], None),
    ],
)
def test_what_is_wrong_with_sigmas(sigmas: list[float], problem: str | None) -> None:
    found = check_sigmas(sigmas, 2)
    assert found is None if problem is None else problem in str(found)

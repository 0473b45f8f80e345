"""Targets and Instances, and what they are turned into."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mvision.errors import UserError
from mvision.structures import Category, Instances, Targets
from mvision.structures.masks import encode_mask

CATEGORIES = [Category(id=4, name="cat", keypoints=["a", "b"], skeleton=[(0, 1)]), Category(id=11, name="dog")]


def instances(count: int = 3, masks: bool = True, keypoints: bool = True) -> Instances:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 30, (count, 2))
    return Instances(
        boxes=np.concatenate((corner, corner + rng.uniform(1, 10, (count, 2))), axis=1).astype(np.float32),
        scores=np.linspace(0.9, 0.3, count, dtype=np.float32),
        labels=np.arange(count) % 2,
        size=(40, 50),
        categories=CATEGORIES,
        masks=rng.random((count, 40, 50)) > 0.5 if masks else None,
        keypoints=rng.uniform(0, 1, (count, 2, 3)).astype(np.float32) if keypoints else None,
        path="a.jpg",
    )


def test_to_coco() -> None:
    found = instances()
    assert found.masks is not None
    assert found.keypoints is not None
    results = found.to_coco(17)
    assert [entry["category_id"] for entry in results] == [4, 11, 4]
    assert {entry["image_id"] for entry in results} == {17}
    for index, entry in enumerate(results):
        x0, y0, x1, y1 = found.boxes[index]
        assert entry["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], rel=1e-6)
        assert entry["score"] == pytest.approx(float(found.scores[index]))
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), found.masks[index])
    assert results[0]["keypoints"] == pytest.approx(found.keypoints[0].ravel().tolist())
    assert ["keypoints" in entry for entry in results] == [True, False, True]  # dogs have none in this data set


def test_to_coco_has_as_many_points_as_the_class() -> None:
    """Evaluators compare point by point; here rows are as long as the class with most points needs."""
    found = instances(count=1)
    found.categories = [Category(id=4, name="cat", keypoints=["a"]), Category(id=11, name="dog", keypoints=["a", "b"])]
    assert found.keypoints is not None
    assert found.to_coco(1)[0]["keypoints"] == pytest.approx(found.keypoints[0, 0].tolist())


def test_to_coco_has_only_what_there_is() -> None:
    assert set(instances(masks=False, keypoints=False).to_coco(1)[0]) == {"image_id", "category_id", "bbox", "score"}
    assert instances(count=0).to_coco(1) == []


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_masks_are_encoded_as_pycocotools_does(dtype: type) -> None:
    for mask in (np.random.default_rng(1).random((37, 23)) > 0.6, np.zeros((5, 9)), np.ones((9, 5))):
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode_mask(mask.astype(dtype)) == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    strided = np.zeros((40, 40), dtype)[::2, 1::3]
    assert encode_mask(strided)["size"] == [20, 13]


def test_filter_keeps_the_rows_together() -> None:
    found = instances()
    assert found.masks is not None
    kept = found.filter(found.scores < 0.8)
    assert len(kept) == 2
    assert kept.masks is not None
    assert np.array_equal(kept.masks, found.masks[1:])
    assert kept.path == "a.jpg"
    assert kept.size == (40, 50)
    swapped = found.filter(np.array([2, 0]))
    assert np.array_equal(swapped.boxes, found.boxes[[2, 0]])


def test_to_coco_marks_regions() -> None:
    objects, regions = instances(count=2, masks=False, keypoints=False), instances(count=3, keypoints=False)
    objects.regions = regions
    entries = objects.to_coco(5)
    assert [entry.get("region") for entry in entries] == [None, None, True, True, True]
    assert [{**entry, "region": True} for entry in regions.to_coco(5)] == entries[2:]


def test_resized() -> None:
    """Boxes, masks and keypoints at twice the height and half the width."""
    mask = np.zeros((1, 40, 50), bool)
    mask[0, 10:20, 20:40] = True
    points = np.array([[[30, 20, 0.7], [0, 0, 0.0]]], np.float32)
    values = (np.array([[20, 10, 40, 20]], np.float32), np.array([0.9]), np.array([1]), (40, 50), CATEGORIES)
    found = Instances(*values, mask, points).resized((80, 25))
    assert found.size == (80, 25)
    assert found.boxes.tolist() == [[10, 20, 20, 40]]
    np.testing.assert_allclose(found.keypoints, [[[15, 40, 0.7], [0, 0, 0]]])
    assert found.masks is not None
    expected = np.zeros((1, 80, 25), bool)
    expected[0, 20:40, 10:20] = True
    assert np.array_equal(found.masks, expected)
    assert instances(masks=False, keypoints=False).resized((80, 25)).masks is None


def test_to_supervision() -> None:
    found = instances()
    detections = found.to_supervision()
    assert np.array_equal(detections.xyxy, found.boxes)
    assert detections.confidence is not None
    assert np.array_equal(detections.confidence, found.scores)
    assert list(detections["class_name"]) == ["cat", "dog", "cat"]
    assert np.array_equal(detections.mask, found.masks)
    points = found.to_supervision_keypoints()
    assert found.keypoints is not None
    assert np.array_equal(points.xy, found.keypoints[..., :2])
    assert np.array_equal(points.keypoint_confidence, found.keypoints[..., 2])
    assert len(instances(count=0).to_supervision()) == 0
    with pytest.raises(UserError, match="no keypoints"):
        instances(keypoints=False).to_supervision_keypoints()


def test_targets_of_some_fields() -> None:
    full = Targets(
        torch.rand(2, 4),
        torch.tensor([1, 0]),
        torch.rand(2),
        masks=torch.ones(2, 3, 3, dtype=torch.uint8),
        keypoints=torch.zeros(2, 1, 3),
        labelled_classes=torch.tensor([True, False]),
    )
    boxes = full.only({"boxes"})
    assert (len(boxes), boxes.masks, boxes.keypoints) == (2, None, None)
    assert boxes.labelled_classes is full.labelled_classes
    masks = full.only({"boxes", "masks"})
    assert masks.masks is full.masks
    assert masks.keypoints is None
    nothing = full.only({"keypoints"})
    assert (len(nothing), nothing.boxes.shape, nothing.areas.shape) == (0, (0, 4), (0,))
    assert (nothing.masks, nothing.keypoints) == (None, None)
    assert nothing.labelled_classes is not None
    assert nothing.labelled_classes.tolist() == [False]


def test_targets_move_with_all_their_tensors() -> None:
    targets = Targets(
        torch.zeros(1, 4),
        torch.zeros(1).long(),
        torch.zeros(1),
        keypoints=torch.zeros(1, 2, 3),
        image_id=5,
        size=(1, 2),
    )
    moved = targets.to("meta")
    assert moved.boxes.is_meta
    assert moved.keypoints is not None
    assert moved.keypoints.is_meta
    assert (moved.masks, moved.image_id, moved.size) == (None, 5, (1, 2))
    assert not targets.boxes.is_meta

"""Which grid points of a keypoint head are positives of which object, each with its own candidates."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mvision.heads.keypoints.assignment import assign_one2many, candidates, compute_alignment, start_one2one
from mvision.heads.keypoints.targets import ClassTables, KeypointTargets, keypoint_targets
from mvision.heads.query.anchors import grid_centres
from mvision.structures import Category, Targets

SHAPES = [(8, 8), (4, 4)]
CENTRES = grid_centres(SHAPES, torch.device("cpu"), torch.float32)
SIZES = torch.cat((torch.full((64,), 0.1), torch.full((16,), 0.4)))
CATEGORIES = [
    Category(id=1, name="cat", keypoints=["nose", "tail"], sigmas=[0.1, 0.2]),
    Category(id=2, name="box"),
    Category(id=3, name="worm", keypoints=["head"], sigmas=[0.3]),
]


def make_gt(*targets, predicted=((0, 2),)) -> KeypointTargets:
    return keypoint_targets(list(targets), predicted, ClassTables.of(CATEGORIES), (64, 64), torch.zeros(1))


def make_target(labels, visible=2.0, **more):
    count = len(labels)
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4]).repeat(count, 1)
    points = torch.full((count, 2, 3), 0.5)
    points[..., 2] = visible
    return Targets(
        boxes, torch.tensor(labels, dtype=torch.int64), torch.full((count,), 0.1), **{"keypoints": points, **more}
    )


def test_objects_of_classes_with_keypoints_are_collected_image_by_image():
    first = make_target([1, 2])
    first.boxes[1, 0] = 0.3
    gt = make_gt(first, make_target([]), make_target([0, 1, 0]))
    assert gt.image.tolist() == [0, 2, 2]
    assert gt.classes.tolist() == [1, 0, 0]
    assert gt.boxes[:, 0].tolist() == pytest.approx([0.3, 0.5, 0.5])
    assert gt.is_labelled.all()
    assert not gt.images_without_keypoints.any()
    assert not gt.any_ignored
    assert (gt.sizes, gt.counts) == ([3], [1, 0, 2])
    torch.testing.assert_close(gt.sigmas, torch.tensor([[0.3, 1.0], [0.1, 0.2], [0.1, 0.2]]))
    assert gt.point_exists.tolist() == [[True, False], [True, True], [True, True]]


def test_every_set_of_layers_has_its_own_objects_one_set_after_the_other():
    """The second one learns all classes; each numbers its own."""
    batch = [make_target([1, 2], labelled_classes=torch.tensor([True, False, True])), make_target([]), make_target([0])]
    gt = make_gt(*batch, predicted=((0, 2), range(3)))
    assert (gt.sizes, gt.counts) == ([2, 3], [1, 0, 1])
    assert gt.image.tolist() == [0, 2, 0, 0, 2]
    assert gt.classes.tolist() == [1, 0, 1, 2, 0]
    assert gt.class_has_points.tolist() == [True, True, False, True, True]
    assert [labelled.tolist()[0] for labelled in gt.labelled_classes] == [[True, True], [True, False, True]]
    assert make_gt(make_target([0])).labelled_classes == [None]


def test_poses_are_the_objects_of_the_first_set_with_labelled_points():
    first, second = make_target([0, 0, 2]), make_target([1, 2, 2])
    first.keypoints[1, :, 2] = 0
    first.areas[2] = 0.7
    poses = make_gt(first, second, predicted=((0, 2), range(3))).poses
    assert poses.row.tolist() == [0, 2, 3, 4]
    assert poses.image.tolist() == [0, 0, 1, 1]
    assert poses.number.tolist() == [0, 1, 0, 1]
    assert poses.most == 2
    assert poses.areas.tolist() == pytest.approx([0.1, 0.7, 0.1, 0.1])
    assert len(make_gt(make_target([])).poses.row) == 0


def test_objects_and_images_without_points_are_known_to_be_there():
    assert make_gt(make_target([0], visible=0.0)).any_ignored
    assert make_gt(make_target([0]), make_target([], keypoints=None)).any_ignored
    assert not make_gt(make_target([1], visible=0.0), predicted=((0, 2), range(3))).any_ignored


def test_lengths_are_those_of_the_original_image_whatever_its_shape():
    wide, unknown = make_gt(make_target([0], size=(100, 400)), make_target([0])).scale
    torch.testing.assert_close(wide, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(unknown, torch.ones(2))


def test_images_without_keypoint_labels_are_marked():
    gt = make_gt(make_target([0], keypoints=None), make_target([0]), make_target([0], visible=0.0))
    assert gt.images_without_keypoints.tolist() == [True, False, False]
    assert gt.is_labelled.tolist() == [False, True, False]


@pytest.mark.parametrize(("side", "level"), [(0.12, 0), (0.5, 1)])
def test_candidates_lie_in_the_object_on_the_level_for_its_size(side, level):
    grid_points, location_prior, inside = candidates(CENTRES, SIZES, torch.tensor([[0.6, 0.4, side, side]]), 4)
    best = grid_points[0, 0].item()
    assert (best >= 64) == bool(level)
    assert location_prior[0, 0] == 1
    real = grid_points[location_prior > 0]
    assert ((CENTRES[real] - torch.tensor([0.6, 0.4])).abs() <= side / 2).all()
    assert inside.sum() == ((CENTRES - torch.tensor([0.6, 0.4])).abs() < side / 2).all(-1).sum()


def test_the_location_prior_falls_to_zero_at_the_sides_of_the_box():
    """A box whose centre is a grid point: the next ones lie half and wholly on the way to its right side."""
    box = torch.tensor([[CENTRES[27, 0], CENTRES[27, 1], 0.5, 0.5]])
    grid_points, location_prior, _ = candidates(CENTRES[:64], torch.full((64,), 0.1), box, 64)
    prior = torch.zeros(64).scatter(0, grid_points[0], location_prior[0])
    torch.testing.assert_close(prior[27:30], torch.tensor([1.0, 0.5, 0.0]))


def test_an_object_between_all_grid_points_gets_the_nearest():
    grid_points, location_prior, _ = candidates(CENTRES, SIZES, torch.tensor([[0.2, 0.2, 0.01, 0.01]]), 5)
    assert (location_prior > 0).sum() == 1
    assert grid_points[0, 0].item() == 9


def test_there_are_no_more_candidates_than_grid_points():
    assert candidates(CENTRES, SIZES, torch.tensor([[0.5, 0.5, 0.9, 0.9]]), 7)[0].shape == (1, 7)
    assert candidates(CENTRES, SIZES, torch.zeros(0, 4), 100)[0].shape == (0, 80)


def alignment_of(rows):
    """Alignment and grid points (the column numbers) for objects of one image."""
    alignment = torch.tensor(rows)
    return alignment, torch.arange(alignment.shape[1]).expand_as(alignment)


def one2one(rows):
    """The positives of one-to-one training for objects of one image."""
    return start_one2one(*alignment_of(rows), [len(rows)])().tolist()


def one2many(rows, top_k):
    """The positives of one-to-many training for objects of one image."""
    image = torch.zeros(len(rows), dtype=torch.int64)
    return assign_one2many(*alignment_of(rows), image, 1, len(rows[0]), top_k).tolist()


def test_location_counts_until_predictions_are_good():
    location_prior = torch.tensor([[1.0, 0.5, 0.0]])
    nothing, is_labelled = torch.full((1, 3), 1e-4), torch.tensor([True])
    untrained = compute_alignment(location_prior, nothing, nothing, nothing, is_labelled)
    assert untrained.argmax() == 0
    scores, quality = torch.tensor([[0.05, 0.9, 0.9]]), torch.tensor([[0.3, 0.9, 0.9]])
    trained = compute_alignment(location_prior, scores, quality, quality, is_labelled)
    assert trained.argmax() == 1
    assert trained[0, 2] == 0  # not a candidate, however good


def test_alignment_is_location_and_twice_the_quality_of_the_prediction():
    prior, scores = torch.tensor([[0.5], [0.5]]), torch.full((2, 1), 0.5)
    oks, iou = torch.full((2, 1), 0.2), torch.full((2, 1), 0.8)
    labelled, unlabelled = compute_alignment(prior, scores, oks, iou, torch.tensor([True, False])).flatten().tolist()
    assert labelled == pytest.approx(0.5 + 2 * math.sqrt(0.5 * 0.5))
    assert unlabelled == pytest.approx(0.5 + 2 * math.sqrt(0.5 * 0.8))  # the box alone
    broken = compute_alignment(prior, torch.full((2, 1), torch.nan), oks, iou, torch.tensor([True, False]))
    assert broken.isfinite().all()


def test_one_grid_point_each_with_the_largest_sum():
    """The better grid point of the first object is the only candidate of the second."""
    assert one2one([[0.9, 0.8, 0.0], [0.7, 0.0, 0.0]]) == [[False, True, False], [True, False, False]]


def test_the_matching_is_the_best_on_any_numbers():
    """Several objects and images, shared candidates in any order: as good as the matching on the whole map."""
    torch.manual_seed(0)
    image = torch.tensor([0, 0, 0, 2, 2])
    grid_points = torch.stack([torch.randperm(12)[:6] for _ in image])
    alignment = torch.rand(5, 6)
    chosen = start_one2one(alignment, grid_points, [3, 0, 2])()
    assert (chosen.sum(1) == 1).all()
    for number in (0, 2):
        own = image == number
        whole = torch.zeros(int(own.sum()), 12).scatter(1, grid_points[own], alignment[own])
        best = whole[linear_sum_assignment(whole, maximize=True)].sum()
        torch.testing.assert_close(alignment[own][chosen[own]].sum(), best)
        assert grid_points[own][chosen[own]].unique().numel() == own.sum()


def test_an_object_whose_candidates_are_taken_has_no_positive():
    assert one2one([[0.9], [0.7]]) == [[True], [False]]


def test_a_grid_point_is_a_positive_of_one_object_in_one_to_many_training():
    rows = [[0.9, 0.8, 0.7, 0.0], [0.5, 0.9, 0.7, 0.6]]
    assert one2many(rows, 3) == [[True, False, False, False], [False, True, True, True]]
    # In the other order: the one that it is aligned with best, and of equal ones the last.
    assert one2many(rows[::-1], 3) == [[False, True, False, True], [True, False, True, False]]
    assert one2many(rows, 1) == [[True, False, False, False], [False, True, False, False]]


def test_the_same_grid_point_in_two_images_is_two():
    alignment, grid_points = alignment_of([[0.9, 0.8], [0.9, 0.8]])
    assert assign_one2many(alignment, grid_points, torch.tensor([0, 1]), 2, 2, top_k=2).all()
    assert start_one2one(alignment, grid_points, [1, 1])().tolist() == [[True, False], [True, False]]

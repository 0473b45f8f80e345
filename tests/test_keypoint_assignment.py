"""Which grid points of a keypoint head are positives of which object, each with its own candidates."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mvision.heads.keypoints.assignment import (
    assign_one2many,
    assign_one2one,
    candidates,
    compute_alignment,
    keypoint_targets,
)
from mvision.heads.query.decoder import grid_centres
from mvision.structures import Targets

SHAPES = [(8, 8), (4, 4)]
CENTRES = grid_centres(SHAPES, torch.device("cpu"), torch.float32)
SIZES = torch.cat((torch.full((64,), 0.1), torch.full((16,), 0.4)))
CLASS_LABELS = torch.tensor([0, 2])


def make_gt(*targets):
    return keypoint_targets(list(targets), CLASS_LABELS, torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), (64, 64))


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
    """Alignment, grid points (the column numbers) and images for objects of one image."""
    alignment = torch.tensor(rows)
    grid_points = torch.arange(alignment.shape[1]).expand_as(alignment)
    return alignment, grid_points, torch.zeros(len(alignment), dtype=torch.int64)


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
    chosen = assign_one2one(*alignment_of([[0.9, 0.8, 0.0], [0.7, 0.0, 0.0]]))
    assert chosen.tolist() == [[False, True, False], [True, False, False]]


def test_the_matching_is_the_best_on_any_numbers():
    """Several objects and images, shared candidates in any order: as good as the matching on the whole map."""
    torch.manual_seed(0)
    image = torch.tensor([0, 0, 0, 2, 2])
    grid_points = torch.stack([torch.randperm(12)[:6] for _ in image])
    alignment = torch.rand(5, 6)
    chosen = assign_one2one(alignment, grid_points, image)
    assert (chosen.sum(1) == 1).all()
    for number in (0, 2):
        own = image == number
        whole = torch.zeros(int(own.sum()), 12).scatter(1, grid_points[own], alignment[own])
        best = whole[linear_sum_assignment(whole, maximize=True)].sum()
        torch.testing.assert_close(alignment[own][chosen[own]].sum(), best)
        assert grid_points[own][chosen[own]].unique().numel() == own.sum()


def test_an_object_whose_candidates_are_taken_has_no_positive():
    chosen = assign_one2one(*alignment_of([[0.9], [0.7]]))
    assert chosen.tolist() == [[True], [False]]


def test_a_grid_point_is_a_positive_of_one_object_in_one_to_many_training():
    rows = [[0.9, 0.8, 0.7, 0.0], [0.5, 0.9, 0.7, 0.6]]
    chosen = assign_one2many(*alignment_of(rows), 4, top_k=3)
    assert chosen.tolist() == [[True, False, False, False], [False, True, True, True]]
    # In the other order: the one that it is aligned with best, and of equal ones the last.
    swapped = assign_one2many(*alignment_of(rows[::-1]), 4, top_k=3)
    assert swapped.tolist() == [[False, True, False, True], [True, False, True, False]]
    assert assign_one2many(*alignment_of(rows), 4, top_k=1).tolist() == [
        [True, False, False, False],
        [False, True, False, False],
    ]


def test_the_same_grid_point_in_two_images_is_two():
    alignment, grid_points, _ = alignment_of([[0.9, 0.8], [0.9, 0.8]])
    image = torch.tensor([0, 1])
    assert assign_one2many(alignment, grid_points, image, 2, top_k=2).all()
    assert assign_one2one(alignment, grid_points, image).tolist() == [[True, False], [True, False]]

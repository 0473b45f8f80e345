"""Which cells learn which object of a keypoint head."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mvision.heads.keypoints.assignment import candidates, cell_values, keypoint_truth, many_cells, one_cell
from mvision.heads.keypoints.losses import ignored_cells
from mvision.heads.query.decoder import grid_centres
from mvision.structures import Targets

SHAPES = [(8, 8), (4, 4)]
CENTRES = grid_centres(SHAPES, torch.device("cpu"), torch.float32)
SIZES = torch.cat((torch.full((64,), 0.1), torch.full((16,), 0.4)))
TABLE = torch.tensor([0, -1, 1])


def make_truth(*targets, table=TABLE):
    return keypoint_truth(list(targets), table, 2, (64, 64), torch.float32)


def make_target(labels, visible=2.0, **more):
    count = len(labels)
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4]).repeat(count, 1)
    points = torch.full((count, 2, 3), 0.5)
    points[..., 2] = visible
    return Targets(
        boxes, torch.tensor(labels, dtype=torch.int64), torch.full((count,), 0.1), **{"keypoints": points, **more}
    )


def test_truth_has_the_objects_of_classes_with_keypoints_image_by_image():
    truth = make_truth(make_target([1, 2]), make_target([]), make_target([0, 1, 0]))
    assert truth.image.tolist() == [0, 2, 2]
    assert truth.classes.tolist() == [1, 0, 0]
    assert truth.labelled.all()
    assert not truth.unlabelled.any()


def test_lengths_are_those_of_the_original_image_whatever_its_shape():
    wide, unknown = make_truth(make_target([0], size=(100, 400)), make_target([0])).scale
    torch.testing.assert_close(wide, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(unknown, torch.ones(2))


def test_images_without_any_labels_of_points_are_known():
    truth = make_truth(make_target([0], keypoints=None), make_target([0]))
    assert truth.unlabelled.tolist() == [True, False]
    assert truth.labelled.tolist() == [False, True]


@pytest.mark.parametrize(("side", "level"), [(0.12, 0), (0.5, 1)])
def test_candidates_lie_in_the_object_on_the_level_for_its_size(side, level):
    found = candidates(CENTRES, SIZES, torch.tensor([[0.6, 0.4, side, side]]), 4)
    best = found.cells[0, 0].item()
    assert (best >= 64) == bool(level)
    assert found.closeness[0, 0] == 1
    real = found.cells[found.closeness > 0]
    assert ((CENTRES[real] - torch.tensor([0.6, 0.4])).abs() <= side / 2).all()
    assert found.inside.sum() == ((CENTRES - torch.tensor([0.6, 0.4])).abs() < side / 2).all(-1).sum()


def test_an_object_between_all_cells_gets_the_nearest():
    found = candidates(CENTRES, SIZES, torch.tensor([[0.2, 0.2, 0.01, 0.01]]), 5)
    assert (found.closeness > 0).sum() == 1
    assert found.cells[0, 0].item() == 9


def values_of(rows):
    """Values, cells (the column numbers) and images for objects of one image."""
    values = torch.tensor(rows)
    return values, torch.arange(values.shape[1]).expand_as(values), torch.zeros(len(values), dtype=torch.int64)


def test_a_place_counts_until_a_prediction_does():
    closeness = torch.tensor([[1.0, 0.5, 0.0]])
    nothing, labelled = torch.full((1, 3), 1e-4), torch.tensor([True])
    new = cell_values(closeness, nothing, nothing, nothing, labelled)
    assert new.argmax() == 0
    scores, near = torch.tensor([[0.05, 0.9, 0.9]]), torch.tensor([[0.3, 0.9, 0.9]])
    trained = cell_values(closeness, scores, near, near, labelled)
    assert trained.argmax() == 1
    assert trained[0, 2] == 0  # no candidate, however good


def test_one_cell_each_with_the_largest_sum():
    """The better cell of the first object is the only one of the second."""
    chosen = one_cell(*values_of([[0.9, 0.8, 0.0], [0.7, 0.0, 0.0]]))
    assert chosen.tolist() == [[False, True, False], [True, False, False]]


def test_one_cell_is_the_best_on_any_numbers():
    """Several objects and images, shared candidates in any order: as good as the matching on the whole map."""
    torch.manual_seed(0)
    image = torch.tensor([0, 0, 0, 2, 2])
    cells = torch.stack([torch.randperm(12)[:6] for _ in image])
    values = torch.rand(5, 6)
    chosen = one_cell(values, cells, image)
    assert (chosen.sum(1) == 1).all()
    for number in (0, 2):
        own = image == number
        whole = torch.zeros(int(own.sum()), 12).scatter(1, cells[own], values[own])
        best = whole[linear_sum_assignment(whole, maximize=True)].sum()
        torch.testing.assert_close(values[own][chosen[own]].sum(), best)
        assert cells[own][chosen[own]].unique().numel() == own.sum()


def test_an_object_that_no_cell_is_left_for_has_none():
    chosen = one_cell(*values_of([[0.9], [0.7]]))
    assert chosen.tolist() == [[True], [False]]


def test_many_cells_learn_one_object_each():
    rows = [[0.9, 0.8, 0.7, 0.0], [0.5, 0.9, 0.7, 0.6]]
    chosen = many_cells(*values_of(rows), 4, top_k=3)
    assert chosen.tolist() == [[True, False, False, False], [False, True, True, True]]
    assert many_cells(*values_of(rows), 4, top_k=1).tolist() == [
        [True, False, False, False],
        [False, True, False, False],
    ]


def test_cells_of_different_images_are_different():
    values, cells, _ = values_of([[0.9, 0.8], [0.9, 0.8]])
    image = torch.tensor([0, 1])
    assert many_cells(values, cells, image, 2, top_k=2).all()
    assert one_cell(values, cells, image).tolist() == [[True, False], [True, False]]


def test_objects_without_points_hide_their_cells_from_the_score():
    truth = make_truth(make_target([0], visible=0.0), make_target([0]), make_target([0], keypoints=None))
    inside = candidates(CENTRES, SIZES, truth.boxes, 4).inside
    ignored = ignored_cells(inside, truth)
    assert torch.equal(ignored[0], inside[0])
    assert 0 < ignored[0].sum() < 80
    assert not ignored[1].any()
    assert ignored[2].all()

"""Grid points of keypoint heads, and how the numbers of their last layers become boxes and points."""

from __future__ import annotations

import math

import pytest
import torch

from mvision.heads.keypoints.grid import (
    FINEST_SIZE,
    MAX_LOG_SCALE,
    SINGLE_LEVEL_SIZE,
    GridPoints,
    PointLayers,
    PoseLayers,
    Raw,
    decode,
    make_grid,
    raw_at,
    take_rows,
)

GRID = GridPoints(torch.tensor([[0.5, 0.25], [0.1, 0.9]]), torch.tensor([0.1, 0.2]))


def test_grid_points_are_the_centres_of_the_maps_positions() -> None:
    grid = make_grid([torch.zeros(1, 3, 2, 4, dtype=torch.bfloat16), torch.zeros(1, 3, 1, 2, dtype=torch.bfloat16)])
    assert grid.centres.dtype == torch.float32
    assert grid.centres[:5].tolist() == [[0.125, 0.25], [0.375, 0.25], [0.625, 0.25], [0.875, 0.25], [0.125, 0.75]]
    assert grid.centres[8:].tolist() == [[0.25, 0.5], [0.75, 0.5]]
    assert grid.sizes.tolist() == pytest.approx([FINEST_SIZE] * 8 + [2 * FINEST_SIZE] * 2)
    assert make_grid([torch.zeros(1, 3, 1, 1)]).sizes.tolist() == pytest.approx([SINGLE_LEVEL_SIZE])


def test_new_layers_predict_the_reference_with_a_low_score() -> None:
    for layers in (PoseLayers(8, 3, 2), PointLayers(8, 2)):
        raw = layers(torch.zeros(1, 2, 8))
        pred = decode(raw, GRID)
        torch.testing.assert_close(pred.points[0], GRID.centres[:, None].expand(2, 2, 2))
        torch.testing.assert_close(raw.logits.sigmoid(), torch.full_like(raw.logits, 0.01))
        torch.testing.assert_close(layers.rank(torch.zeros(1, 2, 8)), raw.logits)
    boxes = PoseLayers(8, 3, 2)(torch.zeros(1, 2, 8))
    torch.testing.assert_close(
        decode(boxes, GRID).boxes[0],
        torch.cat((GRID.centres, GRID.sizes[:, None].expand(2, 2)), -1),
    )


def test_points_of_poses_are_relative_to_the_box() -> None:
    raw = Raw(
        points=torch.tensor([[-0.5, 0.5, 0.25, 0.0, 3.0, -3.0]] * 2),
        logits=torch.zeros(2, 1),
        boxes=torch.tensor([[1.0, -1.0, math.log(2.0), 0.0]] * 2),
    )
    pred = decode(raw, GRID)
    torch.testing.assert_close(pred.boxes, torch.tensor([[0.6, 0.15, 0.2, 0.1], [0.3, 0.7, 0.4, 0.2]]))
    torch.testing.assert_close(pred.points[0], torch.tensor([[0.5, 0.2], [0.65, 0.15]]))
    torch.testing.assert_close(pred.visibility, torch.tensor([[3.0, -3.0]] * 2))


def test_boxes_have_no_gradient_from_points_and_a_largest_size() -> None:
    boxes = torch.zeros(2, 4, requires_grad=True)
    points = torch.ones(2, 6, requires_grad=True)
    pred = decode(Raw(points, torch.zeros(2, 1), boxes), GRID)
    pred.points.sum().backward(retain_graph=True)
    assert boxes.grad is None
    assert (points.grad[:, :4] != 0).all()
    pred.boxes.sum().backward()
    assert (boxes.grad != 0).all()
    huge = decode(Raw(points, torch.zeros(2, 1), boxes.detach() + 99), GRID)
    torch.testing.assert_close(huge.boxes[:, 2], GRID.sizes * math.exp(MAX_LOG_SCALE))


def test_minimal_boxes_are_drawn_around_the_points() -> None:
    layers = PointLayers(8, 3)
    torch.nn.init.zeros_(layers.points.weight)
    layers.points.bias.data = torch.tensor([-1.0, 0.0, 3.0, 2.0, 1.0, 1.0, 0.0, 0.0, math.log(3.0)])
    raw = layers(torch.zeros(2, 8))
    pred = decode(raw, GRID)
    torch.testing.assert_close(pred.points[0], torch.tensor([[0.4, 0.25], [0.8, 0.45], [0.6, 0.35]]))
    torch.testing.assert_close(pred.boxes[0], torch.tensor([0.6, 0.35, 0.4, 0.2]))
    torch.testing.assert_close(raw.logits.sigmoid(), torch.full((2, 1), (0.5 + 0.5 + 0.75) / 3))


def test_raw_numbers_of_several_sets_are_taken_together() -> None:
    """Two objects of the first set and one of the second, with two candidates each, in two images of five points."""
    first = Raw(torch.rand(2, 5, 6), torch.rand(2, 5, 1), torch.rand(2, 5, 4))
    second = Raw(torch.rand(2, 5, 6), torch.rand(2, 5, 3), torch.rand(2, 5, 4))
    rows, classes = torch.tensor([[1, 9], [5, 0], [7, 3]]), torch.tensor([0, 0, 2])
    taken = raw_at([first, second], rows, classes, [2, 1])
    assert torch.equal(taken.points[0], torch.stack((first.points[0, 1], first.points[1, 4])))
    assert torch.equal(taken.boxes[1], torch.stack((first.boxes[1, 0], first.boxes[0, 0])))
    assert torch.equal(taken.points[2], torch.stack((second.points[1, 2], second.points[0, 3])))
    expected = [first.logits[0, 1, 0], first.logits[1, 4, 0], second.logits[1, 2, 2], second.logits[0, 3, 2]]
    assert torch.equal(taken.logits[[0, 2], :, 0].flatten(), torch.stack(expected))
    assert raw_at([first._replace(boxes=None)], rows[:0], classes[:0], [0]).boxes is None
    assert torch.equal(take_rows(first.boxes, rows)[2, 0], first.boxes[1, 2])

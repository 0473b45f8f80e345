"""The field that moves keypoints: reading it, for batches and for objects in one row, and learning it."""

from __future__ import annotations

import pytest
import torch

from mvision.keypoint_losses import field_term
from mvision.keypoint_matching import keypoint_truth
from mvision.point_field import REACH, SAMPLES, SCATTER, follow, follow_of, scatter
from mvision.structures import Targets


def perfect_field(points: torch.Tensor, size: int = 64) -> torch.Tensor:
    """(1, 2 K, size, size) that leads to points (K, 2) from everywhere."""
    at = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(at, at, indexing="ij")
    here = torch.stack((x, y))
    return ((points[:, :, None, None] - here) / REACH).flatten(0, 1)[None]


def test_a_perfect_field_leads_to_the_points() -> None:
    torch.manual_seed(0)
    points = torch.rand(3, 2) * 0.8 + 0.1
    moved = follow(perfect_field(points), torch.rand(1, 7, 3, 2) * 0.9 + 0.05)
    torch.testing.assert_close(moved, points.expand(1, 7, 3, 2), atol=1e-3, rtol=0)


def test_objects_in_a_row_read_the_field_of_their_own_image() -> None:
    torch.manual_seed(1)
    field, points = torch.randn(3, 4, 9, 9), torch.rand(4, 5, 2, 2)
    image = torch.tensor([0, 2, 2, 2])
    moved = follow_of(field, image, points)
    for row, index in enumerate(image.tolist()):
        torch.testing.assert_close(moved[row], follow(field[index : index + 1], points[row : row + 1])[0])
    assert follow_of(field, image[:0], points[:0]).shape == (0, 5, 2, 2)


def test_places_lie_around_their_points() -> None:
    torch.manual_seed(2)
    points, boxes = torch.full((2, 3, 2), 0.5), torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.1, 0.1]])
    places = scatter(points, boxes)
    assert places.shape == (2, SAMPLES, 3, 2)
    far = (places - 0.5).abs().amax((1, 2, 3))
    assert (far <= SCATTER * torch.tensor([0.4, 0.1]) + 1e-6).all()
    assert far[0] > far[1]


def truth_of(points: torch.Tensor, visible: list[float]):
    keypoints = torch.cat((points, torch.tensor(visible)[:, None]), 1)[None]
    target = Targets(
        boxes=torch.tensor([[0.5, 0.5, 0.6, 0.6]]),
        labels=torch.tensor([0]),
        areas=torch.tensor([0.2]),
        keypoints=keypoints,
        size=(64, 64),
    )
    return keypoint_truth([target], torch.tensor([0]), len(points), (64, 64), torch.float32)


@pytest.mark.parametrize("visible", [[2.0, 1.0], [2.0, 0.0]])
def test_the_loss_of_a_perfect_field_is_zero(visible: list[float]) -> None:
    points = torch.tensor([[0.3, 0.6], [0.7, 0.4]])
    truth, sigmas = truth_of(points, visible), torch.full((1, 2), 0.05)
    field = perfect_field(points)
    if not visible[1]:
        field[:, 2:] = 99.0  # of a point that is not labelled: anything goes
    assert field_term(field, truth, sigmas).item() == pytest.approx(0, abs=1e-2)
    assert field_term(torch.zeros_like(field), truth, sigmas) > 0.1


def test_the_field_is_learned() -> None:
    torch.manual_seed(3)
    truth, sigmas = truth_of(torch.tensor([[0.3, 0.6], [0.7, 0.4]]), [2.0, 2.0]), torch.full((1, 2), 0.05)
    field = torch.zeros(1, 4, 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([field], lr=0.1)
    losses = []
    for _ in range(60):
        loss = field_term(field, truth, sigmas)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])

"""Maps in which keypoints are found: reading features in windows, teaching maps, choosing places."""

from __future__ import annotations

import pytest
import torch

from mvision.heads.keypoints.heatmaps import GRID, MARGIN, PointMaps, in_window, likeliest, map_loss, pad_rows, window
from mvision.structures.oks import similarity

BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.6, 0.4, 0.3]])


def new_maps(num_points: int = 3) -> PointMaps:
    torch.manual_seed(0)
    return PointMaps([16] * 3, [8, 16, 32], None, 16, 8, 12, num_points).eval()


def gaussians(boxes: torch.Tensor, points: torch.Tensor, width: float) -> torch.Tensor:
    """Logits of maps around points (M, K, 2), ``width`` in 0..1 of the image."""
    x, y = window(boxes)
    away = [(places[:, None] - points[..., axis, None]) / width for axis, places in enumerate((x, y))]
    return -0.5 * (away[0].square()[..., None, :] + away[1].square()[..., None])


def test_windows_are_the_enlarged_boxes() -> None:
    x, y = window(BOXES)
    assert x.shape == y.shape == (2, GRID)
    step = MARGIN * 0.4 / GRID
    torch.testing.assert_close(x[0, [0, -1]], 0.5 + torch.tensor([-1, 1]) * (MARGIN * 0.2 - step / 2))
    corner = BOXES[:, None, :2] + MARGIN / 2 * BOXES[:, None, 2:] * torch.tensor([[0.99, -0.99], [1.01, 0.0]])
    assert in_window(BOXES, corner).tolist() == [[True, False]] * 2


def test_features_are_read_where_the_windows_lie() -> None:
    """Features that are their own x and y come back as the places of the windows."""
    at = (torch.arange(32) + 0.5) / 32
    pixels = torch.stack((at.expand(32, 32), at[:, None].expand(32, 32)))[None].repeat(2, 1, 1, 1)
    pixels[1] *= 2
    read = new_maps().read(pixels, BOXES.expand(2, 2, 4))
    x, y = window(BOXES)
    for image in (0, 1):
        torch.testing.assert_close(read[image, :, 0], (image + 1) * x[:, None].expand(2, GRID, GRID))
        torch.testing.assert_close(read[image, :, 1], (image + 1) * y[..., None].expand(2, GRID, GRID))


def test_the_prior_lies_where_the_cell_expects_the_point() -> None:
    maps = new_maps()
    points = torch.tensor([[[0.4, 0.4], [0.6, 0.7], [0.5, 0.5]], [[0.3, 0.6], [0.25, 0.58], [0.35, 0.62]]])
    logits = maps.logits(torch.zeros(2, 8, GRID, GRID), torch.zeros(2, 12), BOXES, points)
    found, _ = likeliest(logits, BOXES, torch.full((2, 3, 2), 0.05))
    assert ((found - points).abs() < 1.1 * MARGIN / GRID * BOXES[:, None, 2:]).all()


def test_perfect_maps_cost_nothing_and_give_their_point() -> None:
    points = torch.tensor([[[0.41, 0.33], [0.6, 0.72]], [[0.3, 0.6], [0.22, 0.62]]])
    logits = gaussians(BOXES, points, 0.04)
    assert map_loss(logits, BOXES, points, torch.full((2, 2, 2), 0.04)).max() < 1e-4
    assert map_loss(logits.flip(-1), BOXES, points, torch.full((2, 2, 2), 0.04))[0].min() > 1
    found, similar = likeliest(logits, BOXES, torch.full((2, 2, 2), 0.05))
    assert ((found - points).abs() < 0.3 * MARGIN / GRID * BOXES[:, None, 2:]).all()
    assert (similar > 0.4).all()


def test_places_are_chosen_by_the_oks_to_expect() -> None:
    """Two peaks: not the place between them, and the broad one before the sharp one if more of it is within reach."""
    box, points = BOXES[:1], torch.tensor([[[0.4, 0.5], [0.6, 0.5]]])
    peaks = gaussians(box, points, 0.02)[0, 0].exp() + 0.6 * gaussians(box, points, 0.05)[0, 1].exp()
    chance = peaks / peaks.sum()
    assert chance[:, : GRID // 2].max() > chance[:, GRID // 2 :].max()
    reach = torch.full((1, 1, 2), 0.05)
    found, similar = likeliest(chance.log()[None, None], box, reach)
    assert found[0, 0, 0].item() == pytest.approx(0.6, abs=0.02)
    x, y = window(box)
    grid = torch.stack((x[0].expand(GRID, GRID), y[0][:, None].expand(GRID, GRID)), -1).view(-1, 1, 2)
    # The similarity of the metric, of every place of the map to the one that was chosen.
    each = similarity(found[0], grid, torch.ones(len(grid)), torch.tensor([0.05 / 2]))[:, 0]
    assert similar[0, 0].item() == pytest.approx((each * chance.flatten()).sum().item(), abs=0.02)


def test_objects_in_a_row_get_places_in_their_images() -> None:
    image, rows = torch.tensor([0, 2, 2]), torch.rand(3, 4)
    padded, index = pad_rows(image, 3, rows)
    assert padded.shape == (3, 2, 4)
    torch.testing.assert_close(padded[index], rows)
    assert (padded[1] == 0).all()
    assert pad_rows(image[:0], 3, rows[:0])[0].shape == (3, 0, 4)


def test_maps_learn_points_that_pixels_show() -> None:
    """The same box and cell, the point somewhere else in every image: only the pixels tell where."""
    torch.manual_seed(3)
    maps = new_maps(1).train()
    points = torch.rand(8, 1, 2) * 0.3 + 0.35
    at = (torch.arange(64) + 0.5) / 64
    spots = (-((at - points[..., :1]).square()[:, :, None] + (at - points[..., 1:]).square()[..., None]) / 0.002).clamp(
        min=-8
    )
    pixels = torch.randn(8)[:, None, None] * spots
    boxes, cells = torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]).repeat(8, 1, 1), torch.ones(8, 1, 12)
    expected = torch.full((8, 1, 1, 2), 0.5)
    optimizer = torch.optim.Adam(maps.embed.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        logits = maps.logits(maps.read(pixels, boxes), cells, boxes, expected)
        loss = map_loss(logits, boxes, points[:, None], torch.full((8, 1, 1, 2), 0.03)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    found, _ = likeliest(logits.detach(), boxes, torch.full((8, 1, 1, 2), 0.05))
    assert (found - points[:, None]).abs().max() < 0.03

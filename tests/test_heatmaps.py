"""Heatmaps of keypoints: sampling features in windows, training heatmaps, choosing places."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mvision.heads.keypoints.heatmaps import (
    AREA_OF_BOX,
    INITIAL_PRIOR_STD,
    MAX_SIGMA,
    MIN_PRIOR_LOGIT,
    MIN_TARGET_STD,
    PRIOR_STD_RANGE,
    RESOLUTION,
    WINDOW_SCALE,
    Heatmaps,
    best_places,
    cell_sides,
    estimated_similarity_std,
    heatmap_loss,
    in_window,
    window,
)
from mvision.heads.pixel_features import PixelFeatures
from mvision.structures.oks import point_similarity

BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.6, 0.4, 0.3]])


def new_maps(num_points: int = 3) -> Heatmaps:
    torch.manual_seed(0)
    return Heatmaps(PixelFeatures([16] * 3, [8, 16, 32], None, 16, 8), 12, num_points).eval()


def gaussians(boxes: torch.Tensor, points: torch.Tensor, width: float) -> torch.Tensor:
    """Logits of Gaussian heatmaps around points (M, K, 2), with standard deviation ``width`` in 0..1 of the image."""
    x, y = window(boxes).unbind(-2)
    away = [(places[:, None] - points[..., axis, None]) / width for axis, places in enumerate((x, y))]
    return -0.5 * (away[0].square()[..., None, :] + away[1].square()[..., None])


def test_windows_are_the_enlarged_boxes() -> None:
    x, y = window(BOXES).unbind(-2)
    assert x.shape == y.shape == (2, RESOLUTION)
    step = WINDOW_SCALE * 0.4 / RESOLUTION
    torch.testing.assert_close(x[0, [0, -1]], 0.5 + torch.tensor([-1, 1]) * (WINDOW_SCALE * 0.2 - step / 2))
    corner = BOXES[:, None, :2] + WINDOW_SCALE / 2 * BOXES[:, None, 2:] * torch.tensor([[0.99, -0.99], [1.01, 0.0]])
    assert in_window(BOXES, corner).tolist() == [[True, False]] * 2


def test_features_are_sampled_where_the_windows_lie() -> None:
    """Features whose values are their own x and y give the places of the windows' cells."""
    at = (torch.arange(32) + 0.5) / 32
    pixels = torch.stack((at.expand(32, 32), at[:, None].expand(32, 32)))[None].repeat(2, 1, 1, 1)
    pixels[1] *= 2
    read = new_maps().sample(pixels, BOXES.expand(2, 2, 4))
    x, y = window(BOXES).unbind(-2)
    for image in (0, 1):
        torch.testing.assert_close(read[image, :, 0], (image + 1) * x[:, None].expand(2, RESOLUTION, RESOLUTION))
        torch.testing.assert_close(read[image, :, 1], (image + 1) * y[..., None].expand(2, RESOLUTION, RESOLUTION))


def test_an_export_reads_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """In table lookups: also of windows that reach over the border, and of places that are not numbers."""
    pixels = torch.rand(2, 8, 20, 32, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.3], [0.02, 0.97, 0.3, 0.4], [0.5, 0.5, 2, 2], [0.7, 0.1, 0, 0]]])
    boxes = torch.cat((boxes, boxes.flip(1)))
    expected = new_maps().sample(pixels, boxes)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(F, "grid_sample", None)
    with torch.no_grad():
        found = new_maps().sample(pixels, boxes)
        assert new_maps().sample(pixels, boxes * torch.nan).isnan().any()
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_the_prior_lies_where_the_point_is_predicted() -> None:
    maps = new_maps()
    points = torch.tensor([[[0.4, 0.4], [0.6, 0.7], [0.5, 0.5]], [[0.3, 0.6], [0.25, 0.58], [0.35, 0.62]]])
    logits = maps.logits(torch.zeros(2, 8, RESOLUTION, RESOLUTION), torch.zeros(2, 12), BOXES, points)
    found, _ = best_places(logits, BOXES, torch.full((2, 3, 2), 0.05))
    assert ((found - points).abs() < 1.1 * WINDOW_SCALE / RESOLUTION * BOXES[:, None, 2:]).all()


def test_exact_heatmaps_cost_nothing_and_give_their_point() -> None:
    points = torch.tensor([[[0.41, 0.33], [0.6, 0.72]], [[0.3, 0.6], [0.22, 0.62]]])
    logits = gaussians(BOXES, points, 0.04)
    assert heatmap_loss(logits, BOXES, points, torch.full((2, 2, 2), 0.04)).max() < 1e-4
    assert heatmap_loss(logits.flip(-1), BOXES, points, torch.full((2, 2, 2), 0.04))[0].min() > 1
    found, expected = best_places(logits, BOXES, torch.full((2, 2, 2), 0.05))
    assert ((found - points).abs() < 0.3 * WINDOW_SCALE / RESOLUTION * BOXES[:, None, 2:]).all()
    assert (expected > 0.4).all()


def test_places_are_chosen_by_the_expected_similarity() -> None:
    """Two peaks: not the place between them, and of the two the broad one, although the sharp one is higher."""
    box, points = BOXES[:1], torch.tensor([[[0.4, 0.5], [0.6, 0.5]]])
    peaks = gaussians(box, points, 0.02)[0, 0].exp() + 0.6 * gaussians(box, points, 0.05)[0, 1].exp()
    chance = peaks / peaks.sum()
    assert chance[:, : RESOLUTION // 2].max() > chance[:, RESOLUTION // 2 :].max()
    std = torch.full((1, 1, 2), 0.05)
    found, expected = best_places(chance.log()[None, None], box, std)
    assert found[0, 0, 0].item() == pytest.approx(0.6, abs=0.02)
    x, y = window(box).unbind(-2)
    grid = torch.stack((x[0].expand(RESOLUTION, RESOLUTION), y[0][:, None].expand(RESOLUTION, RESOLUTION)), -1).view(
        -1, 1, 2
    )
    # The similarity that the metric has, between the chosen place and every place of the heatmap.
    each = point_similarity(found[0], grid, torch.ones(len(grid)), torch.tensor([0.05 / 2]))[:, 0]
    assert expected[0, 0].item() == pytest.approx((each * chance.flatten()).sum().item(), abs=0.02)


def test_heatmaps_learn_points_that_only_the_pixels_show() -> None:
    """The same box and token in every image, the point in another place: only the pixels show where."""
    torch.manual_seed(3)
    maps = new_maps(1).train()
    points = torch.rand(8, 1, 2) * 0.3 + 0.35
    at = (torch.arange(64) + 0.5) / 64
    spots = (-((at - points[..., :1]).square()[:, :, None] + (at - points[..., 1:]).square()[..., None]) / 0.002).clamp(
        min=-8
    )
    pixels = torch.randn(8)[:, None, None] * spots
    boxes, tokens = torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]).repeat(8, 1, 1), torch.ones(8, 1, 12)
    predicted = torch.full((8, 1, 1, 2), 0.5)
    optimizer = torch.optim.Adam(maps.embed.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        logits = maps.logits(maps.sample(pixels, boxes), tokens, boxes, predicted)
        loss = heatmap_loss(logits, boxes, points[:, None], torch.full((8, 1, 1, 2), 0.03)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    found, _ = best_places(logits.detach(), boxes, torch.full((8, 1, 1, 2), 0.05))
    assert (found - points[:, None]).abs().max() < 0.03


def test_new_priors_are_as_wide_as_a_part_of_the_box() -> None:
    """Without pixel features a new heatmap is the prior alone, cut off far from its centre."""
    maps = new_maps(1)
    torch.nn.init.zeros_(maps.embed.weight)
    points = BOXES[:, None, :2]
    logits = maps.logits(torch.zeros(2, 8, RESOLUTION, RESOLUTION), torch.zeros(2, 12), BOXES, points)
    for axis, places in enumerate(window(BOXES).unbind(-2)):
        distance = (places - BOXES[:, axis, None]) / (INITIAL_PRIOR_STD * BOXES[:, 2 + axis, None])
        profile = logits[:, 0].amax(1 + axis)
        expected = (-0.5 * distance.square()).clamp(min=MIN_PRIOR_LOGIT)
        torch.testing.assert_close(profile - profile.amax(-1, keepdim=True), expected - expected.amax(-1, keepdim=True))
    narrow = maps.logits(torch.zeros(2, 8, RESOLUTION, RESOLUTION), torch.zeros(2, 12), BOXES, points + 1)
    assert narrow.min() == 2 * MIN_PRIOR_LOGIT


def test_prior_widths_stay_in_their_range() -> None:
    maps = new_maps(1)
    for value, limit in zip((-50.0, 50.0), PRIOR_STD_RANGE):
        maps.embed.bias.data[-1] = value
        at = torch.zeros(1, 8, RESOLUTION, RESOLUTION)
        logits = maps.logits(at, torch.zeros(1, 12), BOXES[:1], BOXES[:1, None, :2])
        near = 0.5 * (0.5 * WINDOW_SCALE / RESOLUTION / limit) ** 2  # half a cell from the centre, along each axis
        assert logits.max().item() == pytest.approx(-2 * near, rel=1e-4)


def test_heatmaps_are_scaled_dot_products_of_embeddings_and_pixels() -> None:
    maps = new_maps(2)
    sampled, token = torch.randn(1, 8, RESOLUTION, RESOLUTION), torch.randn(1, 12)
    points = torch.tensor([[[0.4, 0.5], [0.6, 0.4]]])
    with_pixels, without = (maps.logits(x, token, BOXES[:1], points) for x in (sampled, torch.zeros_like(sampled)))
    embedding = maps.embed(token).view(2, 9)[:, :8]
    expected = torch.einsum("kd,dhw->khw", embedding, sampled[0]) / 8**0.5
    torch.testing.assert_close((with_pixels - without)[0], expected, atol=1e-5, rtol=1e-4)


def test_the_estimated_similarity_is_that_of_an_object_of_the_boxs_usual_area() -> None:
    """In pixels of an image that is not square."""
    box, sigmas = torch.tensor([0.5, 0.5, 0.25, 0.5]), torch.tensor([0.05, 0.5])
    std = estimated_similarity_std(box, sigmas, (100, 400)) * torch.tensor([400, 100])
    area = torch.tensor(AREA_OF_BOX * 100 * 50)
    for row, sigma in enumerate((0.05, MAX_SIGMA)):
        for away in (torch.stack((std[row, 0], torch.tensor(0.0))), torch.stack((torch.tensor(0.0), std[row, 1]))):
            value = point_similarity(away[None], torch.zeros(1, 2), area, torch.tensor([sigma]))
            assert value.item() == pytest.approx(math.exp(-0.5), rel=1e-4)


def test_places_are_finer_than_the_cells() -> None:
    """Between two cells of equal probability lies the middle; a similarity narrower than a cell is as wide as one."""
    box = BOXES[:1]
    x, y = window(box).unbind(-2)
    logits = torch.full((1, 1, RESOLUTION, RESOLUTION), -torch.inf)
    logits[0, 0, 4, 10:12] = 0.0
    found, expected = best_places(logits, box, torch.full((1, 1, 2), 0.05))
    assert found[0, 0].tolist() == pytest.approx([x[0, 10:12].mean().item(), y[0, 4].item()], abs=0.15 * 0.02)
    _, narrow = best_places(logits, box, torch.full((1, 1, 2), 1e-9))
    assert narrow.item() == pytest.approx(0.5 + 0.5 * math.exp(-0.5))
    assert expected > narrow


def test_target_heatmaps_have_the_width_that_is_asked_for() -> None:
    """And at least that of a part of a cell, which makes the loss of a sharper heatmap larger."""
    points = torch.tensor([[[0.41, 0.33]], [[0.3, 0.6]]])
    for asked, factor, exact in ((0.04, 1.0, True), (0.04, 2.0, False), (0.04, 0.5, False)):
        loss = heatmap_loss(gaussians(BOXES, points, factor * asked), BOXES, points, torch.full((2, 1, 2), asked))
        assert ((loss < 1e-3) == exact).all(), (factor, loss)
    square = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    smallest = MIN_TARGET_STD * cell_sides(square)[0, 0].item()
    loss = heatmap_loss(gaussians(square, points[:1], smallest), square, points[:1], torch.full((1, 1, 2), 1e-6))
    assert loss.item() == pytest.approx(0, abs=1e-3)

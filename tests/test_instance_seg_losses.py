"""Mask losses against Mask2Former's, as ``transformers`` has them, and the points that they look at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mask2former import modeling_mask2former as reference

from mvision.heads.instance_seg.losses import (
    mask_costs,
    mask_losses,
    read_features,
    read_masks,
    sample_mask_points,
    uncertain_points,
)
from mvision.structures import Targets


def pairs(count: int = 7, points: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 4 * torch.randn(count, points), torch.rand(count, points).round()


def test_losses_are_mask2formers() -> None:
    logits, labels = pairs()
    cross_entropy, dice = mask_losses(logits, labels)
    for found, expected in ((cross_entropy, reference.sigmoid_cross_entropy_loss), (dice, reference.dice_loss)):
        torch.testing.assert_close(found.sum() / 3, expected(logits, labels, 3), atol=1e-5, rtol=0)


def test_costs_are_mask2formers() -> None:
    logits, _ = pairs(11)
    _, labels = pairs(4)
    cross_entropy, dice = mask_costs(logits, labels)
    expected = reference.pair_wise_sigmoid_cross_entropy_loss(logits, labels)
    torch.testing.assert_close(cross_entropy, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dice, reference.pair_wise_dice_loss(logits, labels), atol=1e-5, rtol=1e-5)
    layers = mask_costs(torch.stack((logits, -logits))[:, None], labels[None])
    torch.testing.assert_close(layers[0][0, 0], cross_entropy)


def test_losses_of_a_perfect_and_of_a_wrong_mask() -> None:
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    right, wrong = (mask_losses(sign * 50 * (2 * labels - 1), labels) for sign in (1, -1))
    assert [value.item() for value in right] == pytest.approx([0, 0], abs=1e-6)
    assert wrong[0].item() == pytest.approx(50)
    assert wrong[1].item() == pytest.approx(1 - 1 / 5)


def test_masks_and_features_are_read_as_grid_sample_does() -> None:
    torch.manual_seed(1)
    masks, points = torch.rand(3, 9, 14).round(), torch.rand(50, 2)
    grid = (2 * points - 1)[None, None]
    expected = F.grid_sample(masks[None], grid, padding_mode="border", align_corners=False)[0, :, 0]
    torch.testing.assert_close(read_masks(masks.to(torch.uint8), points), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(read_features(masks[None], points[None])[0], expected)
    halves = read_features(masks[None].bfloat16().transpose(2, 3), points[None])
    assert halves.dtype == torch.float32
    assert halves.isfinite().all()


def test_uncertain_points_come_first() -> None:
    logits, _ = pairs(5, 300)
    index = uncertain_points(logits, 40)
    assert index.shape == (5, 40)
    assert index[:, 30:].tolist() == [list(range(10))] * 5
    chosen, every = logits.abs().gather(1, index[:, :30]), logits.abs().sort(1).values
    torch.testing.assert_close(chosen.sort(1).values, every[:, :30])


def square(count: int, masks: bool = True) -> Targets:
    """Objects in a grid, each a square of a tenth of the image."""
    centres = torch.stack((torch.arange(count) % 5 / 5 + 0.1, torch.arange(count) // 5 / 5 + 0.1), -1)
    boxes = torch.cat((centres, torch.full((count, 2), 0.1)), 1)
    drawn = torch.zeros(count, 100, 100, dtype=torch.uint8)
    for mask, (x, y) in zip(drawn, (centres * 100).round().int().tolist()):
        mask[y - 5 : y + 5, x - 5 : x + 5] = 1
    return Targets(boxes, torch.zeros(count, dtype=torch.int64), boxes[:, 2] * boxes[:, 3], drawn if masks else None)


def test_points_are_where_the_objects_are() -> None:
    torch.manual_seed(2)
    at = sample_mask_points([square(2), square(0), square(5, masks=False)], 4000, torch.device("cpu"))
    assert at.points.shape == (3, 4000, 2)
    assert at.labels.shape == (3, 5, 4000)
    assert ((at.points >= 0) & (at.points <= 1)).all()
    assert at.valid.tolist() == [[True, True, False, False, False], [False] * 5, [False] * 5]
    # A square is 1 % of the image; half of all points are drawn from the two of them, 1 / 1.3 ** 2 inside.
    assert at.labels[0, :2].mean(1).tolist() == pytest.approx([0.5 / 2 / 1.69 + 0.005] * 2, abs=0.02)
    assert at.labels[1:].sum() == 0


def test_an_object_without_a_pixel_has_no_mask() -> None:
    targets = square(2)
    assert targets.masks is not None
    targets.masks[1] = 0
    assert sample_mask_points([targets], 10, torch.device("cpu")).valid.tolist() == [[True, False]]

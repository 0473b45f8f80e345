"""Mask losses against Mask2Former's, as ``transformers`` has them, and the points that they look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.mask2former import modeling_mask2former as reference

from mvision.heads.instance_seg.logits import mask_at_points
from mvision.heads.instance_seg.losses import mask_costs, mask_losses, matched_losses, uncertain_points
from mvision.heads.instance_seg.points import MAX_NUMBERS, pack_masks, read_features, read_masks, sample_mask_points
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
    torch.testing.assert_close(read_features(masks[None], points[None])[0], expected)
    halves = read_features(masks[None].bfloat16().transpose(2, 3), points[None])
    assert halves.dtype == torch.float32
    assert halves.isfinite().all()


@pytest.mark.parametrize("at_once", [1, 2**25])
def test_masks_of_a_batch_are_read_as_grid_sample_does(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setitem(MAX_NUMBERS, "cpu", at_once)
    torch.manual_seed(1)
    batch = [square(count) for count in (3, 0, 5)] + [square(2, masks=False)]
    for target in batch[:3]:
        target.masks = torch.rand(len(target), 9, 14).round().to(torch.uint8)
    assert batch[2].masks is not None
    batch[2].masks[1] = 0
    points, known = torch.rand(4, 50, 2), np.zeros((4, 5), bool)
    bits, slots, size = pack_masks(batch, known)
    assert known.tolist() == [[True] * 3 + [False] * 2, [False] * 5, [True, False, True, True, True], [False] * 5]
    labels = torch.zeros(4, 5, 50)
    read_masks(bits, slots, size, points, labels)
    for target, at, found in zip(batch, 2 * points - 1, labels):
        if target.masks is not None:
            expected = F.grid_sample(
                target.masks[:, None].float(),
                at.expand(len(target), 1, -1, -1),
                padding_mode="border",
                align_corners=False,
            )
            torch.testing.assert_close(found[: len(target)], expected[:, 0, 0], atol=1e-5, rtol=0)
        assert not found[0 if target.masks is None else len(target) :].any()


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


def loop_losses(embeddings, boxes, pairs, pixels, samples, count):  # type: ignore[no-untyped-def]
    """The sums of ``matched_losses``, pair by pair."""
    sums = {"mask": torch.zeros(len(embeddings)), "dice": torch.zeros(len(embeddings))}
    for layer, image, query, gt_index in pairs.tolist():
        if samples.known[image, gt_index]:
            at = (layer, image, slice(query, query + 1))
            logits = mask_at_points(
                embeddings[at], pixels[image], None if boxes is None else boxes[at], samples.points[image]
            )
            index = uncertain_points(logits, count)
            labels = samples.labels[image, gt_index][None].gather(1, index)
            for name, values in zip(sums, mask_losses(logits.gather(1, index), labels)):
                sums[name][layer] += values[0]
    return sums


@pytest.mark.parametrize("at_once", [1, 3000, 2**25])
def test_a_batch_has_the_losses_of_its_pairs(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Images with many, few and no objects, some without a mask; all at once and in parts."""
    monkeypatch.setitem(MAX_NUMBERS, "cpu", at_once)
    torch.manual_seed(3)
    batch = [square(3), square(0), square(7), square(2, masks=False), square(1)]
    assert batch[2].masks is not None
    batch[2].masks[4] = 0
    samples = sample_mask_points(batch, 120, torch.device("cpu"))
    embeddings, pixels = torch.randn(2, 5, 9, 5), torch.randn(5, 4, 120)
    boxes = torch.rand(2, 5, 9, 4) * 0.3 + 0.3
    pairs = np.array(
        [
            (layer, image, query, gt_index)
            for layer in range(2)
            for image, target in enumerate(batch)
            for gt_index, query in enumerate(torch.randperm(9)[: len(target)].tolist())
        ]
    )
    found, expected = (
        function(embeddings.requires_grad_(), boxes, pairs, pixels.requires_grad_(), samples, 40)
        for function in (matched_losses, loop_losses)
    )
    for name in ("mask", "dice"):
        torch.testing.assert_close(found[name], expected[name])
        for leaf in (embeddings, pixels):
            gradients = [
                torch.autograd.grad(sums[name].sum(), leaf, retain_graph=True)[0] for sums in (found, expected)
            ]
            torch.testing.assert_close(*gradients)

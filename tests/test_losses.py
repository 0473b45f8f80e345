"""Loss terms against their definitions."""

from dataclasses import replace

import pytest
import torch

from mvision.heads.query.losses import LossSet, quality_focal, set_losses
from mvision.heads.query.matching import Pairs, pad_targets
from mvision.structures import Targets
from tests.test_matching import as_pairs

TARGETS = [
    Targets(
        boxes=torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.3, 0.2, 0.2]]),
        labels=torch.tensor([1, 0]),
        areas=torch.tensor([0.16, 0.04]),
    ),
    Targets(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), areas=torch.zeros(0)),
]


def losses_of(logits, boxes, pairs, gt, total=None):
    suffixes = [str(layer) for layer in range(len(logits))]
    return set_losses([LossSet(logits, boxes, pairs, gt.total if total is None else total, suffixes)], gt)


def test_set_losses_of_known_boxes():
    boxes = torch.zeros(1, 2, 3, 4)
    boxes[0, 0, 0] = torch.tensor([0.5, 0.5, 0.4, 0.4])  # exactly object 0
    boxes[0, 0, 1] = torch.tensor([0.3, 0.3, 0.2, 0.2])  # half over object 1: IoU 1/3, GIoU 1/3
    boxes[0, 0, 2] = boxes[0, 1] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    assignment = torch.tensor([[[0, 1, -1], [-1, -1, -1]]])
    logits = torch.zeros(1, 2, 3, 2)
    losses = losses_of(logits, boxes, as_pairs(assignment), pad_targets(TARGETS, torch.device("cpu")))
    assert losses["box"].item() == pytest.approx(0.1 / 2, abs=1e-6)
    assert losses["giou"].item() == pytest.approx((1 - 1 / 3) / 2, abs=1e-6)
    # sigmoid(0) = 1/2 everywhere, so each binary cross-entropy is ln 2: positives weigh their IoU, others 0.75 / 4.
    weights = 1 + 1 / 3 + 10 * 0.75 * 0.25
    assert losses["class"].item() == pytest.approx(weights * 0.693147 / 2, abs=1e-5)


def test_matchability_aware_loss_keeps_poor_matches_at_full_weight():
    logits, positive = torch.tensor([0.3, -0.4]), torch.tensor([0])
    found = quality_focal(logits, (positive,), torch.tensor([0.25]), "mal", alpha=0.75, gamma=1.5)
    prob = logits.sigmoid()
    soft = 0.25**1.5
    expected_positive = -(soft * prob[0].log() + (1 - soft) * (1 - prob[0]).log())
    expected_negative = -(prob[1] ** 1.5) * (1 - prob[1]).log()
    torch.testing.assert_close(found, torch.stack((expected_positive, expected_negative)))


def test_pairs_that_do_not_count_change_nothing():
    """Not even where they name the query of a pair that counts, before it or after it."""
    torch.manual_seed(0)
    gt = pad_targets(TARGETS, torch.device("cpu"))
    zero = torch.tensor(0)
    plain = Pairs(*torch.tensor([[0, 0], [0, 0], [1, 3], [0, 1]]))
    filled = Pairs(
        layer=zero.expand(5), image=torch.tensor([0, 0, 0, 0, 1]), query=torch.tensor([1, 1, 3, 3, 2]),
        object=torch.tensor([1, 0, 1, 0, 0]), counted=torch.tensor([False, True, True, False, False]),
    )  # fmt: skip
    results = []
    for pairs in (plain, filled):
        logits, boxes = (x.requires_grad_() for x in (torch.linspace(-2, 2, 16), torch.linspace(0.1, 0.9, 32)))
        losses = losses_of(logits.view(1, 2, 4, 2), boxes.view(1, 2, 4, 4), pairs, gt)
        sum(value.sum() for value in losses.values()).backward()
        results.append([*losses.values(), logits.grad, boxes.grad])
    torch.testing.assert_close(*results)


def test_layers_are_independent():
    torch.manual_seed(0)
    logits, boxes = torch.randn(3, 2, 4, 2), torch.rand(3, 2, 4, 4)
    assignment = torch.tensor([[[0, 1, -1, -1], [-1] * 4], [[-1, 0, 1, -1], [-1] * 4], [[1, -1, -1, 0], [-1] * 4]])
    gt = pad_targets(TARGETS, torch.device("cpu"))
    together = losses_of(logits, boxes, as_pairs(assignment), gt)
    for layer in range(3):
        one = slice(layer, layer + 1)
        alone = losses_of(logits[one], boxes[one], as_pairs(assignment[one]), gt)
        for name, value in together.items():
            torch.testing.assert_close(value[layer], alone[name][0])


def test_without_objects_losses_are_finite_and_differentiable():
    empty = pad_targets([TARGETS[1]], torch.device("cpu"))
    logits = torch.randn(2, 1, 4, 3, requires_grad=True)
    boxes = torch.rand(2, 1, 4, 4, requires_grad=True)
    losses = losses_of(logits, boxes, as_pairs(torch.full((2, 1, 4), -1)), empty)
    assert (losses["box"] == 0).all()
    assert (losses["giou"] == 0).all()
    sum(value.sum() for value in losses.values()).backward()
    assert logits.grad.isfinite().all()
    assert (boxes.grad == 0).all()


def test_a_given_total_takes_the_place_of_the_number_of_objects():
    gt = pad_targets(TARGETS, torch.device("cpu"))
    logits, boxes = torch.randn(1, 2, 4, 2), torch.rand(1, 2, 4, 4)
    assignment = torch.tensor([[[0, 0, 1, -1], [-1] * 4]])
    by_objects, by_tokens = (losses_of(logits, boxes, as_pairs(assignment), gt, total) for total in (None, 3.0))
    for name, value in by_objects.items():
        torch.testing.assert_close(by_tokens[name], value * 2 / 3)


def test_sets_do_not_touch_each_other():
    """Together they have the terms and gradients that each has alone; classes that are not labelled differ by image."""
    torch.manual_seed(0)
    known = torch.tensor([True, False, True])
    targets = [replace(TARGETS[0], labelled_classes=known), *TARGETS]
    gt = pad_targets(targets, torch.device("cpu"))
    matched = as_pairs(torch.tensor([[[0, 1, -1], [-1] * 3, [-1, 0, 1]], [[-1, 0, 1], [-1] * 3, [1, -1, 0]]]))
    dense = Pairs(
        layer=torch.zeros(4, dtype=torch.int64), image=torch.tensor([0, 0, 2, 2]), query=torch.tensor([4, 4, 0, 3]),
        object=torch.tensor([0, 1, 1, 0]), counted=torch.tensor([False, True, True, True]),
    )  # fmt: skip
    sets = [
        LossSet(torch.randn(layers, 3, number, 3), torch.rand(layers, 3, number, 4), pairs, total, suffixes)
        for layers, number, pairs, total, suffixes in (
            (2, 3, matched, 4.0, ["a", "b"]), (1, 5, dense, torch.tensor(3.0), ["c"]), (2, 3, matched, 8.0, ["d", "e"])
        )
    ]  # fmt: skip
    leaves = [value.requires_grad_() for one in sets for value in (one.logits, one.boxes)]
    together = set_losses(sets, gt)
    alone = [set_losses([one], gt) for one in sets]
    for name, values in together.items():
        torch.testing.assert_close(values, torch.cat([one[name] for one in alone]))
    gradients = [torch.autograd.grad(_weighted(terms), leaves) for terms in (together, _joined(alone))]
    torch.testing.assert_close(*gradients)


def _joined(alone):
    return {name: torch.cat([one[name] for one in alone]) for name in alone[0]}


def _weighted(terms):
    """A sum in which every term and layer has a weight of its own."""
    return sum(((index + 1) * torch.arange(1.0, 6) * values).sum() for index, values in enumerate(terms.values()))

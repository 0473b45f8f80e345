"""Hungarian matching and task-aligned assignment."""

import itertools

import torch

from mvision.boxes import cxcywh_to_xyxy, iou
from mvision.matching import MatchingCosts, hungarian, pad_targets, task_aligned
from mvision.structures import Targets


def make_targets(*counts, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.2
        labels = torch.randint(0, classes, (count,), generator=generator)
        targets.append(Targets(boxes=boxes, labels=labels, areas=boxes[:, 2] * boxes[:, 3]))
    return targets


def _cost(logits, boxes, target):
    prob = logits.sigmoid()[:, target.labels]
    focal = 0.25 * (1 - prob) ** 2 * -(prob + 1e-8).log() - 0.75 * prob**2 * -(1 - prob + 1e-8).log()
    l1 = (boxes[:, None] - target.boxes[None]).abs().sum(-1)
    _, giou = iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(target.boxes)[None])
    return 2 * focal + 5 * l1 - 2 * giou


def test_matching_finds_the_cheapest_assignment_of_every_layer_and_image():
    torch.manual_seed(1)
    targets = make_targets(3, 0, 1)
    logits, boxes = torch.randn(2, 3, 5, 3), torch.rand(2, 3, 5, 4) * 0.5 + 0.2
    assigned = hungarian(logits, boxes, pad_targets(targets, torch.device("cpu")), MatchingCosts())
    assert (assigned[:, 1] == -1).all()
    for layer, image in itertools.product(range(2), (0, 2)):
        cost = _cost(logits[layer, image], boxes[layer, image], targets[image])
        count = cost.shape[1]
        cheapest = min(
            sum(cost[query, target].item() for target, query in enumerate(chosen))
            for chosen in itertools.permutations(range(5), count)
        )
        matched = assigned[layer, image]
        assert sorted(matched[matched >= 0].tolist()) == list(range(count))
        found = sum(cost[query, matched[query]].item() for query in range(5) if matched[query] >= 0)
        assert abs(found - cheapest) < 1e-5


def test_predictions_that_are_not_finite_are_matched_last():
    targets = make_targets(2)
    logits, boxes = torch.zeros(1, 1, 4, 3), torch.rand(1, 1, 4, 4)
    boxes[0, 0, :2] = float("nan")
    logits[0, 0, 0] = float("inf")
    assigned = hungarian(logits, boxes, pad_targets(targets, torch.device("cpu")), MatchingCosts())
    assert (assigned[0, 0, :2] == -1).all()
    assert (assigned[0, 0, 2:] >= 0).all()


def test_more_objects_than_queries():
    assigned = hungarian(
        torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2, 4), pad_targets(make_targets(5), torch.device("cpu")), MatchingCosts()
    )
    assert (assigned >= 0).all()
    assert assigned.unique().numel() == 2


def _grid(side):
    line = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)


def test_task_aligned_takes_the_best_cells_inside_the_object():
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    target = Targets(boxes=box, labels=torch.tensor([1]), areas=torch.tensor([0.25]))
    centres = _grid(8)
    boxes = torch.cat((centres, torch.full_like(centres, 0.5)), -1)[None]
    logits = torch.zeros(1, 64, 3)
    assigned, quality = task_aligned(logits, boxes, centres, pad_targets([target], torch.device("cpu")), top_k=4)
    positive = assigned[0] >= 0
    assert positive.sum() == 4
    # The four cells around the middle overlap the object most.
    assert ((centres[positive] - 0.5).abs() < 0.1).all()
    overlap, _ = iou(cxcywh_to_xyxy(boxes[0, positive]), cxcywh_to_xyxy(box))
    torch.testing.assert_close(quality[0, positive].max(), overlap.max())
    assert (quality[0, ~positive] == 0).all()


def test_task_aligned_gives_a_contested_cell_to_the_larger_overlap():
    truth = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.8, 0.8]])
    target = Targets(boxes=truth, labels=torch.tensor([0, 0]), areas=torch.tensor([0.16, 0.64]))
    centres = torch.tensor([[0.5, 0.5]])
    boxes = torch.tensor([[[0.5, 0.5, 0.7, 0.7]]])
    assigned, _ = task_aligned(torch.zeros(1, 1, 2), boxes, centres, pad_targets([target], torch.device("cpu")))
    assert assigned.item() == 1


def test_task_aligned_serves_an_object_smaller_than_a_cell():
    target = Targets(
        boxes=torch.tensor([[0.501, 0.501, 0.001, 0.001]]), labels=torch.tensor([0]), areas=torch.tensor([1e-6])
    )
    centres = _grid(4)
    boxes = torch.cat((centres, torch.full_like(centres, 0.3)), -1)[None]
    assigned, _ = task_aligned(torch.zeros(1, 16, 2), boxes, centres, pad_targets([target], torch.device("cpu")))
    assert (assigned >= 0).sum() == 1


def test_task_aligned_without_objects():
    truth = pad_targets(make_targets(0, 0), torch.device("cpu"))
    assigned, quality = task_aligned(torch.zeros(2, 16, 3), torch.rand(2, 16, 4), _grid(4), truth)
    assert (assigned == -1).all()
    assert (quality == 0).all()

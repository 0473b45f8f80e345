"""Hungarian matching and the dense assignment by anchors."""

import itertools

import torch

from mvision.heads.query import matching
from mvision.heads.query.matching import Pairs, anchor_assignment, pad_targets, start_matching
from mvision.structures import Targets
from mvision.structures.boxes import cxcywh_to_xyxy, iou


def make_targets(*counts, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.2
        labels = torch.randint(0, classes, (count,), generator=generator)
        targets.append(Targets(boxes=boxes, labels=labels, areas=boxes[:, 2] * boxes[:, 3]))
    return targets


def as_pairs(assignment):
    """The pairs of (L, B, Q) indices of objects, -1 for none."""
    return Pairs(*(assignment >= 0).nonzero().unbind(1), assignment[assignment >= 0])


def as_assignment(pairs, shape):
    """The inverse, of the pairs that count."""
    counts = slice(None) if pairs.counted is None else pairs.counted
    layer, image, query, index = (x[counts] for x in (pairs.layer, pairs.image, pairs.query, pairs.object))
    assignment = torch.full(shape, -1)
    assignment[layer, image, query] = index
    assert (assignment >= 0).sum() == len(index)  # no query has two objects
    return assignment


def hungarian(logits, boxes, padded):
    return start_matching(logits, boxes, padded)()


def _cost(logits, boxes, target):
    prob = logits.sigmoid()[:, target.labels]
    focal = 0.25 * (1 - prob) ** 2 * -(prob + 1e-8).log() - 0.75 * prob**2 * -(1 - prob + 1e-8).log()
    l1 = (boxes[:, None] - target.boxes[None]).abs().sum(-1)
    _, giou = iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(target.boxes)[None])
    return 2 * focal + 5 * l1 - 2 * giou


def test_matching_is_the_cheapest_assignment_of_every_layer_and_image():
    torch.manual_seed(1)
    targets = make_targets(3, 0, 1)
    logits, boxes = torch.randn(2, 3, 5, 3), torch.rand(2, 3, 5, 4) * 0.5 + 0.2
    assignment = as_assignment(hungarian(logits, boxes, pad_targets(targets, torch.device("cpu"))), boxes.shape[:3])
    assert (assignment[:, 1] == -1).all()
    for layer, image in itertools.product(range(2), (0, 2)):
        cost = _cost(logits[layer, image], boxes[layer, image], targets[image])
        count = cost.shape[1]
        cheapest = min(
            sum(cost[query, target].item() for target, query in enumerate(chosen))
            for chosen in itertools.permutations(range(5), count)
        )
        matched = assignment[layer, image]
        assert sorted(matched[matched >= 0].tolist()) == list(range(count))
        cost_of_match = sum(cost[query, matched[query]].item() for query in range(5) if matched[query] >= 0)
        assert abs(cost_of_match - cheapest) < 1e-5


def test_predictions_that_are_not_finite_are_matched_last():
    targets = make_targets(2)
    logits, boxes = torch.zeros(1, 1, 4, 3), torch.rand(1, 1, 4, 4)
    boxes[0, 0, :2] = float("nan")
    logits[0, 0, 0] = float("inf")
    assignment = as_assignment(hungarian(logits, boxes, pad_targets(targets, torch.device("cpu"))), boxes.shape[:3])
    assert (assignment[0, 0, :2] == -1).all()
    assert (assignment[0, 0, 2:] >= 0).all()


def test_more_objects_than_queries():
    padded = pad_targets(make_targets(5), torch.device("cpu"))
    assignment = as_assignment(hungarian(torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2, 4), padded), (1, 1, 2))
    assert (assignment >= 0).all()
    assert assignment.unique().numel() == 2


def test_pairs_are_ordered_and_the_same_from_one_thread_and_from_several(monkeypatch):
    torch.manual_seed(1)
    logits, boxes = torch.randn(2, 3, 5, 3), torch.rand(2, 3, 5, 4)
    found = []
    for worth_threads in (0, float("inf")):
        monkeypatch.setattr(matching, "WORTH_THREADS", worth_threads)
        found.append(hungarian(logits, boxes, pad_targets(make_targets(4, 0, 2), torch.device("cpu"))))
    pairs, by_one = found
    assert (pairs.host == by_one.host).all()
    assert pairs.host.tolist() == sorted(pairs.host.tolist())
    assert pairs.host[:, :2].tolist() == [[layer, image] for layer in (0, 1) for image in (0, 0, 0, 0, 2, 2)]
    on_device = torch.stack((pairs.layer, pairs.image, pairs.query, pairs.object), 1)
    assert on_device.equal(torch.from_numpy(pairs.host))


def test_labels_are_stacked_and_padded():
    targets = make_targets(2, 0, 1)
    targets[2].labelled_classes = torch.tensor([True, False, True])
    padded = pad_targets(targets, torch.device("cpu"))
    assert padded.valid.tolist() == [[True, True], [False, False], [True, False]]
    assert padded.boxes[padded.valid].equal(torch.cat([target.boxes for target in targets]))
    assert padded.labels[padded.valid].equal(torch.cat([target.labels for target in targets]))
    assert not padded.boxes[~padded.valid].any()
    assert padded.labelled_classes.tolist() == [[True] * 3, [True] * 3, [True, False, True]]
    assert (padded.counts, padded.total) == ([2, 0, 1], 3.0)
    assert pad_targets(make_targets(0), torch.device("cpu")).total == 1


def _anchors(side, size):
    line = (torch.arange(side) + 0.5) / side
    centres = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
    return torch.cat((centres, torch.full_like(centres, size)), -1)


def _dense(anchors, padded, **options):
    """(B, S) the object of every token, -1 for none."""
    pairs = anchor_assignment(anchors, padded.boxes, padded.valid, **options)
    return as_assignment(pairs, (1, len(padded.counts), len(anchors)))[0]


def _one(*boxes, labels=None):
    boxes = torch.tensor(boxes)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return pad_targets([Targets(boxes=boxes, labels=labels, areas=boxes[:, 2] * boxes[:, 3])], torch.device("cpu"))


def test_dense_assignment_takes_the_tokens_around_the_middle_of_the_level_that_fits():
    anchors = torch.cat((_anchors(16, 0.1), _anchors(8, 0.4)))
    assignment = _dense(anchors, _one([0.5, 0.5, 0.4, 0.4]), top_k=4)[0]
    positive = assignment >= 0
    assert positive.sum() == 4
    assert not positive[:256].any()  # anchors of the other level are far from the object's size
    assert ((anchors[positive, :2] - 0.5).abs() < 0.1).all()


def test_tokens_outside_of_the_object_are_never_taken():
    anchors = _anchors(8, 0.3)
    assignment = _dense(anchors, _one([0.5, 0.5, 0.15, 0.15]), top_k=50)[0]
    centres = anchors[assignment >= 0, :2]
    assert len(centres) == 4
    assert ((centres - 0.5).abs() < 0.075).all()


def test_a_token_of_two_objects_goes_to_the_smaller_object():
    assignment = _dense(_anchors(1, 0.5), _one([0.5, 0.5, 0.9, 0.9], [0.5, 0.5, 0.3, 0.3]))
    assert assignment.tolist() == [[1]]


def test_an_object_smaller_than_the_grid_gets_the_nearest_one():
    assignment = _dense(_anchors(4, 0.25), _one([0.501, 0.501, 0.001, 0.001]))
    assert (assignment >= 0).sum() == 1


def test_dense_assignment_without_objects_or_with_padding():
    anchors = _anchors(4, 0.25)
    gt = pad_targets(make_targets(0, 0), torch.device("cpu"))
    assert (_dense(anchors, gt) == -1).all()
    mixed = _dense(anchors, pad_targets(make_targets(0, 3), torch.device("cpu")))
    assert (mixed[0] == -1).all()
    assert set(mixed[1].tolist()) <= {-1, 0, 1, 2}

"""Losses of box distributions, and box losses at the union of the matches of all layers."""

import numpy as np
import pytest
import torch

from mvision.heads.query import matching
from mvision.heads.query.distribution import BoxDistribution
from mvision.heads.query.fine_grained import distillation_losses, join_distributions, localization_losses
from mvision.heads.query.losses import LossSet, set_losses
from mvision.heads.query.matching import pad_targets, start_matching
from mvision.heads.query.union import in_every_layer, union_of_matches
from tests.test_heads import make_features, make_head, make_targets, total
from tests.test_matching import as_pairs

CPU = torch.device("cpu")
DISTRIBUTION = {"box_refinement": "distribution"}
OPTIONS = {
    "shared matches": {"shared_matches": True},
    "distribution": DISTRIBUTION,
    "both": {**DISTRIBUTION, "shared_matches": True},
    "no DDF": {**DISTRIBUTION, "ddf_weight": 0.0},
    "no FGL": {**DISTRIBUTION, "fgl_weight": 0.0},
    "one layer": {**DISTRIBUTION, "shared_matches": True, "num_layers": 1},
    "no denoising": {**DISTRIBUTION, "shared_matches": True, "num_denoising": 0},
}


def union(*rows):
    return union_of_matches(np.array(rows, dtype=np.int64).reshape(-1, 4)).tolist()


def test_a_query_keeps_the_object_of_most_layers():
    rows = [(0, 0, 5, 1), (1, 0, 5, 2), (2, 0, 5, 2), (0, 0, 3, 2), (1, 1, 5, 0), (2, 0, 4, 1)]
    assert union(*rows) == [[0, 3, 2], [0, 4, 1], [0, 5, 2], [1, 5, 0]]
    assert union(*reversed(rows)) == union(*rows)


def test_of_equal_votes_the_first_object_counts():
    assert union((0, 0, 5, 7), (1, 0, 5, 2), (2, 0, 5, 4)) == [[0, 5, 2]]
    assert union((0, 1, 5, 7), (1, 1, 5, 7), (2, 1, 5, 2), (3, 1, 5, 2)) == [[1, 5, 2]]


def test_the_union_of_nothing_is_empty():
    assert union() == []
    assert in_every_layer(union_of_matches(np.empty((0, 4), dtype=np.int64)), 3).shape == (0, 4)


def test_matching_gives_the_union_in_every_layer():
    torch.manual_seed(0)
    padded = pad_targets(make_targets(3, 0, 2), CPU)
    logits, boxes = torch.randn(4, 3, 6, 3), torch.rand(4, 3, 6, 4)
    matches = start_matching(logits, boxes, padded, shared=True)()
    assert matches.host.tolist() == start_matching(logits, boxes, padded)().host.tolist()
    expected = in_every_layer(union_of_matches(matches.host), 4)
    shared = matches.shared
    assert shared.host.tolist() == expected.tolist()
    assert len(expected) > len(matches.host)
    on_device = torch.stack((shared.layer, shared.image, shared.query, shared.object), 1)
    assert on_device.equal(torch.from_numpy(expected))
    none = start_matching(logits, boxes, pad_targets(make_targets(0, 0, 0), CPU), shared=True)()
    assert none.shared.host.shape == (0, 4)


def test_box_terms_have_pairs_and_a_divisor_of_their_own():
    torch.manual_seed(0)
    gt = pad_targets(make_targets(2, 1), CPU)
    own = as_pairs(torch.tensor([[[0, 1, -1], [-1, 0, -1]], [[-1, 0, 1], [0, -1, -1]]]))
    shared = as_pairs(torch.tensor([[[0, 1, 1], [0, 0, -1]]] * 2))
    logits, boxes = torch.randn(2, 2, 3, 3), torch.rand(2, 2, 3, 4)
    other = LossSet(torch.randn(1, 2, 4, 3), torch.rand(1, 2, 4, 4), as_pairs(torch.zeros(1, 2, 4).long()), 2.0, ["c"])

    def losses(pairs, divisor, **more):
        return set_losses([LossSet(logits, boxes, pairs, divisor, ["a", "b"], **more), other], gt)

    both = losses(own, 3.0, box_pairs=shared, box_total=5.0)
    torch.testing.assert_close(both["class"], losses(own, 3.0)["class"])
    for term in ("box", "giou"):
        torch.testing.assert_close(both[term], losses(shared, 5.0)[term])


def distributions(layers=2, queries=5, seed=0):
    """A set of predictions for two images with 2 and 0 objects, and the targets."""
    torch.manual_seed(seed)
    gt = pad_targets(make_targets(2, 0), CPU)
    initial = torch.rand(2, queries, 4) * 0.4 + 0.3
    assignment = torch.full((layers, 2, queries), -1)
    assignment[:, 0, :2] = torch.tensor([1, 0])
    boxes = (gt.boxes[0, 0] + 0.02 * torch.randn(layers, 2, queries, 4)).clamp(0.1, 0.9)
    corners = torch.randn(layers, 2, queries, 4 * 9, requires_grad=True)
    logits = torch.randn(layers, 2, queries, 3)
    suffixes = [str(layer) for layer in range(layers)]
    return LossSet(logits, boxes, as_pairs(assignment), 2.0, suffixes, corners=corners, initial=initial), gt


def test_fgl_is_least_where_the_two_bins_have_the_shares_of_the_side():
    one, gt = distributions()
    bins = BoxDistribution(8, 4.0, 0.5)
    found = join_distributions([one], gt)
    lower, share = bins.bins_of(found.gt_boxes, found.initial)
    prob = torch.zeros(len(lower), 4, 9).scatter(-1, lower[..., None], 1 - share[..., None])
    prob.scatter_(-1, lower[..., None] + 1, share[..., None])
    found.corners = torch.randn(20, 4, 9).index_copy(0, found.row, (prob + 1e-9).log()).view(2, 2, 5, 4, 9)
    entropy = -(prob * (prob + 1e-9).log()).sum((1, 2)) * found.overlap
    expected = torch.zeros(2).index_add(0, found.term, entropy) / 2
    torch.testing.assert_close(localization_losses(found, [2.0], bins), expected)


def test_ddf_moves_all_queries_of_earlier_layers_towards_the_last():
    one, gt = distributions(layers=3)
    losses = distillation_losses(join_distributions([one], gt), one.logits[-1])
    assert losses.shape == (2,)
    for layer in range(2):
        (gradient,) = torch.autograd.grad(losses[layer], one.corners, retain_graph=True)
        changed = gradient.abs().sum((2, 3)).sum(1) > 0
        assert changed.tolist() == [index == layer for index in range(3)]  # neither the teacher nor other layers
        assert gradient[layer].abs().sum(-1).min() > 0
    with torch.no_grad():
        one.corners.copy_(one.corners[-1:].expand(3, -1, -1, -1))
    assert distillation_losses(join_distributions([one], gt), one.logits[-1]).abs().max() < 1e-5


def test_ddf_is_a_mean_of_queries_with_and_of_queries_without_an_object():
    one, gt = distributions()
    found = join_distributions([one], gt)
    student, teacher = (one.corners.detach().unflatten(-1, (4, 9)) / 5).log_softmax(-1)
    divergence = 25 * (teacher.exp() * (teacher - student)).sum(-1).mean(-1)  # (B, N), mean over the sides
    matched = torch.zeros(2, 5, dtype=torch.bool)
    matched[0, :2] = True
    weight = one.logits[-1].sigmoid().amax(-1)
    weight[matched] = found.overlap[:2]
    means = (divergence * weight)[matched].mean(), (divergence * weight)[~matched].mean()
    shares = torch.tensor([2.0, 8.0]).sqrt()
    expected = (torch.stack(means) * shares).sum() / shares.sum()
    torch.testing.assert_close(distillation_losses(found, one.logits[-1]), expected[None])


def test_sets_have_the_losses_that_they_have_alone():
    """But for DDF's proportion of queries with and without an object, which is that of the first set for all."""
    bins = BoxDistribution(8, 4.0, 0.5)
    sets = [distributions(queries=queries, seed=queries)[0] for queries in (5, 5, 3)]
    gt = distributions()[1]
    together = join_distributions(sets, gt)
    alone = [join_distributions([one], gt) for one in sets]
    fgl = torch.cat([localization_losses(found, [2.0], bins) for found in alone])
    torch.testing.assert_close(localization_losses(together, [2.0] * 3, bins), fgl)
    last = [one.logits[-1] for one in sets]
    ddf = torch.cat([distillation_losses(found, logits) for found, logits in zip(alone, last)])
    found = distillation_losses(together, torch.cat(last, 1))
    torch.testing.assert_close(found[:2], ddf[:2])
    assert abs(found[2] - ddf[2]) > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)], ids=str)
def test_each_option_alone_trains_every_parameter(option, counts):
    check_terms("detection", OPTIONS[option], counts)


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)], ids=str)
def test_masks_train_beside_distributions(counts):
    check_terms("instance-seg", OPTIONS["both"], counts)


@pytest.mark.parametrize("task", ["detection", "instance-seg"])
def test_outputs_of_training_are_those_of_the_decoder(task):
    """Of its layers, of "pre" and of the selected tokens, in this order; those of denoising queries by themselves."""
    head, targets = randomised(make_head(task, **DISTRIBUTION)).eval(), make_targets(3, 1)
    torch.manual_seed(0)
    outputs = head(make_features(), targets=targets)
    padded = head.pad(targets, make_features())
    torch.manual_seed(0)
    decoded, noise = head.decode(make_features(), padded)
    if task == "instance-seg":
        embeddings, noisy = outputs.embeddings, outputs.denoising_embeddings
        outputs = outputs.queries
        last = head.mask_embed(decoded.encoder_queries)
        assert len(embeddings) == len(outputs.logits)
        torch.testing.assert_close(embeddings[-2:], torch.stack((embeddings[0], last)))
        torch.testing.assert_close(noisy[-1], noisy[0])
        assert len(noisy) == len(outputs.denoising.logits)
    split = noise.labels.shape[1]
    for name in ("logits", "boxes"):
        every = torch.cat((getattr(decoded, name), getattr(decoded, f"pre_{name}")[None]))
        selected = getattr(decoded, f"encoder_{name}")
        assert getattr(outputs, name).equal(torch.cat((every[:, :, split:], selected[None])))
        assert getattr(outputs.denoising, name).equal(every[:, :, :split])
    for found, part in ((outputs, slice(split, None)), (outputs.denoising, slice(split))):
        assert found.corners.equal(decoded.corners[:, :, part])
        assert found.initial.equal(decoded.initial[:, part])


def check_terms(task, settings, counts):
    """The names of the terms, and that they train every parameter."""
    head, targets = make_head(task, **settings), make_targets(*counts)
    terms = head.loss(head(make_features(), targets=targets), targets)
    total(terms).backward()
    missing = [name for name, value in head.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    assert not missing
    places = ["_encoder", "", *(f"_{index}" for index in range(head.config.num_layers - 1))]
    noisy = [f"_denoising_{index}" for index in range(head.config.num_layers)]
    noisy = noisy if any(counts) and head.config.num_denoising else []
    fine = settings.get("box_refinement") == "distribution"
    every = [*places, *noisy, *(["_pre", *(["_denoising_pre"] if noisy else [])] if fine else [])]
    names = {"class", "box", "giou", *(("mask", "dice") if task == "instance-seg" else ())}
    expected = {f"{name}{place}" for name in names for place in every}
    if fine:
        expected |= {f"fgl{place}" for place in [*places[1:], *noisy]}
    if fine and head.config.ddf_weight and head.config.num_layers > 1:
        expected |= {f"ddf{place}" for place in [*places[2:], *noisy[:-1]]}
    assert set(terms) == expected


def randomised(head):
    """Layers that do not agree, unlike those of a new head."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return head


def test_masks_are_trained_at_each_layers_own_matches():
    """Only the boxes share the matches, as in EdgeCrafter."""
    results = []
    for shared in (False, True):
        head, targets = (
            randomised(make_head("instance-seg", num_denoising=0, shared_matches=shared)),
            make_targets(3, 1),
        )
        outputs = head(make_features(), targets=targets)
        torch.manual_seed(0)
        results.append(head.loss(outputs, targets))
    own, shared = results
    changed = {name for name, value in own.items() if not torch.equal(shared[name], value)}
    assert changed == {f"{term}{place}" for term in ("box", "giou") for place in ("", "_0", "_encoder")}


@pytest.mark.parametrize("settings", [{"shared_matches": True}, OPTIONS["both"], DISTRIBUTION], ids=str)
def test_losses_of_two_processes_have_the_mean_of_one(monkeypatch, settings):
    """Whose batch is that of both together, however the objects are spread over them."""
    head = randomised(make_head("detection", num_denoising=0, **settings)).eval()  # batch norms do not see the batch
    targets, maps = make_targets(4, 1), make_features()

    def terms(images):
        chosen = targets[images]
        return head.loss(head([features[images] for features in maps], targets=chosen), chosen)

    together = terms(slice(0, 2))
    counts, calls = [], []
    monkeypatch.setattr(matching, "_several_processes", lambda: True)
    monkeypatch.setattr(matching, "mean_over_processes", lambda value: calls.append(value) or value)
    for image in range(2):
        terms(slice(image, image + 1))
        counts.append(calls.copy())
        calls.clear()
    alone = []
    for image in range(2):
        means = iter([(one + two) / 2 for one, two in zip(*counts, strict=True)])
        monkeypatch.setattr(matching, "mean_over_processes", lambda value, means=means: next(means))
        alone.append(terms(slice(image, image + 1)))
    for name, value in together.items():
        torch.testing.assert_close((alone[0][name] + alone[1][name]) / 2, value)

"""Boxes as distributions: the bins, the way to boxes and back, and what the decoder makes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mvision.heads.query import distribution
from mvision.heads.query.decoder import QueryDecoder
from mvision.heads.query.denoising import make_denoising
from mvision.heads.query.distribution import STATISTICS, BoxDistribution, bin_values, statistics
from mvision.heads.query.layers import DecoderLayer, Gate
from mvision.heads.query.matching import pad_targets
from mvision.heads.query.settings import DecoderConfig
from tests.decoder_inputs import DFINE
from tests.test_matching import make_targets

SMALL = {"embed_dim": 32, "num_queries": 9, "num_layers": 3, "num_heads": 4, "ffn_dim": 48}


def make_decoder(num_denoising: int = 0, seed: int | None = 1, **settings: Any) -> QueryDecoder:
    """Two levels; what is zero at the start is random, unless there is no seed."""
    torch.manual_seed(0)
    config = DecoderConfig(**{**SMALL, **DFINE, "num_points": [3, 5], **settings})
    decoder = QueryDecoder(config, [32, 32], num_classes=5, num_denoising=num_denoising)
    if seed is not None:
        for head in (decoder.pre_box, *decoder.box_heads, *decoder.quality_heads):
            torch.nn.init.normal_(head.layers[-1].weight, std=0.2)
    return decoder


def make_maps() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(2, 32, *shape) for shape in ((8, 6), (4, 3))]


def test_bins_are_close_around_zero_and_reach_as_far_as_said() -> None:
    values = torch.tensor(bin_values(32, 4.0, 0.5))
    torch.testing.assert_close(values, -values.flip(0))
    torch.testing.assert_close(values[-2:], torch.tensor([2.0, 4.0]))  # half a width, and a whole one
    steps = values.diff()
    assert (steps > 0).all()
    assert (steps[16:].diff() > 0).all()
    assert bin_values(4, 1.0, 3.0) == [-6.0, -3.0, 0.0, 3.0, 6.0]


@pytest.mark.parametrize("settings", [(32, 4.0, 0.5), (4, 1.0, 3.0), (16, 8.0, 0.5)])
def test_bins_in_a_graph_are_the_same(settings: tuple[int, float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "in_graph", lambda: True)
    found = BoxDistribution(*settings).values(torch.float64, torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor(bin_values(*settings), dtype=torch.float64))


def test_the_mean_of_a_side_moves_it() -> None:
    bins = BoxDistribution(32, 4.0, 0.5)
    initial = torch.tensor([0.5, 0.4, 0.2, 0.1])
    only = torch.nn.functional.one_hot
    unchanged = bins.boxes(only(torch.tensor([16] * 4), 33).float(), initial)
    torch.testing.assert_close(unchanged, initial)
    # Left side out by half a width, upper side in by the same, right side out by a width, lower side as it was.
    moved = bins.boxes(only(torch.tensor([31, 1, 32, 16]), 33).float(), initial)
    left, top, right, bottom = 0.4 - 0.1, 0.35 + 0.05, 0.6 + 0.2, 0.45
    expected = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    torch.testing.assert_close(moved, torch.tensor(expected))


def test_bins_of_boxes_are_the_way_back() -> None:
    torch.manual_seed(0)
    bins = BoxDistribution(16, 8.0, 0.5)
    initial = torch.rand(50, 4, dtype=torch.float64) * 0.4 + 0.2
    boxes = initial * (1 + 0.3 * torch.randn(50, 4, dtype=torch.float64).clamp(-1, 1))
    lower, weight = bins.bins_of(boxes, initial)
    probabilities = torch.zeros(50, 4, 17, dtype=torch.float64)
    probabilities.scatter_(-1, lower[..., None], 1 - weight[..., None])
    probabilities.scatter_(-1, lower[..., None] + 1, weight[..., None])
    torch.testing.assert_close(bins.boxes(probabilities, initial), boxes)
    far = torch.tensor([7.0, -7.0, 0.2, 0.0], dtype=torch.float64)
    lower, weight = bins.bins_of(far, torch.tensor([0.5, 0.5, 0.1, 0.1], dtype=torch.float64))
    assert lower.tolist() == [0, 15, 15, 0]
    assert weight.tolist() == [0, 1, 1, 0]
    assert bins.bins_of(far.clone(), far)[1].isfinite().all()  # an initial box without height


def test_statistics_are_the_largest_probabilities_and_their_mean() -> None:
    probabilities = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.4]).expand(2, 4, 5)
    expected = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.25]).repeat(4).expand(2, -1)
    torch.testing.assert_close(statistics(probabilities), expected)
    assert expected.shape[1] == STATISTICS


def test_the_bins_are_no_part_of_the_weights_and_stay_exact() -> None:
    bins = BoxDistribution(32, 4.0, 0.5).bfloat16()
    exact = bins.values(torch.float32, torch.device("cpu"))
    assert exact is copy.copy(bins).values(torch.float32, torch.device("cpu"))  # computed once
    assert copy.deepcopy(bins).values(torch.float32, torch.device("cpu")).tolist() == exact.tolist()
    assert exact.tolist() == pytest.approx(bin_values(32, 4.0, 0.5))
    assert not bins.state_dict()
    assert bins.to("meta").values(torch.float32, torch.device("meta")).is_meta
    corners, initial = 5 * torch.randn(3, 132), torch.rand(3, 4)
    expected = bins.boxes(bins.probabilities(corners), initial)
    with torch.autocast("cpu", torch.bfloat16):
        found = bins.boxes(bins.probabilities(corners), initial)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_a_new_decoder_predicts_the_selected_boxes() -> None:
    found = make_decoder(seed=None)(make_maps(), every_layer=True)
    torch.testing.assert_close(found.pre_boxes, found.encoder_boxes, rtol=0, atol=1e-5)
    for boxes in found.boxes:
        torch.testing.assert_close(boxes, found.initial, rtol=0, atol=1e-6)
    assert torch.equal(found.logits[0], found.pre_logits)


def test_layers_add_to_the_same_distributions() -> None:
    decoder = make_decoder()
    found = decoder(make_maps(), every_layer=True)
    first, last = found.corners[0], found.corners[-1]
    changes = [head(a + b) for head, a, b in zip(decoder.box_heads, found.queries, (0, *found.queries))]
    torch.testing.assert_close(first, changes[0])
    torch.testing.assert_close(last, sum(changes))
    of_sides = decoder.distribution.probabilities(last)
    torch.testing.assert_close(found.boxes[-1], decoder.distribution.boxes(of_sides, found.initial))
    quality = decoder.quality_heads[-1](statistics(of_sides))
    torch.testing.assert_close(found.logits[-1], decoder.class_heads[-1](found.queries[-1]) + quality)


def test_gradients_go_through_the_corners_and_not_through_boxes_and_queries() -> None:
    decoder = make_decoder(num_layers=2)
    found = decoder(make_maps(), every_layer=True)
    assert not found.initial.requires_grad
    heads = [head.layers[-1].weight for head in (decoder.pre_box, *decoder.box_heads)]
    of_last = torch.autograd.grad(found.boxes[-1].sum(), heads, allow_unused=True, retain_graph=True)
    assert of_last[0] is None
    assert all(gradient.abs().sum() > 0 for gradient in of_last[1:])


def test_the_queries_of_the_layer_before_have_no_gradient() -> None:
    decoder = make_decoder(num_layers=2)
    decoder.layers[1].register_forward_hook(lambda *args: args[2].detach())
    found = decoder(make_maps(), every_layer=True)
    added = found.corners[1] - found.corners[0]
    first = [*decoder.layers[0].parameters()]
    assert not any(gradient.any() for gradient in torch.autograd.grad(added.sum(), first))


def test_prediction_runs_the_last_classifier_and_quality_alone() -> None:
    decoder, called = make_decoder(), []
    for name in ("class_heads", "quality_heads"):
        for index, head in enumerate(getattr(decoder, name)):
            head.register_forward_hook(lambda *_, where=(name, index): called.append(where))
    found = decoder(make_maps())
    assert called == [("quality_heads", 2), ("class_heads", 2)]
    assert found.corners is found.initial is found.pre_logits is found.pre_boxes is None


def test_denoising_queries_have_first_boxes_and_corners_too() -> None:
    decoder = make_decoder(num_denoising=10)
    noisy = make_denoising(pad_targets(make_targets(2, 1), torch.device("cpu"), num_denoising=10), 5, 9, 0.5, 1.0)
    found, without = (decoder(make_maps(), queries, every_layer=True) for queries in (noisy, None))
    split = noisy.labels.shape[1]
    for name in ("pre_logits", "pre_boxes", "initial"):
        assert getattr(found, name).shape[1] == split + 9
        torch.testing.assert_close(getattr(found, name)[:, split:], getattr(without, name), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.corners[:, :, split:], without.corners, atol=1e-4, rtol=1e-4)


def test_a_shared_classifier_serves_the_first_outputs_too() -> None:
    decoder = make_decoder(shared_class_head=True)
    found = decoder(make_maps(), every_layer=True)
    torch.testing.assert_close(found.pre_logits, decoder.memory_class(found.queries[0]))
    assert (found.logits[0] - found.pre_logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("projections", "gate", "similarity"), [(True, False, 0.9999), (True, True, 0.9999), (False, True, 0.98)]
)
def test_layers_start_close_to_the_identity(projections: bool, gate: bool, similarity: float) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(**SMALL, attention_projections=projections, gate=gate)
    layer = DecoderLayer(config, 2)
    layer.start_as_identity()
    queries = torch.nn.functional.layer_norm(torch.randn(1, 9, 32), (32,))
    boxes, memory = torch.rand(1, 9, 4) * 0.5 + 0.2, torch.randn(1, 60, 32)
    found = layer(queries, torch.randn(1, 9, 32), boxes, memory, [(8, 6), (4, 3)], None)
    assert cosine_similarity(found, queries, dim=-1).min() > similarity


def test_a_gate_weighs_two_inputs() -> None:
    torch.manual_seed(0)
    gate, x, y = Gate(8), torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(gate(x, y), torch.nn.functional.layer_norm((x + y) / 2, (8,)))
    torch.nn.init.normal_(gate.linear.weight)
    weights = gate.linear(torch.cat((x, y), -1)).sigmoid()
    expected = torch.nn.functional.layer_norm(weights[:, :8] * x + weights[:, 8:] * y, (8,))
    torch.testing.assert_close(gate(x, y), expected)


def test_the_embedding_of_boxes_is_limited_and_computed_once_where_said() -> None:
    for once, calls in ((False, 3), (True, 1)):
        decoder, found = make_decoder(position_once=once, position_limit=0.01), []
        decoder.position.register_forward_hook(lambda *args, found=found: found.append(args[1]))
        seen: list[Tensor] = []
        for layer in decoder.layers:
            layer.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[1]))
        decoder(make_maps())
        assert len(found) == calls
        assert max(float(position.detach().abs().max()) for position in seen) == pytest.approx(0.01)

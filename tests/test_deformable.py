"""Deformable attention: its implementations of sampling, against each other and against a plain loop."""

import pytest
import torch

from mvision.heads.query import deformable
from mvision.heads.query.deformable import (
    DeformableAttention,
    _sample_gather,
    _sample_lookup,
    _sample_matrix,
    _sample_nearest,
)
from mvision.heads.query.sampling import sample_grid

SHAPES = [(5, 7), (3, 4)]
TOKENS = 5 * 7 + 3 * 4
POINTS = [2, 2]


def _inputs(dtype=torch.float64, reach=1.4, points=POINTS):
    torch.manual_seed(0)
    value = torch.randn(2, TOKENS, 3, 4, dtype=dtype)
    # Some points lie outside of the image on every side.
    locations = torch.rand(2, 6, 3, sum(points), 2, dtype=dtype) * reach - (reach - 1) / 2
    weights = torch.rand(2, 6, 3, sum(points), dtype=dtype)
    return value, locations, weights


def _bilinear_by_hand(value, locations, weights, per_level):
    batch, count, heads, points, _ = locations.shape
    out = torch.zeros(batch, count, heads, value.shape[-1], dtype=value.dtype)
    starts = [0, 35]
    for b, q, h, p in torch.cartesian_prod(*(torch.arange(n) for n in (batch, count, heads, points))).tolist():
        level = int(p >= per_level[0])
        height, width = SHAPES[level]
        x = locations[b, q, h, p, 0].item() * width - 0.5
        y = locations[b, q, h, p, 1].item() * height - 0.5
        for column in (int(x // 1), int(x // 1) + 1):
            for row in (int(y // 1), int(y // 1) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, h, p]
                    out[b, q, h] += share * value[b, starts[level] + row * width + column, h]
    return out.flatten(2)


@pytest.mark.parametrize("points", [POINTS, [1, 3]])
@pytest.mark.parametrize("sample", [sample_grid, _sample_gather, _sample_lookup, _sample_matrix])
def test_bilinear_sampling_equals_the_definition(sample, points):
    value, locations, weights = _inputs(points=points)
    expected = _bilinear_by_hand(value, locations, weights, points)
    torch.testing.assert_close(sample(value, locations, weights, SHAPES, points), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("points", [POINTS, [1, 3]])
def test_matrix_has_the_gradients_of_grid_sampling(points):
    gradients = []
    for sample in (sample_grid, _sample_matrix):
        inputs = [tensor.requires_grad_() for tensor in _inputs(points=points)]
        out = sample(*inputs, SHAPES, points)
        gradients.append(torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), inputs))
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_training_in_bf16_takes_the_matrix_unless_it_is_too_large(monkeypatch):
    value, locations, _ = _inputs(torch.float32)
    assert deformable._matrix_is_faster(value.bfloat16(), locations)
    assert not deformable._matrix_is_faster(value, locations)
    monkeypatch.setattr(deformable, "MATRIX_ELEMENTS", 2 * 3 * 6 * TOKENS - 1)
    assert not deformable._matrix_is_faster(value.bfloat16(), locations)


@pytest.mark.parametrize("sample", [_sample_gather, _sample_lookup, _sample_matrix])
def test_sampling_in_bf16_is_finite_and_close(sample):
    value, locations, weights = _inputs(torch.float32)
    expected = sample_grid(value, locations, weights, SHAPES, POINTS)
    found = sample(value.bfloat16(), locations, weights.bfloat16(), SHAPES, POINTS)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


def test_nearest_sampling_takes_the_token_under_the_point():
    value, _, _ = _inputs()
    locations = torch.zeros(2, 1, 3, 3, 2, dtype=torch.float64)
    locations[..., :2, :] = torch.tensor([2.2 / 7, 3.1 / 5])  # finest level: column 2, row 3
    locations[..., 2, :] = torch.tensor([1.5, -0.3])  # coarser level: clamped to the last column, first row
    weights = torch.tensor([0.5, 0.5, 10.0], dtype=torch.float64).expand(2, 1, 3, 3)
    expected = (value[:, 3 * 7 + 2] + 10 * value[:, 35 + 3]).flatten(1).unsqueeze(1)
    torch.testing.assert_close(_sample_nearest(value, locations, weights, SHAPES, [2, 1]), expected)


@pytest.mark.parametrize(("points", "projections"), [(4, True), ([3, 5], True), ([3, 5], False)])
def test_training_and_inference_agree(points, projections):
    torch.manual_seed(0)
    attention = DeformableAttention(12, 3, 2, points, projections=projections)
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    queries, memory = torch.randn(2, 6, 12), torch.randn(2, TOKENS, 12)
    references = torch.rand(2, 6, 4)
    with_gradient = attention(queries, references, memory, SHAPES)
    with torch.no_grad():
        without = attention(queries, references, memory, SHAPES)
    torch.testing.assert_close(with_gradient, without)


def test_heads_start_in_different_directions():
    attention = DeformableAttention(16, 4, 1, 2)
    first = attention.sampling_offsets.bias.view(4, 1, 2, 2)[:, 0, 0]
    torch.testing.assert_close(first, torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0)


def test_the_outermost_point_of_every_level_starts_at_half_the_box():
    attention = DeformableAttention(4, 1, 2, [1, 4], projections=False)
    memory = torch.zeros(1, TOKENS, 4)
    memory[0, :, 0] = torch.cat([torch.arange(w).repeat(h) / w for h, w in SHAPES])  # each token says where it is
    offsets = attention.sampling_offsets.bias.view(1, 5, 2)[..., 0] * attention._offset_scale(memory)[:, 0]
    torch.testing.assert_close(offsets, torch.tensor([[0.5, 0.125, 0.25, 0.375, 0.5]]))
    found = attention(torch.zeros(1, 1, 4), torch.tensor([[[0.3, 0.5, 0.4, 0.4]]]), memory, SHAPES)
    # The middle of a column is half a column to the right of what its tokens say.
    places = 0.3 + 0.4 * offsets[0] - 0.5 / torch.tensor([7, 4, 4, 4, 4])
    torch.testing.assert_close(found[0, 0, 0], places.mean())


def test_without_projections_the_memory_is_the_values():
    attention = DeformableAttention(12, 3, 2, 1, projections=False)
    memory = torch.randn(1, TOKENS, 12)
    # In the middle of the token in row 2, column 3 of the finest level, and outside of the image.
    attention.sampling_offsets.bias.data.zero_()
    attention.attention_weights.bias.data = torch.tensor([50.0, 0.0]).repeat(3)
    box = torch.tensor([[[3.5 / 7, 2.5 / 5, 0.1, 0.1]]])
    torch.testing.assert_close(attention(torch.zeros(1, 1, 12), box, memory, SHAPES)[0, 0], memory[0, 2 * 7 + 3])
    assert sorted(attention.state_dict()) == [
        f"{name}.{part}" for name in ("attention_weights", "sampling_offsets") for part in ("bias", "weight")
    ]


def test_numbers_of_points_that_do_not_fit_the_levels_are_refused():
    with pytest.raises(ValueError, match=r"num_points \[3, 6\] has to be one number, or one for each of the 3 levels"):
        DeformableAttention(8, 2, 3, [3, 6])


def test_indivisible_width_is_refused():
    with pytest.raises(ValueError, match="embed_dim 10 has to be a multiple of num_heads 4"):
        DeformableAttention(10, 4, 1, 1)

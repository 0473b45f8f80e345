"""Shared blocks: fusing is exact and clean, attention and MLP compute what the field's own modules compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mvision.neck.layers import (
    MLP,
    ConvNorm,
    CSPRepLayer,
    EncoderLayer,
    RepBlock,
    SelfAttention,
    fuse_modules,
    get_activation,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@torch.no_grad()
def randomise_norms(module: nn.Module) -> nn.Module:
    """Fresh norms are the identity and hide every mistake in folding them."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 2.0)
    return module


def max_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "block",
    [
        ConvNorm(6, 8),
        ConvNorm(6, 8, 3, stride=2, act="relu"),
        ConvNorm(6, 8, 5, groups=2, act=None, eps=1e-3),
        ConvNorm(6, 8, 3, padding=0, act="gelu"),
        RepBlock(6, 6),
        RepBlock(6, 6, identity=True),
        RepBlock(6, 6, identity=True, act=None, eps=1e-3),
        RepBlock(6, 8, identity=True),
        RepBlock(6, 6, stride=2, identity=True),
        CSPRepLayer(6, 8, depth=2, identity=True),
        CSPRepLayer(6, 8, depth=1, expansion=0.5),
    ],
    ids=lambda block: type(block).__name__ if isinstance(block, nn.Module) else None,
)
def test_fusing_changes_nothing_but_rounding(block: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = randomise_norms(copy.deepcopy(block)).eval().to(dtype)
    x = torch.randn(2, 6, 9, 7, dtype=dtype)
    before = block(x)
    assert fuse_modules(block) is block
    after = block(x)
    assert max_difference(before, after) <= TOLERANCE[dtype]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in block.modules())
    state = copy.deepcopy(block.state_dict())
    fuse_modules(block)
    assert torch.equal(block(x), after)
    assert state.keys() == block.state_dict().keys()


def test_a_fused_rep_block_is_one_convolution() -> None:
    block = RepBlock(4, 4, identity=True).fuse()
    assert [type(module) for module in block.modules()] == [RepBlock, nn.SiLU, nn.Conv2d]
    assert list(block.state_dict()) == ["conv.weight", "conv.bias"]
    assert block.conv is not None
    assert block.conv.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("block", "has_identity"),
    [
        (RepBlock(4, 4), False),
        (RepBlock(4, 4, identity=True), True),
        (RepBlock(4, 6, identity=True), False),
        (RepBlock(4, 4, stride=2, identity=True), False),
    ],
)
def test_identity_branch_only_where_shapes_allow(block: RepBlock, has_identity: bool) -> None:
    assert (block.identity is not None) == has_identity


def test_identity_branch_is_part_of_the_sum() -> None:
    torch.manual_seed(0)
    block = randomise_norms(RepBlock(4, 4, identity=True, act=None)).eval()
    x = torch.randn(1, 4, 5, 5)
    assert block.identity is not None
    assert block.conv3x3 is not None
    assert block.conv1x1 is not None
    expected = block.conv3x3(x) + block.conv1x1(x) + block.identity(x)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.fuse()(x), expected)


def test_fused_state_moves_to_another_fused_model_and_copies() -> None:
    torch.manual_seed(0)
    source = fuse_modules(randomise_norms(CSPRepLayer(6, 8, depth=2)).eval())
    target = fuse_modules(CSPRepLayer(6, 8, depth=2).eval())
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 6, 4, 4)
    assert torch.equal(source(x), target(x))
    assert torch.equal(source(x), copy.deepcopy(source)(x))


def test_fusing_leaves_a_state_dict_taken_before_alone() -> None:
    block = randomise_norms(ConvNorm(3, 4)).eval()
    state = block.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    block.fuse()
    assert all(torch.equal(before[key], value) for key, value in state.items())


def test_fusing_keeps_dtype_memory_format_mode_and_frozen_parameters() -> None:
    block = RepBlock(8, 8).to(torch.bfloat16, memory_format=torch.channels_last).eval().requires_grad_(False)
    fuse_modules(block)
    assert block.conv is not None
    weight = block.conv.weight
    assert weight.dtype == block.conv.bias.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert not any(module.training for module in block.modules())


def test_fuse_modules_reaches_every_leaf_and_leaves_the_rest() -> None:
    tree = nn.Sequential(nn.Sequential(ConvNorm(3, 4)), nn.BatchNorm2d(4), nn.ModuleDict({"a": RepBlock(4, 4)}))
    fuse_modules(tree)
    assert isinstance(tree[0][0].norm, nn.Identity)
    assert isinstance(tree[1], nn.BatchNorm2d)
    assert tree[2]["a"].conv is not None


def test_a_sync_batch_norm_is_fused_too() -> None:
    torch.manual_seed(0)
    block = randomise_norms(ConvNorm(3, 4, 3)).eval()
    x = torch.randn(1, 3, 6, 6)
    expected = block(x)
    block = nn.SyncBatchNorm.convert_sync_batchnorm(block).eval()
    torch.testing.assert_close(block.fuse()(x), expected)


def test_a_norm_without_statistics_cannot_be_fused() -> None:
    block = ConvNorm(3, 4)
    block.norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="cannot fuse BatchNorm2d"):
        block.fuse()


def test_csp_layer_depth_and_expansion() -> None:
    assert len(CSPRepLayer(8, 4, depth=5).blocks) == 5
    assert isinstance(CSPRepLayer(8, 4).conv3, nn.Identity)
    narrow = CSPRepLayer(8, 4, expansion=0.5)
    assert narrow.conv1.conv.out_channels == 2
    assert narrow(torch.randn(2, 8, 3, 3)).shape == (2, 4, 3, 3)
    assert CSPRepLayer(8, 4, depth=0)(torch.randn(2, 8, 3, 3)).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match="depth=-1"):
        CSPRepLayer(8, 4, depth=-1)
    with pytest.raises(ValueError, match=r"expansion=0\.1"):
        CSPRepLayer(8, 4, expansion=0.1)


def test_activation_names() -> None:
    assert isinstance(get_activation(None), nn.Identity)
    assert isinstance(get_activation("silu"), nn.SiLU)
    assert get_activation("relu") is not get_activation("relu")
    with pytest.raises(ValueError, match="unknown activation 'swish'; choose one of relu, gelu, silu"):
        get_activation("swish")


def test_mlp_has_activations_between_layers_only() -> None:
    mlp = MLP(2, 3, 4, num_layers=3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(3, 2), (3, 3), (4, 3)]
    x = torch.randn(5, 2)
    expected = mlp.layers[2](mlp.layers[1](mlp.layers[0](x).relu()).relu())
    torch.testing.assert_close(mlp(x), expected)
    assert (MLP(2, 3, 4, num_layers=1)(x) < 0).any()
    with pytest.raises(ValueError, match="num_layers=0"):
        MLP(2, 3, 4, num_layers=0)


def test_self_attention_equals_multihead_attention() -> None:
    """torch's module with the position on queries and keys; the mask's sense is the opposite there."""
    torch.manual_seed(0)
    ours = SelfAttention(16, 4)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.randn(48))
        for proj, bias in zip((ours.q_proj, ours.k_proj, ours.v_proj), theirs.in_proj_bias.chunk(3)):
            proj.bias.copy_(bias)
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, position = torch.randn(2, 7, 16), torch.randn(1, 7, 16)
    qk = x + position
    torch.testing.assert_close(ours(x, position), theirs(qk, qk, x, need_weights=False)[0])
    may_attend = torch.rand(7, 7) < 0.5
    may_attend.fill_diagonal_(True)
    expected = theirs(qk, qk, x, attn_mask=~may_attend, need_weights=False)[0]
    torch.testing.assert_close(ours(x, position, may_attend), expected)


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_self_attention_trains_in_bf16_as_it_predicts(kind: torch.dtype | None) -> None:
    """With gradients the CPU uses another implementation, see `_explicit_is_faster`."""
    torch.manual_seed(0)
    attention, x = SelfAttention(16, 4), torch.randn(2, 7, 16)
    allowed = (torch.rand(7, 7) < 0.5).fill_diagonal_(True)
    mask = allowed if kind is torch.bool else torch.randn(7, 7) if kind else None
    with torch.autocast("cpu", torch.bfloat16):
        trained = attention(x, mask=mask)
        with torch.no_grad():
            predicted = attention(x, mask=mask)
    exact = attention(x, mask=mask)
    assert trained.requires_grad
    torch.testing.assert_close(trained.float(), exact, rtol=0.03, atol=0.02)
    torch.testing.assert_close(predicted.float(), exact, rtol=0.03, atol=0.02)


def test_encoder_layer_equals_torchs_post_norm_layer() -> None:
    torch.manual_seed(0)
    ours = EncoderLayer(16, 4, 32)
    theirs = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True)
    state = {
        "self_attn.in_proj_weight": torch.cat([getattr(ours.attention, f"{n}_proj").weight for n in "qkv"]),
        "self_attn.in_proj_bias": torch.cat([getattr(ours.attention, f"{n}_proj").bias for n in "qkv"]),
        "self_attn.out_proj.weight": ours.attention.out_proj.weight,
        "self_attn.out_proj.bias": ours.attention.out_proj.bias,
    }
    pairs = {"linear1": ours.ffn.layers[0], "linear2": ours.ffn.layers[1]}
    pairs |= {"norm1": ours.attention_norm, "norm2": ours.ffn_norm}
    for name, module in pairs.items():
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    theirs.load_state_dict(state)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(16, 4, 32, dropout=0.5)
    x = torch.randn(1, 5, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"embed_dim=100 is not a multiple of num_heads=8.*embed_dim=96"):
        SelfAttention(100, 8)

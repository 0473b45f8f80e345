"""Blocks shared by the neck and the heads: convolutions with a foldable norm, re-parameterised blocks, attention.

Sources: RepVGG (Ding et al., CVPR 2021, sections 3.2-3.3) for the re-parameterised block, CSPNet (Wang et al., 2020)
for the cross-stage layer, RT-DETR (Zhao et al., CVPR 2024, section 4.2) for how the two are combined, DETR (Carion et
al., ECCV 2020) for attention whose positions enter queries and keys only.

Needs torch alone.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}

Module = TypeVar("Module", bound=nn.Module)


def get_activation(name: str | None) -> nn.Module:
    """A new activation module by its name (a key of `ACTIVATIONS`); None gives the identity.

    Raises:
        ValueError: the name is unknown.
    """
    if name is None:
        return nn.Identity()
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}, or None")
    return ACTIVATIONS[name]()


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm2d, activation: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)).

    This output size is that of the default padding and odd kernels. `fuse` folds the norm into the convolution.

    Args:
        padding: pixels on every side; None for `(kernel_size - 1) // 2`.
        act: a key of `ACTIVATIONS`, or None for none.
        eps: of the BatchNorm; 1e-5 in every published RT-DETR.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        padding: int | None = None,
        groups: int = 1,
        act: str | None = "silu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=eps)
        self.act = get_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> ConvNorm:
        """Fold the norm's running statistics into the convolution, once; the outputs in eval mode stay the same."""
        if not isinstance(self.norm, nn.Identity):
            self.conv = _conv_like(self.conv, *_fold(self.conv.weight, self.norm))
            self.norm = nn.Identity()
        return self


class RepBlock(nn.Module):
    """act(3x3 conv-BN + 1x1 conv-BN [+ BN of the input]) in training; one 3x3 convolution with bias after `fuse`.

    (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)).

    Args:
        identity: add RepVGG's BN-only branch, where the shapes allow it (in_channels == out_channels and stride 1).
            RT-DETR's blocks, and so its published weights, come without.
        act: a key of `ACTIVATIONS`, or None; applied after the sum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        identity: bool = False,
        act: str | None = "silu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv3x3: ConvNorm | None = ConvNorm(in_channels, out_channels, 3, stride, act=None, eps=eps)
        self.conv1x1: ConvNorm | None = ConvNorm(in_channels, out_channels, 1, stride, act=None, eps=eps)
        has_identity = identity and in_channels == out_channels and stride == 1
        self.identity: nn.Module | None = nn.BatchNorm2d(in_channels, eps=eps) if has_identity else None
        self.conv: nn.Conv2d | None = None
        self.act = get_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.act(self.conv(x))
        assert self.conv3x3 is not None
        assert self.conv1x1 is not None
        y = self.conv3x3(x) + self.conv1x1(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return self.act(y)

    def fuse(self) -> RepBlock:
        """Merge all branches into one 3x3 convolution, once; the outputs in eval mode stay the same."""
        if self.conv3x3 is None or self.conv1x1 is None:
            return self
        conv = self.conv3x3.conv
        kernel, bias = _fold(conv.weight, self.conv3x3.norm)
        point_kernel, point_bias = _fold(self.conv1x1.conv.weight, self.conv1x1.norm)
        kernel, bias = kernel + F.pad(point_kernel, [1, 1, 1, 1]), bias + point_bias
        if self.identity is not None:
            eye = torch.eye(conv.in_channels)[:, :, None, None]
            eye_kernel, eye_bias = _fold(eye, self.identity)
            kernel, bias = kernel + F.pad(eye_kernel, [1, 1, 1, 1]), bias + eye_bias
        self.conv = _conv_like(conv, kernel, bias)
        self.conv3x3 = self.conv1x1 = self.identity = None
        return self


class CSPRepLayer(nn.Module):
    """RT-DETR's fusion block: the sum of two paths, a 1x1 convolution with `depth` RepBlocks and a 1x1 convolution.

    (B, in, H, W) -> (B, out, H, W).

    Args:
        depth: number of RepBlocks, >= 0.
        expansion: channels of both paths relative to out_channels; if they differ from it, a last 1x1 ConvNorm follows.
        identity: passed to every `RepBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        depth: int = 3,
        expansion: float = 1.0,
        identity: bool = False,
        act: str | None = "silu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        if depth < 0 or hidden < 1:
            raise ValueError(f"depth={depth} must be >= 0, and expansion={expansion} leave at least one channel")
        self.conv1 = ConvNorm(in_channels, hidden, act=act, eps=eps)
        self.conv2 = ConvNorm(in_channels, hidden, act=act, eps=eps)
        self.blocks = nn.Sequential(
            *(RepBlock(hidden, hidden, identity=identity, act=act, eps=eps) for _ in range(depth))
        )
        self.conv3: nn.Module = (
            ConvNorm(hidden, out_channels, act=act, eps=eps) if hidden != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.blocks(self.conv1(x)) + self.conv2(x))


class MLP(nn.Module):
    """`num_layers` linear layers, (..., in_dim) -> (..., out_dim), an activation between every two.

    Args:
        act: a key of `ACTIVATIONS`; not applied to the output.
        dropout: probability, after every activation.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, *, act: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1")
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))
        self.act = get_activation(act)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1:
                x = self.dropout(self.act(x))
        return x


class SelfAttention(nn.Module):
    """Multi-head self-attention whose position embedding enters queries and keys, not values (DETR, appendix A.4).

    Raises:
        ValueError: embed_dim is not a multiple of num_heads.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)

    def forward(self, x: Tensor, position: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, N, embed_dim) -> (B, N, embed_dim).

        Args:
            position: added to x for queries and keys; broadcast to x.
            mask: broadcast to (B, num_heads, N, N); bool (True: may attend) or float (added to the logits).
        """
        qk = x if position is None else x + position
        q, k, v = self._split(self.q_proj(qk)), self._split(self.k_proj(qk)), self._split(self.v_proj(x))
        dropout = self.dropout if self.training else 0.0
        if _explicit_is_faster(q):
            weights = _masked((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), mask).softmax(-1)
            y = F.dropout(weights, dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, num_heads, N, C / num_heads)."""
        return x.unflatten(-1, (self.num_heads, x.shape[-1] // self.num_heads)).transpose(1, 2)


def _explicit_is_faster(q: Tensor) -> bool:
    """In bf16 on a CPU the backward pass of the fused kernel takes four times as long as that of plain matrix products.

    (Measured with 150 queries.)
    """
    return (
        q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and not torch.compiler.is_compiling()
    )


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logits
    return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask


class EncoderLayer(nn.Module):
    """A Transformer encoder layer, norm after each residual sum: (B, N, embed_dim) -> (B, N, embed_dim).

    Args:
        act: of the feed-forward part, a key of `ACTIVATIONS`.
        dropout: probability, on attention weights, inside the feed-forward part and on both residual branches.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, ffn_dim: int, *, dropout: float = 0.0, act: str = "gelu"
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(embed_dim, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = MLP(embed_dim, ffn_dim, embed_dim, num_layers=2, act=act, dropout=dropout)
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """See `SelfAttention.forward` for the arguments."""
        x = self.attention_norm(x + self.dropout(self.attention(x, position, mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Raise ValueError unless embed_dim splits evenly over num_heads."""
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(
            f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}; change one of the two, "
            f"e.g. embed_dim={max(1, round(embed_dim / max(1, num_heads))) * max(1, num_heads)}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value of the argument `name` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `x`, for operators that are too imprecise in half precision.

    On the meta device (tensors without data), which has no autocast, it does nothing.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def fuse_modules(module: Module) -> Module:
    """Fuse every `ConvNorm` and `RepBlock` in the tree, in place, and return the module.

    Outputs in eval mode stay the same up to rounding (the folding is computed in float64). Calling it again changes
    nothing. The fused state_dict has other keys, so load weights before.
    """
    if isinstance(module, (ConvNorm, RepBlock)):
        module.fuse()
    else:
        for child in module.children():
            fuse_modules(child)
    return module


@torch.no_grad()
def _fold(weight: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Kernel and bias, in float64 on the CPU, of a bias-free convolution followed by a norm in eval mode.

    Works for every norm with running statistics (BatchNorm2d, SyncBatchNorm, frozen variants). Computed on the CPU
    because some accelerators have no float64.
    """
    state = {name: getattr(norm, name, None) for name in ("running_mean", "running_var", "weight", "bias")}
    mean, var, gamma, beta = (None if value is None else _exact(value) for value in state.values())
    if mean is None or var is None:
        raise ValueError(
            f"cannot fuse {type(norm).__name__}: it has no running statistics (track_running_stats=False?)"
        )
    scale = torch.rsqrt(var + float(norm.eps))  # type: ignore[arg-type]
    scale = scale if gamma is None else scale * gamma
    bias = -mean * scale
    return _exact(weight) * scale[:, None, None, None], bias if beta is None else bias + beta


def _exact(x: Tensor) -> Tensor:
    return x.to(device="meta" if x.is_meta else "cpu", dtype=torch.float64)


@torch.no_grad()
def _conv_like(conv: nn.Conv2d, kernel: Tensor, bias: Tensor) -> nn.Conv2d:
    """A copy of `conv`, its device, dtype, memory format and mode included, with these weights."""
    fused = copy.deepcopy(conv)
    fused.weight.copy_(kernel)
    fused.bias = nn.Parameter(bias.to(conv.weight), conv.weight.requires_grad)
    return fused

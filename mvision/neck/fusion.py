"""The parts of the two fusion paths: blocks that work on two joined maps, and downsampling from a scale to the next.

Sources: RT-DETR (Zhao et al., CVPR 2024, section 4.2) for the CSP block with re-parameterised convolutions; D-FINE
(Peng et al., ICLR 2025) for the ELAN block, a form of GELAN (YOLOv9, Wang et al., ECCV 2024, section 4.2); YOLOv10
(Wang et al., NeurIPS 2024, section 3.2) for downsampling that separates channels from space; EdgeCrafter
(github.com/Intellindust-AI-Lab/EdgeCrafter) for the split CSP layer.

Needs torch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mvision.neck.layers import ConvNorm, CSPRepLayer, RepBlock, check_choice

FUSION_BLOCKS = ("csp", "elan")
DOWNSAMPLING = ("conv", "separable")


class HalvedConvNorm(ConvNorm):
    """A 1x1 ConvNorm whose output goes two ways: (B, in, H, W) -> two maps (B, half, H, W).

    `fuse` makes it two convolutions. A convolution first copies an input that is a part of another map: with the copies
    the necks of D-FINE S and ECDet S take 1.04 and 1.08 times as long in bf16 on a CPU, and equally long in fp32.
    """

    def __init__(self, in_channels: int, half: int, *, act: str | None = "silu", eps: float = 1e-5) -> None:
        super().__init__(in_channels, 2 * half, act=act, eps=eps)
        self.second: ConvNorm | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.second is not None:
            return self.act(self.conv(x)), self.second(x)
        first, second = self.act(self.norm(self.conv(x))).chunk(2, 1)
        return first, second

    def fuse(self) -> HalvedConvNorm:
        """Fold the norm and divide the convolution, once; the outputs in eval mode stay the same."""
        if self.second is None:
            super().fuse()
            half = self.conv.out_channels // 2
            with torch.device("meta"):  # its own weights are not used
                second = ConvNorm(self.conv.in_channels, half)
            second.norm, second.act = nn.Identity(), copy.deepcopy(self.act)
            self.conv, second.conv = _part(self.conv, 0, half), _part(self.conv, half, 2 * half)
            self.second = second.train(self.training)
        return self


class SplitCSPRepLayer(nn.Module):
    """One 1x1 convolution, whose first half of the channels is added to the second after `depth` RepBlocks.

    (B, in, H, W) -> (B, out, H, W). A `CSPRepLayer` of expansion 1 whose two 1x1 convolutions are one in training.

    Args:
        depth: number of RepBlocks, >= 0.
        identity: passed to every `RepBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        depth: int = 3,
        identity: bool = False,
        act: str | None = "silu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth={depth} must be >= 0")
        self.conv1 = HalvedConvNorm(in_channels, out_channels, act=act, eps=eps)
        self.blocks = nn.Sequential(
            *(RepBlock(out_channels, out_channels, identity=identity, act=act, eps=eps) for _ in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.conv1(x)
        return kept + self.blocks(changed)


class ELANBranch(nn.Module):
    """A CSP layer and what follows it, a 3x3 convolution or nothing: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, csp: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.csp = csp
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.csp(x))


class ELANBlock(nn.Module):
    """D-FINE's fusion block: two CSP layers one after the other; what enters and leaves each is concatenated.

    (B, in, H, W) -> (B, out, H, W). A 1x1 convolution to 2 * out channels comes first. The first branch takes their
    second half, the second branch the output of the first, and a last 1x1 convolution all of them.

    Args:
        depth: number of RepBlocks in each of the two CSP layers, >= 0.
        expansion: channels of a branch relative to half of out_channels.
        conv: end each branch with a 3x3 ConvNorm (EdgeCrafter's blocks have none).
        split: branches of `SplitCSPRepLayer` instead of `CSPRepLayer`.
        identity: passed to every `RepBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        depth: int = 3,
        expansion: float = 1.0,
        conv: bool = True,
        split: bool = False,
        identity: bool = False,
        act: str | None = "silu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = int(expansion * out_channels // 2)
        if hidden < 1:
            raise ValueError(
                f"expansion={expansion} of {out_channels} channels leaves none for a branch of an ELAN block, which "
                f"has expansion * {out_channels} / 2"
            )
        csp = partial(SplitCSPRepLayer if split else CSPRepLayer, depth=depth, identity=identity, act=act, eps=eps)
        self.conv1 = HalvedConvNorm(in_channels, out_channels, act=act, eps=eps)
        self.branch1, self.branch2 = (
            ELANBranch(csp(channels, hidden), ConvNorm(hidden, hidden, 3, act=act, eps=eps) if conv else nn.Identity())
            for channels in (out_channels, hidden)
        )
        self.conv2 = ConvNorm(2 * (out_channels + hidden), out_channels, act=act, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.conv1(x)
        first = self.branch1(changed)
        return self.conv2(torch.cat([kept, changed, first, self.branch2(first)], dim=1))


class SeparableDown(nn.Module):
    """Downsampling of fewer operations: a 1x1 ConvNorm mixes the channels, a depth-wise one has the stride.

    (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)). Neither has an activation.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 2, *, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.pointwise = ConvNorm(in_channels, out_channels, act=None, eps=eps)
        self.depthwise = ConvNorm(
            out_channels, out_channels, kernel_size, stride, groups=out_channels, act=None, eps=eps
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(self.pointwise(x))


def fusion_block_maker(
    kind: str,
    in_channels: int,
    out_channels: int,
    *,
    depth: int,
    expansion: float,
    elan_conv: bool,
    elan_split: bool,
    identity: bool,
    act: str,
    eps: float,
) -> Callable[[], nn.Module]:
    """What makes a new block of a fusion path, (B, in_channels, H, W) -> (B, out_channels, H, W).

    Args:
        kind: one of `FUSION_BLOCKS`.
        elan_conv, elan_split: `conv` and `split` of an `ELANBlock`; for other blocks True and False.

    Raises:
        ValueError: an unknown kind, or arguments that have no effect on it.
    """
    check_choice("fusion_block", kind, FUSION_BLOCKS)
    if kind != "elan" and (elan_split or not elan_conv):
        name = "elan_split=True" if elan_split else "elan_conv=False"
        raise ValueError(f"{name} has no effect with fusion_block={kind!r}; leave it out, or set fusion_block='elan'")
    block = partial(ELANBlock, conv=elan_conv, split=elan_split) if kind == "elan" else CSPRepLayer
    return partial(
        block, in_channels, out_channels, depth=depth, expansion=expansion, identity=identity, act=act, eps=eps
    )


def downsampling_maker(kind: str, channels: int, *, act: str, eps: float) -> Callable[[int], nn.Module]:
    """What makes, for a step, a new module (B, channels, H, W) -> (B, channels, ceil(H / step), ceil(W / step)).

    Args:
        kind: one of `DOWNSAMPLING`.
        act: of the kind `conv`; `separable` has no activation.

    Raises:
        ValueError: the kind is unknown.
    """
    check_choice("downsample", kind, DOWNSAMPLING)
    down = partial(ConvNorm, act=act) if kind == "conv" else SeparableDown
    return lambda step: down(channels, channels, _down_kernel(step), step, eps=eps)


def _down_kernel(step: int) -> int:
    """Kernel of the downsampling by `step`: 3 for 2 (as in RT-DETR), 7 for 4; neighbouring windows overlap."""
    return max(3, 2 * step - 1)


@torch.no_grad()
def _part(conv: nn.Conv2d, begin: int, end: int) -> nn.Conv2d:
    """A convolution that computes these output channels of `conv` alone."""
    part = copy.deepcopy(conv)
    part.out_channels = end - begin
    part.weight = nn.Parameter(conv.weight[begin:end].clone(), conv.weight.requires_grad)
    if conv.bias is not None:
        part.bias = nn.Parameter(conv.bias[begin:end].clone(), conv.bias.requires_grad)
    return part

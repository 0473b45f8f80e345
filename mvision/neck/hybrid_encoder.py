"""The hybrid encoder of RT-DETR: attention inside a scale, convolutions across scales.

Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", CVPR 2024, section 4.2. Its two parts are AIFI
(attention-based intra-scale feature interaction) and CCFM (CNN-based cross-scale feature fusion). The defaults compute
what the published RT-DETR models compute; others give the encoders of D-FINE and its relatives, see docs/neck.md.

Needs torch alone, so that the neck can be used on any list of feature maps:

    backbone = timm.create_model("convnext_tiny", features_only=True, out_indices=(1, 2, 3))
    neck = HybridEncoder(backbone.feature_info.channels(), backbone.feature_info.reduction(), embed_dim=192)
    p3, p4, p5 = neck(backbone(images))                     # each (B, 192, H / stride, W / stride), finest first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.neck.aifi import AIFI, FractionPosition, LearnedPosition, SincosPosition, is_static
from mvision.neck.fusion import downsampling_maker, fusion_block_maker
from mvision.neck.layers import ConvNorm, check_choice, check_heads, fuse_modules, get_activation

AttentionMode = Literal["global", "window", "auto"]


class HybridEncoder(nn.Module):
    """Project every map to `embed_dim` channels, apply attention inside scales, fuse top-down, then bottom-up.

    Any number of scales, channels, strides and map sizes: an output map has the size of its input map. Only maps that
    repeat a stride (all maps of a plain ViT have the same) are resampled into a pyramid first, see `pyramid_strides`.

    Cost: the fusion is linear in the number of pixels, and so is attention in windows; global attention on a scale of n
    tokens is O(n^2), which is small on the coarsest scale (n = 400 at 640 x 640).

    Args:
        in_channels: channels of every input map, finest first.
        strides: stride of every input map relative to the image, finest first.
        embed_dim: channels of every output map; a multiple of num_heads (and of 4 with "sincos" positions).
        attention_levels: scales with attention: "coarsest" (the paper's choice), "all", or indices into the maps
            (0 is the finest; [] for none).
        share_attention: one set of attention weights for all these scales instead of one per scale.
        num_heads: attention heads.
        num_layers: Transformer layers per scale.
        ffn_dim, dropout, attention_act: of these layers.
        position: "sincos" (fixed), "fraction" (fixed, of positions as shares of the map: DETRPose) or "learned" (a grid
            resized to the map, plus one vector per scale with attention).
        attention: "global", "window" (inside windows of at most window_size x window_size tokens), or "auto": windows
            on maps of more than window_threshold tokens, global on others. The weights are the same, so the attribute
            may be changed later. A graph exported with dynamic sizes holds one form only: global for "auto", and for
            "window" the one for maps larger than a window.
        window_size: largest side of a window in tokens.
        window_threshold: in tokens; 1600 are a 1280 x 1280 image at stride 32.
        projections: False takes the maps as they are, and "last" all but the coarsest (EdgeCrafter's small models);
            those must have embed_dim channels.
        lateral_act: apply conv_act after the 1x1 convolutions of the top-down path.
        fusion: how two maps become the input of a fusion block, "concat" or "sum".
        fusion_block: "csp" (RT-DETR, `CSPRepLayer`) or "elan" (D-FINE, `ELANBlock`).
        elan_conv: end each branch of an ELAN block with a 3x3 convolution.
        elan_split: the CSP layers in ELAN blocks have one 1x1 convolution whose output is split, not two.
        depth: RepBlocks in every CSP layer: in every "csp" block, and in each of the two branches of an "elan" block.
        expansion: channels inside a "csp" block relative to embed_dim; in a branch of an "elan" block relative to half
            of it.
        downsample: "conv" (a 3x3 convolution with activation) or "separable" (a 1x1 and a depth-wise one, without).
        rep_identity: give the RepBlocks RepVGG's identity branch (the published RT-DETR models have none).
        conv_act: activation of all convolutions.
        norm_eps: epsilon of all BatchNorms.

    Attributes:
        strides: stride of every output map, strictly increasing.
        out_channels: embed_dim for every output map.

    Raises:
        ValueError: an argument is impossible, or the maps of a call do not fit in_channels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        embed_dim: int = 256,
        *,
        attention_levels: Literal["coarsest", "all"] | Sequence[int] = "coarsest",
        share_attention: bool = True,
        num_heads: int = 8,
        num_layers: int = 1,
        ffn_dim: int = 1024,
        dropout: float = 0.0,
        attention_act: str = "gelu",
        position: Literal["sincos", "fraction", "learned"] = "sincos",
        attention: AttentionMode = "global",
        window_size: int = 20,
        window_threshold: int = 1600,
        projections: bool | Literal["last"] = True,
        lateral_act: bool = True,
        fusion: Literal["concat", "sum"] = "concat",
        fusion_block: Literal["csp", "elan"] = "csp",
        elan_conv: bool = True,
        elan_split: bool = False,
        depth: int = 3,
        expansion: float = 1.0,
        downsample: Literal["conv", "separable"] = "conv",
        rep_identity: bool = False,
        conv_act: str = "silu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.in_channels, self.in_strides = list(in_channels), list(strides)
        check_heads(embed_dim, num_heads)
        _check_maps(self.in_channels, self.in_strides)
        check_choice("attention", attention, ("global", "window", "auto"))
        check_choice("fusion", fusion, ("concat", "sum"))
        if window_size < 1 or num_layers < 1:
            raise ValueError(f"window_size={window_size} and num_layers={num_layers} must be at least 1")
        self.strides = pyramid_strides(self.in_strides)
        self.embed_dim, self.out_channels = embed_dim, [embed_dim] * len(self.in_channels)
        self.attention: str = attention
        self.fusion: str = fusion
        self.window_size, self.window_threshold = window_size, window_threshold

        self.projections = _projections(self.in_channels, embed_dim, projections, norm_eps)
        self.resamplers = nn.ModuleList(
            _resampler(embed_dim, a, b, conv_act, norm_eps) for a, b in zip(self.in_strides, self.strides)
        )
        self.attention_levels = _resolve_levels(attention_levels, len(self.in_channels))
        self.position = _position(position, embed_dim, len(self.attention_levels))
        aifi = partial(AIFI, embed_dim, num_heads, num_layers, ffn_dim, dropout=dropout, act=attention_act)
        self._add_attention(aifi, share_attention)
        lateral = partial(ConvNorm, embed_dim, embed_dim, act=conv_act if lateral_act else None, eps=norm_eps)
        down = downsampling_maker(downsample, embed_dim, act=conv_act, eps=norm_eps)
        block = fusion_block_maker(
            fusion_block, 2 * embed_dim if fusion == "concat" else embed_dim, embed_dim, depth=depth,
            expansion=expansion, elan_conv=elan_conv, elan_split=elan_split,
            identity=rep_identity, act=conv_act, eps=norm_eps,
        )  # fmt: skip
        self._add_fusion(lateral, down, block)

    def _add_attention(self, aifi: Callable[[], nn.Module], share: bool) -> None:
        num_scales = len(self.attention_levels)
        # Scales with attention, grouped by the set of weights that they share.
        self.scale_groups = [list(range(num_scales))] if share else [[i] for i in range(num_scales)]
        self.aifi = nn.ModuleList(aifi() for group in self.scale_groups if group)

    def _add_fusion(
        self,
        lateral: Callable[[], nn.Module],
        down: Callable[[int], nn.Module],
        block: Callable[[], nn.Module],
    ) -> None:
        steps = [max(1, round(b / a)) for a, b in zip(self.strides[:-1], self.strides[1:])]
        # In the order of use: the first two lists start at the coarsest scale, the last two at the finest.
        self.lateral_convs = nn.ModuleList(lateral() for _ in steps)
        self.top_down = nn.ModuleList(block() for _ in steps)
        self.downsample_convs = nn.ModuleList(down(step) for step in steps)
        self.bottom_up = nn.ModuleList(block() for _ in steps)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps (B, in_channels[i], H_i, W_i), finest first -> maps (B, embed_dim, H_i, W_i), finest first.

        H_i and W_i of the output differ from the input only where `strides` differs from the strides given.
        """
        if not torch.jit.is_scripting():
            self._check_features(features)
        maps: list[Tensor] = []
        for i, (projection, resampler) in enumerate(zip(self.projections, self.resamplers)):
            maps.append(resampler(projection(features[i])))

        for i, aifi in enumerate(self.aifi):
            for scale in self.scale_groups[i]:
                level = self.attention_levels[scale]
                x = maps[level]
                maps[level] = aifi(x, self.position(x, scale), self._window(x))

        coarsest = len(maps) - 1
        for i, (lateral_conv, block) in enumerate(zip(self.lateral_convs, self.top_down)):
            coarse, fine = coarsest - i, coarsest - i - 1
            maps[coarse] = lateral_conv(maps[coarse])
            upsampled = F.interpolate(maps[coarse], size=maps[fine].shape[-2:], mode="nearest")
            maps[fine] = block(self._join(upsampled, maps[fine]))

        for i, (downsample_conv, block) in enumerate(zip(self.downsample_convs, self.bottom_up)):
            downsampled = _fit(downsample_conv(maps[i]), maps[i + 1])
            maps[i + 1] = block(self._join(downsampled, maps[i + 1]))
        return maps

    def fuse(self) -> HybridEncoder:
        """Re-parameterise for inference, in place: all norms and RepBlocks are folded, outputs in eval mode kept."""
        return fuse_modules(self)

    def _join(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.fusion == "sum" else torch.cat([x, y], dim=1)

    def _window(self, x: Tensor) -> int:
        """Window side for the attention on this map, 0 for global attention."""
        if self.attention == "auto":
            height, width = x.shape[-2:]
            if _dynamic_export(height, width):
                return 0
            return self.window_size if height * width > self.window_threshold else 0
        return self.window_size if self.attention == "window" else 0

    def _check_features(self, features: list[Tensor]) -> None:
        if torch.jit.is_tracing():  # sizes are tensors then, and comparing them prints warnings
            return
        if len(features) != len(self.in_channels):
            raise ValueError(
                f"HybridEncoder was built for {len(self.in_channels)} maps (in_channels={self.in_channels}) "
                f"and got {len(features)}"
            )
        for i, (x, channels) in enumerate(zip(features, self.in_channels)):
            if x.ndim == 4 and x.shape[1] == channels:
                continue
            hint = ""
            if x.ndim == 4 and x.shape[3] == channels:
                hint = "; it looks channels-last (B, H, W, C): pass x.permute(0, 3, 1, 2)"
            raise ValueError(f"map {i} must be (B, {channels}, H, W) and is {tuple(x.shape)}{hint}")


def pyramid_strides(strides: Sequence[int]) -> list[int]:
    """Strictly increasing output strides for input strides of which some may be equal.

    If all are equal, as in a plain ViT, they become a pyramid around that stride, as in ViTDet (Li et al., ECCV 2022):
    16, 16, 16 becomes 8, 16, 32, and four maps become 4, 8, 16, 32. A stride is halved only while it stays a whole
    number. If only some are equal, as in dilated CNNs, a repeated stride is doubled until it exceeds the one before it.
    """
    targets = list(strides)
    if len(set(targets)) == 1:
        for _ in range(len(targets) // 2):
            if targets[0] % 2 == 0:
                targets[0] //= 2
        return [targets[0] * 2**i for i in range(len(targets))]
    for i in range(1, len(targets)):
        while targets[i] <= targets[i - 1]:
            targets[i] *= 2
    return targets


def _resampler(dim: int, source: int, target: int, act: str, eps: float) -> nn.Module:
    """From stride `source` to `target`, a power of two apart: 2x2 transposed convolutions up (ViTDet), 3x3 down."""
    layers: list[nn.Module] = []
    while source > target:
        layers += [nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2), get_activation(act)]
        source //= 2
    while source < target:
        layers.append(ConvNorm(dim, dim, 3, stride=2, act=act, eps=eps))
        source *= 2
    return nn.Sequential(*layers)


def _projections(in_channels: list[int], embed_dim: int, project: bool | Literal["last"], eps: float) -> nn.ModuleList:
    projected = [
        project is True or (project == "last" and level == len(in_channels) - 1) for level, _ in enumerate(in_channels)
    ]
    for level, channels in enumerate(in_channels):
        if channels != embed_dim and not projected[level]:
            raise ValueError(
                f"projections={project!r} takes maps of embed_dim={embed_dim} channels as they are, but map {level} "
                f"has {channels}; set projections=True, or another embed_dim"
            )
    return nn.ModuleList(
        ConvNorm(channels, embed_dim, act=None, eps=eps) if wanted else nn.Identity()
        for channels, wanted in zip(in_channels, projected)
    )


def _position(position: str, embed_dim: int, num_scales: int) -> nn.Module:
    check_choice("position", position, ("sincos", "fraction", "learned"))
    if num_scales == 0:
        return nn.Identity()
    if position == "learned":
        return LearnedPosition(embed_dim, num_scales)
    return SincosPosition(embed_dim) if position == "sincos" else FractionPosition(embed_dim)


def _fit(x: Tensor, like: Tensor) -> Tensor:
    """x (B, C, H, W) resized to the size of `like` by nearest neighbour.

    Stride-2 convolutions round sizes up, many backbones round them down: x may be one row or column larger.
    """
    size = like.shape[-2:]
    if is_static(size[0] * size[1]) and x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="nearest")


def _dynamic_export(height: int, width: int) -> bool:
    """Is a graph with a dynamic map size being exported? (torch.compile may compare sizes, it compiles others anew.)"""
    if torch.jit.is_scripting():
        return False
    else:
        exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # is_exporting: torch >= 2.7
        return exporting() and not is_static(height * width)


def _resolve_levels(levels: str | Sequence[int], num_levels: int) -> list[int]:
    """Ascending indices of the maps with attention."""
    if isinstance(levels, str):
        check_choice("attention_levels", levels, ("coarsest", "all"))
        return [num_levels - 1] if levels == "coarsest" else list(range(num_levels))
    for level in levels:
        if not -num_levels <= level < num_levels:
            raise ValueError(f"attention_levels={list(levels)} names map {level}, but there are {num_levels} maps")
    return sorted({level % num_levels for level in levels})


def _check_maps(in_channels: list[int], strides: list[int]) -> None:
    if not in_channels or len(in_channels) != len(strides):
        raise ValueError(
            f"in_channels={in_channels} and strides={strides} must have one number per map, and at least one"
        )
    if min(in_channels) < 1 or min(strides) < 1:
        raise ValueError(f"in_channels={in_channels} and strides={strides} must be positive; leave empty maps out")
    if strides != sorted(strides):
        raise ValueError(f"strides={strides} must not decrease: give the maps finest first")

"""What the tensors of a published model say about it: its network, widths, numbers of layers, points and classes.

Descriptions beside weights can be wrong or absent; the shape of a tensor is what the model was trained with. Tensors
have mvision's names here. Whether they are complete and fit each other is checked afterwards, see ``check_fit``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mvision.errors import UserError
from mvision.weights.published import DECODER

STRIDES = (8, 16, 32)
HEADS = 8
"""Attention heads of every published model of these families."""
EXPANSIONS = (0.34, 0.5, 0.75, 1.0, 1.5)
"""Of the published models; several numbers can give the same width."""

# Channels of the first and the last convolution of the stem, layers of a block, and blocks of the stages -> network.
_HGNETS: dict[tuple[int, int, int, tuple[int, ...]], str] = {
    (16, 16, 3, (1, 1, 2, 1)): "hgnetv2_b0",
    (24, 32, 3, (1, 1, 2, 1)): "hgnetv2_b1",
    (24, 32, 4, (1, 1, 3, 1)): "hgnetv2_b2",
    (24, 32, 5, (1, 1, 3, 1)): "hgnetv2_b3",
    (32, 48, 6, (1, 1, 3, 1)): "hgnetv2_b4",
    (32, 64, 6, (1, 2, 5, 2)): "hgnetv2_b5",
    (48, 96, 6, (2, 3, 6, 3)): "hgnetv2_b6",
}
AFFINE = {"hgnetv2_b0", "hgnetv2_b1", "hgnetv2_b2", "hgnetv2_b3"}
"""Those whose activations are scaled, in timm and in D-FINE; Paddle's own models have no scales."""
RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18d",
    ("basic", (3, 4, 6, 3)): "resnet34d",
    ("bottleneck", (3, 4, 6, 3)): "resnet50d",
    ("bottleneck", (3, 4, 23, 3)): "resnet101d",
}
"""Kind of the blocks and blocks of the stages -> network."""


class Structure:
    """Sections of a ``ModelConfig``, read from tensors.

    Args:
        tensors: by mvision's names.
        source: for messages.
        levels: number of maps; None: as many as are projected by the neck.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: Path, levels: int | None = None) -> None:
        self.tensors, self.source = tensors, source
        self.levels = self.count("neck.projections.") if levels is None else levels

    def backbone(self) -> dict[str, Any]:
        """The section ``backbone``: an HGNetV2 or a ResNet of timm, for images in 0..1."""
        strides = list(STRIDES[-self.levels :])
        if self.has("backbone.net.stem."):
            return {"name": self._hgnet(), "normalize": "none", "strides": strides}
        blocks = tuple(self.count(f"backbone.net.layer{stage}.") for stage in range(1, 5))
        kind = "bottleneck" if self.has("backbone.net.layer1.0.conv3.") else "basic"
        name = RESNETS.get((kind, blocks))
        if name is None:
            raise UserError(f"weights {self.source}: the backbone is a {kind} ResNet of {blocks} blocks, not {RESNETS}")
        return {"name": name, "normalize": "none", "stage1_shortcut": kind == "basic", "strides": strides}

    def _hgnet(self) -> str:
        first, last, layers, blocks = found = self._hgnet_sizes()
        name = _HGNETS.get(found)
        affine = self.has("backbone.net.stem.stem1.lab.")
        if name is None or affine != (name in AFFINE):
            raise UserError(
                f"weights {self.source}: the backbone is an HGNetV2 with a stem of {first} and {last} channels, "
                f"{blocks} blocks of {layers} layers, {'with' if affine else 'without'} affine blocks, which timm does "
                "not have"
            )
        return name

    def hgnet_by_sizes(self) -> str | None:
        """The network with this stem and these blocks, whether its activations are scaled or not; None if unknown."""
        return _HGNETS.get(self._hgnet_sizes())

    def _hgnet_sizes(self) -> tuple[int, int, int, tuple[int, ...]]:
        stem, net = "backbone.net.stem.stem", "backbone.net.stages_"
        blocks = tuple(self.count(f"{net}{stage}.blocks.") for stage in range(4))
        layers = self.count(f"{net}0.blocks.0.layers.")
        return self.rows(f"{stem}1.conv.weight"), self.rows(f"{stem}4.conv.weight"), layers, blocks

    def neck(self, expansion: object = None, heads: int = HEADS) -> dict[str, Any]:
        """The section ``neck``: RT-DETR's, or that of D-FINE or EdgeCrafter, which have ELAN blocks.

        No tensor tells that their lateral layers have no activation, as all but DETRPose's.

        Args:
            expansion: of a description; used where it gives the width that the tensors have.
        """
        width = self.rows("neck.lateral_convs.0.conv.weight")
        section: dict[str, Any] = {
            "embed_dim": width,
            "num_heads": heads,
            "num_layers": self.count("neck.aifi.0.layers."),
            "ffn_dim": self.rows("neck.aifi.0.layers.0.ffn.layers.0.weight"),
        }
        if self.count("neck.aifi.") > 1:
            raise UserError(f"weights {self.source}: attention on several scales, which only a description could name")
        block = "neck.top_down.0."
        if self.has(f"{block}branch1."):
            section |= {"fusion_block": "elan", "downsample": "separable", "lateral_act": False}
            section |= self._elan(block, width)
            block = f"{block}branch1.csp."
            hidden = self.rows(f"{block}conv1.conv.weight") // (2 if section.get("elan_split") else 1)
            whole = max(1, width // 2)
        else:
            hidden, whole = self.rows(f"{block}conv1.conv.weight"), width
        section["depth"] = self.count(f"{block}blocks.")
        section["expansion"] = _expansion(hidden, whole, expansion)
        return section

    def _elan(self, block: str, width: int) -> dict[str, Any]:
        """What EdgeCrafter's ELAN blocks have otherwise than D-FINE's."""
        section: dict[str, Any] = {}
        if not self.has(f"{block}branch1.conv."):
            section["elan_conv"] = False
        if not self.has(f"{block}branch1.csp.conv2."):
            section["elan_split"] = True
        first = self.tensors.get(f"{block}conv1.conv.weight")
        if first is not None and first.ndim > 1 and first.shape[1] == width:
            section["fusion"] = "sum"
        return section

    def decoder(self, points: Sequence[int] | None) -> dict[str, Any]:
        """The section of the head.

        Args:
            points: sampled points of every level; None: the same on all levels, for ``HEADS`` heads.
        """
        width = self.rows(f"{DECODER}memory_box.layers.0.weight")
        layer, levels = f"{DECODER}layers.0.", self.levels
        samples = self.rows(f"{layer}cross_attention.attention_weights.weight")  # of all heads together
        if points is None:
            points = [max(1, samples // (HEADS * levels))] * levels
        section: dict[str, Any] = {
            "embed_dim": width,
            "num_layers": self.count(f"{DECODER}layers."),
            "num_heads": max(1, samples // sum(points)),
            "ffn_dim": self.rows(f"{layer}ffn.layers.0.weight"),
            # One number divides exactly, and a list by float32's 1 / number, as the buffer of these models does.
            "num_points": points[0] if set(points) <= {1, 2, 4, 8} and len(set(points)) == 1 else list(points),
            "num_denoising": 100 if self.has(f"{DECODER}label_embed.") else 0,
            "position_mlp": "wide" if self.count(f"{DECODER}position.layers.") == 2 else "deep",
        }
        if self.has(f"{layer}gate."):
            section |= {"gate": True, "input_projection": "if_needed", "position_limit": 10.0}
        if not self.has(f"{DECODER}memory_proj."):
            section["memory_projection"] = False
        if not self.has(f"{layer}cross_attention.value_proj."):
            section["attention_projections"] = False
        if self.has(f"{DECODER}pre_box."):
            bins = self.rows(f"{DECODER}box_heads.0.layers.2.weight") // 4 - 1
            section |= {"box_refinement": "distribution", "num_bins": bins}
            section["location_quality"] = self.has(f"{DECODER}quality_heads.")
        return section

    def rows(self, name: str) -> int:
        """Length of a tensor's first axis: the output channels of a layer."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise UserError(f"weights {self.source}: a tensor is missing: {name}")
        if tensor.ndim < 1 or not len(tensor):
            raise UserError(f"weights {self.source}: the tensor {name} is of shape {list(tensor.shape)}")
        return len(tensor)

    def count(self, prefix: str) -> int:
        """How many numbered modules begin with a prefix."""
        return len(set(self._numbers(prefix)))

    def _numbers(self, prefix: str) -> Iterator[str]:
        number = re.compile(rf"{re.escape(prefix)}(\d+)\.")
        return (match[1] for match in map(number.match, self.tensors) if match)

    def has(self, prefix: str) -> bool:
        """Whether a tensor's name begins with a prefix."""
        return any(name.startswith(prefix) for name in self.tensors)


def points_of_levels(tensors: Mapping[str, Tensor], source: Path) -> list[int] | None:
    """Sampled points of every level, from the buffers with one over this number for each point; None without one.

    Every layer has such a buffer, and all say the same.
    """
    scales = {name: tensors[name] for name in sorted(tensors) if re.search(r"\.n(um)?_points_scale$", name)}
    found = {name: _points_of_layer(name, scale.flatten().tolist(), source) for name, scale in scales.items()}
    for name, points in found.items():
        first = next(iter(found))
        if points != found[first]:
            raise UserError(f"weights {source}: {name} tells of {points} points, {first} of {found[first]}")
    return next(iter(found.values()), None)


def _points_of_layer(name: str, values: list[float], source: Path) -> list[int]:
    points: list[int] = []
    while sum(points) < len(values):
        value = values[sum(points)]
        count = round(1 / value) if 1e-3 < value <= 1 else 0
        of_level = values[sum(points) : sum(points) + count]
        if len(of_level) != max(1, count) or any(abs(count * other - 1) > 1e-2 for other in of_level):
            raise UserError(f"weights {source}: {name} has to be one over the number of points of each level")
        points.append(count)
    return points


def scalar(tensor: Tensor | None) -> float | None:
    """The number in a tensor of one element; None for any other."""
    return float(tensor.item()) if tensor is not None and tensor.numel() == 1 else None


def _expansion(hidden: int, whole: int, given: object) -> float:
    """A number that gives ``hidden`` of ``whole`` channels: the described or a published one, if one does."""
    candidates = [given] if isinstance(given, int | float) else []
    candidates += [*EXPANSIONS, hidden / whole, (hidden + 0.5) / whole]
    return next(float(x) for x in candidates if int(x * whole) == hidden)

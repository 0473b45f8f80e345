"""Mask-RT-DETR from the neck's maps on, computed step by step from its description, with functions alone.

Paddle, which its code needs, is no part of the tests. The description is PaddleDetection's (commit 666f597):
``MaskFeatFPN`` and the mask layers of ``MaskHybridEncoder``, ``MaskRTDETR`` and the decoder layers of ``RTDETR``. One
difference: Paddle divides the anchors' x by the height and their y by the width, which only square images survive.
The weights are those of our head, by its names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def predict(
    state: State, maps: list[Tensor], lateral: Tensor, *, queries: int, layers: int, heads: int, points: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (Q, C), boxes (Q, 4) cxcywh and mask logits (Q, h, w) of one image, from maps (1, C, h, w)."""
    prototypes = pixel_features(state, maps, lateral)
    projected = [conv(state, f"decoder.input_proj.{i}", x) for i, x in enumerate(maps)]
    memory = torch.cat([x[0].flatten(1).T for x in projected])
    anchors, inside = anchors_of(projected)
    features = linear(state, "decoder.memory_proj.0", memory * inside[:, None])
    features = norm(state, "decoder.memory_proj.1", features)
    best = linear(state, "decoder.memory_class", features).amax(1).topk(queries).indices
    content = features[best]
    _, masks = classes_and_masks(state, content, prototypes)
    boxes = logit(torch.stack([box_around(mask > 0) for mask in masks]).to(content.dtype)).sigmoid()
    for index in range(layers):
        content = layer(state, f"decoder.layers.{index}", content, boxes, projected, memory, heads, points)
        change = mlp(state, "decoder.memory_box", content, 3)
        boxes = (change + logit(boxes)).sigmoid()
    logits, masks = classes_and_masks(state, content, prototypes)
    return logits, boxes, masks


def pixel_features(state: State, maps: list[Tensor], lateral: Tensor) -> Tensor:
    """(P, h, w) at stride 4."""
    total = F.silu(conv(state, "pixels.scales.0.0", maps[0]))
    for level in range(1, len(maps)):
        x = maps[level]
        for step in range(level):
            x = enlarged(F.silu(conv(state, f"pixels.scales.{level}.{step}", x)))
        total = total + x
    x = enlarged(F.silu(conv(state, "pixels.merge", total)))
    x = x + F.silu(conv(state, "pixels.lateral", lateral))
    x = F.silu(conv(state, "pixels.refine", x))
    return F.conv2d(x, state["pixels.out.weight"], state["pixels.out.bias"])[0]


def anchors_of(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(S, 4) boxes of all tokens, and (S,) whether all their numbers are between 0.01 and 0.99."""
    boxes = [
        [(column + 0.5) / x.shape[3], (row + 0.5) / x.shape[2], 0.05 * 2**level, 0.05 * 2**level]
        for level, x in enumerate(maps)
        for row in range(x.shape[2])
        for column in range(x.shape[3])
    ]
    anchors = torch.tensor(boxes, dtype=maps[0].dtype)
    return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(1)


def classes_and_masks(state: State, content: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """What the shared heads make of queries (Q, D): a norm, then classes, and masks (Q, h, w)."""
    normed = norm(state, "decoder.output_norm", content)
    embedding = mlp(state, "mask_embed", normed, 3)
    return linear(state, "decoder.memory_class", normed), torch.einsum("qp,phw->qhw", embedding, prototypes)


def box_around(mask: Tensor) -> Tensor:
    """cxcywh in 0..1 of the pixels of a mask (h, w), zeros if it has none."""
    height, width = mask.shape
    pixels = mask.nonzero().tolist()
    if not pixels:
        return torch.zeros(4)
    rows, columns = [row for row, _ in pixels], [column for _, column in pixels]
    left, right = min(columns) / width, (max(columns) + 1) / width
    top, bottom = min(rows) / height, (max(rows) + 1) / height
    return torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dtype=torch.float64)


def layer(
    state: State, name: str, content: Tensor, boxes: Tensor, maps: list[Tensor], memory: Tensor, heads: int, points: int
) -> Tensor:
    """A decoder layer on queries (Q, D): attention between them, to the maps, feed-forward network."""
    position = mlp(state, "decoder.position", boxes, 2)
    x = attention(state, f"{name}.self_attention", content, position, heads)
    content = norm(state, f"{name}.norm1", content + x)
    x = deformable(state, f"{name}.cross_attention", content + position, boxes, maps, memory, heads, points)
    content = norm(state, f"{name}.norm2", content + x)
    return norm(state, f"{name}.norm3", content + mlp(state, f"{name}.ffn", content, 2))


def attention(state: State, name: str, content: Tensor, position: Tensor, heads: int) -> Tensor:
    """Attention between queries; positions are added to queries and keys."""
    q, k, v = (
        linear(state, f"{name}.{part}_proj", x).unflatten(1, (heads, -1)).transpose(0, 1)
        for part, x in (("q", content + position), ("k", content + position), ("v", content))
    )
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return linear(state, f"{name}.out_proj", (weights @ v).transpose(0, 1).flatten(1))


def deformable(
    state: State, name: str, x: Tensor, boxes: Tensor, maps: list[Tensor], memory: Tensor, heads: int, points: int
) -> Tensor:
    """Attention of queries to ``points`` places of every map, at offsets in shares of half of their boxes' sides."""
    levels, count = len(maps), len(x)
    values = linear(state, f"{name}.value_proj", memory)
    offsets = linear(state, f"{name}.sampling_offsets", x).view(count, heads, levels * points, 2)
    weights = linear(state, f"{name}.attention_weights", x).view(count, heads, levels * points).softmax(-1)
    places = boxes[:, None, None, :2] + offsets / points * boxes[:, None, None, 2:] * 0.5
    read, first = [], 0
    for level, single in enumerate(maps):
        height, width = single.shape[2:]
        own = values[first : first + height * width].T.reshape(heads, -1, height, width)
        first += height * width
        grid = 2 * places[:, :, level * points : (level + 1) * points].transpose(0, 1) - 1
        read.append(F.grid_sample(own, grid, align_corners=False))  # (heads, D / heads, Q, points)
    found = (torch.cat(read, -1) * weights.transpose(0, 1)[:, None]).sum(-1)
    return linear(state, f"{name}.output_proj", found.flatten(0, 1).T)


def conv(state: State, name: str, x: Tensor) -> Tensor:
    weight, statistics = (
        state[f"{name}.conv.weight"],
        [state[f"{name}.norm.running_{part}"] for part in ("mean", "var")],
    )
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return F.batch_norm(x, *statistics, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mlp(state: State, name: str, x: Tensor, layers: int) -> Tensor:
    for index in range(layers):
        x = linear(state, f"{name}.layers.{index}", x if index == 0 else x.relu())
    return x


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def logit(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))

"""Attention inside one feature map: RT-DETR's AIFI, position embeddings, windows for large maps.

AIFI: attention-based intra-scale feature interaction (Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection",
CVPR 2024, section 4.2). Needs torch alone.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvision.neck.cached import ShapeCache, in_graph
from mvision.neck.layers import EncoderLayer

LEARNED_GRID = 20
"""Side of the learned position grid: the tokens of a 640-pixel image at stride 32."""


class AIFI(nn.Module):
    """Transformer layers over the pixels of one map, globally or in windows: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self, embed_dim: int, num_heads: int, num_layers: int, ffn_dim: int, *, dropout: float = 0.0, act: str = "gelu"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(embed_dim, num_heads, ffn_dim, dropout=dropout, act=act) for _ in range(num_layers)
        )
        self._windows = ShapeCache()

    def forward(self, x: Tensor, position: Tensor, window: int = 0) -> Tensor:
        """x: (B, C, H, W), position: (1, H, W, C), window: largest side of a window in tokens, 0 for global."""
        tokens = x.permute(0, 2, 3, 1)
        tokens = self._windowed(tokens, position, window) if window > 0 else self._global(tokens, position)
        y = tokens.permute(0, 3, 1, 2).to(x.dtype)  # under autocast on CUDA a LayerNorm returns float32
        # y is channels-last in memory, and all later convolutions would return channels-last too. Compilers choose the
        # layout themselves.
        if torch.jit.is_scripting() or not torch.compiler.is_compiling():
            return y.contiguous() if x.is_contiguous() else y
        return y

    def _global(self, tokens: Tensor, position: Tensor) -> Tensor:
        y, position = tokens.flatten(1, 2), position.flatten(1, 2)
        for layer in self.layers:
            y = layer(y, position)
        return y.reshape(tokens.shape)

    def _windowed(self, tokens: Tensor, position: Tensor, window: int) -> Tensor:
        """Apply the layers inside windows; only attention mixes tokens, so the map is divided once, before them."""
        batch, height, width, channels = tokens.shape
        source, real, slot = self._indices(height, width, window, tokens.device)
        length = _window_length(height, width, window)
        mask: Tensor | None = None
        if not is_static(height * width) or source.shape[0] > height * width:
            mask = real.repeat(batch).reshape(-1, 1, 1, length)
        y = tokens.flatten(1, 2)[:, source].reshape(-1, length, channels)
        position = position.flatten(1, 2)[:, source].repeat(batch, 1, 1).reshape(-1, length, channels)
        for layer in self.layers:
            y = layer(y, position, mask)
        return y.reshape(batch, -1, channels)[:, slot].reshape(tokens.shape)

    def _indices(self, height: int, width: int, window: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if torch.jit.is_scripting():
            return _window_index(height, width, window, device)
        else:
            key = (height, width, window, device)
            return self._windows.get(key, partial(_window_index, height, width, window, device))


def _window_index(height: int, width: int, window: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices that divide a map of height x width tokens into windows of at most window x window, and back.

    The windows are the fewest that cover the map, all of the same size, so each axis is padded by less than one token
    per window, and a map of at most window x window tokens is one window without padding. Indices are used instead of
    reshapes because they can be exported with dynamic sizes.

    Returns:
        source: (windows * length,) index in the map of every token, window after window; padding repeats the edge.
        real: (windows * length,) bool, False for padding.
        slot: (height * width,) index in `source` of every token of the map.
    """
    rows, columns = (height + window - 1) // window, (width + window - 1) // window
    h, w = (height + rows - 1) // rows, (width + columns - 1) // columns

    number, inside = _divide(torch.arange(rows * columns * h * w, device=device), h * w)
    (row, column), (inner_y, inner_x) = _divide(number, columns), _divide(inside, w)
    y, x = row * h + inner_y, column * w + inner_x
    real = (y < height) & (x < width)
    source = y.clamp(max=height - 1) * width + x.clamp(max=width - 1)

    y, x = _divide(torch.arange(height * width, device=device), width)
    (row, inner_y), (column, inner_x) = _divide(y, h), _divide(x, w)
    slot = ((row * columns + column) * h + inner_y) * w + inner_x
    return source, real, slot


def _window_length(height: int, width: int, window: int) -> int:
    """Tokens per window of `_window_index`."""
    rows, columns = (height + window - 1) // window, (width + window - 1) // window
    return ((height + rows - 1) // rows) * ((width + columns - 1) // columns)


def _divide(x: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder, without `%`: ONNX export has no remainder by a dynamic size."""
    quotient = x // divisor
    return quotient, x - quotient * divisor


class SincosPosition(nn.Module):
    """Fixed 2D position embedding, channels [sin y | cos y | sin x | cos x], dim / 4 frequencies each.

    For square maps the values equal those of the original RT-DETR code. For others that code confuses rows and columns;
    `transformers` computes them as here.

    Raises:
        ValueError: dim is not a multiple of 4.
    """

    def __init__(self, dim: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(
                f"embed_dim={dim} is not a multiple of 4, which position='sincos' needs; take position='learned' or "
                f"embed_dim={dim + 4 - dim % 4}"
            )
        self.dim, self.temperature = dim, temperature
        self._tables = ShapeCache()

    def forward(self, x: Tensor, scale: int = 0) -> Tensor:
        """(1, H, W, dim) for a map x (B, dim, H, W), in its dtype; the same for every scale."""
        if torch.jit.is_scripting():
            return self._table(x)
        else:
            return self._tables.get((x.shape[-2], x.shape[-1], x.dtype, x.device), partial(self._table, x))

    def _table(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # The reference computes in float64, which MPS and many runtimes lack; float32 differs by less than 1e-5.
        dtype = torch.float64
        if x.dtype != torch.float64 and (in_graph() or x.device.type == "mps"):
            dtype = torch.float32
        frequencies = torch.arange(self.dim // 4, dtype=dtype, device=x.device) / (self.dim // 4)
        frequencies = 1.0 / self.temperature**frequencies
        # One table per axis: H + W rows of sines and cosines instead of H x W.
        rows = self._waves(torch.arange(height, dtype=dtype, device=x.device), height, frequencies).to(x.dtype)
        columns = self._waves(torch.arange(width, dtype=dtype, device=x.device), width, frequencies).to(x.dtype)
        rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
        return torch.cat([rows, columns], dim=2)[None]

    def _waves(self, places: Tensor, length: int, frequencies: Tensor) -> Tensor:
        """(length, dim / 2) sines and cosines of the positions 0 to length - 1 on an axis."""
        angles = places.outer(frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FractionPosition(SincosPosition):
    """DETRPose's fixed 2D position embedding: of positions as shares of the map, whatever its size.

    The i-th of n rows or columns is at 2 pi (i + 1) / n. Channels are as those of `SincosPosition`, but that each
    cosine follows its sine.

    Source: github.com/SebastianJanampa/DETRPose, hybrid_encoder.py, after DETR (Carion et al., ECCV 2020).

    Raises:
        ValueError: dim is not a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, temperature=20.0)

    def _waves(self, places: Tensor, length: int, frequencies: Tensor) -> Tensor:
        angles = ((places + 1) * (2 * math.pi) / (length + 1e-6)).outer(frequencies)
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class LearnedPosition(nn.Module):
    """Learned position embedding: one grid for all scales, resized to the map (bicubic), plus one vector per scale."""

    def __init__(self, dim: int, num_scales: int) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.empty(1, dim, LEARNED_GRID, LEARNED_GRID))
        self.scales = nn.Parameter(torch.empty(num_scales, dim))
        nn.init.trunc_normal_(self.grid, std=0.02)
        nn.init.trunc_normal_(self.scales, std=0.02)

    def forward(self, x: Tensor, scale: int = 0) -> Tensor:
        """(1, H, W, dim) for a map x (B, dim, H, W) in its dtype; `scale` counts the scales with attention."""
        grid = F.interpolate(self.grid, size=x.shape[-2:], mode="bicubic", align_corners=False)
        return (grid.permute(0, 2, 3, 1) + self.scales[scale]).to(x.dtype)


def is_static(size: int) -> bool:
    """Is this size a plain number? In a dynamic graph it is a symbol, and comparing it would make the size fixed."""
    return isinstance(size, int)

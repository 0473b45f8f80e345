"""Attention inside a map: positions have the published values, windows attend to exactly what they should."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mvision.neck.aifi import (
    AIFI,
    LEARNED_GRID,
    FractionPosition,
    LearnedPosition,
    SincosPosition,
    _window_index,
    _window_length,
)


def make_aifi(num_layers: int = 2) -> AIFI:
    torch.manual_seed(0)
    return AIFI(16, 4, num_layers, 32).eval()


def attend(aifi: AIFI, x: Tensor, window: int) -> Tensor:
    return aifi(x, SincosPosition(x.shape[1])(x), window)


def original_position(width: int, height: int, dim: int) -> Tensor:
    """The numbers of the original RT-DETR code, (H * W, dim); meant for width == height."""
    grid_w, grid_h = torch.meshgrid(torch.arange(width).double(), torch.arange(height).double(), indexing="ij")
    omega = 1.0 / 10000.0 ** (torch.arange(dim // 4).double() / (dim // 4))
    w, h = grid_w.flatten()[:, None] * omega, grid_h.flatten()[:, None] * omega
    return torch.cat([w.sin(), w.cos(), h.sin(), h.cos()], dim=1)


def test_sincos_has_the_original_numbers_on_square_maps() -> None:
    position = SincosPosition(32)(torch.empty(1, 32, 7, 7, dtype=torch.float64))
    torch.testing.assert_close(position[0].flatten(0, 1), original_position(7, 7, 32), rtol=0, atol=1e-14)


def test_sincos_puts_y_first_and_follows_the_map_on_others() -> None:
    position = SincosPosition(8)(torch.empty(3, 8, 4, 6))
    assert position.shape == (1, 4, 6, 8)
    y, x, slow = 3, 5, 1 / 100  # with two frequencies, the second is 10000 ** -0.5
    expected = [f(v * w) for v in (y, x) for f in (math.sin, math.cos) for w in (1, slow)]
    torch.testing.assert_close(position[0, y, x], torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sincos_follows_the_dtype_without_losing_the_arguments_precision(dtype: torch.dtype) -> None:
    exact = SincosPosition(64)(torch.empty(1, 64, 3, 200, dtype=torch.float64))
    position = SincosPosition(64)(torch.empty(1, 64, 3, 200, dtype=dtype))
    assert position.dtype == dtype
    torch.testing.assert_close(position, exact.to(dtype), rtol=0, atol=0)


def test_sincos_in_a_graph_stays_close() -> None:
    x = torch.empty(1, 64, 50, 50)
    program = torch.export.export(SincosPosition(64), (x,))
    assert torch.float64 not in {
        node.meta["val"].dtype for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)
    }
    torch.testing.assert_close(program.module()(x), SincosPosition(64)(x), rtol=0, atol=2e-5)


def test_sincos_needs_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match=r"embed_dim=30 is not a multiple of 4.*embed_dim=32"):
        SincosPosition(30)


def test_fraction_position_knows_shares_of_the_map() -> None:
    """DETRPose's: the last row and column are at 2 pi whatever the size, and sines and cosines take turns."""
    position = FractionPosition(8)(torch.empty(1, 8, 4, 6, dtype=torch.float64))
    y, x = 2, 5
    angles = [2 * math.pi * 3 / 4, 2 * math.pi * 3 / 4 / 20**0.5, 2 * math.pi, 2 * math.pi / 20**0.5]
    expected = [function(angle) for angle in angles for function in (math.sin, math.cos)]
    torch.testing.assert_close(position[0, y, x], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_learned_position_is_a_resized_grid_plus_a_vector_per_scale() -> None:
    torch.manual_seed(0)
    position = LearnedPosition(6, 2)
    same = torch.empty(2, 6, LEARNED_GRID, LEARNED_GRID)
    torch.testing.assert_close(position(same, 0) - position.scales[0], position.grid.permute(0, 2, 3, 1))
    with torch.no_grad():  # a ramp along x stays one at any size
        position.grid.copy_(((torch.arange(LEARNED_GRID) + 0.5) / LEARNED_GRID).expand_as(position.grid))
    for height, width in ((9, 13), (40, 30)):
        x = torch.empty(1, 6, height, width)
        wide = position(x, 1) - position.scales[1]
        assert wide.shape == (1, height, width, 6)
        ramp = (torch.arange(width) + 0.5) / width
        inner = slice(width // 5, -(width // 5))  # bicubic flattens at the borders
        torch.testing.assert_close(wide[0, :, inner], ramp[inner, None].expand(height, -1, 6), rtol=0, atol=2e-2)
        between = position(x, 1) - position(x, 0)
        torch.testing.assert_close(between, (position.scales[1] - position.scales[0]).expand_as(wide))


@pytest.mark.parametrize("window", [8, 9, 100])
def test_a_window_over_the_whole_map_is_global_attention(window: int) -> None:
    aifi = make_aifi()
    x = torch.randn(2, 16, 5, 8)
    torch.testing.assert_close(attend(aifi, x, window), attend(aifi, x, 0))


@pytest.mark.parametrize(("height", "width", "window"), [(8, 12, 4), (7, 11, 4), (1, 9, 3), (10, 3, 4), (5, 5, 1)])
def test_windows_attend_to_their_own_real_tokens_only(height: int, width: int, window: int) -> None:
    """Every window by itself, cut out by hand without any padding or mask."""
    aifi = make_aifi()
    x = torch.randn(2, 16, height, width)
    position = SincosPosition(16)(x)
    result = aifi(x, position, window)
    h, w = (math.ceil(size / math.ceil(size / window)) for size in (height, width))
    assert max(h, w) <= window
    for top in range(0, height, h):
        for left in range(0, width, w):
            cut = slice(top, top + h), slice(left, left + w)
            alone = aifi(x[:, :, cut[0], cut[1]], position[:, cut[0], cut[1]], 0)
            torch.testing.assert_close(result[:, :, cut[0], cut[1]], alone)


@pytest.mark.parametrize("size", [(1, 1), (20, 20), (21, 40), (41, 19), (333, 57)])
@pytest.mark.parametrize("window", [1, 7, 20])
def test_windows_hold_every_token_once_with_little_padding(size: tuple[int, int], window: int) -> None:
    height, width = size
    source, real, slot = _window_index(height, width, window, torch.device("cpu"))
    length = _window_length(height, width, window)
    assert torch.equal(source[slot], torch.arange(height * width))
    assert real[slot].all()
    assert real.sum() == height * width
    assert length <= window**2
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    assert len(source) == rows * columns * length
    assert len(source) < (height + rows) * (width + columns)
    assert real.reshape(-1, length).any(1).all(), "a window without a real token has no defined attention"


def test_windows_train() -> None:
    aifi = make_aifi().train()
    x = torch.randn(2, 16, 7, 9, requires_grad=True)
    attend(aifi, x, 4).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_memory_format_is_the_inputs() -> None:
    aifi = make_aifi()
    x = torch.randn(2, 16, 6, 5)
    for window in (0, 3):
        assert attend(aifi, x, window).is_contiguous()
        channels_last = attend(aifi, x.contiguous(memory_format=torch.channels_last), window)
        assert channels_last.is_contiguous(memory_format=torch.channels_last)


def test_output_follows_the_maps_dtype() -> None:
    """Autocast on CUDA, unlike on the CPU, leaves a LayerNorm's output in float32."""
    aifi = make_aifi()
    aifi.layers[-1].register_forward_hook(lambda module, inputs, output: output.float())
    x = torch.randn(2, 16, 6, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert [attend(aifi, x, window).dtype for window in (0, 3)] == [torch.bfloat16] * 2


@pytest.mark.xfail(torch.__version__ < (2, 11), reason="torch 2.6's exporter has no sym_not", strict=False)
@torch.no_grad()
def test_windows_in_onnx_at_any_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aifi, self.position = make_aifi(num_layers=1), SincosPosition(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.aifi(x, self.position(x), 4)

    module = Windowed().eval()
    shapes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    x = torch.randn(2, 16, 8, 12)  # windows fit without padding here, but not below
    program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "windows.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "windows.onnx", providers=["CPUExecutionProvider"])
    for size in ((1, 16, 8, 8), (3, 16, 11, 5), (2, 16, 3, 4)):
        x = torch.randn(size)
        (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(result), module(x), rtol=0, atol=1e-4)

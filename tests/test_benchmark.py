"""The benchmarks: what is compared is what it is called, and the figures are counted, not quoted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mvision import UserError
from mvision.commands.benchmark_baselines import DeformableEncoder, PlainEncoder
from mvision.commands.benchmark_encoder import benchmark_encoder, encoders
from mvision.commands.benchmark_model import benchmark_model
from mvision.commands.benchmark_timing import alternate, median_ratio, peak_memory


def maps(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 8, *shape) for shape in shapes]


def test_fused_and_written_out_attention_are_the_same() -> None:
    torch.manual_seed(0)
    fused = PlainEncoder([8, 8], 16, 4, 2).eval()
    plain = PlainEncoder([8, 8], 16, 4, 2, fused=False).eval()
    plain.load_state_dict(fused.state_dict())
    inputs = maps((8, 6), (4, 3))
    with torch.no_grad():
        for a, b in zip(fused(inputs), plain(inputs)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [PlainEncoder, DeformableEncoder])
def test_baselines_give_maps_and_look_across_scales(cls: type) -> None:
    torch.manual_seed(0)
    encoder = cls([8, 8], 16, 4, 1)
    inputs = [x.requires_grad_() for x in maps((8, 6), (4, 3))]
    found = encoder(inputs)
    assert [tuple(x.shape) for x in found] == [(2, 16, 8, 6), (2, 16, 4, 3)]
    found[0][0].sum().backward()
    assert inputs[1].grad is not None
    assert inputs[1].grad[0].abs().sum() > 0
    assert inputs[1].grad[1].abs().sum() == 0  # other images are other images


def test_calls_take_turns() -> None:
    order: list[str] = []
    taken = alternate([lambda: order.append("a"), lambda: order.append("b")], torch.device("cpu"), 4, warmups=1)
    assert "".join(order) == "ab" * 5
    assert [len(times) for times in taken] == [4, 4]
    assert len(alternate([lambda: None], torch.device("cpu"), 50, seconds=0.0)[0]) == 3
    assert median_ratio([2, 9, 4], [1, 3, 4]) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
def test_peak_memory_sees_what_is_freed_again() -> None:
    found = peak_memory(lambda: torch.ones(2**26).sum(), torch.device("cpu"))
    assert found is not None
    assert 0.8 * 2**28 < found < 1.5 * 2**28


def test_encoder_benchmark(tmp_path: Path) -> None:
    names = ["plain, 1 layer, fused", "deformable, 1 layer"]
    text = benchmark_encoder(
        sizes=[64, 128], embed_dim=32, repeats=3, device="cpu", output=tmp_path, names=names, log=lambda _: None
    )
    assert (tmp_path / "encoder.md").read_text() == text
    records = json.loads((tmp_path / "encoder.json").read_text())["records"]
    assert [(r["encoder"], r["size"]) for r in records] == [
        (name, size) for size in (64, 128) for name in ("hybrid", *names)
    ]
    for record in records:
        module = encoders(32)[record["encoder"]]()
        if hasattr(module, "fuse"):
            module.fuse()
        assert record["parameters"] == sum(p.numel() for p in module.parameters())
        assert record["memory"] is None or record["memory"] >= 0
    hybrid = [r for r in records if r["encoder"] == "hybrid"]
    assert all(r["ratio"] == 1 for r in hybrid)
    assert hybrid[1]["flops"] / hybrid[0]["flops"] == pytest.approx(4, rel=0.02)  # attention on four tokens is nothing
    assert (tmp_path / "encoder.png").stat().st_size > 10000


def test_model_benchmark(tmp_path: Path) -> None:
    text = benchmark_model(
        model="tiny", batches=[1, 2], precisions=["fp32"], roads=["eager"], repeats=3, device="cpu", output=tmp_path,
        tasks=["detection", "keypoints"], log=lambda _: None,
    )  # fmt: skip
    assert "| head keypoints |" in text
    document = json.loads((tmp_path / "model.json").read_text())
    assert [(row["batch"], row["road"], row["ratio"]) for row in document["totals"]] == [
        (1, "eager", 1),
        (2, "eager", 1),
    ]
    part = document["parts"][0]["milliseconds"]
    assert math.isclose(part["all of it"], sum(v for k, v in part.items() if k != "all of it"), rel_tol=0.5)


def test_unknown_roads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--road tensorrt: choose one of eager, compiled, onnx, openvino"):
        benchmark_model(roads=["tensorrt"], output=tmp_path)
    with pytest.raises(UserError, match="give one of them"):
        benchmark_model(model="tiny", weights="x", output=tmp_path)
    assert not list(tmp_path.iterdir())

"""The benchmarks compare what they name, and report what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mvision import UserError
from mvision.commands import benchmark_encoder as encoder_module
from mvision.commands import benchmark_model as model_module
from mvision.commands import equal_flops
from mvision.commands.benchmark_baselines import DeformableEncoder, PlainEncoder
from mvision.commands.benchmark_encoder import benchmark_encoder
from mvision.commands.benchmark_model import benchmark_model
from mvision.commands.benchmark_timing import alternate, median_ratio
from mvision.machine import cpu_name
from mvision.weights import save_weights
from tests.test_joint import make_model
from tests.test_runtimes import has_bf16


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


def test_warm_up_rounds_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    durations = iter([100.0, 100.0, 1.0, 2.0, 3.0])

    def call() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert alternate([call], torch.device("cpu"), 3, warmups=2) == [[1.0, 2.0, 3.0]]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
def test_peak_memory_includes_what_is_freed_again() -> None:
    """In a process of its own: this one has memory that it freed, which the call would use."""
    code = (
        "import torch; from mvision.commands.benchmark_timing import peak_memory; "
        "print(peak_memory(lambda: torch.ones(2**26).sum(), torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = int(done.stdout)
    assert 0.8 * 2**28 < found < 1.5 * 2**28


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
def test_written_out_attention_takes_the_memory_of_its_matrix() -> None:
    found = encoder_module._memory("plain, 1 layer", 32, 320, torch.device("cpu"))  # in a process of its own
    tokens = 40**2 + 20**2 + 10**2
    assert found is not None
    assert found > 8 * tokens**2 * 4  # heads, pairs of tokens, bytes


def take_seconds(monkeypatch: pytest.MonkeyPatch, module: Any, seconds: Callable[[int], float]) -> list[int]:
    """No clocks: the call with index ``i`` takes ``seconds(i)``. Returns the number of calls of each benchmark."""
    counts: list[int] = []

    def fake(calls: Sequence[Callable[[], Any]], *_: object, **__: object) -> list[list[float]]:
        for call in calls:
            call()
        counts.append(len(calls))
        return [[seconds(index)] * 3 for index in range(len(calls))]

    monkeypatch.setattr(module, "alternate", fake)
    return counts


def test_encoder_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_seconds(monkeypatch, encoder_module, lambda index: (0.1, 0.4, 0.05)[index])
    memory = {"hybrid": 2**20, "plain, 1 layer, fused": 3 * 2**20, "deformable, 1 layer": None}
    monkeypatch.setattr(encoder_module, "_memory", lambda name, *_: memory[name])
    text = benchmark_encoder(
        sizes=[128, 64], embed_dim=32, device="cpu", output=tmp_path, names=list(memory)[1:], log=lambda _: None
    )
    assert (tmp_path / "encoder.md").read_text() == text
    assert "| encoder | 64 | 128 |\n|---|---|---|\n| hybrid | 100 ms (1.00) | 100 ms (1.00) |" in text
    assert "| plain, 1 layer, fused | 400 ms (4.00) | 400 ms (4.00) |" in text
    assert "| plain, 1 layer, fused | 3 MiB (3.00) | 3 MiB (3.00) |" in text
    assert "| deformable, 1 layer | - | - |" in text
    records = json.loads((tmp_path / "encoder.json").read_text())["records"]
    assert [(r["encoder"], r["size"]) for r in records] == [(name, size) for size in (64, 128) for name in memory]
    plain = records[1]
    projections, levels = 32 * (512 + 1024 + 2048) + 3 * 32, 3 * 32
    attention, feed_forward, norms = 4 * (32 * 32 + 32), (32 * 128 + 128) + (128 * 32 + 32), 2 * 2 * 32
    assert plain["parameters"] == projections + levels + attention + feed_forward + norms
    tokens = [64, 16, 4]
    products = sum(count * channels * 32 for count, channels in zip(tokens, (512, 1024, 2048)))
    products += 84 * (4 * 32 * 32 + 2 * 32 * 128) + 2 * 84**2 * 32  # linear layers; both products of attention
    assert plain["flops"] == 2 * products
    hybrid = [r for r in records if r["encoder"] == "hybrid"]
    assert hybrid[1]["flops"] / hybrid[0]["flops"] == pytest.approx(4, rel=0.02)  # attention on few tokens is little
    assert (tmp_path / "encoder.png").stat().st_size > 10000


@pytest.mark.parametrize("name", ["hybrid, elan blocks", "hybrid, sums", "hybrid, as EdgeCrafter"])
def test_encoders_with_other_blocks_have_equal_flops(name: str) -> None:
    known = encoder_module.encoders(256)
    base, other = (encoder_module._build(known[which], torch.device("cpu")) for which in ("hybrid", name))
    counts = [
        encoder_module._flops(encoder, encoder_module._maps(640, torch.device("meta"))) for encoder in (base, other)
    ]
    assert counts[1] / counts[0] == pytest.approx(1, abs=0.04)
    assert list(base.state_dict()) != list(other.state_dict()) or name == "hybrid, sums"


def test_flops_of_a_neck_are_counted_after_fusing() -> None:
    settings = {"embed_dim": 16, "attention_levels": [], "depth": 1}
    counted = equal_flops.neck_flops([8], [16], 64, settings), equal_flops.neck_flops([8, 8], [16, 32], 64, settings)
    assert counted[0] == 2 * 4**2 * 8 * 16
    lateral, down, point = 2**2 * 16 * 16, 2**2 * 9 * 16 * 16, 2 * 32 * 16 + 9 * 16 * 16  # of one block per pixel
    assert counted[1] == counted[0] + 2 * (2**2 * 8 * 16 + lateral + down + (4**2 + 2**2) * point)


def test_encoders_are_chosen_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--encoder hybrid, elans: did you mean 'hybrid, elan blocks'"):
        benchmark_encoder(names=["hybrid, elans"], output=tmp_path)
    with pytest.raises(UserError, match="--embed-dim 100: .* choose a multiple of 8"):
        benchmark_encoder(embed_dim=100, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_sizes_that_take_too_long_or_too_much_memory_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = take_seconds(monkeypatch, encoder_module, lambda index: (0.001, 2.5)[index])
    monkeypatch.setattr(encoder_module, "_memory", lambda *_: None)
    options: dict = {"embed_dim": 32, "device": "cpu", "output": tmp_path, "log": lambda _: None}
    text = benchmark_encoder(sizes=[64, 96, 128, 256], names=["plain, 1 layer, fused"], **options)
    assert counts == [2, 2, 2, 1]  # twice the side takes 16 times as long: 40 s
    assert "| plain, 1 layer, fused | 2500 ms (2500.00) | 2500 ms (2500.00) | 2500 ms (2500.00) | left out |" in text
    limits = [("plain, 1 layer", 800), ("plain, 1 layer", 1280), ("plain, 1 layer, fused", 1280)]
    assert [encoder_module._is_too_much(*entry, []) for entry in limits] == [False, True, False]


def test_model_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_bf16(monkeypatch, True)
    counts = take_seconds(monkeypatch, model_module, lambda index: 0.2 / (index + 1))
    save_weights(make_model(["detection", "keypoints"]), tmp_path / "best.safetensors")
    prepared: list[str] = []
    monkeypatch.setattr(model_module, "export", lambda weights, format, **_: prepared.append(format))
    monkeypatch.setattr(model_module, "ExportedModel", lambda path, precision: lambda images: None)
    text = benchmark_model(
        weights=str(tmp_path / "best.safetensors"), batches=[1, 2], runtimes=["openvino", "onnx"], device="cpu",
        output=tmp_path, log=lambda _: None,
    )  # fmt: skip
    document = json.loads((tmp_path / "model.json").read_text())
    assert (document["tasks"], document["size"]) == (["detection", "keypoints"], [64, 96])
    assert [(part["batch"], part["precision"]) for part in document["parts"]] == [
        *((1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")),
    ]
    stages = ["preparation", "backbone", "neck", "head detection", "head keypoints", "post-processing", "all of it"]
    assert list(document["parts"][0]["milliseconds"]) == stages
    assert document["parts"][0]["milliseconds"]["backbone"] == pytest.approx(100)
    expected = [("eager", "fp32"), ("eager", "bf16"), ("openvino", "fp32"), ("openvino", "bf16"), ("onnx", "fp32")]
    for batch in (1, 2):
        rows = [row for row in document["totals"] if row["batch"] == batch]
        assert [(row["runtime"], row["precision"]) for row in rows] == expected
        assert [row["milliseconds"] for row in rows] == pytest.approx([200, 100, 200 / 3, 50, 40])
        assert [row["ratio"] for row in rows] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert counts == [len(stages)] * 4 + [len(expected)] * 2
    assert prepared == ["openvino", "onnx"]
    assert (tmp_path / "model.md").read_text() == text
    path = str(tmp_path / "best.safetensors").replace("_", "\\_")  # Markdown would read underscores as emphasis
    assert text.startswith(f"# {path}: detection, keypoints at 96 x 64")
    assert "| 2 | openvino | bf16 | 50.0 ms | 0.25 |" in text
    assert "| neck | 66.7 ms | 66.7 ms | 66.7 ms | 66.7 ms |" in text


def test_ratios_are_to_the_first_candidate_without_eager_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_bf16(monkeypatch, True)
    take_seconds(monkeypatch, model_module, lambda index: 0.2 / (index + 1))
    benchmark_model(
        model="tiny", batches=[1], precisions=["bf16"], runtimes=["eager"], device="cpu", output=tmp_path,
        log=lambda _: None,
    )  # fmt: skip
    document = json.loads((tmp_path / "model.json").read_text())
    assert [(row["runtime"], row["precision"], row["ratio"]) for row in document["totals"]] == [("eager", "bf16", 1)]
    assert (document["model"], document["tasks"]) == ("tiny", ["detection"])


def test_what_the_processor_does_not_compute_in_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_bf16(monkeypatch, False)
    take_seconds(monkeypatch, model_module, lambda index: 1.0)
    lines: list[str] = []
    measure = partial(benchmark_model, model="tiny", batches=[1], runtimes=["eager"], device="cpu", output=tmp_path)
    measure(log=lines.append)
    assert [row["precision"] for row in json.loads((tmp_path / "model.json").read_text())["totals"]] == ["fp32"]
    assert lines[1] == f"bf16: not measured, {cpu_name()} does not compute in it"
    with pytest.raises(UserError, match="--precision bf16: this CPU does not compute in bf16"):
        measure(precisions=["bf16"], log=lines.append)


def test_unknown_runtimes(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--runtime tensorrt: choose one of compiled, eager, executorch, litert, onnx, openvino"
    ):
        benchmark_model(runtimes=["tensorrt"], output=tmp_path)
    with pytest.raises(UserError, match="--precision bf61: did you mean 'bf16'"):
        benchmark_model(precisions=["bf61"], output=tmp_path)
    with pytest.raises(UserError, match="give one of them"):
        benchmark_model(model="tiny", weights="x", output=tmp_path)
    assert not list(tmp_path.iterdir())

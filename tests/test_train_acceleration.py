"""Settings of a GPU's libraries while a run trains, and a backbone and neck that are compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvision.config import load_config
from mvision.engine.acceleration import compiled, set_for_training
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.storage.run_folder import RunFolder
from tests.small_runs import run_in_process


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any]) -> None:
    monkeypatch.setattr("mvision.engine.train.compiled", functools.partial(compiled, backend=backend))


def test_compiled_parts_train_as_others_do(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here in the second half of a run, with names in the weights as ever."""
    graphs: list[torch.fx.GraphModule] = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_with(monkeypatch, as_it_is)
    # Weights that hardly change: from random ones, rounding would grow from step to step.
    settings = {"train__warmup_steps": 2, "train__schedule": "constant", "train__lr": 1e-6}
    settings |= {"data__augment__mosaic": 0, "data__augment__mixup": 0}  # their beginning and end are shares of the run
    plain = run_in_process(squares, tmp_path / "plain", **settings, train__epochs=2)
    run = run_in_process(squares, tmp_path / "run", **settings, train__epochs=1)
    assert graphs == []
    changed = load_config(file=run / "config.yaml", overrides={"train.epochs": 2, "train.compile": True})
    train(changed, resume=run, device="cpu")
    assert len(graphs) >= 2
    assert capsys.readouterr().out.count("backbone and neck compiled in") == 1
    losses = [RunFolder(path).records()[1]["loss"] for path in (plain, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for path in ("best.safetensors", RunFolder(run).state.relative_to(run)):
        assert load_file(run / path).keys() == load_file(plain / path).keys()


def test_a_machine_that_cannot_compile_is_one_line(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise RuntimeError("no C++ compiler")

    compile_with(monkeypatch, failing)
    with pytest.raises(UserError, match=r"train\.compile: .*no C\+\+ compiler.*; leave train\.compile out"):
        run_in_process(squares, tmp_path / "run", train__epochs=1, train__compile=True)


def test_other_devices_keep_their_settings() -> None:
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    with set_for_training(accelerator):
        assert (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(("mixed", "products"), [("no", "high"), ("bf16", "highest")])
def test_libraries_of_a_gpu_are_set_while_it_trains(mixed: str, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings themselves exist without a GPU too."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), mixed_precision=mixed)
    with set_for_training(accelerator):
        assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == products
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == before == "highest"

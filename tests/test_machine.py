"""Devices, precision and facts about the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import click
import pytest
import timm
import torch

from mvision import machine
from mvision.cli.main import cli
from mvision.errors import UserError
from mvision.machine import channels_last_is_safe, processor, resolve_device, resolve_precision

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.10GHz
flags\t\t: fpu sse2 {flags}

processor\t: 1
model name\t: Another
"""


def use_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    """Makes ``machine`` read a processor's description with these flags; ``none``: there is no such file."""
    file = tmp_path / "cpuinfo"
    if flags != "none":
        file.write_text(CPUINFO.format(flags=flags))
    monkeypatch.setattr(processor, "Path", lambda name: {"/proc/cpuinfo": file}[name])


def test_an_unusable_device_is_one_line() -> None:
    with pytest.raises(UserError, match="--device banana: not usable here") as caught:
        resolve_device("banana")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line() -> None:
    with pytest.raises(UserError, match="--device cuda: not usable here"):
        resolve_device("cuda")


def test_the_default_device_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for has, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has: has)
        assert resolve_device(None).type == expected


def test_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has, faster, expected in ((True, True, "bf16"), (True, False, "fp32"), (False, True, "fp32")):
        monkeypatch.setattr(machine, "cpu_has_bf16", lambda has=has: has)
        monkeypatch.setattr(machine, "bf16_is_faster", lambda faster=faster: faster)
        assert resolve_precision("auto", cpu) == expected
        for given in ("fp32", "bf16", "fp16"):
            assert resolve_precision(given, cpu) == given
    assert resolve_precision("auto", torch.device("mps")) == "fp32"


def test_a_precision_that_there_is_not_is_one_line() -> None:
    with pytest.raises(UserError, match="precision 'half': fp32, bf16, fp16 or auto"):
        machine.inference_precision("half", torch.device("cpu"))  # type: ignore[arg-type]


def test_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert resolve_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512_bf16", True), ("amx_bf16", True), ("avx512f", False), ("none", False)]
)
def test_bf16_is_recognised_by_the_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, expected: bool
) -> None:
    use_cpuinfo(monkeypatch, tmp_path, flags)
    assert machine.cpu_has_bf16() is expected


def test_the_name_of_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cpuinfo(monkeypatch, tmp_path, "none")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert machine.cpu_name() == "unknown"
    use_cpuinfo(monkeypatch, tmp_path, "avx2")
    assert machine.cpu_name() == "Some CPU @ 2.10GHz"
    assert machine.device_name(torch.device("cpu")) == "Some CPU @ 2.10GHz"
    assert machine.cpu_field("cache size") == ""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on this system")
def test_cores_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6})
    assert machine.cores() == 3


def test_networks_that_crash_in_channels_last_are_recognised() -> None:
    assert not channels_last_is_safe(timm.create_model("repvgg_a0"), torch.device("cpu"))
    assert channels_last_is_safe(timm.create_model("repvgg_a0"), torch.device("cuda"))
    assert channels_last_is_safe(timm.create_model("resnet18d"), torch.device("cpu"))


def test_commands_offer_the_precisions_that_there_are() -> None:
    for command, precision in (
        ("train", set(get_args(machine.PrecisionOption))),
        ("predict", set(get_args(machine.PrecisionOption))),
        ("val", set(get_args(machine.PrecisionOption))),
    ):
        option = next(p for p in cli.commands[command].params if p.name == "precision")
        assert isinstance(option.type, click.Choice)
        assert set(option.type.choices) == precision
    for name, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        assert machine.torch_dtype(name).itemsize == size
    assert machine.torch_dtype("bf16") != machine.torch_dtype("fp16")

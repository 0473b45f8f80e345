"""The measured choice between bf16 and fp32 on a CPU, and where it is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch

from mvision.machine import cpu_has_bf16, selftest
from mvision.machine.selftest import bf16_is_faster

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has not asked yet."""
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path / "cache"))
    if not cpu_has_bf16():  # where nobody is asked; packed weights in bf16 need its instructions
        monkeypatch.setattr(selftest, "has_packed_convolutions", lambda: False)
    bf16_is_faster.cache_clear()
    yield tmp_path / "cache"
    bf16_is_faster.cache_clear()


def use_times(monkeypatch: pytest.MonkeyPatch, *times: float) -> list[float]:
    """Durations of the calls in turn: fp32, bf16, fp32, ...; returns those that were taken."""
    given, taken = cycle(times), []

    def seconds(call: Callable[[], object]) -> float:
        taken.append(next(given))
        return taken[-1]

    monkeypatch.setattr(selftest, "seconds", seconds)
    monkeypatch.setattr(selftest, "SECONDS", 60.0)
    monkeypatch.setattr(selftest, "processor_share", lambda *clocks: 1.0)
    return taken


def ask_in_new_process() -> bool:
    bf16_is_faster.cache_clear()
    return bf16_is_faster()


@pytest.mark.parametrize(("bf16", "expected"), [(0.5, True), (0.9, True), (0.92, False), (1.0, False), (3.0, False)])
def test_bf16_is_taken_where_it_is_faster_by_a_margin(
    bf16: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = use_times(monkeypatch, 1.0, bf16)
    assert bf16_is_faster() is expected
    assert len(taken) == 2 * selftest.ROUNDS


def test_one_disturbed_round_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    use_times(monkeypatch, *[1.0, 0.5] * 8, 1.0, 50.0)
    assert bf16_is_faster()


@pytest.mark.parametrize(("share", "kept"), [(0.95, True), (0.5, False)])
def test_what_a_busy_machine_gave_is_not_kept(
    share: float, kept: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_times(monkeypatch, 1.0, 1.0)
    monkeypatch.setattr(selftest, "processor_share", lambda *clocks: share)
    assert not bf16_is_faster()
    assert len(list(cache.glob("*.json"))) == kept


def test_the_share_of_the_processor() -> None:
    clocks = time.perf_counter(), time.process_time()
    time.sleep(0.1)
    assert selftest.processor_share(*clocks) < 0.5


def test_the_ratio_is_measured_once_for_a_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = use_times(monkeypatch, 2.0, 1.0)
    assert bf16_is_faster()
    (file,) = cache.iterdir()
    stored = json.loads(file.read_text())
    assert stored["fp32_over_bf16"] == 2.0
    assert stored["threads"] == torch.get_num_threads()
    assert ask_in_new_process()
    assert len(taken) == 2 * selftest.ROUNDS
    file.write_text(json.dumps({**stored, "fp32_over_bf16": 0.7}))
    assert not ask_in_new_process()  # it was read, not measured
    for name, value in (("cpu_name", lambda: "Another"), ("VERSION", selftest.VERSION + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(selftest, name, value)
            assert ask_in_new_process()
    assert len(list(cache.iterdir())) == 3


def test_the_first_answer_stands_within_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the number of threads changes, as it does in a process that is forked after a prediction."""
    taken = use_times(monkeypatch, 2.0, 1.0)
    assert bf16_is_faster()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert bf16_is_faster()
    assert len(taken) == 2 * selftest.ROUNDS


def test_an_unclear_result_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_times(monkeypatch, 2.0, 1.0, 1.0, 2.0)
    bf16_is_faster()
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"fp32_over_bf16": 0.1}', b"null"],
    ids=["empty", "cut", "list", "not text", "about nothing", "null"],
)
def test_a_damaged_file_is_measured_again(content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_times(monkeypatch, 2.0, 1.0)
    assert bf16_is_faster()
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(content)
    assert ask_in_new_process()
    assert file.read_bytes() == good


@pytest.mark.parametrize("ratio", ['"2"', "NaN", "-3", "0", "Infinity", "true", "null"])
def test_a_ratio_that_is_none_is_measured_again(ratio: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = use_times(monkeypatch, 1.0, 1.0)
    assert not bf16_is_faster()
    (file,) = cache.iterdir()
    file.write_text(file.read_text().replace("1.0\n", f"{ratio}\n"))
    assert not ask_in_new_process()
    assert len(taken) == 4 * selftest.ROUNDS


def test_without_a_writable_folder_it_is_measured_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = use_times(monkeypatch, 2.0, 1.0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MVISION_CACHE", str(tmp_path / "file" / "folder"))
    assert bf16_is_faster()
    assert ask_in_new_process()
    monkeypatch.delenv("MVISION_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert ask_in_new_process()
    assert len(taken) == 6 * selftest.ROUNDS


@pytest.mark.parametrize("packed", [True, False])
def test_the_measured_piece_runs_and_leaves_the_random_numbers(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        monkeypatch.setattr(selftest, "has_packed_convolutions", lambda: False)
    monkeypatch.setattr(selftest, "SECONDS", 0.0)
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(selftest.measure()) == selftest.FEWEST_ROUNDS
    assert torch.equal(torch.get_rng_state(), before)
    for dtype in (torch.float32, torch.bfloat16):
        output = selftest.block(dtype)()
        assert output.dtype == dtype
        assert output.isfinite().all()


def test_two_processes_at_once_leave_one_whole_file(cache: Path) -> None:
    code = (
        "import torch; torch.set_num_threads(1); from mvision.machine import selftest as s; "
        "s.has_packed_convolutions = lambda: False; s.seconds = lambda call: 1.0; "
        "s.processor_share = lambda *clocks: 1.0; print(s.bf16_is_faster())"
    )
    environment = {**os.environ, "MVISION_CACHE": str(cache)}
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.communicate()[0].split() for process in started] == [[b"False"]] * 2
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["fp32_over_bf16"] == 1.0

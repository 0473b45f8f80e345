"""Training by torchrun: two agents, as on two machines, meet by rendezvous, and what is left when one is lost.

The agents and their workers are forks of one process that has imported everything; all else is torchrun's own: its
rendezvous, the environment of the workers, and how it passes signals on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mvision.config import Config
from mvision.data.loading.workers import worker_context
from mvision.engine.state import read_state
from mvision.storage.run_folder import RunFolder
from tests.conftest import write_squares
from tests.small_runs import fast_config

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
EPOCHS, BATCHES = 2, 4
Launch = Callable[..., list[str]]


def worker(folder: Path, resume: bool, fault: str) -> None:
    """``mvision train`` as a process of torchrun's.

    Args:
        fault: in the second batch of the second epoch, ``kill`` ends the second process as a lost machine does, or
            ``term`` sends SIGTERM to the agents of both.
    """
    rank = int(os.environ["RANK"])
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    from mvision.cli.main import main
    from mvision.engine import checkpoint, train
    from mvision.engine import epoch as engine

    # Most of the time of such short runs: pictures, and the comparison with all published architectures.
    checkpoint.plot_run = train.write_curves = train.write_prediction_grid = lambda *_, **__: None
    train.published_start = lambda *_, **__: None
    forward, calls = engine._forward, []

    def faulty(trainer: Any, batch: Any) -> Any:
        calls.append(None)
        if fault and len(calls) == BATCHES + 2:
            if fault == "kill" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "term":
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(0.5)  # torchrun passes it on
        return forward(trainer, batch)

    engine._forward = faulty
    run = str(folder / "run")
    begin = ["--resume", run] if resume else ["--config", str(folder / "config.yaml"), "--output", run]
    main(["train", *begin, "--device", "cpu"])


def agent(folder: Path, port: int, resume: bool, fault: str) -> None:
    """torchrun on one machine of two, with one process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    log = os.open(folder / "agents", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    place = f"127.0.0.1:{port}"
    config = LaunchConfig(
        *(2, 2, 1), run_id="test", rdzv_backend="c10d", rdzv_endpoint=place, start_method="fork", max_restarts=0,
        monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, worker)(folder, resume, fault)
    sys.exit(0)


def start_agents(connection: Connection) -> None:
    """Start two agents for each request, and answer which of them have ended by themselves."""
    context: Any = multiprocessing.get_context("fork")
    while (given := connection.recv()) is not None:
        agents = [context.Process(target=agent, args=given) for _ in range(2)]
        for one in agents:
            one.start()
        end = time.monotonic() + 240
        for one in agents:
            one.join(max(end - time.monotonic(), 0))
        connection.send([one.exitcode is not None for one in agents])
        for one in agents:
            one.kill()


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Trains by two agents; returns what the two processes printed."""
    context: Any = worker_context()
    here, there = context.Pipe()
    starter = context.Process(target=start_agents, args=(there,))
    starter.start()

    def both(folder: Path, config: Config, resume: bool = False, fault: str = "") -> list[str]:
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(config.to_yaml())
        for rank in range(2):
            (folder / f"log{rank}").write_text("")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        here.send((folder, port, resume, fault))
        ended = here.recv()
        printed = [(folder / f"log{rank}").read_text() for rank in range(2)]
        assert ended == [True, True], (printed, (folder / "agents").read_text())
        return printed

    yield both
    here.send(None)
    starter.join()


@pytest.fixture(scope="module")
def config_and_whole_run(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    folder = tmp_path_factory.mktemp("torchrun")
    config = fast_config(write_squares(folder / "data", images=2 * BATCHES), train__epochs=EPOCHS)
    printed = launch(folder / "whole", config)
    assert "Traceback" not in "".join(printed), printed
    return config, folder / "whole" / "run"


def assert_same_ends(run: Path, whole: Path) -> None:
    assert read_state(RunFolder(run).state).progress.epoch == EPOCHS
    for file in ("best.safetensors", "last/state.safetensors"):
        ours, theirs = load_file(run / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    records: Callable[[Path], list[Any]] = lambda path: [{**one, "seconds": 0} for one in RunFolder(path).records()]  # noqa: E731
    assert records(run) == records(whole)


def test_two_machines_meet_and_train(config_and_whole_run: tuple[Config, Path]) -> None:
    _, whole = config_and_whole_run
    saved = read_state(RunFolder(whole).state)
    assert (saved.progress.epoch, saved.progress.step) == (EPOCHS, EPOCHS * BATCHES)
    assert len(saved.random) == 2  # both processes trained in this run


def test_a_machine_that_is_lost_inside_an_epoch_costs_this_epoch_only(
    launch: Launch, config_and_whole_run: tuple[Config, Path], tmp_path: Path
) -> None:
    config, whole = config_and_whole_run
    printed = launch(tmp_path, config, fault="kill")
    progress = read_state(RunFolder(tmp_path / "run").state).progress
    assert (progress.epoch, progress.batch) == (1, 0)
    assert "Traceback" not in "".join(printed), printed
    printed = launch(tmp_path, config, resume=True)
    assert "resumed after 1 epoch" in printed[0]
    assert_same_ends(tmp_path / "run", whole)


def test_sigterm_to_torchrun_saves_inside_the_epoch(
    launch: Launch, config_and_whole_run: tuple[Config, Path], tmp_path: Path
) -> None:
    """It comes to both agents at about the same time, as from a scheduler that ends a job."""
    config, whole = config_and_whole_run
    printed = launch(tmp_path, config, fault="term")
    progress = read_state(RunFolder(tmp_path / "run").state).progress
    assert progress.epoch == 1
    assert progress.batch in (2, 3)  # the second of its batches, or one more until all know of it
    assert all("stopped by SIGTERM; go on with: mvision train --resume" in text for text in printed), printed
    assert "Traceback" not in "".join(printed)
    assert "resumed after 1 epoch and" in launch(tmp_path, config, resume=True)[0]
    assert_same_ends(tmp_path / "run", whole)

"""A training by several processes: what happens to the others when one ends, and data that they cannot share evenly."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvision.commands.val import validate
from mvision.config import Config, DecidedTrain, load_config
from mvision.data.loading.workers import worker_context
from mvision.engine.state import read_state
from mvision.storage.run_folder import RunFolder
from tests.conftest import write_squares
from tests.small_runs import FAST, add_corners, fast_config

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

HEAD = FAST["model.heads.detection"]
UNION = {"box_refinement": "distribution", "shared_matches": True}
HEADS: dict[str, dict[str, Any]] = {
    "detection": HEAD,
    "instance-seg": {**HEAD, "pixel_dim": 16, "mask_dim": 8, "mask_points": 64},
    "keypoints": {"embed_dim": 16},
    "semantic-seg": {},
}


def process(rank: int, size: int, port: int, folder: Path, change: str) -> None:
    """``mvision train`` as one of several processes.

    Args:
        change: number 1 is ``killed``, ``stopped`` or has an ``error`` before its second epoch; or ``plain descent``
            without Adam and batch norms.
    """
    # Without torchrun, which would end the others by itself after it has seen one fail.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in address.items()} if size > 1 else {}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # the server that starts this process blocks it
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    from mvision.backbone import freeze
    from mvision.cli.main import run
    from mvision.engine import train as engine
    from mvision.errors import UserError

    train_epoch = engine.train_epoch

    def faulty(trainer: Any, loader: Any, epoch: int) -> dict[str, float]:
        if epoch == 1 and rank == 1 and change == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if epoch == 1 and rank == 1 and change == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        if epoch == 1 and rank == 1 and change == "error":
            raise UserError("the disk of this machine is full")
        return train_epoch(trainer, loader, epoch)

    def plain_descent(model: torch.nn.Module, config: DecidedTrain) -> torch.optim.Optimizer:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                freeze(module)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD([{"params": parameters, "lr": config.lr, "peak_lr": config.lr}], fused=True)

    engine.train_epoch = faulty
    if change == "plain descent":
        engine.build_optimizer = plain_descent
    sys.exit(
        run(["train", "--config", str(folder / "config.yaml"), "--output", str(folder / "run"), "--device", "cpu"])
    )


def launch(folder: Path, config: Config, size: int = 2, change: str = "") -> tuple[list[int | None], list[str]]:
    """The exit codes of ``size`` processes, and what each of them printed."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forks of a process that has torch imported.
    context: Any = worker_context()
    processes = [context.Process(target=process, args=(rank, size, port, folder, change)) for rank in range(size)]
    end = time.monotonic() + 60
    for one in processes:
        one.start()
    for one in processes:
        one.join(max(end - time.monotonic(), 0))
    codes = [one.exitcode for one in processes]
    for one in processes:
        one.kill()
    return codes, [(folder / f"log{rank}").read_text() for rank in range(size)]


def leave(root: Path, split: str, images: int, labelled: int) -> None:
    """Keep the first images of a split, with the objects of the first ``labelled`` of them."""
    file = root / "annotations" / f"{split}.json"
    content = json.loads(file.read_text())
    content["images"] = content["images"][:images]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] <= labelled]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("fault", ["killed", "error"])
def test_the_end_of_one_process_ends_the_others_in_a_line(tmp_path: Path, fault: str) -> None:
    data = write_squares(tmp_path / "data")
    leave(data, "train", images=1, labelled=1)  # which both of them train on
    settings = {"train__epochs": 3, "model__image_size": 96}
    codes, printed = launch(tmp_path / "runs", fast_config(data, **settings), change=fault)
    assert codes == [2, -signal.SIGKILL if fault == "killed" else 2]
    (line,) = [line for line in printed[0].splitlines() if line.startswith("error: ")]
    assert "another process of this training has ended" in line
    assert "--resume" in line
    assert "Traceback" not in printed[0] + printed[1]
    if fault == "error":
        assert "error: the disk of this machine is full" in printed[1]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    """The others learn of it one step later, and none waits for it."""
    config = fast_config(write_squares(tmp_path / "data", images=10), train__epochs=3)
    codes, printed = launch(tmp_path / "runs", config, change="stopped")
    assert codes == [143, 143], printed
    progress = read_state(RunFolder(tmp_path / "runs" / "run").state).progress
    assert (progress.epoch, progress.batch, progress.step) == (1, 2, 7)
    assert "--resume" in printed[0]


def test_all_tasks_with_images_and_objects_for_one_process_only(tmp_path: Path) -> None:
    """Three images to train on, one of them with objects, and one to evaluate. The figures are those of one process."""
    data = write_squares(tmp_path / "data")
    add_corners(data)
    leave(data, "train", images=3, labelled=1)
    leave(data, "val", images=1, labelled=1)
    common = {key: value for key, value in FAST.items() if "heads" not in key}
    heads = {f"model.heads.{task}": settings for task, settings in HEADS.items()}
    config = load_config(
        "tiny", tasks=list(HEADS), overrides={**common, **heads, "data.root": str(data), "train.epochs": 2}
    )
    codes, printed = launch(tmp_path / "runs", config)
    assert codes == [0, 0], printed
    run = tmp_path / "runs" / "run"
    validate(str(run), data=str(data), output=tmp_path / "val", device="cpu", workers=0)
    assert json.loads((tmp_path / "val" / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same weights after four steps, and so the same figures: losses are divided by the objects of all processes.

    Box losses of the union of the matches and of distributions have divisors of their own.

    Batch norms are frozen, which on CPUs each process has for itself; the denoising noise is off, which each process
    draws for its own images; and so is Adam, which makes a whole step of a gradient that is only rounding.
    """
    data = write_squares(tmp_path / "data", objects=3)
    leave(data, "train", images=4, labelled=3)
    settings = {"train__epochs": 2, "train__ema_decay": 0, "train__lr": 0.05}
    config = fast_config(data, **settings, model__heads__detection={**HEAD, **UNION, "num_denoising": 0})
    weights, figures = [], []
    for size in (1, 2):
        codes, printed = launch(tmp_path / str(size), config, size, "plain descent")
        assert codes == [0] * size, printed
        run = tmp_path / str(size) / "run"
        weights.append(load_file(run / "best.safetensors"))
        figures.append([json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=1e-5, msg=name)
    for one, two in zip(*figures, strict=True):
        assert two["detection"] == pytest.approx(one["detection"], abs=1e-6)

"""A prediction from what the user named, and what follows where something was not: the newest run, sample images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mvision.config import DataConfig, config_of_run
from mvision.data import CocoSplit, find_layout
from mvision.deploy.runtimes import Chosen, open_fastest
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.inference.output import Summary
from mvision.inference.predict import predict_sources
from mvision.machine import keep_freed_memory, resolve_device
from mvision.storage.run_folder import BEST

SAMPLES = 8
RUNS = Path("runs")


def predict_job(
    sources: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    weights: str | None = None,
    threshold: float = 0.5,
    output: Path | None = None,
    device: str | None = None,
    precision: Chosen = "auto",
    log: Callable[[str], None] = print,
) -> Summary:
    """Predict, and write pictures and ``predictions.json``.

    Args:
        sources: see ``find_sources``; none: the first validation images of the data that the weights were trained on
            if they lie in a run's folder, else of the built-in data set.
        tasks: which heads of the weights; none: all of them.
        weights: any source that ``mvision.load`` takes, or an exported model; None: the newest run of these tasks.
        threshold: the least score, 0..1.
        output: a folder, ``predictions`` by default.
        device: None is the first GPU, else the CPU.
        precision: see ``open_fastest``.
        log: gets the line that tells what the model runs in.

    Raises:
        UserError: no run to take the weights from, or anything wrong with sources, weights, device or folder.
    """
    for task in tasks:
        head_class(task)  # an unknown task is told before a missing run of it
    source = weights if weights is not None else str(newest_run(tasks))
    keep_freed_memory()
    chosen = resolve_device(device)
    model, road = open_fastest(source, tasks, chosen, precision)
    log(road)
    found = list(sources) or sample_images(source)
    return predict_sources(model, found, output or Path("predictions"), threshold=threshold)


def newest_run(tasks: Sequence[str] = (), runs: Path = RUNS) -> Path:
    """The run with the newest weights among those that have these tasks.

    Raises:
        UserError: there is none; the message tells how to get weights.
    """
    found = [best for best in runs.glob(f"*/*/{BEST}") if set(tasks) <= set(best.parent.parent.name.split("+"))]
    if not found:
        wanted = " ".join(f"--task {task}" for task in tasks or ("detection",))
        published = " or PekingU/rtdetr_r18vd" if set(tasks) <= {"detection"} else ""
        raise UserError(
            f"no run to predict with in {runs.resolve()}: train one with 'mvision train {wanted}', or give --weights, "
            f"such as a .safetensors file{published}"
        )
    return max(found, key=lambda best: best.stat().st_mtime).parent


def sample_images(weights: str, count: int = SAMPLES) -> list[str]:
    """Files of the first images of the validation split that belongs to the weights."""
    run = config_of_run(weights)
    data = run.data if run is not None else DataConfig()
    part = CocoSplit(find_layout(data.root).split(data.val))
    return [str(part.folder / record.file) for record in part.records[:count]]

"""``mvision predict``: by default with the newest run, on sample images of its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mvision.config import DataConfig, config_of_run
from mvision.data import CocoSplit, find_layout
from mvision.deploy.runtimes import open_fastest
from mvision.errors import UserError
from mvision.heads import head_class, known_tasks
from mvision.inference.output import Summary
from mvision.inference.predict_sources import predict_sources
from mvision.inference.sources import find_sources
from mvision.machine import InferencePrecisionOption, keep_freed_memory, resolve_device
from mvision.storage.run_folder import BEST
from mvision.weights import rtdetr

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
    precision: InferencePrecisionOption = "auto",
    log: Callable[[str], None] = print,
) -> Summary:
    """Predict, and write pictures and ``predictions.json``.

    Args:
        sources: see ``find_sources``; empty: the first validation images of the run that the weights lie in, else of
            the built-in data set.
        tasks: the tasks to run; empty: all that the weights have.
        weights: any source that ``mvision.load`` takes, or an exported model; None: the newest run with these tasks.
        threshold: the lowest score that is kept, 0..1.
        output: a folder; None: ``predictions``.
        device: None: the first GPU, else the CPU.
        precision: see ``open_fastest``.
        log: is called with the line that names the runtime.

    Raises:
        UserError: there is no run, or the sources, weights, device or folder cannot be used.
    """
    for task in tasks:
        head_class(task)  # report an unknown task, not that it has no run
    if sources:
        find_sources(sources, leave_out=output)  # report a missing file before the model is loaded
    source = weights if weights is not None else str(newest_run(tasks))
    keep_freed_memory()
    model, runtime = open_fastest(source, tasks, resolve_device(device), precision)
    log(runtime)
    images = list(sources) or sample_images(source)
    return predict_sources(model, images, output or Path("predictions"), threshold=threshold)


def newest_run(tasks: Sequence[str] = (), runs: Path = RUNS) -> Path:
    """The run with the newest weights among those whose folder names all of these tasks.

    Raises:
        UserError: there is no such run.
    """
    weights = [best for best in runs.glob(f"*/*/{BEST}") if set(tasks) <= set(best.parent.parent.name.split("+"))]
    if not weights:
        wanted = " ".join(f"--task {task}" for task in tasks or known_tasks()[:1])
        published = f" or {rtdetr.EXAMPLE}" if set(tasks) <= {rtdetr.TASK} else ""
        raise UserError(
            f"no run to predict with in {runs.resolve()}: train one with 'mvision train {wanted}', or give --weights, "
            f"such as a .safetensors file{published}"
        )
    return max(weights, key=lambda best: best.stat().st_mtime).parent


def sample_images(weights: str, count: int = SAMPLES) -> list[str]:
    """Files of the first validation images of the run that the weights lie in, else of the built-in data set."""
    run = config_of_run(weights)
    data = run.data if run is not None else DataConfig()
    part = CocoSplit(find_layout(data.root).split(data.val))
    return [str(part.folder / record.file) for record in part.records[:count]]

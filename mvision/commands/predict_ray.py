"""``mvision predict --engine ray``: predictions on any number of pictures by Ray Data, as shards."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvision.commands.predict import about_results, newest_run
from mvision.deploy.loading import load
from mvision.deploy.portable import PortableModel, portable
from mvision.deploy.ray_actor import ActorSettings, PredictStage
from mvision.deploy.ray_session import (
    READ_CPUS,
    WRITE_CPUS,
    Actors,
    choose_actors,
    ray_session,
    require_ray,
    user_error_in,
)
from mvision.errors import Stopped, UserError, printable
from mvision.heads import head_class
from mvision.inference.output import file_names
from mvision.inference.remote_sources import find_pictures
from mvision.inference.selection import AskedThreshold, Selection, resolve_threshold, without_best
from mvision.inference.shard_stages import input_blocks, read_stage, rows_per_block, write_stage
from mvision.inference.shards import ShardFolder, ShardFormat, ShardPlan
from mvision.inference.sources import Sources
from mvision.inference.summary import Summary
from mvision.machine import PrecisionOption
from mvision.storage.urls import scheme_of

SHARD_SIZE = 1000


@dataclass
class ShardSummary(Summary):
    """What ``predict_ray_job`` did; its counts are of the shards that this call has written.

    Attributes:
        folder: the folder of the shards.
        written, complete: number of shards that were written, and that were there before.
        errors: number of pictures that cannot be read.
    """

    folder: str = ""
    written: int = 0
    complete: int = 0
    errors: int = 0

    def __str__(self) -> str:
        lines = super().__str__().splitlines()[:-1]
        if self.errors:
            what = "picture" if self.errors == 1 else "pictures"
            lines.append(f"{self.errors} {what} cannot be read; each has a row with its error")
        before = f", {self.complete} were complete before" if self.complete else ""
        return "\n".join([*lines, printable(f"{self.written} shards written{before}: {self.folder}")])


def predict_ray_job(
    sources: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    weights: str | None = None,
    family: str | None = None,
    threshold: AskedThreshold | None = None,
    multi_label: bool = False,
    nms: float | None = None,
    output: str | None = None,
    device: str | None = None,
    precision: PrecisionOption = "auto",
    batch_size: int | None = None,
    actors: int | None = None,
    format: ShardFormat = "parquet",
    shard_size: int | None = None,
    log: Callable[[str], None] = print,
) -> ShardSummary:
    """Predict on pictures, and write shards of the entries that ``predictions.json`` would have.

    A second call with the same arguments makes the shards that are missing.

    Args:
        sources: pictures, folders and globs, on disk (of every machine of the cluster) or behind URLs.
        tasks, weights, family, threshold, multi_label, nms: see ``predict_job``.
        output: a folder or a URL; None: ``predictions``.
        device: ``cpu`` or ``cuda``; None: GPUs where the cluster has some.
        precision: see ``portable``.
        batch_size: pictures in a forward pass; None: 1 on a CPU, else 8.
        actors: how many hold the model; None: see ``choose_actors``.
        format: of the shards.
        shard_size: pictures in a shard; None: 1000.
        log: is called with what names the runtime and the actors, and with what plain prediction says of the results.

    Raises:
        UserError: a missing package, sources, weights, device or folder that cannot be used, or a folder with shards of
            something else.
        Stopped: by Ctrl-C or SIGTERM; the shards that are complete stay.
    """
    require_ray()
    for task in tasks:
        head_class(task)  # report an unknown task, not that it has no run
    if not sources:
        raise UserError("--engine ray: no SOURCE; name pictures, folders, globs or URLs of them")
    Selection(without_best(threshold), multi_label, nms)  # mistakes are reported before the model is opened
    source = str(newest_run(tasks)) if weights is None else weights
    folder = ShardFolder(output or "predictions")
    found = find_pictures(sources, None if scheme_of(folder.place) else Path(folder.place))
    loaded = load(source, list(tasks) or None, family=family)
    chosen = Selection(resolve_threshold(threshold, loaded), multi_label, nms)
    chosen.check(loaded.config.categories)
    with _stopped_in_a_line(folder), ray_session():
        on_cpu = choose_actors(device, actors, own_threads=False).device == "cpu"
        model, runtime = portable(loaded, source, tasks, on_cpu, precision, family)
        many = choose_actors("cpu" if model.own_threads else device, actors, model.own_threads)
        plan = _plan(found, model, chosen, format, shard_size or SHARD_SIZE)
        where = f"{many.count} actor{'s' * (many.count > 1)} of Ray on {many.device}, {plan.count} shards"
        log("\n".join([f"{runtime}; {where}", *about_results(threshold, chosen, loaded)]))
        return _predict(found, plan, folder, model, many, ActorSettings(many.device, many.threads, batch_size, chosen))


def _predict(
    found: Sources,
    plan: ShardPlan,
    folder: ShardFolder,
    model: PortableModel,
    actors: Actors,
    settings: ActorSettings,
) -> ShardSummary:
    missing = folder.prepare(plan)
    summary = ShardSummary(Path(folder.place), folder=folder.shown, complete=plan.count - len(missing))
    summary.skipped += found.skipped
    summary.notes += found.notes()
    started = time.monotonic()
    for written in _shards(found, missing, plan, folder, model, actors, settings):
        _add(summary, written)
    summary.seconds = time.monotonic() - started
    return summary


def _plan(found: Sources, model: PortableModel, chosen: Selection, format: ShardFormat, shard_size: int) -> ShardPlan:
    """What the shards are of. The numbers of actors and of pictures in a forward pass are not part of it."""
    digest = hashlib.sha256()
    names = file_names(found)
    for source in found:
        path = source.path if scheme_of(source.path) else str(Path(source.path).absolute())
        digest.update(f"{path}\0{names[source]}\n".encode(errors="surrogateescape"))
    threshold = dict(chosen.threshold) if isinstance(chosen.threshold, Mapping) else chosen.threshold
    settings = {
        "--task": list(model.tasks),
        "--threshold": threshold,
        "--multi-label": chosen.multi_label,
        "--nms": chosen.nms,
        "--precision": model.precision,
    }
    return ShardPlan(model.digest, digest.hexdigest(), settings, len(found), shard_size, format)


def _shards(
    found: Sources,
    missing: Sequence[int],
    plan: ShardPlan,
    folder: ShardFolder,
    model: PortableModel,
    actors: Actors,
    settings: ActorSettings,
) -> Iterator[dict[str, Any]]:
    """Make the missing shards; yields the row of ``write_stage`` for each when it is written."""
    if not missing:
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # so that the rows of a shard come one after the other
    size, rows = model.config.image_size, rows_per_block(model.config.image_size)
    names = file_names(found)
    blocks = input_blocks(plan, missing, [one.path for one in found], [names[one] for one in found], rows)
    with DataContext.current(context):
        data = ray.data.from_arrow(blocks)
        data = data.map_batches(
            read_stage,
            fn_kwargs={"size": size, "pixel_range": model.config.pixel_range},
            batch_size=None,
            num_cpus=READ_CPUS,
        )
        data = data.map_batches(
            PredictStage,
            fn_constructor_args=(ray.put(model), settings),
            batch_size=None,
            compute=ActorPoolStrategy(size=actors.count),
            num_cpus=actors.cpus,
            num_gpus=actors.gpus or None,
        )
        # Blocks do not go across the borders of shards, so each batch of this size is a shard.
        data = data.map_batches(
            write_stage, fn_kwargs={"folder": folder, "plan": plan}, batch_size=plan.shard_size, num_cpus=WRITE_CPUS
        )
        total = sum(len(plan.pictures(shard)) for shard in missing)
        with tqdm(total=total, desc="predicting", unit="img", disable=None, leave=False) as bar:
            for row in data.iter_rows():
                bar.update(len(plan.pictures(int(row["shard"]))))
                yield row


def _add(summary: ShardSummary, row: dict[str, Any]) -> None:
    errors = [(str(name), str(reason)) for name, reason in json.loads(row["errors"])]
    summary.written += 1
    summary.images += int(row["images"])
    summary.errors += len(errors)
    summary.skipped += errors
    summary.instances.update(json.loads(row["instances"]))
    summary.regions.update(json.loads(row["regions"]))
    summary.remarks.update(Counter(json.loads(row["notes"])))


@contextmanager
def _stopped_in_a_line(folder: ShardFolder) -> Iterator[None]:
    """Errors of tasks and actors as the line that they are about; and how to go on after Ctrl-C and SIGTERM."""
    try:
        yield
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        raise Stopped(
            number, f"complete shards stay in {folder.shown}; the same command goes on with the others"
        ) from None
    except UserError:
        raise
    except Exception as error:
        line = user_error_in(error)
        if line is None:
            raise
        raise line from error

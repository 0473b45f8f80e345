"""The stages of a prediction on Ray Data: read on CPUs, predict by actors that hold the model, write shards.

Rows are pictures. Between the stages they have fixed columns: what was found travels as JSON, so that a block of
pictures without results has the same types as any other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mvision.errors import UserError
from mvision.inference.output import result_values
from mvision.inference.predict import eval_mode, infer
from mvision.inference.remote_sources import read_inputs
from mvision.inference.selection import Selection
from mvision.inference.shards import ShardFolder, ShardPlan, encode_rows
from mvision.machine import keep_freed_memory
from mvision.structures import Instances
from mvision.structures.images import PixelRange
from mvision.structures.messages import decoder_messages_hidden

if TYPE_CHECKING:
    import ray

BLOCK_BYTES = 16 << 20  # of the model's inputs that are read together and sent to an actor
BLOCK_ROWS = 128
Columns = dict[str, Any]


def rows_per_block(image_size: tuple[int, int]) -> int:
    """Pictures that are read together, so that a block of them stays small next to Ray's object store."""
    return int(np.clip(BLOCK_BYTES // (3 * image_size[0] * image_size[1]), 4, BLOCK_ROWS))


def read_stage(batch: Columns, size: tuple[int, int], pixel_range: PixelRange | None) -> Columns:
    """Pictures at the model's input size.

    Args:
        batch: ``number`` of each picture, its ``path`` and its ``name`` in the results.
        size: (height, width) of the input.

    Returns:
        ``number``, ``name``, ``image`` (B, h, w, 3) uint8, ``height`` and ``width`` of the picture, ``problem`` why
        it cannot be read (then its image is black), ``notes`` as JSON.
    """
    with decoder_messages_hidden():
        frames = read_inputs([str(path) for path in batch["path"]], size, pixel_range)
    black = np.zeros((*size, 3), np.uint8)
    return {
        "number": batch["number"],
        "name": batch["name"],
        "image": np.stack([black if frame.model_input is None else frame.model_input for frame in frames]),
        "height": np.array([frame.size[0] for frame in frames]),
        "width": np.array([frame.size[1] for frame in frames]),
        "problem": np.array([frame.problem for frame in frames], dtype=object),
        "notes": np.array([json.dumps(frame.notes) for frame in frames], dtype=object),
    }


@dataclass(frozen=True)
class ActorSettings:
    """How an actor computes.

    Attributes:
        device: of PyTorch; with a GPU the only one that Ray shows to the actor.
        threads: of PyTorch on a CPU.
        batch_size: pictures in a forward pass; None: 1 on a CPU, else 8.
        chosen: which results are kept.
    """

    device: str
    threads: int
    batch_size: int | None
    chosen: Selection


class PredictStage:
    """An actor: it opens the model once, and predicts on batches."""

    def __init__(self, model: ray.ObjectRef[Any], settings: ActorSettings) -> None:
        """Open the model.

        Args:
            model: a ``PortableModel`` in Ray's object store, where all actors of a machine share it.
        """
        import ray

        keep_freed_memory()
        torch.set_num_threads(settings.threads)
        device = torch.device(settings.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU on a machine of the cluster that Ray says has one")
        self.model = ray.get(model).open(device)
        self.settings = settings

    def __call__(self, batch: Columns) -> Columns:
        """``number``, ``problem`` and ``notes`` as they came, and ``rows``: the entries of each picture as JSON."""
        columns = zip(batch["number"], batch["image"], batch["height"], batch["width"], batch["problem"])
        prepared = [
            (int(number), None if problem else np.require(image, requirements=["C", "W"]), (int(height), int(width)))
            for number, image, height, width, problem in columns
        ]
        with eval_mode(self.model):
            results = infer(self.model, prepared, [self.settings.chosen], self.settings.batch_size, len(prepared))
            found = {number: None if each is None else each[0] for number, each in results}
        rows = [
            _rows(int(number), str(name), found[int(number)], str(problem))
            for number, name, problem in zip(batch["number"], batch["name"], batch["problem"])
        ]
        return {
            "number": batch["number"],
            "rows": np.array([json.dumps(each) for each in rows], dtype=object),
            "problem": batch["problem"],
            "notes": batch["notes"],
        }


def _rows(number: int, name: str, found: Instances | None, problem: str) -> list[dict[str, Any]]:
    """The rows of a picture in its shard; pictures are numbered from 1 there, as in ``predictions.json``."""
    where: dict[str, Any] = {"image_id": number + 1, "file_name": name}
    if found is None:
        return [{**where, "error": problem}]
    names = found.class_names + ([] if found.regions is None else found.regions.class_names)
    return [
        {**where, "category_id": entry["category_id"], "category_name": category, **result_values(entry)}
        for entry, category in zip(found.to_coco(number + 1), names, strict=True)
    ]


def write_stage(batch: Columns, folder: ShardFolder, plan: ShardPlan) -> Columns:
    """Write one shard.

    Args:
        batch: the pictures of exactly one shard, in their order.

    Returns:
        One row: ``shard``, ``images`` that were predicted on, and as JSON ``instances`` and ``regions`` by class,
        ``errors`` ((name, reason) of each) and ``notes``.
    """
    numbers = [int(number) for number in batch["number"]]
    shard = numbers[0] // plan.shard_size
    if numbers != list(plan.pictures(shard)):
        raise AssertionError(f"a block of {len(numbers)} pictures from {numbers[0]} on is not shard {shard}")
    rows = [row for text in batch["rows"] for row in json.loads(text)]
    folder.write(plan.name(shard), encode_rows(rows, plan.format))
    errors = [(row["file_name"], row["error"]) for row in rows if "error" in row]
    found = [row for row in rows if "error" not in row]
    return {
        "shard": [shard],
        "images": [len(numbers) - len(errors)],
        "instances": [_counted(row["category_name"] for row in found if not row.get("region"))],
        "regions": [_counted(row["category_name"] for row in found if row.get("region"))],
        "errors": [json.dumps(errors)],
        "notes": [_counted(note for text in batch["notes"] for note in json.loads(text))],
    }


def _counted(names: Iterator[str]) -> str:
    return json.dumps(Counter(names))


def input_blocks(
    plan: ShardPlan, shards: Sequence[int], paths: Sequence[str], names: Sequence[str], rows: int
) -> list[Any]:
    """Arrow tables of up to ``rows`` pictures of one shard each: what ``read_stage`` takes.

    Args:
        shards: the numbers of those to make.
        paths, names: of all pictures.
    """
    import pyarrow

    tables = []
    for shard in shards:
        pictures = plan.pictures(shard)
        for part in (pictures[start : start + rows] for start in range(0, len(pictures), rows)):
            columns = {
                "number": pyarrow.array(part, pyarrow.int64()),
                "path": pyarrow.array(paths[part.start : part.stop], pyarrow.string()),
                "name": pyarrow.array(names[part.start : part.stop], pyarrow.string()),
            }
            tables.append(pyarrow.table(columns))
    return tables

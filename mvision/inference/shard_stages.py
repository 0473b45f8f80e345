"""The stages of a prediction by many processes that need no model: reading pictures, and writing shards.

They run in processes of their own, on CPUs. Rows are pictures. Between the stages they have fixed columns: what was
found travels as JSON, so that a block of pictures without results has the same types as any other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mvision.inference.remote_sources import read_inputs
from mvision.inference.shards import ShardFolder, ShardPlan, encode_rows
from mvision.structures.images import PixelRange
from mvision.structures.messages import decoder_messages_hidden

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

"""Predictions on many pictures as shards: files of equal numbers of pictures, and which of them are complete.

A shard holds the entries that ``predictions.json`` has of its pictures, one a row, and a row with an ``error`` for each
picture that cannot be read. Which pictures belong to it follows from its number, so a shard that is made a second time
is the same file. It appears under its name only when it is complete; a run that was broken off goes on with those that
are missing.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mvision.errors import UserError
from mvision.inference.streams import hide_password
from mvision.storage.atomic import remove_partial_files, whole_file
from mvision.storage.urls import open_url, remote_errors, scheme_of

if TYPE_CHECKING:
    import pyarrow

ShardFormat = Literal["parquet", "jsonl"]
PLAN = "_predictions.json"
"""What the shards of a folder are of. Readers of Parquet folders leave out names that begin with an underscore."""
WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2", "hf", "memory"})
"""Stores in which an object appears once it is complete. On others a shard is written beside its name and moved."""


@dataclass(frozen=True)
class ShardPlan:
    """What the shards of a folder are made of; written beside them, and compared before a run goes on.

    Attributes:
        model: a digest of weights and config.
        source: a digest of the names of the pictures, in order.
        settings: all else that decides on the results, by option.
        images: number of pictures.
        shard_size: pictures in a shard; the last one may have fewer.
        format: of the shards.
    """

    model: str
    source: str
    settings: dict[str, Any]
    images: int
    shard_size: int
    format: ShardFormat

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)

    def name(self, number: int) -> str:
        """The file of a shard; ``number`` counts from 0."""
        return f"part-{number:05d}-of-{self.count:05d}.{self.format}"

    def pictures(self, number: int) -> range:
        """The positions of a shard's pictures among all."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.images))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What another plan has otherwise, in words."""
        ours = asdict(self)
        named = {"model": "another model", "source": "other sources", "images": "other sources"}
        lines = [named[key] for key in ("model", "source", "images") if other.get(key) != ours[key]]
        for option, key in {"--shard-size": "shard_size", "--format": "format"}.items():
            lines += [f"{option} {other.get(key)} and not {ours[key]}"] if other.get(key) != ours[key] else []
        theirs = other.get("settings")
        theirs = theirs if isinstance(theirs, dict) else {}
        lines += [
            f"{key} {theirs.get(key)} and not {own}" for key, own in self.settings.items() if theirs.get(key) != own
        ]
        return list(dict.fromkeys(lines))


@dataclass(frozen=True)
class ShardFolder:
    """The folder of shards: on disk, or behind a URL. It can be sent to other processes.

    Attributes:
        place: a path or a URL.
    """

    place: str

    @property
    def is_local(self) -> bool:
        """Whether it is on disk."""
        return scheme_of(self.place) in ("", "file", "local")

    @cached_property
    def shown(self) -> str:
        """The place for messages, without a password."""
        return hide_password(self.place)

    def prepare(self, plan: ShardPlan) -> list[int]:
        """The numbers of the shards that are missing; the plan is written where there is none yet.

        Raises:
            UserError: the folder cannot be written, or has shards of another plan.
        """
        if self.is_local:
            folder = Path(self._local)
            with self._errors():
                folder.mkdir(parents=True, exist_ok=True)
                remove_partial_files(folder)
        names = self.names()
        shards = {name for name in names if name.startswith("part-")}
        if PLAN in names:
            self._compare(plan, bool(shards))
        elif shards:
            raise UserError(
                f"--output {self.shown}: {len(shards)} shards and no {PLAN} that says of what; choose another folder"
            )
        self.write(PLAN, (json.dumps(asdict(plan), indent=1) + "\n").encode())
        return [number for number in range(plan.count) if plan.name(number) not in shards]

    def _compare(self, plan: ShardPlan, has_shards: bool) -> None:
        try:
            there = json.loads(self._read(PLAN))
        except ValueError:
            there = None
        if not isinstance(there, dict):
            raise UserError(f"--output {self.shown}: its {PLAN} is damaged; choose another folder")
        differences = plan.differences(there)
        if differences and has_shards:
            raise UserError(
                f"--output {self.shown}: has shards of {' and of '.join(differences)}; choose another folder, or "
                "give what they were made with to go on"
            )

    def names(self) -> set[str]:
        """The names of the files in it; none where it is not there."""
        with self._errors():
            if self.is_local:
                folder = Path(self._local)
                return {file.name for file in folder.iterdir()} if folder.is_dir() else set()
            file_system, path = open_url(self.place, "--output")
            file_system.invalidate_cache()  # fsspec remembers what it has listed before
            try:
                return {str(name).rpartition("/")[2] for name in file_system.ls(path, detail=False)}
            except FileNotFoundError:
                return set()

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that it has its name only once it is complete.

        Raises:
            UserError: it cannot be written.
        """
        with self._errors():
            if self.is_local:
                with whole_file(Path(self._local) / name) as temporary:
                    temporary.write_bytes(content)
                return
            file_system, path = open_url(self.place, "--output")
            target = f"{path.rstrip('/')}/{name}"
            if scheme_of(self.place) in WHOLE_OBJECTS:
                file_system.pipe_file(target, content)
                return
            file_system.makedirs(path, exist_ok=True)
            partial = f"{path.rstrip('/')}/_{name}.{os.getpid()}.partial"
            file_system.pipe_file(partial, content)
            file_system.mv(partial, target)

    def _read(self, name: str) -> bytes:
        with self._errors():
            if self.is_local:
                return (Path(self._local) / name).read_bytes()
            file_system, path = open_url(self.place, "--output")
            return bytes(file_system.cat_file(f"{path.rstrip('/')}/{name}"))

    @property
    def _local(self) -> str:
        return self.place.partition("://")[2] if scheme_of(self.place) else self.place

    def _errors(self) -> AbstractContextManager[None]:
        return remote_errors("--output", self.shown)


def encode_rows(rows: Sequence[dict[str, Any]], format: ShardFormat) -> bytes:
    """The content of a shard, of entries of ``predictions.json`` and rows with an ``error``."""
    if format == "jsonl":
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    import pyarrow
    import pyarrow.parquet

    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), row_schema()), content)
    return content.getvalue()


def row_schema() -> pyarrow.Schema:
    """The columns of every Parquet shard: the keys of ``predictions.json``, and ``error``.

    ``bbox`` is x, y, width, height in pixels of the picture; ``segmentation`` run lengths of COCO; ``keypoints`` x, y
    and score of each point; ``region`` is true for the regions of semantic segmentation. What a result does not have is
    null, and in the row of a picture that cannot be read all is null but its number, name and ``error``.
    """
    import pyarrow

    numbers = pyarrow.list_(pyarrow.float64())
    run_lengths = pyarrow.struct([("size", pyarrow.list_(pyarrow.int64())), ("counts", pyarrow.string())])
    return pyarrow.schema(
        [
            *(("image_id", pyarrow.int64()), ("file_name", pyarrow.string())),
            *(("category_id", pyarrow.int64()), ("category_name", pyarrow.string())),
            *(("bbox", numbers), ("score", pyarrow.float64())),
            *(("segmentation", run_lengths), ("keypoints", numbers), ("region", pyarrow.bool_())),
            ("error", pyarrow.string()),
        ]
    )

"""``mvision predict`` and ``mvision predict --engine ray`` on the same pictures: times, and whether results are equal.

    python docs/scripts/ray_predict.py --weights RUN [--count 5000] [--cpus 2] [--formats jsonl parquet]

The pictures are those of the built-in data set's validation split under ``count`` names, and one that cannot be read.
Ray runs on this machine with so many CPUs and 200 MB for objects; its start and end are part of its time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvision.cli.main import run
from mvision.commands.predict import sample_images
from mvision.machine.processor import cpu_name

OBJECT_STORE = 200 << 20


def main() -> None:
    """Print a table of times and differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--threshold", default="0.1")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--shard-size", type=int, default=500)
    parser.add_argument("--formats", nargs="+", default=["jsonl", "parquet"], choices=["jsonl", "parquet"])
    options = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "pyarrow"))
    print(f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pictures = make_pictures(root / "pictures", options.count)
        common = ["predict", str(pictures), "--weights", options.weights, "--threshold", options.threshold]
        common += ["--precision", options.precision, "--device", "cpu"]
        seconds = timed([*common, "--no-pictures", "--output", str(root / "plain")])
        plain = json.loads((root / "plain" / "predictions.json").read_text())
        print(f"plain: {seconds:.1f} s, {options.count / seconds:.1f} pictures/s, {len(plain)} results")
        for name in options.formats:
            output = root / name
            began = time.monotonic()
            start_ray(options.cpus)
            ready = time.monotonic() - began
            more = ["--engine", "ray", "--format", name, "--shard-size", str(options.shard_size)]
            try:
                timed([*common, *more, "--output", str(output)])
            finally:
                stop_ray()
            seconds = time.monotonic() - began
            rows = read_shards(output)
            errors = [row for row in rows if "error" in row]
            found = [row for row in rows if "error" not in row]
            print(
                f"ray, {name}: {seconds:.1f} s (of which {ready:.1f} s until Ray runs), "
                f"{options.count / seconds:.1f} pictures/s, {len(found)} results, {len(errors)} errors; "
                f"{'equal to plain in every digit' if found == plain else difference(found, plain)}"
            )


def make_pictures(folder: Path, count: int) -> Path:
    """A folder of pictures under ``count`` names, one of them damaged."""
    folder.mkdir()
    files = [Path(shutil.copy(file, folder.parent)) for file in sample_images("", 100)]
    for number in range(count - 1):
        file = files[number % len(files)]
        os.link(file, folder / f"picture-{number}{file.suffix}")
    (folder / "damaged.jpg").write_bytes(b"not a picture")
    return folder


def timed(arguments: Sequence[str]) -> float:
    """Seconds that a command takes; it has to succeed."""
    began = time.monotonic()
    code = run(list(arguments))
    assert code == 0, code
    return time.monotonic() - began


def start_ray(cpus: int) -> None:
    """Ray on this machine, smaller than it would make itself."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
    )
    signal.signal(signal.SIGTERM, before)


def stop_ray() -> None:
    """End all processes of Ray that ``start_ray`` has started."""
    import ray

    ray.shutdown()


def read_shards(folder: Path) -> list[dict[str, Any]]:
    """The rows of all shards in order, without the columns that are empty in them."""
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("part-*")):
        if file.suffix == ".jsonl":
            rows += [json.loads(line) for line in file.read_text().splitlines()]
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(file).to_pylist()
            rows += [{key: value for key, value in row.items() if value is not None} for row in table]
    return rows


def difference(found: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> str:
    """How two lists of results differ."""
    if len(found) != len(plain):
        return f"{len(found)} results and not {len(plain)}"
    pairs = [(ours, theirs) for ours, theirs in zip(found, plain) if ours != theirs]
    scores = max(abs(ours["score"] - theirs["score"]) for ours, theirs in pairs)
    boxes = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours["bbox"], theirs["bbox"]))
    return f"{len(pairs)} differ, by up to {scores:.5f} in score and {boxes:.2f} pixels"


if __name__ == "__main__":
    main()

"""``mvision predict --engine ray`` on Ray itself: on a disk, and from an S3 server into an S3 server."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvision.cli.main import run
from mvision.weights.thresholds import write_thresholds
from tests.test_shards import draw_pictures, weights  # noqa: F401 - a fixture

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
OBJECTS = 100 << 20


@pytest.fixture(scope="module")
def address() -> Iterator[str | None]:
    """The address of an S3 server, None where its package is missing; and Ray on this machine, which sees it."""
    try:
        from moto.server import ThreadedMotoServer

        moto = ThreadedMotoServer(port=0, verbose=False)
    except ImportError:
        moto = None
    if moto is not None:
        moto.start()
    url = None if moto is None else "http://{}:{}".format(*moto.get_host_and_port())
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            if url is not None:
                patch.setenv(name, str(value))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
        ray.init(address="local", num_cpus=1, object_store_memory=OBJECTS, **quiet)
        signal.signal(signal.SIGTERM, before)
        try:
            yield url
        finally:
            ray.shutdown()
            if moto is not None:
                moto.stop()


@pytest.fixture(scope="module")
def store(address: str | None) -> Any:
    """The file system of an S3 server with an empty bucket."""
    s3fs = pytest.importorskip("s3fs")
    if address is None:
        pytest.skip("needs moto[server]")
    files = s3fs.S3FileSystem(use_listings_cache=False)
    files.mkdir("bucket")
    return files


def predict(*arguments: str, threshold: str = "0.02") -> int:
    return run(["predict", *arguments, "--threshold", threshold, "--precision", "fp32", "--device", "cpu"])


def test_from_s3_to_s3_and_on_after_a_break(
    store: Any,
    weights: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures = draw_pictures(tmp_path / "pictures")
    store.put(f"{pictures}/", "bucket/pictures/", recursive=True)
    assert predict(str(pictures), "--weights", weights, "--no-pictures", "--output", str(tmp_path / "plain")) == 0
    plain = json.loads((tmp_path / "plain" / "predictions.json").read_text())
    command = ["s3://bucket/pictures", "--weights", weights, "--engine", "ray", "--shard-size", "3"]
    command += ["--output", "s3://bucket/found"]
    assert predict(*command) == 0
    assert "1 picture cannot be read; each has a row with its error" in capsys.readouterr().out
    shards = store.glob("bucket/found/part-*")
    assert [name.rpartition("/")[2] for name in shards] == [f"part-0000{n}-of-00003.parquet" for n in range(3)]

    def rows() -> list[dict[str, Any]]:
        tables = [parquet.read_table(name, filesystem=store).to_pylist() for name in shards]
        return [{k: v for k, v in row.items() if v is not None} for table in tables for row in table]

    assert [row for row in rows() if "error" not in row] == plain
    assert [row["file_name"] for row in rows() if "error" in row] == ["p3.png"]
    contents, times = [store.cat_file(name) for name in shards], [store.modified(name) for name in shards]
    store.rm(shards[1])
    assert predict(*command) == 0
    assert "1 shards written, 2 were complete before: s3://bucket/found" in capsys.readouterr().out
    assert [store.cat_file(name) for name in shards] == contents
    assert [store.modified(name) == time for name, time in zip(shards, times)] == [True, False, True]
    assert predict(*command, "--nms", "0.5") == 2
    assert "has shards of --nms None and not 0.5; choose another folder" in capsys.readouterr().err
    assert predict(*command[:-1], "s3://nobucket/found") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output s3://nobucket/found: ")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("address")
def test_the_best_thresholds_reach_the_actors(
    weights: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures, own = draw_pictures(tmp_path / "pictures", 4), tmp_path / "own.safetensors"
    shutil.copy(weights, own)
    common = [str(pictures), "--weights", str(own)]
    by_ray = [*common, "--engine", "ray", "--format", "jsonl", "--output", str(tmp_path / "shards")]
    assert predict(*by_ray, threshold="best") == 2
    assert "threshold 'best': these weights have none" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()

    def plain(name: str, threshold: str) -> list[dict[str, Any]]:
        output = tmp_path / name
        assert predict(*common, "--no-pictures", "--output", str(output), threshold=threshold) == 0
        return [e for e in json.loads((output / "predictions.json").read_text()) if "score" in e]

    every = plain("every", "0.001")
    scores = {name: sorted(e["score"] for e in every if e["category_name"] == name) for name in ("cat", "ball")}
    middle = {name: found[len(found) // 2] for name, found in scores.items()}
    write_thresholds(own, {"instance-seg": middle})
    expected = plain("best", "best")
    assert 0 < len(expected) < len(every)
    capsys.readouterr()
    assert predict(*by_ray, threshold="best") == 0
    assert f"thresholds: cat {middle['cat']:g}, ball {middle['ball']:g}" in capsys.readouterr().out
    rows = [json.loads(line) for part in sorted((tmp_path / "shards").glob("part-*")) for line in part.open()]
    assert [row for row in rows if "score" in row] == expected


@pytest.mark.usefixtures("address")
def test_a_machine_that_cannot_write_ends_the_command_in_a_line(
    weights: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error inside a task, far from this process."""
    pictures = draw_pictures(tmp_path / "pictures", 3)
    output = tmp_path / "found"
    command = [str(pictures), "--weights", weights, "--engine", "ray", "--format", "jsonl", "--output", str(output)]
    from mvision.commands import predict_ray

    prepare = predict_ray.ShardFolder.prepare

    def block(folder: Any, plan: Any) -> list[int]:
        missing = prepare(folder, plan)
        (output / plan.name(0)).mkdir()  # a folder takes the place of the shard
        return missing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_ray.ShardFolder, "prepare", block)
        assert predict(*command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {output}: ")
    assert error.count("\n") == 1

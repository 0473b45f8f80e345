"""Predictions as shards: sources and outputs through fsspec, the stages that Ray runs, what a folder is checked for.

The stages are called one after the other here, in one process; ``test_ray.py`` runs them on Ray.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from mvision.cli.main import run
from mvision.commands import predict_ray
from mvision.config import load_config
from mvision.deploy import ray_session
from mvision.deploy.loading import load
from mvision.deploy.portable import portable
from mvision.deploy.ray_actor import ActorSettings, PredictStage
from mvision.errors import UserError
from mvision.inference.output import file_names
from mvision.inference.remote_sources import find_pictures, read_inputs
from mvision.inference.selection import Selection
from mvision.inference.shard_stages import input_blocks, read_stage, write_stage
from mvision.inference.shards import PLAN, ShardFolder, ShardFormat, ShardPlan, encode_rows
from mvision.model import Model
from mvision.storage.urls import open_url
from mvision.structures import Category
from mvision.structures.images import write_image
from mvision.weights import save_weights
from tests.small_runs import FAST

HEAD = FAST["model.heads.detection"]
SIZE = (64, 64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Boxes, masks and points in one model, and no training."""
    common = {key: value for key, value in FAST.items() if key.startswith("model.") and "heads" not in key}
    heads = {
        "instance-seg": {**HEAD, "pixel_dim": 16, "mask_dim": 8, "mask_points": 64},
        "keypoints": {"embed_dim": 16},
        "semantic-seg": {},
    }
    overrides = {**common, **{f"model.heads.{task}": settings for task, settings in heads.items()}}
    config = load_config("tiny", tasks=list(heads), overrides=overrides)
    config.model.categories = [Category(id=4, name="cat", keypoints=("nose", "tail")), Category(id=9, name="ball")]
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "all.safetensors"
    save_weights(Model(config.model).eval(), file)
    return str(file)


def draw_pictures(folder: Path, count: int = 7) -> Path:
    """Pictures of several sizes, numbered from 1; number 3 is damaged."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(1, count + 1):
        size = (40 + 8 * number, 90 - 4 * number)
        write_image(folder / f"p{number}.png", generator.integers(0, 255, (*size, 3), dtype=np.uint8))
    (folder / "p3.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system of ``memory://``, empty."""
    file_system = fsspec.filesystem("memory")
    file_system.store.clear()
    file_system.pseudo_dirs[:] = [""]
    yield file_system
    file_system.store.clear()


def upload(memory: Any, folder: Path, to: str) -> None:
    for file in folder.iterdir():
        memory.pipe_file(f"{to}/{file.name}", file.read_bytes())


def plan_of(images: int, size: int = 3, format: ShardFormat = "jsonl", **more: Any) -> ShardPlan:
    return ShardPlan(
        **{"model": "m", "source": "s", "settings": {"--nms": None}, **more},
        images=images,
        shard_size=size,
        format=format,
    )


def by_stages(monkeypatch: pytest.MonkeyPatch, source: str, weights: str, folder: ShardFolder) -> list[dict[str, Any]]:
    """What ``write_stage`` says of every shard."""
    pytest.importorskip("pyarrow")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
    found = find_pictures([source])
    names = file_names(found)
    model, _ = portable(load(weights), weights, [], on_cpu=True, precision="fp32")
    settings = ActorSettings("cpu", torch.get_num_threads(), None, Selection(0.02))
    actor: Any = PredictStage(model, settings)
    plan = plan_of(len(found))
    missing = folder.prepare(plan)
    tables = input_blocks(plan, missing, [one.path for one in found], [names[one] for one in found], rows=2)
    blocks = [
        actor(read_stage({name: table[name].to_numpy() for name in table.column_names}, SIZE, None)) for table in tables
    ]
    rows = [{key: block[key][row] for key in block} for block in blocks for row in range(len(block["number"]))]
    written = []
    for shard in missing:
        part = [row for row in rows if int(row["number"]) in plan.pictures(shard)]
        written.append(write_stage({key: np.array([row[key] for row in part]) for key in part[0]}, folder, plan))
    return written


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("part-*")) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "url"])
def test_the_rows_are_the_entries_of_plain_prediction(
    remote: bool, tmp_path: Path, weights: str, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    upload(memory, pictures, "/bucket/pictures")
    out = tmp_path / "plain"
    options = ["--weights", weights, "--threshold", "0.02", "--no-pictures", "--precision", "fp32", "--device", "cpu"]
    assert run(["predict", str(pictures), *options, "--output", str(out)]) == 0
    plain = json.loads((out / "predictions.json").read_text())
    assert {"segmentation", "keypoints", "region"} <= set().union(*plain)
    source = "memory://bucket/pictures" if remote else str(pictures)
    written = by_stages(monkeypatch, source, weights, ShardFolder(str(tmp_path / "shards")))
    rows = lines(tmp_path / "shards")
    assert [row for row in rows if "error" not in row] == plain
    assert [row for row in rows if "error" in row] == [
        {"image_id": 3, "file_name": "p3.png", "error": "not an image that can be read"}
    ]
    assert [row["images"] for row in written] == [[2], [3], [1]]
    assert json.loads(written[0]["errors"][0]) == [["p3.png", "not an image that can be read"]]


def test_a_shard_holds_exactly_its_pictures(tmp_path: Path) -> None:
    batch = {"number": np.array([0, 1, 3]), "rows": np.array(["[]"] * 3), "notes": np.array(["[]"] * 3)}
    folder = ShardFolder(str(tmp_path))
    with pytest.raises(AssertionError, match="is not shard 0"):
        write_stage(batch, folder, plan_of(7))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["disk", "memory", "local URL"])
def test_shards_that_are_there_are_not_made_again(place: str, tmp_path: Path, memory: Any) -> None:
    folder = ShardFolder(
        {"disk": f"{tmp_path}/out", "memory": "memory://b/out", "local URL": f"file://{tmp_path}/out"}[place]
    )
    plan = plan_of(7)
    assert folder.prepare(plan) == [0, 1, 2]
    folder.write(plan.name(1), b"complete")
    assert folder.prepare(plan) == [0, 2]
    assert folder.names() == {PLAN, "part-00001-of-00003.jsonl"}
    changed = {"model": "x"}, {"source": "x"}, {"size": 2}, {"settings": {"--nms": 0.5}}, {"format": "parquet"}
    told = "another model", "other sources", "--shard-size 3 and not 2", "--nms None and not 0.5", "--format jsonl"
    for change, line in zip(changed, told, strict=True):
        with pytest.raises(UserError, match=f"has shards of {line}.*choose another folder"):
            folder.prepare(plan_of(7, **change))
    assert folder.prepare(plan) == [0, 2]  # nothing of what was refused was written


def test_shards_without_a_plan_are_refused(tmp_path: Path) -> None:
    (tmp_path / "part-00000-of-00009.parquet").touch()
    with pytest.raises(UserError, match="1 shards and no _predictions.json"):
        ShardFolder(str(tmp_path)).prepare(plan_of(7))
    (tmp_path / PLAN).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        ShardFolder(str(tmp_path)).prepare(plan_of(7))


def test_a_store_that_shows_unfinished_files_gets_them_under_another_name(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SFTP or HDFS; a reader never finds a part of a shard under its name."""
    from mvision.inference import shards

    monkeypatch.setattr(shards, "WHOLE_OBJECTS", frozenset())
    piped: list[str] = []
    pipe = type(memory).pipe_file
    monkeypatch.setattr(
        type(memory), "pipe_file", lambda self, path, *a, **k: (piped.append(path), pipe(self, path, *a, **k))
    )
    folder = ShardFolder("memory://b/out")
    folder.write("part-0.jsonl", b"x")
    assert folder.names() == {"part-0.jsonl"}
    assert all("partial" in path for path in piped)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*file/out: ") as error:
        ShardFolder(str(tmp_path / "file" / "out")).prepare(plan_of(7))
    assert "\n" not in str(error.value)


def test_parquet_has_the_same_columns_in_every_shard(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image_id": 1, "file_name": "a", "category_id": 2, "category_name": "cat", "bbox": [1.0, 2.0, 3.0, 4.0],
         "score": 0.5, "segmentation": {"size": [4, 5], "counts": "ab"}, "keypoints": [1.0, 2.0, 0.5]},
        {"image_id": 2, "file_name": "b", "error": "damaged"},
    ]  # fmt: skip
    for name, part in {"full": rows, "none": []}.items():
        (tmp_path / f"{name}.parquet").write_bytes(encode_rows(part, "parquet"))
    full, none = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("full", "none"))
    assert full.schema == none.schema
    read = [{key: value for key, value in row.items() if value is not None} for row in full.to_pylist()]
    assert read == rows


def test_pictures_behind_a_url(tmp_path: Path, memory: Any) -> None:
    for name in ("p10.png", "p9.JPG", "in/p1.png", "notes.txt", ".hidden.png", "film.mp4", "a[1].png"):
        memory.pipe_file(f"/b/set/{name}", b"")
    found = find_pictures(["memory://b/set"])
    assert [one.name for one in found] == ["a[1].png", "in/p1.png", "p9.JPG", "p10.png"]
    assert dict(found.left_out) == {".txt": 1, ".mp4": 1, "hidden": 1}
    assert [one.name for one in find_pictures(["memory://b/set/*.png"])] == ["a[1].png", "p10.png"]
    assert [one.name for one in find_pictures(["memory://b/set/a[1].png", "memory://b/set/p10.png"])] == [
        "a[1].png",
        "p10.png",
    ]
    with pytest.raises(UserError, match=r"memory://b/none: no picture there|not there"):
        find_pictures(["memory://b/none"])


def test_pictures_are_fetched_as_they_are_on_disk(tmp_path: Path, memory: Any) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    upload(memory, pictures, "/b/[1]")
    names = ["p2.png", "p3.png", "p1.png"]
    local = read_inputs([str(pictures / name) for name in names], SIZE, None)
    remote = read_inputs([*(f"memory://b/[1]/{name}" for name in names), "memory://b/none.png"], SIZE, None)
    for ours, theirs in zip(remote, local):
        assert (ours.size, ours.problem) == (theirs.size, theirs.problem)
        np.testing.assert_array_equal(ours.model_input, theirs.model_input)
    assert remote[3].problem.startswith("cannot be fetched")


def test_schemes_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("fsspec.registry")  # the attribute of this name is another object
    monkeypatch.delitem(registry._registry, "gs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"source gs://b/x: the package for gs:// is missing: pip install gcsfs"):
        open_url("gs://b/x", "source")
    with pytest.raises(UserError, match=r"source s33://b/x: unknown scheme 's33': did you mean 's3'\?"):
        open_url("s33://b/x", "source")


NODES = {
    "laptop": [{"CPU": 2.0}],
    "small": [{"CPU": 1.0}],
    "cluster": [{"CPU": 16.0}, {"CPU": 9.0}, {}],
    "gpus": [{"CPU": 8.0, "GPU": 2.0}],
}


@pytest.mark.parametrize(
    ("nodes", "device", "count", "expected"),
    [
        ("laptop", None, None, (1, "cpu", 0, 2)),
        ("small", None, None, (1, "cpu", 0, 1)),
        ("laptop", None, 2, (2, "cpu", 0, 1)),
        ("cluster", "cpu", None, (6, "cpu", 0, 4)),
        ("gpus", None, None, (2, "cuda", 1, 1)),
        ("gpus", "cuda", 3, (3, "cuda", 0.5, 1)),
        ("gpus", "cpu", None, (2, "cpu", 0, 4)),
    ],
)
def test_actors_by_what_the_cluster_has(
    nodes: str, device: str | None, count: int | None, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [{"Alive": True, "Resources": node} for node in NODES[nodes]]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: [*alive, dead]))
    actors = ray_session.choose_actors(device, count, own_threads=False)
    assert (actors.count, actors.device, actors.gpus, actors.threads) == expected
    total = sum(node.get("CPU", 0) for node in NODES[nodes])
    assert (
        actors.count * actors.cpus + ray_session.READ_CPUS + ray_session.WRITE_CPUS <= total
    )  # else it waits for ever


def test_devices_that_the_cluster_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}]))
    with pytest.raises(UserError, match="--device cuda: the cluster has no GPU"):
        ray_session.choose_actors("cuda", None, own_threads=False)
    with pytest.raises(UserError, match="--device cuda:1: with --engine ray give cpu or cuda"):
        ray_session.choose_actors("cuda:1", None, own_threads=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["x", "--actors", "2"], "--actors is for --engine ray"),
        (["x", "--output", "s3://b/out"], "--output s3://b/out: a URL is for --engine ray; give a folder"),
        (["--engine", "ray", "--data", "x"], "--data is not for --engine ray (help"),
        (["x", "--engine", "rai"], "'rai' is unknown: did you mean 'ray'?"),
        (["x", "--engine", "ray"], "the package ray is missing: pip install 'ray[data]'"),
    ],
)
def test_wrong_usage_is_a_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name=name)

    monkeypatch.setattr(ray_session, "importlib", SimpleNamespace(import_module=missing))
    assert run(["predict", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


def test_errors_of_tasks_are_found_in_what_ray_raises() -> None:
    text = (
        "ray::Map() (pid=1)\n  File x\nmvision.errors.UserError: weights x: damaged\n\nThe above was the direct cause"
    )
    assert str(ray_session.user_error_in(RuntimeError(text))) == "weights x: damaged"
    assert ray_session.user_error_in(ValueError("a bug")) is None


def test_the_plan_is_that_of_pictures_model_and_settings(tmp_path: Path, weights: str) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    model, _ = portable(load(weights), weights, [], on_cpu=True, precision="fp32")
    again, _ = portable(load(weights), weights, [], on_cpu=True, precision="fp32")
    one_task, _ = portable(load(weights, ["keypoints"]), weights, ["keypoints"], on_cpu=True, precision="fp32")
    plans = [
        predict_ray._plan(find_pictures([str(pictures)]), one, Selection(0.5), "jsonl", 3)
        for one in (model, again, one_task)
    ]
    assert plans[0] == plans[1] != plans[2]
    other = draw_pictures(tmp_path / "other")
    assert predict_ray._plan(find_pictures([str(other)]), model, Selection(0.5), "jsonl", 3).source != plans[0].source
    assert importlib.import_module("mvision.deploy.portable").WEIGHTS in model.files

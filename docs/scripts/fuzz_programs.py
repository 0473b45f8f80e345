"""Hostile configs, weights, exports and options: kinds of ``fuzz.py``, written as those in ``fuzz_data.py``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import click
import yaml
from fuzz_data import FILE_FORMS, ONE_PART, TRAINING, YAML_VALUES, Case, alias_bomb, hostile_yaml
from fuzz_files import OPTIONS, SMALL
from fuzz_values import NAMES, NUMBERS, junk, mutate_bytes, mutate_tree, to_json


def config_tree() -> dict[str, Any]:
    """The settings of the smallest model as the tree of a config file, with sections for most features."""
    tree: dict[str, Any] = {}
    for key, value in SMALL.items():
        *path, last = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    tree["data"] |= {"root": "data", "augment": {"mosaic": 0.5, "extra": [{"name": "Rotate", "args": {"limit": 5}}]}}
    tree["train"] |= {"lr": 1e-4, "freeze": [], "task_weights": {}, "seed": 0, "patience": 0, "schedule": "cosine"}
    return tree


CONFIG_VALUES: dict[str, list[Any]] = {
    "base": ["tiny", "nowhere", "config.yaml", "../../../etc/passwd", 5, [], {}],
    "tasks": [{"detection": {"train": {"epochs": 1}}}, {"x": {}}, [], {"detection": 5}],
    "image_size": [10**6, 10**9, [64, 10**7], [64], [64, 64, 64], "64", "64x64", [0, 0], -64, 64.0],
    "workers": [10**6, -1, 1.5, "all"],
    "epochs": [10**12, 0, -1, 1.5, "1"],
    "batch_size": [10**9, 10**12, 0],
    "name": ["resnet50d", "no_such_net", "../x", *NAMES],
    "extra": [[{"name": "os.system", "args": {"x": 1}}], [{"name": "__init__"}], [5], {"name": "Rotate"}],
    "seed": [2**32, 2**64, 10**40, -1],
}


def config(rng: Random, base: Path, folder: Path) -> Case:
    """A config file, or a value given to ``-o``."""
    (folder / "data").symlink_to(base / "coco")
    train = ["train", "--output", "out", "--device", "cpu"]
    if rng.random() < 0.6:
        data, what = hostile_yaml(rng, config_tree(), CONFIG_VALUES)
        (folder / "config.yaml").write_bytes(data)
        # With options that win over the file: a file without ``data`` would train on the built-in data set for long.
        return Case(what, [[*train, "--config", "config.yaml", "--data", "data", "--epochs", "1"]])
    key = rng.choice([*config_keys(), rng.choice(NAMES), "model", "train", "model.heads", "model.heads.detection"])
    special = [str(value) for value in CONFIG_VALUES.get(key.split(".")[-1], ["1e400", "-1", "10e12"])]
    value = rng.choice([str(junk(rng)), rng.choice(YAML_VALUES), alias_bomb(), rng.choice(NAMES), *special])
    assignment = rng.choice([f"{key}={value}"] * 6 + [key, f"={value}", f"{key}.x={value}", f"{key}..={value}"])
    return Case(f"-o {assignment[:100]!r}", [[*train, *OPTIONS, "--data", "data", "-o", assignment]])


def config_keys() -> list[str]:
    """Every dotted key of a model with one detection head."""
    from mvision.config import load_config

    def keys(tree: dict[str, Any], prefix: str) -> Iterator[str]:
        for key, value in tree.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{key}.")

    return list(keys(load_config("tiny").model_dump(), ""))


def weights(rng: Random, base: Path, folder: Path) -> Case:
    """The header of a weights file: our description, names, types, shapes and offsets; its length; its bytes."""
    data = (base / "run" / "best.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    form = rng.choice(["description", "description", "description", "header", "bytes", "length"])
    if form == "description":
        tree, what = mutate_tree(rng, json.loads(header["__metadata__"]["mvision"]), DESCRIPTION_VALUES)
        header["__metadata__"]["mvision"] = to_json(tree)
    elif form == "header":
        tree, what = mutate_tree(rng, header, {"shape": [[2**40], [0], [-1], [2**62, 4], []], "dtype": ["F8", "I64"]})
        header = tree
    text = to_json(header).encode()
    data = len(text).to_bytes(8, "little") + text + tensors
    if form == "bytes":
        data, what = mutate_bytes(rng, data)
    elif form == "length":
        number = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        data, what = number.to_bytes(8, "little") + data[8:], f"length {number}"
    (folder / "model.safetensors").write_bytes(data)
    return Case(f"{form}: {what}", _model_commands(rng, base, "model.safetensors", folder))


HUGE = [10**6, 2**20, 2**31, 10**12, 10**30]
DESCRIPTION_VALUES: dict[str, list[Any]] = {
    **dict.fromkeys(("embed_dim", "num_heads", "num_layers", "ffn_dim", "depth", "num_queries", "num_denoising"), HUGE),
    **dict.fromkeys(("window_size", "num_levels", "num_points"), HUGE),
    "image_size": [[64, 10**7], [10**6, 10**6], 0, [64], "64"],
    "name": ["resnet50d", "vit_giant_patch14_clip_224", "../x", "hf-hub:evil/model", *NAMES],
    "categories": [[], [{"name": "x"}] * 100_000, {}, None],
    "heads": [{}, {"no-task": {}}, {"detection": None}],
    "fused": [True, "yes", 1, None],
    "pretrained": [True],
}


def exports(rng: Random, base: Path, folder: Path) -> Case:
    """The description in an ONNX file or an OpenVINO folder, or the bytes of their files."""
    form = rng.choice(["onnx", "onnx", "openvino"])
    if form == "onnx":
        import onnx

        model = onnx.load(base / "model.onnx")
        entry = next(entry for entry in model.metadata_props if entry.key == "mvision")
        tree, what = mutate_tree(rng, json.loads(entry.value), DESCRIPTION_VALUES)
        entry.value = to_json(tree)
        data = model.SerializeToString()
        if rng.random() < 0.3:
            data, what = mutate_bytes(rng, (base / "model.onnx").read_bytes())
        (folder / "model.onnx").write_bytes(data)
        return Case(f"onnx: {what}", _model_commands(rng, base, "model.onnx", folder))
    shutil.copytree(base / "openvino", folder / "model")
    file = folder / "model" / rng.choice(["model.xml", "model.xml", "model.bin"])
    if file.suffix == ".bin" or rng.random() < 0.3:
        data, what = mutate_bytes(rng, file.read_bytes())
        file.write_bytes(data)
    else:
        text = file.read_text(encoding="utf-8")
        start = text.index('<mvision value="') + len('<mvision value="')
        end = text.index('"', start)
        tree, what = mutate_tree(rng, json.loads(text[start:end].replace("&quot;", '"')), DESCRIPTION_VALUES)
        value = to_json(tree).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        file.write_text(text[:start] + value + text[end:], encoding="utf-8")
    return Case(f"openvino: {file.name}: {what}", _model_commands(rng, base, "model", folder))


def _model_commands(rng: Random, base: Path, source: str, folder: Path) -> list[list[str]]:
    (folder / "data").symlink_to(base / "coco")
    more = ["--weights", source, "--device", "cpu"]
    return [
        rng.choice([["load", source], ["info", "--weights", source]]),
        rng.choice(
            [
                ["predict", "data/images/0.png", "--output", "out", *more],
                ["predict", "data/images/0.png", "--output", "out", *more],
                ["val", "--data", "data", "--workers", "0", *more],
                ["train", "--init", source, *TRAINING[1:]],
                ["export", "--weights", source, "--output", "out.onnx", "--task", "x"],
            ]
        ),
    ]


def runs(rng: Random, base: Path, folder: Path) -> Case:
    """One file in the folder of a run, which is resumed, evaluated or used to predict."""
    shutil.copytree(base / "run", folder / "run")
    (folder / "data").symlink_to(base / "coco")
    file = rng.choice(sorted(path for path in (folder / "run").rglob("*") if path.is_file()))
    data, form = file.read_bytes(), rng.choice(["content", "content", "content", "bytes", "form"])
    if form == "form":
        form = rng.choice(sorted(FILE_FORMS))
        file.unlink()
        with suppress(OSError, ValueError):  # a name that the file system refuses
            FILE_FORMS[form](rng, file)
    elif form == "bytes" or file.suffix not in RUN_FILES:
        data, form = mutate_bytes(rng, data)
        file.write_bytes(data)
    else:
        data, form = RUN_FILES[file.suffix](rng, data)
        file.write_bytes(data)
    command = rng.choice(
        [
            ["train", "--resume", "run", "-o", "train.epochs=2", "--data", "data", "--device", "cpu"],
            ["train", "--resume", "run", "-o", "train.epochs=2", "--data", "data", "--device", "cpu"],
            ["val", "--weights", "run", "--data", "data", "--workers", "0", "--device", "cpu"],
            ["predict", "data/images/0.png", "--weights", "run", "--output", "out", "--device", "cpu"],
        ]
    )
    return Case(f"{file.relative_to(folder)}: {form}", [command])


def _header(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file with other metadata: each of ours is JSON inside of the header's JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = rng.choice(sorted(header.get("__metadata__", {})) or [""])
    try:
        tree = json.loads(header["__metadata__"][key])
    except (KeyError, ValueError):
        tree, what = mutate_tree(rng, header)
        header = tree
    else:
        tree, what = mutate_tree(rng, tree, DESCRIPTION_VALUES)
        header["__metadata__"][key] = to_json(tree)
    text = to_json(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :], f"{key}: {what}"


def _json(rng: Random, data: bytes) -> tuple[bytes, str]:
    tree, what = mutate_tree(rng, json.loads(data))
    return to_json(tree).encode(), what


def _json_lines(rng: Random, data: bytes) -> tuple[bytes, str]:
    lines = data.decode().splitlines()
    row = rng.randrange(len(lines))
    changed, what = _json(rng, lines[row].encode())
    lines[row] = changed.decode()
    return "\n".join(lines[: rng.choice([row + 1, len(lines)])]).encode(), what


RUN_FILES = {
    ".safetensors": _header,
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": lambda rng, data: hostile_yaml(rng, yaml.safe_load(data), CONFIG_VALUES),
}


def options(rng: Random, base: Path, folder: Path) -> Case:
    """One option of one command, with a value of another type, huge, empty, odd, or a path to something else."""
    (folder / "data").symlink_to(base / "coco")
    (folder / "file.txt").write_text("text", encoding="utf-8")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    path, command = rng.choice(list(_leaves()))
    arguments = [*path, *sound_arguments(path, base)]
    parameter = rng.choice(command.params)
    paths = ["file.txt", "folder", "pipe", "nowhere", "/dev/null", "/dev/full", "/dev/zero/x", "/proc/1/mem", ".", "/"]
    odd = [
        str(rng.choice(NUMBERS)),
        str(junk(rng)),
        rng.choice(NAMES),
        rng.choice(paths),
        "-1",
        "",
        "http://[::1",
        "99",
    ]
    value = rng.choice(
        [*odd, rng.choice(paths), "http://127.0.0.1:9/x.jpg", "rtsp://x", "cuda:99", "mps", "0x10", "１"]
    )
    if parameter.name in ("output", "destination"):  # nothing that a command would be right to write to
        value = rng.choice(["file.txt", "pipe", "nowhere/x", "/dev/null", "/dev/full", "/dev/zero/x", "", *ONE_PART])
    if isinstance(parameter, click.Argument):
        extra = [value]
    elif getattr(parameter, "is_flag", False):
        extra = [parameter.opts[0], *rng.choice([[], [value]])]
    else:
        extra = rng.choice([[parameter.opts[0], value], [f"{parameter.opts[0]}={value}"], [parameter.opts[0]]])
    return Case(f"{' '.join(path)} {extra!r}"[:200], [[*arguments, *extra]])


def _leaves(command: click.Command | None = None, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, click.Command]]:
    from mvision.cli.main import cli

    command = cli if command is None else command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from _leaves(below, (*path, name))
    else:
        yield path, command


def sound_arguments(path: tuple[str, ...], base: Path) -> list[str]:
    """Arguments with which a command ends in seconds; those that would take minutes end at weights that are missing."""
    run, cpu = ["--weights", str(base / "run")], ["--device", "cpu"]
    return {
        ("train",): TRAINING[1:],
        ("val",): [*run, *cpu, "--data", "data", "--workers", "0"],
        ("predict",): ["data/images/0.png", *run, *cpu, "--output", "out"],
        ("label",): ["data/images", *run, *cpu, "--format", "coco", "--output", "labelled"],
        ("demo",): ["--weights", "nothing", "--host", "127.0.0.1", "--port", "0"],
        ("export",): ["--weights", "nothing", "--output", "out.onnx"],
        ("push",): ["nothing", "user/name"],
        ("benchmark", "encoder"): ["--device", "none"],
        ("benchmark", "model"): ["--weights", "nothing", "--output", "out"],
        ("transfer",): ["--init", "nothing", "--output", "out"],
        ("data", "check"): ["data"],
        ("data", "show"): ["data", "--output", "sheet.png"],
        ("data", "convert"): ["data", "converted"],
        ("info",): [],
        ("models",): ["dfine-s"],
    }[path]

"""Hostile data sets and pictures: kinds of ``fuzz.py``. Each function writes the files of one case and returns it.

A kind is called as ``kind(rng, base, folder)``: ``base`` has the sound inputs of ``fuzz_files.prepare``; ``folder`` is
empty and is the working folder of the commands, so that paths are relative to it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml
from fuzz_files import OPTIONS, TRAIN, VAL, coco_tree, yolo_tree
from fuzz_pictures import foreign_content, mutate_picture
from fuzz_values import NAMES, mutate_lines, mutate_text, mutate_tree, to_json

TRAINING = ["train", "--data", "data", "--output", "out", "--device", "cpu", *OPTIONS]
CHECK = ["data", "check", "data"]


@dataclass
class Case:
    """What was done, the commands to run in the folder, and whether ``data check`` and ``train`` have to agree."""

    what: str
    commands: list[list[str]]
    agree: bool = False


LONG_RUNS = "0" * 1_000_000
# By key of a COCO file: what is hostile there in particular.
COCO_VALUES: dict[str, list[Any]] = {
    "segmentation": [
        {"size": [96000, 128000], "counts": [0, 96000 * 128000]},
        {"size": [64, 96], "counts": [2**31, 5]},
        {"size": [64, 96], "counts": [-5, 6149]},
        {"size": [64, 96], "counts": [1] * 6144},
        {"size": [64, 96], "counts": LONG_RUNS},
        {"size": [64, 96], "counts": "\u00e9\x00~~~"},
        {"size": [64, 96], "counts": "oooooooooooooooooooo"},
        {"size": ["64", 96.5], "counts": [6144]},
        {"size": [2**40, 2**40], "counts": "PPT"},
        {"size": [0, 0], "counts": []},
        {"size": [64], "counts": [1]},
        {"counts": [1]},
        [[2e9, 2e9, 3e9, 2e9, 2e9, 3e9]],
        [[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9]],
        [[1e308] * 6],
        [[1, 2, 3]],
        [["1", "2", "30", "2", "30", "40"]],
        [1, 2, 30, 2, 30, 40],
        [[0, 0, 96, 64] * 20000],
        "[[1, 2, 30, 2, 30, 40]]",
    ],
    "bbox": [
        [0, 0, 0, 0],
        [-50, -50, 20, 20],
        [1e9, 1e9, 5, 5],
        ["6", "8", "24", "20"],
        [6, 8, 24],
        [6, 8, 24, 20, 0.3],
        {"x": 6, "y": 8, "w": 24, "h": 20},
        "6,8,24,20",
        [float("nan")] * 4,
        [30, 30, -20, -20],
    ],
    "keypoints": [[], [1, 2], [1, 2, 2] * 17, [[1, 2, 2], [3, 4, 2]], ["1", "2", "2", "3", "4", "2"], [0] * 6, [2] * 6],
    "iscrowd": ["0", "1", 2, -1, "yes", True, None, 0.5, [0]],
    "file_name": [f"images/{TRAIN[0]}.png", "../coco/images/0.png", "0.PNG", "0", "./0.png", "images\\0.png", *NAMES],
    "width": [0, -96, 48, 64, 10**9, "96", 96.5],
    "height": [0, -64, 96, 10**9, "64", 64.5],
    "skeleton": [[[0, 0]], [[1]], [[99, 100]], "x", [[-1, 1]], [[1.5, 2]]],
    "id": ["1", 1.5, -1, 10**30, True, "a", 1],
    "image_id": ["1", 99, 1.0, None],
    "category_id": ["2", 99, 2.0, None, 0],
    "name": [*NAMES, "blue", "red"],
}


def coco(rng: Random, base: Path, folder: Path) -> Case:
    """A COCO file damaged as a tree, then sometimes as text."""
    shutil.copytree(base / "coco", folder / "data")
    done = []
    for name in rng.choice([["train"], ["train"], ["val"], ["train", "val"]]):
        tree, what = mutate_tree(rng, coco_tree(TRAIN if name == "train" else VAL), COCO_VALUES)
        text = to_json(tree)
        if rng.random() < 0.1:
            text, more = mutate_lines(rng, text.replace("}, ", "},\n"))
            what += f"; {more}"
        data, how = mutate_text(rng, text)
        (folder / "data" / "annotations" / f"{name}.json").write_bytes(data)
        done.append(f"{name}: {what} ({how})")
    return Case("; ".join(done), *_data_commands(rng, base))


def yolo(rng: Random, base: Path, folder: Path) -> Case:
    """Label files damaged line by line, or ``data.yaml`` as a tree or text."""
    form = rng.choice(["box", "polygon", "pose"])
    shutil.copytree(base / f"yolo-{form}", folder / "data")
    if rng.random() < 0.4:
        data, what = hostile_yaml(rng, yolo_tree(form), {"names": [NAMES, {0: 1, 1: True}, {1: "a", 5: "b"}, "names"]})
        (folder / "data" / "data.yaml").write_bytes(data)
    else:
        labels = sorted((folder / "data" / "labels").rglob("*.txt"))
        chosen = labels if rng.random() < 0.3 else [rng.choice(labels)]
        for file in chosen:
            text, what = mutate_lines(rng, file.read_text(encoding="utf-8"))
            data, how = mutate_text(rng, text)
            file.write_bytes(data)
        what = f"{len(chosen)} label files: {what} ({how})"
    return Case(f"{form}: {what}", *_data_commands(rng, base))


def _data_commands(rng: Random, base: Path) -> tuple[list[list[str]], bool]:
    """Mostly the check alone, which is quick; of some cases also the training, and of few another command."""
    also = rng.choice(["train", "train", "show", "convert", "val", *[""] * 5])
    commands = {
        "train": TRAINING,
        "show": ["data", "show", "data", "--output", "sheet.png", *rng.choice([[], ["--augmented"]])],
        "convert": ["data", "convert", "data", "converted"],
        "val": ["val", "--weights", str(base / "run"), "--data", "data", "--workers", "0", "--device", "cpu"],
    }
    check = CHECK if also == "train" else [*CHECK, *rng.choice([[], ["--quick"], ["--split", "val"]])]
    return [check, *([commands[also]] if also else [])], also == "train"


def alias_bomb() -> str:
    """A few lines of YAML that stand for billions of entries."""
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join(["a0: &a0 [x, x, x]", *levels])


YAML_VALUES = [
    *("&a [*a]", "*unknown", "!!timestamp foo", "!!int x", "!!float x", "!!bool maybe", "!!binary '!'", "2001-13-45"),
    *("!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "!x y", "!!set {a, b}", "!!omap [a]"),
    *(
        "1:99:99",
        "{[a]: b}",
        "{{a: b}: c}",
        "9" * 5000,
        "0b",
        "0x",
        "1_000",
        "=",
        "<<",
        "'open",
        "|",
        "\t",
        "%TAG",
        "@",
    ),
    *(
        "`",
        "? x",
        "- a\n- b",
        "!!null x",
        "~",
        ".nan",
        "-.inf",
        "1e999",
        "0o17",
        "[" * 3000,
        "{a: " * 3000,
        "!!map [1]",
    ),
    *("&a {<<: *a}", "\x00", "\x07", "\ufeff", "!!str {a: b}", "!!seq {a: b}", "[a, b", "{a: 1, a: 2}", "!!pairs 5"),
]


def hostile_yaml(rng: Random, tree: Any, special: dict[str, list[Any]] | None = None) -> tuple[bytes, str]:
    """A tree as YAML: damaged before or after it is written, or with one value that is hostile in YAML."""
    form = rng.choice(["tree", "tree", "lines", "value", "value", "bomb"])
    if form == "tree":
        tree, what = mutate_tree(rng, tree, special)
        text = to_json(tree)
    else:
        text = yaml.safe_dump(tree, sort_keys=False)
        if form == "lines":
            text, what = mutate_lines(rng, text)
        elif form == "value":
            lines = text.splitlines()
            row, value = rng.randrange(len(lines)), rng.choice(YAML_VALUES)
            lines[row] = lines[row].split(":")[0] + f": {value}"
            text, what = "\n".join(lines), f"line {row + 1} is {value[:40]!r}"
        else:
            key = rng.choice(sorted(tree))
            text, what = f"{alias_bomb()}\n{text}{key}: *a11\n", f"aliases of aliases as {key}"
    data, how = mutate_text(rng, text)
    return data, f"YAML: {what} ({how})"


def files(rng: Random, base: Path, folder: Path) -> Case:
    """One file or folder of a data set is missing, a folder, a device, a pipe, a loop, or something else."""
    kind = rng.choice(["coco", "coco", "yolo-box"])
    shutil.copytree(base / kind, folder / "data")
    entries = sorted((folder / "data").rglob("*"))
    target, form = rng.choice(entries), rng.choice(list(FILE_FORMS))
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    with suppress(OSError, ValueError):  # a name that the file system refuses
        FILE_FORMS[form](rng, target)
    what = f"{target.relative_to(folder)}: {form}"
    return Case(what, *_data_commands(rng, base))


def _link(to: str) -> Callable[[Random, Path], None]:
    return lambda rng, path: path.symlink_to(to)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the whole path can be too long for a socket
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


# Names of one part: joined to a folder, the others lead out of it, and this script writes there.
ONE_PART = [name for name in NAMES if "/" not in name and name not in ("", ".", "..")]
FILE_FORMS: dict[str, Callable[[Random, Path], Any]] = {
    "missing": lambda rng, path: None,
    "empty": lambda rng, path: path.write_bytes(b""),
    "noise": lambda rng, path: path.write_bytes(rng.randbytes(2000)),
    "foreign": lambda rng, path: path.write_bytes(foreign_content(rng)[0]),
    "a folder": lambda rng, path: path.mkdir(),
    "a pipe": lambda rng, path: os.mkfifo(path),
    "a socket": lambda rng, path: _socket(path),
    "a loop": lambda rng, path: path.symlink_to(path),
    "link to its folder": lambda rng, path: path.symlink_to(path.parent),
    "link to nothing": _link("nowhere"),
    "link to /dev/zero": _link("/dev/zero"),
    "link to /dev/null": _link("/dev/null"),
    "link to /dev/tty": _link("/dev/tty"),
    "link to /proc/self/mem": _link("/proc/self/mem"),
    "link to /etc": _link("/etc"),
    "odd name": lambda rng, path: (path.parent / rng.choice(ONE_PART)).write_bytes(b"x"),
    "bytes as name": lambda rng, path: Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe.png")).write_bytes(b"x"),
}


def pictures(rng: Random, base: Path, folder: Path) -> Case:
    """One picture of a data set is damaged, huge, of another format or no picture at all."""
    shutil.copytree(base / "coco", folder / "data")
    name = rng.choice(sorted(path.name for path in (base / "pictures").iterdir()))
    data, what = mutate_picture(rng, name, (base / "pictures" / name).read_bytes())
    split = rng.choice(["train", "train", "val"])
    tree = coco_tree(TRAIN if split == "train" else VAL)
    (folder / "data" / "images" / name).write_bytes(data)
    tree["images"][0]["file_name"] = name
    (folder / "data" / "annotations" / f"{split}.json").write_text(json.dumps(tree), encoding="utf-8")
    commands, agree = _data_commands(rng, base)
    if rng.random() < 0.4:
        source = rng.choice([f"data/images/{name}", "data/images", "data/images/*.*"])
        commands = [["predict", source, "--weights", str(base / "run"), "--output", "out", "--device", "cpu"]]
        agree = False
    return Case(f"{split}: {name}: {what}", commands, agree)

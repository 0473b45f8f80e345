"""The laboratory of ``kills.py``: commands run in forked children, faults, and what is looked at afterwards.

Importing torch takes seconds: one process imports everything, starts no thread, and each command runs in a fork of it.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

RECORD, KILL, FULL = 0, 1, 2  # as in kills.c
TIMEOUT = 180.0  # seconds; a command that takes longer hangs
RUNNING_TIME = re.compile(rb'"(seconds|hours|time)": ?[0-9.e+-]+|\\"seconds\\": ?[0-9.e+-]+')
Contents = dict[str, bytes]


@dataclass
class Fault:
    """What happens to a command: ``how`` at file operation ``number``, or a ``signal`` after so many ``seconds``."""

    how: int = RECORD
    number: int = 0
    signal: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """How a command ended: exit code (-9 after SIGKILL), everything it printed, its file operations, its duration."""

    code: int
    text: str
    operations: list[str]
    seconds: float

    @property
    def problem(self) -> str | None:
        """What is wrong with the way it ended, unless it was killed or is done."""
        not_begun = self.code == -signal.SIGTERM and not self.operations  # Python had not set its handler yet
        if self.code in (0, -signal.SIGKILL) or not_begun:
            return None
        if self.code < 0:
            return f"died of signal {-self.code}: {self.text.strip()[-200:]}"
        if "Traceback" in self.text:
            return f"traceback: {self.text.strip().splitlines()[-1][:200]}"
        lines = [line for line in self.text.splitlines() if line.startswith(("error: ", "stopped by "))]
        return None if len(lines) == 1 and self.code in (2, 130, 143) else f"code {self.code}, {len(lines)} lines"


def run(arguments: Sequence[str], folder: Path, fault: Fault | None = None) -> Outcome:
    """``mvision ARGUMENTS`` in ``folder``, in a fork of this process."""
    fault = fault or Fault()
    log, operations = folder.with_name("log.txt"), folder.with_name("operations.txt")
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_command(arguments, folder, fault, log, operations)
    code = _wait(child, fault, start)
    seconds = time.monotonic() - start
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # loading processes that are left
    text = log.read_text(errors="replace")
    return Outcome(code, text, operations.read_text().splitlines(), seconds)


def _be_the_command(arguments: Sequence[str], folder: Path, fault: Fault, log: Path, operations: Path) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        trace = os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        # Loading processes are forked too: a new interpreter for each would take seconds. They write no files.
        import mvision.data.loading.loader as loader
        from mvision.cli.main import main
        from mvision.commands import early
        from mvision.engine import train

        for module in (loader, early, train):
            module.worker_context = lambda: multiprocessing.get_context("fork")  # type: ignore[attr-defined]
        ctypes.CDLL(None).kills_arm(os.fsencode(folder), fault.how, ctypes.c_long(fault.number), trace)
        main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:  # noqa: BLE001 - the fork ends here, whatever it was
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, fault: Fault, start: float) -> int:
    sent = fault.signal == 0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - start
        if not sent and passed >= fault.seconds:
            os.kill(child, fault.signal)
            sent = True
        if passed > TIMEOUT:
            os.kill(child, signal.SIGABRT)
            os.waitpid(child, 0)
            return -signal.SIGABRT
        time.sleep(0.002)


def points(operations: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Numbers (from 1) of the operations to stop before: of many writes in a row the first, the middle, the last."""
    start, kinds = 0, [re.sub("^p?writev?(64)? ", "write ", operation) for operation in operations]
    while start < len(operations):
        end = start
        while end + 1 < len(operations) and kinds[end + 1] == kinds[start]:
            end += 1
        for number in sorted({start, (start + end) // 2, end}):
            yield number + 1, operations[number]
        start = end + 1


def contents(folder: Path) -> Contents:
    """Every file by name, hidden ones among them, without what differs from run to run: running times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _lasting(path) for path in files}


def _lasting(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".safetensors" and len(data) > 8:  # its header is padded, so that lengths of numbers move it
        end = 8 + int.from_bytes(data[:8], "little")
        data = data[8:end].rstrip() + data[end:]
    return RUNNING_TIME.sub(b'"seconds": 0', data)


def half_written(folder: Path) -> list[str]:
    """Files under a final name that are not whole. A fork opens them, for libraries keep threads and counters."""
    result = folder.with_name("half_written.txt")
    child = os.fork()
    if child == 0:
        result.write_text("\n".join(_half_written(folder)))
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        return ["a file that ends the process that opens it"]
    return result.read_text().splitlines()


def _half_written(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            try:
                _open(path)
            except Exception as error:  # noqa: BLE001 - each format's library has its own
                found.append(f"{path.relative_to(folder)}: {type(error).__name__} {' '.join(str(error).split())[:80]}")
    return found


def _open(path: Path) -> Any:
    match path.suffix:
        case ".json":
            return json.loads(path.read_text())
        case ".jsonl":  # its last line may be cut: readers leave it out
            return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        case ".jpg" | ".png":
            from PIL import Image

            return Image.open(path).load()
        case ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        case ".onnx":
            import onnx

            return onnx.checker.check_model(str(path))
        case ".xml":
            import openvino

            return openvino.Core().read_model(path)
        case ".yaml":
            import yaml

            return yaml.safe_load(path.read_text())
    return None


def write_data(root: Path, images: int = 6) -> Path:
    """A COCO set of coloured squares in pictures of 120 x 80."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    for split in ("train", "val"):
        entries, objects = [], []
        for number in range(1, images + 1):
            picture = np.full((80, 120, 3), 114, np.uint8)
            for _ in range(2):
                x, y, side, label = (int(v) for v in rng.integers((0, 0, 16, 0), (90, 50, 30, 2)))
                picture[y : y + side, x : x + side] = (220, 40, 40) if label else (40, 40, 220)
                outline = [x, y, x + side, y, x + side, y + side, x, y + side]
                entry = {"id": len(objects) + 1, "image_id": number, "category_id": label + 1, "iscrowd": 0}
                objects.append(
                    entry | {"bbox": [x, y, side, side], "area": side * side, "segmentation": [[*map(float, outline)]]}
                )
            cv2.imwrite(str(root / "images" / f"{split}{number}.jpg"), picture)
            entries.append({"id": number, "file_name": f"{split}{number}.jpg", "width": 120, "height": 80})
        categories = [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
        tree = {"images": entries, "annotations": objects, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(tree))
    return root


def write_config(path: Path, data: Path) -> Path:
    """The smallest detector."""
    from mvision.config import load_config

    head = {"embed_dim": 32, "num_queries": 10, "num_layers": 2, "num_heads": 4, "ffn_dim": 32, "num_denoising": 4}
    settings = {
        "data.root": str(data),
        "train.batch_size": 2,
        "train.epochs": 2,
        "train.val_interval": 1,
        "train.precision": "fp32",
        "model.image_size": 64,
        "model.backbone": {"name": "test_resnet.r160_in1k", "pretrained": False},
        "model.neck.embed_dim": 32,
        "model.heads.detection": head,
    }
    path.write_text(load_config("tiny", overrides=settings).to_yaml())
    return path


def compile_shim(folder: Path) -> Path:
    """``kills.c`` as a library; it needs a C compiler."""
    library = folder / "kills.so"
    source = Path(__file__).with_name("kills.c")
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        sys.exit("kills.py needs a C compiler (cc, gcc or clang)")
    code = os.spawnlp(os.P_WAIT, compiler, compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl")
    return library if code == 0 else sys.exit("kills.c does not compile")


def warm_up() -> None:
    """Import what the commands import, so that their forks need not."""
    import importlib

    names = (
        "albumentations accelerate matplotlib.figure matplotlib.backends.backend_agg mvision.cli.main "
        "mvision.commands.export mvision.commands.predict mvision.commands.train mvision.commands.transfer "
        "mvision.commands.val onnx onnxruntime onnxscript openvino pycocotools.coco supervision timm torch.onnx "
        "torchvision torch._dynamo torch.export torch.utils.tensorboard"
    )
    for name in names.split():
        with suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)

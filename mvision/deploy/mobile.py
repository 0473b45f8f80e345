"""Files for phones, ``.pte`` and ``.tflite``: the description in them, and running them with ExecuTorch and LiteRT.

Their graph takes one image, because their shapes are fixed when they are written; a batch is run image by image. The
description is in a ZIP archive behind the model, as TFLite's own metadata are: both programs read the model from the
front and do not look at what follows. With it is a checksum of the model: neither program survives every damage.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mvision.deploy.formats import runtime_of
from mvision.errors import UserError
from mvision.machine.processor import cores
from mvision.weights.stored import first_line

MEMBER = "mvision.json"
"""The file in the archive: the description, with the names of the outputs in order, and the checksum of the graph."""


@dataclass(frozen=True)
class Graph:
    """An open file.

    Attributes:
        outputs: their shapes, in order, for one image.
        images: shape of the input.
        run: the outputs for one image (1, 3, H, W) uint8; one thread at a time.
    """

    outputs: list[tuple[int, ...]]
    images: tuple[int, ...]
    run: Callable[[np.ndarray], list[np.ndarray]]


def append_description(path: Path, described: dict[str, Any]) -> None:
    """Put the description behind the graph in a file. Raises OSError."""
    content = path.read_bytes()
    checked = {**described, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    with zipfile.ZipFile(path, "a") as archive:
        # With a fixed date, so that the same weights give the same file.
        archive.writestr(zipfile.ZipInfo(MEMBER), json.dumps(checked))


def read_description(path: Path) -> str | None:
    """The description in a file as text; None if it has none. Raises OSError."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(MEMBER)
            if entry.compress_type != zipfile.ZIP_STORED:
                return None  # so that no more is read than the file has
            return archive.read(entry).decode()
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, EOFError):  # what zipfile raises for odd archives
        return None


def check_content(path: Path, text: str) -> None:
    """Raise a UserError unless the graph is the one that the description was written for."""
    described = json.loads(text)
    size, digest = described.get("bytes"), described.get("sha256")
    with path.open("rb") as file:
        found = hashlib.sha256(file.read(size)).hexdigest() if isinstance(size, int) and size >= 0 else None
    if found is None or found != digest:
        raise UserError(f"weights {path}: this file is damaged (its graph has another checksum); export it again")


def open_graph(path: Path) -> Graph:
    """Open a file whose description has been checked.

    Raises:
        UserError: the runtime cannot read it.
    """
    opened = _open_executorch if path.suffix.lower() == ".pte" else _open_litert
    try:
        return opened(path)
    except Exception as error:  # these libraries raise what they like
        raise UserError(f"weights {path}: {runtime_of(path)} cannot read it ({first_line(error)})") from error


def batched(graph: Graph, path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """``graph.run`` for any number of images and threads; images of another size are a UserError."""
    lock = Lock()

    def run(images: np.ndarray) -> list[np.ndarray]:
        if images.shape[1:] != graph.images[1:]:
            shapes = "x".join(map(str, images.shape[1:])), "x".join(map(str, graph.images[1:]))
            raise UserError(f"{path}: takes images of shape {shapes[1]} alone, not {shapes[0]}")
        try:
            with lock:
                # The runtime's own memory is used again for the next image.
                rows = [[value.copy() for value in graph.run(images[i : i + 1])] for i in range(len(images))]
        except Exception as error:
            raise UserError(f"{path}: does not run ({first_line(error)})") from error
        if not rows:
            return [np.zeros((0, *shape[1:]), np.float32) for shape in graph.outputs]
        return [np.concatenate(values) for values in zip(*rows)]

    return run


def _open_executorch(path: Path) -> Graph:
    import torch
    from executorch.runtime import Runtime, Verification

    program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
    method = program.load_method("forward")
    assert method is not None
    about = method.metadata
    outputs = [tuple(about.output_tensor_meta(index).sizes()) for index in range(about.num_outputs())]

    def run(image: np.ndarray) -> list[np.ndarray]:
        values: Sequence[Any] = method.execute([torch.from_numpy(image)])
        return [value.numpy() for value in values]

    return Graph(outputs, tuple(about.input_tensor_meta(0).sizes()), run)


def _open_litert(path: Path) -> Graph:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=cores())
    interpreter.allocate_tensors()
    (images,), outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(image: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(images["index"], image)
        interpreter.invoke()
        values = [interpreter.get_tensor(output["index"]) for output in outputs]
        # The converter makes 32 bits of all integers, and PyTorch takes indices of 64.
        return [value.astype(np.int64) if value.dtype == np.int32 else value for value in values]

    return Graph([tuple(output["shape"].tolist()) for output in outputs], tuple(images["shape"].tolist()), run)

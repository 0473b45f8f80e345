"""What ``mvision demo`` does with weights: a picture file in; the drawn picture, its objects and the time out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, cast

import cv2
import numpy as np
import torch
from torch import Tensor

from mvision.drawing.pictures import class_colour
from mvision.errors import UserError, printable, shortened
from mvision.evaluation import Evaluated
from mvision.heads import head_class
from mvision.inference.predict import eval_mode
from mvision.inference.selection import Selection
from mvision.model import Model
from mvision.structures import Instances
from mvision.structures.images import BadImage, image_size, read_image, resize_image

SHOWN_SIDE = 1600  # pixels of the longer side of a drawn picture; a screen shows no more
MOST_PIXELS = 100_000_000  # of an upload; decoding more takes seconds and a gigabyte
LONGEST_NAME = 60  # characters of a file's name on the page

Colour = tuple[int, int, int]


class Row(NamedTuple):
    """One object, or one class of regions, in the table.

    Attributes:
        name: of the class.
        score: 0..1.
        box: x, y, width and height in pixels of the picture.
        colour: RGB, that of the class in the drawn picture.
        region: of a class for every pixel, not an object.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    colour: Colour
    region: bool = False


@dataclass(frozen=True)
class Found:
    """What a model finds in a picture.

    Attributes:
        picture: (h, w, 3) uint8 RGB with the results drawn on it, its longer side at most ``SHOWN_SIDE``.
        rows: sorted by falling score, objects before regions.
        seconds: that the forward pass took, of all tasks and without reading, resizing, post-processing and drawing.
        size: height and width of the picture that was given, in pixels.
        notes: what was left out or guessed while reading it.
    """

    picture: np.ndarray
    rows: list[Row]
    seconds: float
    size: tuple[int, int]
    notes: list[str] = field(default_factory=list)


class DemoModel:
    """A model that finds and draws, for any number of threads at once.

    Args:
        name: what it is called on the page: the source of its weights.
        model: ready to predict, see ``open_fastest``.
        runtime: the line that names its runtime.
        thread: one thread that runs the forward passes of all models, one after the other. A first one is run here,
            because the first takes longer: graphs are compiled in it.
    """

    def __init__(self, name: str, model: Evaluated, runtime: str, thread: Executor) -> None:
        self.name, self.runtime = name, runtime.partition(";")[0].partition(": ")[0]
        self._model, self._thread = cast(Model, model), thread
        height, width = model.config.image_size
        blank = np.zeros((height, width, 3), np.uint8)
        thread.submit(self._pass, blank, (height, width), model.tasks, Selection()).result()

    @property
    def tasks(self) -> list[str]:
        """The tasks of the model."""
        return list(self._model.tasks)

    @property
    def classes(self) -> list[str]:
        """The names of its classes."""
        return [category.name for category in self._model.config.categories]

    def find(self, file: str | Path, tasks: Sequence[str], threshold: float) -> Found:
        """Read a picture, run the model once, and draw what some of its tasks find.

        Args:
            file: of any format that ``read_image`` reads.
            tasks: of the model, at least one: those whose results are wanted.
            threshold: lowest score that is kept, 0..1.

        Raises:
            UserError: a line that names the file and why it cannot be read.
        """
        image, notes = self._read(Path(file))
        size = (image.shape[0], image.shape[1])
        prepared = resize_image(image, self._model.config.image_size)
        ratio = min(1.0, SHOWN_SIDE / max(size))
        shown = (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio)))
        image = resize_image(image, shown)
        work = self._thread.submit(self._pass, prepared, shown, tasks, Selection(threshold))
        found, seconds = work.result()
        found = self._asked_for(found, tasks)
        return Found(found.draw(image), rows_of(found, size), seconds, size, notes)

    def _read(self, file: Path) -> tuple[np.ndarray, list[str]]:
        name, notes = shortened(printable(file.name), LONGEST_NAME), []  # type: tuple[str, list[str]]
        try:
            height, width, _ = image_size(file)
            if height * width > MOST_PIXELS:
                raise UserError(
                    f"{name}: {width} x {height} pixels are too many for this page, which takes up to "
                    f"{MOST_PIXELS // 10**6} megapixels; use mvision predict --tile"
                )
            return read_image(file, pixel_range=self._model.config.pixel_range, notes=notes), notes
        except BadImage as error:
            raise UserError(f"{name}: {error.reason}") from error
        except (MemoryError, cv2.error) as error:
            raise UserError(f"{name}: cannot be decoded ({type(error).__name__})") from error

    def _pass(
        self, prepared: np.ndarray, size: tuple[int, int], tasks: Sequence[str], chosen: Selection
    ) -> tuple[Instances, float]:
        model = self._model
        with eval_mode(model):
            images = torch.from_numpy(prepared)[None].permute(0, 3, 1, 2).to(model.device)
            self._wait()
            start = time.perf_counter()
            outputs: dict[str, dict[str, Tensor]] = model(images)
            self._wait()
            seconds = time.perf_counter() - start
            return model.postprocess(outputs, [size], chosen.threshold, tasks=tasks)[0], seconds

    def _wait(self) -> None:
        """Until a GPU has done all that it was given."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        elif self._model.device.type == "mps":
            torch.mps.synchronize()

    def _asked_for(self, found: Instances, tasks: Sequence[str]) -> Instances:
        """Without the masks and points of a head that serves one of the tasks and finds more than that one does."""
        heads = [head_class(task, self._model.config.heads[task]) for task in tasks]
        needs = {name for head in heads if head.kind != "regions" for name in head.needs}
        if not needs:
            return found
        return replace(
            found,
            masks=found.masks if "masks" in needs else None,
            keypoints=found.keypoints if "keypoints" in needs else None,
        )


def rows_of(found: Instances, size: tuple[int, int]) -> list[Row]:
    """The rows of the table, with boxes in pixels of the picture at ``size`` (height, width)."""
    rows = []
    for part, region in ((found, False), (found.regions, True)):
        if part is None:
            continue
        ratio = np.array([size[1] / part.size[1], size[0] / part.size[0]] * 2)
        boxes = part.boxes.reshape(-1, 4).astype(np.float64) * ratio
        for name, score, label, (x, y, right, bottom) in zip(
            part.class_names, part.scores.tolist(), part.labels.tolist(), boxes.tolist()
        ):
            rows.append(Row(name, score, (x, y, right - x, bottom - y), class_colour(label), region))
    return rows

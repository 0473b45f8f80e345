"""What the tests of ``mvision demo`` try: a model of painted rectangles, pictures, and files that are none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from mvision.deploy.demo_model import DemoModel
from mvision.inference.selection import Threshold
from mvision.structures import Instances
from tests.fake_model import paint, save
from tests.label_model import LabelModel

RUNTIME = "PyTorch on cpu in fp32, image size 96x128; faster after an export"
# A large red and a small green rectangle; the green one has a score of 0.435, the red one 1.0.
PAINTED = paint((96, 128), [(0, (20, 10, 70, 60)), (1, (90, 60, 108, 75))])


class TickedModel(LabelModel):
    """Records of which tasks results were asked for."""

    def __init__(self, tasks: Sequence[str] = ("detection",)) -> None:
        super().__init__(tasks)
        self.config.heads = dict.fromkeys(tasks)
        self.asked: list[list[str]] = []

    def postprocess(  # type: ignore[override]
        self,
        outputs: dict[str, dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
        threshold: Threshold,
        *,
        tasks: Sequence[str],
    ) -> list[Instances]:
        self.asked.append(list(tasks))
        return super().postprocess(outputs, sizes, threshold)


def demo_model(*tasks: str, name: str = "runs/detection/1") -> DemoModel:
    return DemoModel(name, TickedModel(tasks or ("detection",)), RUNTIME, ThreadPoolExecutor(1))  # type: ignore[arg-type]


def painted(folder: Path, name: str = "street.png") -> Path:
    return save(folder / name, PAINTED)


def _write(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def _cut(folder: Path) -> Path:
    data = painted(folder, "whole.jpg").read_bytes()
    return _write(folder, "cut.jpg", data[: len(data) // 2])


# What it is -> makes the file; a part of the line about it.
BAD = {
    "text": (partial(_write, name="notes.jpg", data=b"no picture at all"), "notes.jpg: "),
    "cut": (_cut, "cut.jpg: "),
    "empty": (partial(_write, name="none.png", data=b""), "none.png: the file is empty"),
    "svg": (partial(_write, name="logo.svg", data=b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "logo.svg: "),
}

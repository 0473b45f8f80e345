"""A model that predicts one instance per coloured rectangle of a painted image, without training or a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mvision.evaluation import BoxMetric, Metric
from mvision.inference.predict import predict_images
from mvision.inference.selection import Selection, Threshold
from mvision.structures import Category, Instances

CATEGORIES = [Category(id=3, name="red"), Category(id=9, name="green"), Category(id=10, name="blue")]
SIZE = (96, 128)


class FakeModel(nn.Module):
    """Class ``i`` is where channel ``i`` is above 200 and the others below 60."""

    best_thresholds: Mapping[str, float] = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=SIZE, categories=CATEGORIES, pixel_range=None)
        self.categories = CATEGORIES
        self.tasks = ["detection"]
        self.part = nn.BatchNorm2d(3)
        self.batch_sizes: list[int] = []
        self.own_threads = False

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def head(self, task: str) -> SimpleNamespace:
        assert task == "detection"
        return SimpleNamespace(classes=self.categories, kind="objects")

    def evaluators(self, task: str) -> list[type[Metric]]:
        assert task == "detection"
        return [BoxMetric]

    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        assert not self.training
        assert not self.part.training
        assert not torch.is_grad_enabled()
        assert images.dtype == torch.uint8
        assert tuple(images.shape[1:]) == (3, *SIZE)
        self.batch_sizes.append(len(images))
        return {"detection": {"images": images}}

    def postprocess(
        self,
        outputs: dict[str, dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
        threshold: Threshold,
        *,
        multi_label: bool = False,
        nms: float | None = None,
    ) -> list[Instances]:
        images = outputs["detection"]["images"]
        assert len(images) == len(sizes)
        chosen = Selection(threshold, multi_label, nms)
        every = [find_rectangles(image, size, chosen.lowest) for image, size in zip(images.cpu().numpy(), sizes)]
        return [chosen.without_overlaps(chosen.above(found)) for found in every]

    def results(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> dict[str, list[Instances]]:
        return {"detection": self.postprocess(outputs, sizes, threshold)}

    def predict(self, images: Sequence[np.ndarray], threshold: float = 0.5) -> list[Instances]:
        return predict_images(self, images, threshold)


def find_rectangles(image: np.ndarray, size: tuple[int, int], threshold: float) -> Instances:
    boxes, labels, scores = [], [], []
    for label in range(3):
        others = np.delete(image, label, axis=0).max(axis=0)
        painted = ((image[label] > 200) & (others < 60)).astype(np.uint8)
        for x, y, w, h, _ in cv2.connectedComponentsWithStats(painted)[2][1:].tolist():
            boxes.append([x, y, x + w, y + h])
            labels.append(label)
            scores.append(min(1.0, 0.3 + w * h / 2000))
    order = np.argsort(-np.array(scores), kind="stable")
    scale = np.array([size[1] / image.shape[2], size[0] / image.shape[1]] * 2, np.float32)
    instances = Instances(
        boxes=(np.array(boxes, np.float32).reshape(-1, 4) * scale)[order],
        scores=np.array(scores, np.float32)[order],
        labels=np.array(labels, np.int64)[order],
        size=size,
        categories=CATEGORIES,
    )
    return instances.filter(instances.scores >= threshold)


def paint(size: tuple[int, int], rectangles: Sequence[tuple[int, tuple[int, int, int, int]]]) -> np.ndarray:
    """(H, W, 3) uint8 grey with rectangles (class, xyxy)."""
    image = np.full((*size, 3), 128, np.uint8)
    for label, (x0, y0, x1, y1) in rectangles:
        image[y0:y1, x0:x1] = np.eye(3, dtype=np.uint8)[label] * 255
    return image


def save(path: Path, image: np.ndarray) -> Path:
    """Write an image file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def written(folder: Path) -> list[str]:
    """The files below a folder, hidden ones included."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

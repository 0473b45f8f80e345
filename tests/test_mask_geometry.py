"""The geometry of masks from file to result: a model whose masks are exact has to be right to the pixel.

Shapes are painted in pure colours, so that a "model" can compute their masks from its own input, at the stride of real
masks. Its results are compared with the painted shapes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mvision.config import AugmentConfig, DataConfig
from mvision.data import CocoSplit, Dataset, SampleKey, build_eval_loader, find_layout
from mvision.evaluation import BoxMetric, MaskMetric, Metric
from mvision.evaluation.evaluate import evaluate, make_metrics
from mvision.heads.instance_seg.head import MaskConfig, MaskHead
from mvision.inference.predict import predict_images
from mvision.structures import Category, Instances
from mvision.structures.masks import encode_mask
from tests.coco_files import write_set

CATEGORIES = [Category(id=2, name="red"), Category(id=4, name="green"), Category(id=9, name="blue")]
SIZES = [(331, 517), (480, 640), (641, 333), (301, 301)]  # height, width
ORIENTATIONS = {1: (0, False), 3: (2, False), 6: (1, False), 8: (3, False), 5: (1, True)}  # EXIF: quarter turns, mirror


def scene(size: tuple[int, int]) -> np.ndarray:
    """(3, H, W) bool: a disc, two rings and a star that do not overlap."""
    height, width = size
    canvases = np.zeros((3, height, width), np.uint8)
    unit = min(size)
    cv2.circle(canvases[0], (int(0.25 * width), int(0.3 * height)), int(0.17 * unit), 1, -1)
    for x in (0.55, 0.85):
        cv2.circle(canvases[1], (int(x * width), int(0.25 * height)), int(0.11 * unit), 1, int(0.07 * unit))
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.13, 0.24)[:, None] * unit
    star = np.array((0.5 * width, 0.72 * height)) + reach * np.stack((np.sin(turns), -np.cos(turns)), 1)
    cv2.fillPoly(canvases[2], [star.round().astype(np.int32)], 1)
    return canvases.astype(bool)


def write_scene(path: Path, masks: np.ndarray, orientation: int = 1) -> None:
    """Store the picture rotated, as a camera held in another orientation does: readers have to rotate it back."""
    picture = np.ascontiguousarray(masks.transpose(1, 2, 0)).astype(np.uint8) * 255
    turns, mirrored = ORIENTATIONS[orientation]
    stored = np.rot90(picture, turns)
    stored = stored[::-1] if mirrored else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)


class Oracle(nn.Module):
    """Query i predicts colour i, with a mask of stride 4 as mask heads do."""

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=image_size, categories=[], pixel_range=None)
        self.categories = CATEGORIES
        self.tasks = ["instance-seg"]
        self.own_threads = False
        small = MaskConfig(embed_dim=8, num_heads=1, num_layers=1, ffn_dim=8, pixel_dim=8, mask_dim=4)
        self.mask_head = MaskHead(small, [8, 8], [8, 16], CATEGORIES)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def head(self, task: str) -> MaskHead:
        return self.mask_head

    def evaluators(self, task: str) -> list[type[Metric]]:
        return [MaskMetric, BoxMetric]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert tuple(images.shape[-2:]) == self.config.image_size
        masks = F.avg_pool2d(images.float() / 255, 4) - 0.5
        batch = len(images)
        boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(batch, 3, 4)
        return {"logits": (20 * torch.eye(3) - 10).expand(batch, 3, 3), "boxes": boxes, "masks": masks}

    def postprocess(
        self, outputs: dict[str, Tensor], sizes: list[tuple[int, int]], threshold: float, **_: object
    ) -> list[Instances]:
        return self.mask_head.postprocess(outputs, sizes, threshold)

    def results(
        self, outputs: dict[str, Tensor], sizes: list[tuple[int, int]], threshold: float
    ) -> dict[str, list[Instances]]:
        return {"instance-seg": self.postprocess(outputs, sizes, threshold)}


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("image_size", [(640, 640), (512, 768)])
@pytest.mark.parametrize("size", SIZES)
def test_prediction(tmp_path: Path, size: tuple[int, int], image_size: tuple[int, int]) -> None:
    masks = scene(size)
    paths = []
    for orientation in ORIENTATIONS:
        paths.append(tmp_path / f"{orientation}.png")
        write_scene(paths[-1], masks, orientation)
    for found in predict_images(Oracle(image_size), paths):
        assert found.size == size
        assert found.masks is not None
        for label, mask in zip(found.labels.tolist(), found.masks):
            assert overlap(mask, masks[label]) >= 0.98


def annotated(folder: Path) -> CocoSplit:
    """Scenes of all sizes and orientations, outlines as polygons (discs, stars) and as run lengths (rings)."""
    images, annotations = [], []
    folder.mkdir()
    (folder / "images").mkdir()
    for number, size in enumerate(SIZES, start=1):
        masks = scene(size)
        orientation = list(ORIENTATIONS)[number - 1]
        write_scene(folder / "images" / f"{number}.png", masks, orientation)
        images.append({"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]})
        for label, mask in enumerate(masks):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            outline = encode_mask(mask)
            if label != 1:
                (contour,), _ = cv2.findContours(np.kron(mask, np.ones((4, 4), np.uint8)).astype(np.uint8), 0, 1)
                outline = [((contour[:, 0] + 0.5) / 4).ravel().tolist()]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": CATEGORIES[label].id,
                    "bbox": [float(value) for value in box],
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": outline,
                }
            )
    tree = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category.id, "name": category.name} for category in CATEGORIES],
    }
    for split in ("train", "val"):
        write_set(folder, tree, split, pictures=False)
    return CocoSplit(find_layout(folder).split("val"), ("boxes", "masks"))


def test_evaluation(tmp_path: Path) -> None:
    split = annotated(tmp_path / "data")
    model = Oracle((640, 640))
    loader = build_eval_loader(split, DataConfig(workers=0), batch_size=3, image_size=(640, 640))
    figures = evaluate(model, loader, make_metrics(model, split), progress=False)["instance-seg"]
    assert figures["AP"] > 0.99  # up to an IoU of 0.95
    assert figures["bbox/AP"] == 0  # the oracle's boxes are the whole image


@pytest.mark.parametrize("form", ["filled", "whole"])
@pytest.mark.parametrize("epoch", range(6))
def test_training_masks_follow_every_augmentation(tmp_path: Path, epoch: int, form: str) -> None:
    """On the picture that training sees, the colours and the masks drawn for it are the same shapes."""
    split = annotated(tmp_path / "data")
    everything = AugmentConfig.model_validate(
        {"photometric": 0, "zoom_out": 0.6, "crop": 0.7, "flip": 0.5, "vertical_flip": 0.5}
        | {"mosaic": 0.5, "mosaic_form": form, "mixup": 0, "last_epochs": 0}
    )
    dataset = Dataset(split, everything, seed=1)
    for index in range(len(dataset)):
        sample = dataset[SampleKey(epoch, index, (384, 512))]
        assert sample.image is not None
        assert sample.targets is not None
        assert sample.targets.masks is not None
        for label in range(3):
            painted = (sample.image[..., label] > 127) & (np.delete(sample.image, label, 2).max(2) < 100)
            drawn = sample.targets.masks[sample.targets.labels == label].numpy().any(0)
            if drawn.sum() > 1500:
                # What is cut to nearly nothing stays painted and is not labelled.
                near = cv2.dilate(drawn.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
                # The narrow rings are run lengths, which a turn samples twice.
                least = 0.95 if drawn.sum() < 6000 else 0.98 if form == "filled" else 0.96
                assert overlap(drawn, painted & near) >= least

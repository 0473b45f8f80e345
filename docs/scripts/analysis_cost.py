"""CPU seconds of the analysis after an evaluation, beside those of the COCO figures, on made-up results.

    python docs/scripts/analysis_cost.py                 # 5,000 images as of COCO: 80 classes, 300 results an image
    python docs/scripts/analysis_cost.py --images 500 --metric segm --backend pycocotools

Objects are drawn at random, seven in an image. Of the results two for every object are near it, the others anywhere.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from pycocotools import mask as coco_mask

from mvision.evaluation import BoxMetric, MaskMetric
from mvision.evaluation.analysis import analyse
from mvision.evaluation.pictures import write_pictures
from mvision.structures import Category

CLASSES, OBJECTS, SIDE = 80, 7, 640
METRICS = {"bbox": BoxMetric, "segm": MaskMetric}


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) xywh in pixels."""
    sides = rng.uniform(10, 200, (count, 2))
    return np.concatenate((rng.uniform(0, SIDE - sides), sides), 1)


def mask_of(box: np.ndarray) -> dict[str, Any]:
    """A rhombus in the box."""
    x, y, w, h = box.tolist()
    polygon = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
    return coco_mask.merge(coco_mask.frPyObjects([polygon], SIDE, SIDE))


def made_up(images: int, results: int, with_masks: bool) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """Annotations, and the results of every image."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    found = []
    for image in range(images):
        boxes, labels = random_boxes(rng, OBJECTS), rng.integers(0, CLASSES, OBJECTS)
        for box, label in zip(boxes, labels.tolist()):
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box.tolist()}
            shape = {"segmentation": mask_of(box)} if with_masks else {}
            annotations.append({**entry, "area": float(box[2] * box[3]), "iscrowd": 0, **shape})
        near = np.repeat(boxes, 2, 0) + rng.normal(0, 5, (2 * OBJECTS, 4))
        other = random_boxes(rng, results - len(near))
        all_boxes = np.concatenate((near, other)).clip(min=1)
        all_labels = np.concatenate((np.repeat(labels, 2), rng.integers(0, CLASSES, len(other))))
        scores = np.concatenate((rng.beta(4, 2, len(near)), rng.beta(1, 20, len(other))))
        found.append(
            [
                {"image_id": image, "category_id": label, "bbox": box.tolist(), "score": score}
                | ({"segmentation": mask_of(box)} if with_masks else {})
                for label, box, score in zip(all_labels.tolist(), all_boxes, scores.tolist())
            ]
        )
    tree = {
        "images": [{"id": image, "width": SIDE, "height": SIDE} for image in range(images)],
        "annotations": annotations,
        "categories": [{"id": label, "name": f"class {label}"} for label in range(CLASSES)],
    }
    return tree, found


def main() -> None:
    """Print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--results", type=int, default=300)
    parser.add_argument("--metric", choices=METRICS, default="bbox")
    parser.add_argument("--backend", choices=("hotcoco", "pycocotools"), default="hotcoco")
    options = parser.parse_args()
    tree, found = made_up(options.images, options.results, options.metric == "segm")
    categories = [Category(id=label, name=f"class {label}") for label in range(CLASSES)]
    metric = METRICS[options.metric](tree, categories, backend=options.backend)
    for image, results in enumerate(found):
        metric.update(results, [image])
    print(f"{options.metric}, {options.backend}: {options.images} images, {options.results} results each")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        metric.compute()
        middle = time.process_time()
        analysis = analyse(metric)
        end = time.process_time()
        write_pictures(analysis, Path(folder))
        pictures = time.process_time()
    print(f"COCO figures {middle - begin:.1f} s, analysis {end - middle:.1f} s, pictures {pictures - end:.1f} s")


if __name__ == "__main__":
    main()

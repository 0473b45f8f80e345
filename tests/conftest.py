"""What every test needs: one thread (tests are small, and threads of many processes get in each other's way)."""

import gc
import json
import signal

import cv2
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Leave the million objects of imports and tests out of every further garbage collection, 6 % of the time."""
    gc.collect()
    gc.freeze()


def write_squares(root, images=4, objects=2, size=64, seed=0, splits=("train", "val")):
    """A tiny COCO data set: coloured squares of two classes (category ids 2 and 5) on grey."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for split in splits:
        entries, annotations = [], []
        for index in range(images):
            picture = np.full((size, size, 3), 114, np.uint8)
            name = f"{split}_{index}.jpg"
            for _ in range(objects):
                side = int(rng.integers(size // 5, size // 3))
                x, y = (int(v) for v in rng.integers(0, size - side, 2))
                label = int(rng.integers(2))
                picture[y : y + side, x : x + side] = (220, 40, 40) if label else (40, 40, 220)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": (2, 5)[label],
                        "bbox": [x, y, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
                    }
                )
            cv2.imwrite(str(root / "images" / name), picture)
            entries.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        categories = [{"id": 2, "name": "blue"}, {"id": 5, "name": "red"}]
        content = {"images": entries, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def squares(tmp_path):
    """A folder with 4 + 4 images of two squares each."""
    return write_squares(tmp_path / "squares")

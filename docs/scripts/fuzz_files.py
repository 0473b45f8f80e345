"""Sound inputs that the mutations of ``fuzz.py`` start from: small data sets, pictures of every format, a model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64  # not square, so that swapped sides would show
TRAIN, VAL = range(4), range(4, 6)
# The smallest model, trained for a step or two.
SMALL = {
    "model.backbone.name": "test_resnet",
    "model.backbone.pretrained": False,
    "model.neck.embed_dim": 32,
    "model.neck.num_heads": 2,
    "model.neck.ffn_dim": 32,
    "model.heads.detection.embed_dim": 32,
    "model.heads.detection.num_heads": 2,
    "model.heads.detection.ffn_dim": 32,
    "model.heads.detection.num_queries": 10,
    "model.heads.detection.num_layers": 1,
    "model.heads.detection.num_denoising": 2,
    "model.image_size": 64,
    "data.workers": 0,
    "train.epochs": 1,
    "train.batch_size": 2,
    "train.precision": "fp32",
}
OPTIONS = [part for key, value in SMALL.items() for part in ("-o", f"{key}={json.dumps(value)}")]


def boxes(number: int) -> list[tuple[int, int, int, int, int]]:
    """(class, x, y, width, height) of the two objects of a picture."""
    return [(number % 2, 6 + 4 * number, 8, 24, 20), (1 - number % 2, 50, 30 - 3 * number, 20, 24)]


def pixels(number: int) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8."""
    picture = np.random.default_rng(number).integers(90, 130, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    for label, x, y, width, height in boxes(number):
        picture[y : y + height, x : x + width] = (220, 40, 40) if label else (40, 40, 220)
    return picture


def coco_tree(numbers: range) -> dict[str, Any]:
    """Boxes, polygons, run lengths of both kinds and keypoints."""
    images, annotations = [], []
    for number in numbers:
        images.append({"id": number + 1, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        for label, x, y, w, h in boxes(number):
            outline: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if number % 3 == 1:
                runs = [x * HEIGHT + y, *([h, HEIGHT - h] * (w - 1)), h]
                outline = {"size": [HEIGHT, WIDTH], "counts": [*runs, HEIGHT * WIDTH - sum(runs)]}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": (2, 5)[label],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": outline,
                    "keypoints": [x, y, 2, x + w, y + h, 1],
                    "num_keypoints": 2,
                }
            )
    points = {"keypoints": ["left_end", "right_end"], "skeleton": [[1, 2]], "supercategory": "thing"}
    categories = [{"id": number, "name": name, **points} for number, name in ((2, "blue"), (5, "red"))]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path) -> None:
    """``images/`` and ``annotations/``."""
    for folder in ("images", "annotations"):
        (root / folder).mkdir(parents=True)
    for number in (*TRAIN, *VAL):
        Image.fromarray(pixels(number)).save(root / "images" / f"{number}.png")
    for name, numbers in (("train", TRAIN), ("val", VAL)):
        (root / "annotations" / f"{name}.json").write_text(json.dumps(coco_tree(numbers)), encoding="utf-8")


def yolo_line(form: str, label: int, x: int, y: int, w: int, h: int) -> str:
    """A box, a polygon or a pose of two points, in shares of the picture."""
    left, top, right, low = x / WIDTH, y / HEIGHT, (x + w) / WIDTH, (y + h) / HEIGHT
    numbers = [(left + right) / 2, (top + low) / 2, right - left, low - top]
    if form == "polygon":
        numbers = [left, top, right, top, right, low, left, low]
    if form == "pose":
        numbers += [left, top, 2, right, low, 1]
    return f"{label} " + " ".join(f"{number:.6g}" for number in numbers)


def yolo_tree(form: str) -> dict[str, Any]:
    """The content of ``data.yaml``."""
    tree: dict[str, Any] = {"path": ".", "train": "images/train", "val": "images/val", "names": {0: "blue", 1: "red"}}
    return tree | ({"kpt_shape": [2, 3], "flip_idx": [1, 0]} if form == "pose" else {})


def write_yolo(root: Path, form: str) -> None:
    """``data.yaml``, ``images/`` and ``labels/``."""
    for name, numbers in (("train", TRAIN), ("val", VAL)):
        for folder in ("images", "labels"):
            (root / folder / name).mkdir(parents=True)
        for number in numbers:
            Image.fromarray(pixels(number)).save(root / "images" / name / f"{number}.png")
            text = "\n".join(yolo_line(form, *box) for box in boxes(number)) + "\n"
            (root / "labels" / name / f"{number}.txt").write_text(text, encoding="utf-8")
    (root / "data.yaml").write_text(json.dumps(yolo_tree(form)), encoding="utf-8")


def picture_files() -> dict[str, bytes]:
    """File name -> bytes: the formats and pixel types that Pillow writes here, all of the same picture."""
    colour = Image.fromarray(pixels(0))
    grey = np.asarray(colour.convert("L"))
    deep, real = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey.astype(np.float32))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    variants: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.png": (colour, {}),
        "palette.png": (colour.quantize(16), {"transparency": 0}),
        "alpha.png": (colour.convert("RGBA"), {}),
        "deep.png": (deep, {}),
        "plain.jpg": (colour, {"quality": 90}),
        "exif.jpg": (colour, {"exif": exif}),
        "progressive.jpg": (colour, {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "plain.bmp": (colour, {}),
        "plain.tif": (colour, {}),
        "lzw.tif": (colour, {"compression": "tiff_lzw"}),
        "deep.tif": (deep, {}),
        "float.tif": (real, {}),
        "pages.tif": (colour, {"save_all": True, "append_images": [colour]}),
        "plain.webp": (colour, {}),
        "plain.gif": (colour, {}),
        "plain.ppm": (colour, {}),
        "plain.jp2": (colour, {}),
        "plain.avif": (colour, {}),
        "plain.mpo": (colour, {}),
    }
    return {name: data for name, (image, more) in variants.items() if (data := _encoded(image, name, more))}


def _encoded(image: Image.Image, name: str, options: dict[str, Any]) -> bytes | None:
    """None where this Pillow cannot write the format."""
    buffer, suffix = io.BytesIO(), name[name.rindex(".") :]
    Image.init()
    form = Image.EXTENSION.get(suffix)
    if form not in Image.SAVE:
        return None
    try:
        image.save(buffer, form, **options)
    except (OSError, KeyError):
        return None
    return buffer.getvalue()


def prepare(base: Path, command: Callable[..., None]) -> None:
    """Write every sound input below ``base``; ``command`` runs the command line with arguments.

    ``coco``, ``yolo-box``, ``yolo-polygon``, ``yolo-pose``: data sets. ``pictures``: one of every format. ``run``: a
    trained run; ``model.onnx``, ``openvino``: its exports. All of them are tried once, as they are.
    """
    base.mkdir(parents=True, exist_ok=True)
    write_coco(base / "coco")
    for form in ("box", "polygon", "pose"):
        write_yolo(base / f"yolo-{form}", form)
    (base / "pictures").mkdir()
    for name, data in picture_files().items():
        (base / "pictures" / name).write_bytes(data)
    for name in ("coco", "yolo-box", "yolo-polygon", "yolo-pose"):
        command("data", "check", base / name)
    command("train", "--data", base / "coco", "--output", base / "run", *OPTIONS)
    command("export", "--weights", base / "run", "--output", base / "model.onnx")
    command("export", "--weights", base / "run", "--format", "openvino", "--output", base / "openvino")
    for weights in ("run", "model.onnx", "openvino"):
        command("val", "--weights", base / weights, "--data", base / "coco", "--workers", 0, "--device", "cpu")

"""What tiles are good for, and what they need: AP on mosaics with and without them, and the memory of a huge TIFF.

    python docs/scripts/tiles.py ap --weights runs/detection/1 --data det_bccd --side 4 [--limit N] [--work DIR]
    python docs/scripts/tiles.py large [--side 20000] [--weights W] [--work DIR]

``ap`` joins side x side validation pictures into one large picture, whose objects are small against it, and evaluates
the weights on these mosaics: whole, on tiles, and on tiles and the whole picture; for comparison on the same pictures
one by one, also on tiles that are smaller than they are, which cut the larger objects. ``large`` writes a TIFF of that
side (noise with rectangles, in compressed tiles and uncompressed in one piece), predicts on it in a process of its own,
and prints the time and the peak of that process's memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mvision.commands.val import validate
from mvision.data import CocoSplit, find_layout
from mvision.structures.images import read_image, write_image

SHOWN = ("AP", "AP50", "AP_small", "AP_medium", "AP_large")


def write_mosaics(data: Path, work: Path, side: int, limit: int | None) -> Path:
    """A COCO data set whose pictures are ``side`` x ``side`` pictures of a validation set, cell by cell.

    Pictures of other sizes than the most frequent one are left out, and those that fill no mosaic.
    """
    split = CocoSplit(find_layout(data).split("val", {"boxes"}), ("boxes", "masks"))
    content = split.coco_dict
    sizes = [(image["height"], image["width"]) for image in content["images"]]
    height, width = max(set(sizes), key=sizes.count)
    chosen = [image for image, size in zip(content["images"], sizes) if size == (height, width)][:limit]
    of_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    out = work / f"mosaics-{data.name}-{side}"
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(len(chosen) // side**2):
        canvas = np.zeros((side * height, side * width, 3), np.uint8)
        name = f"mosaic_{number}.png"
        for cell, image in enumerate(chosen[number * side**2 : (number + 1) * side**2]):
            top, left = cell // side * height, cell % side * width
            canvas[top : top + height, left : left + width] = read_image(split.folder / image["file_name"])
            for annotation in of_image.get(image["id"], []):
                moved = _moved(annotation, left, top, canvas.shape[:2])
                annotations.append({**moved, "id": len(annotations) + 1, "image_id": number + 1})
        write_image(out / "images" / name, canvas)
        images.append({"id": number + 1, "file_name": name, "height": canvas.shape[0], "width": canvas.shape[1]})
    mosaics = {"images": images, "annotations": annotations, "categories": content["categories"]}
    (out / "annotations" / "val.json").write_text(json.dumps(mosaics))
    print(
        f"{data.name}: {len(chosen)} of {len(sizes)} pictures of {width} x {height} in {len(images)} mosaics of "
        f"{side * width} x {side * height}, {len(annotations)} objects"
    )
    return out


def _moved(annotation: dict[str, Any], left: int, top: int, size: tuple[int, ...]) -> dict[str, Any]:
    x, y, w, h = annotation["bbox"]
    moved = {key: annotation[key] for key in ("category_id", "area", "iscrowd")} | {"bbox": [x + left, y + top, w, h]}
    outline = annotation.get("segmentation")
    if isinstance(outline, list):
        corner = np.array((left, top))
        moved["segmentation"] = [(np.reshape(part, (-1, 2)) + corner).ravel().tolist() for part in outline]
    elif outline:
        full = np.zeros(size, np.uint8, order="F")
        mask = coco_mask.decode(outline)
        full[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        rle = coco_mask.encode(full)
        moved["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return moved


def compare(weights: str, data: Path, side: int, limit: int | None, overlap: float, work: Path) -> None:
    """Print a table of the figures on the pictures and on their mosaics."""
    mosaics = write_mosaics(data, work, side, limit)
    records = json.loads((mosaics / "annotations" / "val.json").read_text())["images"]
    tile = (records[0]["height"] // side, records[0]["width"] // side)
    pictures = write_mosaics(data, work, 1, len(records) * side**2)
    half = (tile[0] // 2, tile[1] // 2)
    settings: dict[str, tuple[Path, dict[str, Any]]] = {
        "the same pictures one by one": (pictures, {"tile": (0, 0)}),
        "one by one, on tiles of half their sides": (pictures, {"tile": half, "overlap": overlap, "whole": False}),
        "one by one, on such tiles and whole": (pictures, {"tile": half, "overlap": overlap}),
        "mosaics, whole": (mosaics, {"tile": (0, 0)}),
        "mosaics, on tiles": (mosaics, {"tile": tile, "overlap": overlap, "whole": False}),
        "mosaics, on tiles and whole": (mosaics, {"tile": tile, "overlap": overlap}),
    }
    print(f"| {data.name} | {' | '.join(SHOWN)} | seconds |\n|---|{'---|' * (len(SHOWN) + 1)}")
    for name, (folder, more) in settings.items():
        begin = time.monotonic()
        validate(weights, data=str(folder), split="val", output=work / "figures", workers=0, **more)
        figures = json.loads((work / "figures" / "metrics.json").read_text())
        for task, values in figures.items():
            row = " | ".join(f"{values[figure]:.3f}" if figure in values else "-" for figure in SHOWN)
            print(f"| {name}, {task} | {row} | {time.monotonic() - begin:.0f} |", flush=True)


def write_large(path: Path, side: int, kind: str) -> None:
    """A TIFF of side x side pixels, some rows at a time: grey noise with a coloured rectangle in every 512 pixels."""
    import tifffile

    noise = np.random.default_rng(0).integers(100, 156, (512, side, 3), dtype=np.uint8)
    for left in range(200, side - 60, 512):
        noise[200:240, left : left + 60] = (220, 40, 40)
    if kind == "one piece":
        pixels = tifffile.memmap(path, shape=(side, side, 3), dtype=np.uint8, photometric="rgb")
        for top in range(0, side, 512):
            pixels[top : top + 512] = noise[: min(512, side - top)]
        pixels.flush()
        return

    def tiles() -> Iterator[np.ndarray]:
        for top in range(0, side, 512):
            for left in range(0, side, 512):
                part = noise[: side - top, left : left + 512]
                yield np.pad(part, ((0, 512 - part.shape[0]), (0, 512 - part.shape[1]), (0, 0)))

    options: dict[str, Any] = {"tile": (512, 512), "compression": "zlib", "compressionargs": {"level": 1}}
    tifffile.imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint8, photometric="rgb", **options)


def measure_large(side: int, weights: str | None, tile: int, work: Path) -> None:
    """Print the time and the memory of ``mvision predict --tile`` on large TIFFs."""
    for kind in ("tiles", "one piece"):
        path = work / f"large-{kind.replace(' ', '-')}.tif"
        write_large(path, side, kind)
        code = (
            "import resource, sys, torch\nfrom mvision.cli.main import run\n"
            "code = run(sys.argv[1:])\n"
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, 'MB')\nsys.exit(code)"
        )
        arguments = ["predict", str(path), "--tile", str(tile), "--threshold", "0.3", "--output", str(work / kind)]
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--weights", weights or str(_random_weights(work))],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - begin
        written = sorted(file.name for file in (work / kind).iterdir()) if done.returncode == 0 else []
        print(f"{side} x {side} in {kind} ({path.stat().st_size / 1e6:.0f} MB), {seconds:.0f} s, files {written}")
        print(done.stdout + done.stderr, flush=True)
        path.unlink()


def _random_weights(work: Path) -> Path:
    from mvision import create_model
    from mvision.weights import save_weights

    path = work / "random.safetensors"
    if not path.is_file():
        save_weights(create_model("tiny", tasks=["detection"], num_classes=3, image_size=192), path)
    return path


def main() -> None:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ap", "large"))
    parser.add_argument("--weights")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--side", type=int, default=None, help="pictures, or pixels of the TIFF, on a side")
    parser.add_argument("--limit", type=int, help="of the validation pictures")
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--tile", type=int, default=640)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mvision-tiles")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.what == "ap":
        compare(given.weights, given.data, given.side or 4, given.limit, given.overlap, given.work)
    else:
        measure_large(given.side or 20_000, given.weights, given.tile, given.work)


if __name__ == "__main__":
    main()

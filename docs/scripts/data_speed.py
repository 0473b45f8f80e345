"""How long `mvision data check` and the start of a training take, compared with another checkout, in turns.

    python docs/scripts/data_speed.py --against ../before                     # 20,000 generated annotations
    python docs/scripts/data_speed.py --against ../before --data my_data      # a data set of your own

The start of a training ends with the line that names the run: by then the data is read and the model is built. Both
checkouts run with this interpreter, so they share all libraries. Printed are the medians in seconds and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES, OBJECTS, SIZE = 1000, 20, 160  # 20,000 annotations


def main() -> None:
    """Generate, measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="the root of another checkout")
    parser.add_argument("--data", type=Path, help="a data set; default: a generated one")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    trees = {"this": ROOT, "other": arguments.against.resolve()}
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or generate(Path(folder) / "data")
        for name, measure in (("data check", check), ("data check --quick", quick_check), ("start of train", start)):
            seconds: dict[str, list[float]] = {tree: [] for tree in trees}
            for _ in range(arguments.repeats):
                for tree, root in trees.items():
                    seconds[tree].append(measure(root, data.resolve(), Path(folder)))
            this, other = (statistics.median(values) for values in seconds.values())
            print(f"{name:20} {this:6.2f} s, other {other:6.2f} s, ratio {this / other:.3f}", flush=True)


def generate(folder: Path) -> Path:
    """A COCO data set of small pictures with a polygon for every object."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, count in (("train", IMAGES * 9 // 10), ("val", IMAGES // 10)):
        tree: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "categories": []}
        tree["categories"] = [{"id": n + 1, "name": f"class {n}"} for n in range(10)]
        for number in range(count):
            name = f"{split}_{number}.jpg"
            cv2.imwrite(str(folder / "images" / name), rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
            tree["images"].append({"id": number + 1, "file_name": name, "width": SIZE, "height": SIZE})
            for _ in range(OBJECTS):
                x, y = rng.uniform(0, SIZE - 50, 2).round(2).tolist()
                w, h = rng.uniform(5, 50, 2).round(2).tolist()
                angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
                points = np.stack((x + w / 2 + w / 2 * np.cos(angles), y + h / 2 + h / 2 * np.sin(angles)), axis=1)
                tree["annotations"].append(
                    {
                        "id": len(tree["annotations"]) + 1,
                        "image_id": number + 1,
                        "category_id": int(rng.integers(1, 11)),
                        "bbox": [x, y, w, h],
                        "area": round(w * h * 0.785, 2),
                        "iscrowd": 0,
                        "segmentation": [points.round(2).reshape(-1).tolist()],
                    }
                )
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(tree))
    return folder


def check(root: Path, data: Path, _: Path) -> float:
    """Seconds of ``mvision data check``."""
    return _seconds(root, "data", "check", str(data))


def quick_check(root: Path, data: Path, _: Path) -> float:
    """Seconds of ``mvision data check --quick``."""
    return _seconds(root, "data", "check", "--quick", str(data))


def start(root: Path, data: Path, folder: Path) -> float:
    """Seconds from the start of ``mvision train`` to the line that names the run."""
    options = ("--workers", "0", "--output", str(folder / f"run{time.monotonic_ns()}"))
    command = _command("train", "--task", "instance-seg", "--data", str(data), *options)
    begin = time.monotonic()
    with subprocess.Popen(command, env=_environment(root), cwd=root, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            lines.append(line)
            if line.startswith("run "):
                seconds = time.monotonic() - begin
                run.kill()
                return seconds
    sys.exit(f"{root}: the training did not start: {''.join(lines)}")


def _seconds(root: Path, *arguments: str) -> float:
    begin = time.monotonic()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(_command(*arguments), env=_environment(root), cwd=root, check=True, **silent)
    return time.monotonic() - begin


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mvision", *arguments]


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    main()

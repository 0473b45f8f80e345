"""Memory and throughput of ``mvision predict`` on a thousand images, and throughput of the model alone.

    python docs/scripts/predict_throughput.py --weights RUN [--data DIR] [--count 1000]

The model alone is measured before and after, on images that were decoded and resized already. ``predict`` reads copies
of the validation images of the data.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mvision.config import DataConfig
from mvision.data import read_validation
from mvision.deploy.runtimes import open_fastest
from mvision.inference.predict import eval_mode
from mvision.inference.predict_sources import predict_sources
from mvision.machine import keep_freed_memory, resolve_device
from mvision.structures.images import read_image, resize_image

SETTLED = 50  # images after which memory should not grow any more
ALONE = 200  # images on which the model alone is measured, each time


def main() -> None:
    """Print memory and throughput."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--no-pictures", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    device = resolve_device(None)
    model, runtime = open_fastest(options.weights, [], device, options.precision)
    print(f"{runtime}\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {model.config.image_size}")
    _, parts = read_validation(DataConfig(root=options.data), None, model.tasks)
    split = parts[0][2]
    files = [split.folder / record.file for record in split.records]
    ready = [np.stack([resize_image(read_image(file), model.config.image_size)]) for file in files[:64]]
    resident: list[int] = []

    def alone() -> float:
        with eval_mode(model):
            for image in ready[:5]:
                model(torch.from_numpy(image).permute(0, 3, 1, 2).to(device))
            started = time.perf_counter()
            for image in itertools.islice(itertools.cycle(ready), ALONE):
                model(torch.from_numpy(image).permute(0, 3, 1, 2).to(device))
        return ALONE / (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "sources"
        sources.mkdir()
        for number, file in enumerate(itertools.islice(itertools.cycle(files), options.count)):
            shutil.copy(file, sources / f"{number:06}{file.suffix}")
        before = alone()
        hook = model.register_forward_hook(lambda *_: resident.append(_resident()))
        summary = predict_sources(
            model,
            [sources],
            Path(folder) / "out",
            options.threshold,
            progress=False,
            pictures=not options.no_pictures,
        )
        hook.remove()
        after = alone()
    rate = summary.images / summary.seconds
    settled = resident[SETTLED]
    print(
        f"memory after {SETTLED} images {settled / 2**20:.0f} MB, at most {max(resident) / 2**20:.0f} MB later", end=""
    )
    print(f", at the end {resident[-1] / 2**20:.0f} MB")
    print(f"predict {rate:.1f} images/s, the model alone {before:.1f} and {after:.1f}: ", end="")
    print(f"{2 * rate / (before + after):.0%}; {sum(summary.instances.values())} objects drawn")


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()

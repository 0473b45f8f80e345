"""Differences between mvision and the reference implementation, for every published architecture at full size.

Random weights in ``transformers``, saved, loaded with ``mvision.load``, and compared: maps of the neck, logits, boxes,
and every loss term (including denoising) in float64 and float32. Prints two tables in markdown.

    python docs/scripts/fidelity.py [MODEL ...]        # needs transformers; 4 minutes on two cores
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.comparison import Pair, differences, make_pair, reference_maps, training_step
from tests.reference import random_images, random_targets

MODELS = ["r18", "r34", "r50", "r101", "v2_r18", "v2_r50"]
SIZES = [(640, 640), (384, 640), (320, 320)]
TRAINING_SIZE = (320, 320)
KINDS = ["class", "box", "giou"]


def main(models: list[str]) -> None:
    """One row per model, size and precision for what is predicted; one per model and precision for the losses."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print(f"torch {torch.__version__}; largest absolute differences; 300 queries, 80 classes\n")
    print("| model | size | precision | backbone | neck | logits | boxes | the reference's own rounding in the neck |")
    print(f"|{'---|' * 8}")
    losses = []
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            pair = make_pair(Path(folder), name)
        exact = {}
        for dtype in (torch.float64, torch.float32):
            pair.to(dtype)
            precision = str(dtype).removeprefix("torch.")
            for size in SIZES:
                images = random_images(1, *size).to(dtype)
                found = differences(pair, images)
                maps = reference_maps(pair.theirs, images)[1].encoder_last_hidden_state
                exact.setdefault(size, maps)  # float64 comes first
                rounding = max(float((a - b).abs().max()) for a, b in zip(maps, exact[size]))
                cells = _row([*found.values(), rounding])
                print(f"| {name} | {size[0]}x{size[1]} | {precision} | {cells}", flush=True)
            losses.append(f"| {name} | {precision} | {_row(_loss_differences(pair, dtype))}")
    parts = [f"{kind} {place}" for kind in KINDS for place in ("decoder", "encoder", "denoising")]
    print(
        f"\nLoss terms (the worst of all layers) and gradients; two images of {TRAINING_SIZE} with 7 and 3 objects:\n"
    )
    print(f"| model | precision | {' | '.join(parts)} | gradients |\n|{'---|' * (len(parts) + 3)}")
    print("\n".join(losses))


def _loss_differences(pair: Pair, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(0)
    images = random_images(2, *TRAINING_SIZE, dtype=dtype)
    step = training_step(pair, images, random_targets([7, 3], 80, dtype))
    worst: dict[tuple[str, str], float] = {}
    for name, value in step.terms.items():
        kind, _, place = name.removeprefix("detection/").partition("_")
        key = (kind, "denoising" if "denoising" in place else "encoder" if place == "encoder" else "decoder")
        worst[key] = max(worst.get(key, 0.0), float((value - step.reference_terms[name]).detach().abs()))
    rows = [worst[kind, place] for kind in KINDS for place in ("decoder", "encoder", "denoising")]
    gradients = max(
        float((value - step.reference_gradients[name]).abs().max()) for name, value in step.gradients.items()
    )
    return [*rows, gradients]


def _row(values: list[float]) -> str:
    return " | ".join(f"{value:.1e}" for value in values) + " |"


if __name__ == "__main__":
    main(sys.argv[1:] or MODELS)

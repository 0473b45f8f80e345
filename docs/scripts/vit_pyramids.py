"""Which pyramid of a plain ViT learns best: one block for each level, the mean of the last two, or that with details.

    python docs/scripts/vit_pyramids.py OUT --data detection=bccd --seeds 3 --epochs 20

Trains a small model with every pyramid on each of the data sets, with several seeds and equal steps, from random
weights, or from those of ``--weights``. Everything else is the config's. See ablation.py for what OUT has in the end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, Trial, config_of, parser_of, places, run_trials, tables

from mvision.errors import Stopped
from mvision.model import Model

DETAIL = 16
PYRAMIDS: dict[str, dict[str, Any]] = {
    "last": {"pyramid": "last", "detail": 0},
    "mean-bilinear": {"pyramid": "mean-bilinear", "detail": 0},
    "mean-bilinear and detail": {"pyramid": "mean-bilinear", "detail": DETAIL},
}


def main() -> None:
    """Train what has no row yet, and write the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--pyramids", nargs="+", choices=PYRAMIDS, default=list(PYRAMIDS))
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="a plain ViT")
    parser.add_argument("--weights", metavar="FILE", help="of the ViT, with timm's names")
    options = parser.parse_args()
    run_trials(options, trials(options), table)


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Seeds come last, so that a table of what is there compares all pyramids."""
    where = places(options.data)
    for seed, (task, folder), name in itertools.product(range(options.seeds), where, options.pyramids):
        backbone = {"name": options.backbone, "weights": options.weights, **PYRAMIDS[name]}
        config = config_of(task, options, {f"model.backbone.{key}": value for key, value in backbone.items()})
        config.data.root, config.train.seed, config.train.val_interval = folder, seed, config.train.epochs
        variant = {"backbone": options.backbone, "weights": options.weights, "pyramid": name}
        yield Trial(variant, config, {"parameters": parameters(config.model.model_copy(deep=True))})


def parameters(config: Any) -> int:
    """Number of parameters of backbone and neck."""
    config.backbone.forget_weights()
    config.categories = [{"id": 0, "name": "any"}]
    with torch.device("meta"):
        model = Model(config)
    return sum(x.numel() for part in (model.backbone, model.neck) for x in part.parameters())


def table(rows: list[Row]) -> str:
    """Markdown, see ``tables``."""
    ordered = sorted(rows, key=lambda row: (row["backbone"], str(row["weights"]), list(PYRAMIDS).index(row["pyramid"])))
    header = ["backbone", "weights", "pyramid", "backbone and neck"]
    return tables(ordered, ["backbone", "weights", "pyramid"], header, cells)


def cells(row: Row) -> list[str]:
    return [row["backbone"], row["weights"] or "random", row["pyramid"], f"{row['parameters'] / 1e6:.2f} M"]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

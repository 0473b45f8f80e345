"""Runs of a few steps on small pictures, as several tests need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvision.config import Config, DecidedTrain, load_config, parse_config
from mvision.engine.auto import decided
from mvision.engine.train import train

FAST: dict[str, Any] = {
    "train.batch_size": 2,
    "train.val_interval": 1,
    "train.warmup_steps": 2,
    "train.lr": 8e-3,
    "train.precision": "fp32",
    "data.workers": 0,
    "model.image_size": 64,
    "model.neck.embed_dim": 32,
    "model.heads.detection": {
        "embed_dim": 32,
        "num_queries": 10,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_dim": 32,
        "num_denoising": 4,
        "dense_weight": 1.0,
    },
}


def fast_config(data: Path, **more: Any) -> Config:
    """The smallest detector; ``more``: keys of the config with two underscores for a dot."""
    overrides = {**FAST, "data.root": str(data), **{key.replace("__", "."): value for key, value in more.items()}}
    return load_config("tiny", overrides=overrides)


def run_in_process(data: Path, output: Path, **more: Any) -> Path:
    return train(fast_config(data, **more), output=output, device="cpu")


def add_corners(root: Path) -> None:
    """Red squares get their corners as keypoints, blue ones their centre; every third square is not labelled."""
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["categories"][0] |= {"keypoints": ["centre"]}
        content["categories"][1] |= {
            "keypoints": ["left_top", "right_top", "left_end", "right_end"],
            "sigmas": [0.1] * 4,
        }
        for number, entry in enumerate(content["annotations"]):
            x, y, side, _ = entry["bbox"]
            corners = [(x + i * side, y + j * side) for j in (0, 1) for i in (0, 1)]
            points = [(x + side / 2, y + side / 2)] if entry["category_id"] == 2 else corners
            visible = 2 * bool(number % 3)
            entry["keypoints"] = [value for point in points for value in (*point, visible)]
        file.write_text(json.dumps(content))


def train_settings(**settings: Any) -> DecidedTrain:
    """The settings of a run from random weights with 100 batches in an epoch; ``adamw`` where no optimiser is given."""
    return decided(parse_config({"train": {"optimizer": "adamw", **settings}}), 100, "random").train

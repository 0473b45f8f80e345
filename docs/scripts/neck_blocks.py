"""Which fusion block learns best at equal FLOPs, and how many RepBlocks a block should have.

    python docs/scripts/neck_blocks.py OUT --data detection=bccd --data keypoints=tubes --seeds 3
    python docs/scripts/neck_blocks.py OUT --data detection=bccd --blocks csp --downsample conv --depths 1 2 3 4 5

Trains a small model with every kind of block, downsampling and depth (RepBlocks per CSP layer), on each of the data
sets, with several seeds. All necks have the FLOPs, to 2 %, of RT-DETR's blocks with three RepBlocks and the expansion
of the model's config: the expansion of each follows from that. Everything else is the config's. See ablation.py for
what OUT has in the end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, Trial, config_of, parser_of, places, run_trials, tables

from mvision.backbone import Backbone
from mvision.commands.equal_flops import expansion_for, neck_flops
from mvision.config import Config
from mvision.errors import Stopped
from mvision.neck import HybridEncoder

BLOCKS: dict[str, dict[str, Any]] = {
    "csp": {"fusion_block": "csp"},
    "elan": {"fusion_block": "elan"},
    "elan_split": {"fusion_block": "elan", "elan_split": True},
}
TOLERANCE = 0.02  # of FLOPs, relative
BASE_DEPTH = 3  # of the block whose FLOPs all others get


@dataclass(frozen=True)
class Variant:
    """A fusion to compare."""

    block: str
    downsample: str
    depth: int

    @property
    def settings(self) -> dict[str, Any]:
        """Of the neck, without ``expansion``."""
        return {"elan_split": False, **BLOCKS[self.block], "downsample": self.downsample, "depth": self.depth}


@dataclass(frozen=True)
class Cost:
    """Of the neck of a variant, fused: FLOPs for one image, and relative to the reference."""

    expansion: float
    flops: int
    ratio: float
    parameters: int


def main() -> None:
    """Train what has no row yet, and write the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--downsample", nargs="+", choices=("conv", "separable"), default=["conv", "separable"])
    parser.add_argument("--depths", nargs="+", type=int, default=[BASE_DEPTH], metavar="N")
    options = parser.parse_args()
    run_trials(options, trials(options), table)


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Seeds come last, so that a table of what is there compares all variants."""
    variants = [Variant(*names) for names in itertools.product(options.blocks, options.downsample, options.depths)]
    where = places(options.data)
    configs = {task: config_of(task, options) for task, _ in where}
    costs = {(task, variant): cost(config, variant) for task, config in configs.items() for variant in variants}
    for seed, (task, folder), variant in itertools.product(range(options.seeds), where, variants):
        config = Config.model_validate(configs[task].model_dump())
        of_neck = costs[task, variant]
        config.model.neck = config.model.neck.model_copy(update={**variant.settings, "expansion": of_neck.expansion})
        config.data.root, config.train.seed, config.train.val_interval = folder, seed, config.train.epochs
        yield Trial(asdict(variant), config, asdict(of_neck))


def cost(config: Config, variant: Variant) -> Cost:
    """The neck's; the expansion is the one with the reference's FLOPs."""
    backbone = Backbone(config.model.backbone.model_copy(update={"pretrained": False}), config.model.image_size)
    maps = (backbone.channels, backbone.strides, max(config.model.image_size))
    settings = config.model.neck.model_dump()
    reference = neck_flops(*maps, {**settings, **Variant("csp", "conv", BASE_DEPTH).settings})
    settings |= variant.settings
    settings["expansion"] = expansion_for(reference, *maps, settings)
    flops = neck_flops(*maps, settings)
    if abs(flops / reference - 1) > TOLERANCE:
        raise SystemExit(
            f"{variant}: no expansion gives the {reference / 1e9:.3g} GFLOPs of the reference to {TOLERANCE:.0%}; "
            "leave it out, or choose a larger model or wider blocks (-o model.neck.expansion=1)"
        )
    with torch.device("meta"):
        neck = HybridEncoder(*maps[:2], **settings).fuse()
    parameters = sum(parameter.numel() for parameter in neck.parameters())
    return Cost(settings["expansion"], flops, round(flops / reference, 4), parameters)


def table(rows: list[Row]) -> str:
    """Markdown, see ``tables``."""
    header = ["block", "downsampling", "RepBlocks", "expansion", "GFLOPs", "parameters"]
    ordered = sorted(rows, key=lambda row: (row["block"], row["downsample"], row["depth"]))
    return tables(ordered, ["block", "downsample", "depth"], header, cells)


def cells(row: Row) -> list[str]:
    return [
        row["block"],
        row["downsample"],
        str(row["depth"]),
        f"{row['expansion']:.3f}",
        f"{row['flops'] / 1e9:.3f}",
        f"{row['parameters'] / 1e6:.2f} M",
    ]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

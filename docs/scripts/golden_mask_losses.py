"""Loss terms of the original ECSeg on the inputs of ``tests/mask_loss_inputs.py``, into a file for the tests.

    git clone https://github.com/Intellindust-AI-Lab/EdgeCrafter && git -C EdgeCrafter checkout 706d037
    python docs/scripts/golden_mask_losses.py EdgeCrafter

The original code is imported from that folder and run as it is, with the weights of its configuration, but in float64
and with the points of the inputs in place of random ones. For the predictions before the first layer's distributions
("pre") the original decoder hands over the masks of the last layer; here they get those of the first, as in mvision.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from golden_losses import (
    BIN_REACH,
    NAMES,
    count_contested,
    criterion_class,
    is_teacher,
    our_name,
    record_votes,
)
from golden_losses import original_outputs as outputs_without_masks
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.loss_inputs import BINS, LAYERS
from tests.mask_loss_inputs import MaskInputs, make_mask_inputs

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden_mask_losses.json"
COMMIT = "Intellindust-AI-Lab/EdgeCrafter 706d037"
COUNTS = {"objects": (3, 2, 5), "one image empty": (4, 0, 2)}
BIN_SCALE = 4.0
NAMES |= {"mask": "mask", "dice": "dice"}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edgecrafter", type=Path, help="checkout of EdgeCrafter")
    root = parser.parse_args().edgecrafter / "ecdetseg"
    settings = yaml.safe_load((root / "configs" / "ecseg" / "ecseg.yml").read_text())["ECCriterion"]
    size = yaml.safe_load((root / "configs" / "ecseg" / "ecseg_l.yml").read_text())["eval_spatial_size"]
    classes = criterion_class(root / "engine" / "edgecrafter", "edgecrafter", "criterion.ECCriterion")
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    cases = [golden_case(classes, settings, what) for what in COUNTS]
    weights = {name_of(name): value for name, value in settings["weight_dict"].items()}
    published = {
        "weights": weights, "gamma": settings["gamma"], "costs": settings["matcher"]["weight_dict"],
        "mask_points": size[0] // 4 * (size[1] // 4) // settings["matcher"]["mask_point_sample_ratio"],
    }  # fmt: skip
    made_by = {"script": "docs/scripts/golden_mask_losses.py", "from": COMMIT, "torch": torch.__version__}
    FILE.write_text(json.dumps({"made by": made_by, "published": published, "cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} cases in {FILE}")


def golden_case(classes: tuple[type, type], settings: dict[str, Any], what: str) -> dict[str, Any]:
    """The terms on the first inputs where layers disagree about a query, but not with equally many votes."""
    criterion, matcher = classes
    of_matcher = {name: value for name, value in settings["matcher"].items() if name != "type"}
    for seed in range(1000):
        inputs = make_mask_inputs(seed, COUNTS[what])
        give_points(inputs.points)
        made = criterion(
            matcher=matcher(**of_matcher, use_focal_loss=True),
            num_classes=inputs.others.matched.logits.shape[-1],
            **{name: value for name, value in settings.items() if name != "matcher"},
        )
        assert made.reg_max == BINS
        votes = record_votes(made)
        terms = made(original_outputs(inputs), original_targets(inputs))
        contested, ties = count_contested(votes)
        if contested and not ties:
            named = {name_of(name): value.item() for name, value in terms.items() if not is_teacher(name, value)}
            print(f"{what}: seed {seed}, {contested} queries with two objects")
            scales = {"bin_scale": BIN_SCALE, "bin_reach": BIN_REACH}
            return {"what": what, "counts": COUNTS[what], "seed": seed, **scales, "terms": named}
    raise SystemExit(f"{what}: no seed without ties")


def give_points(points: Tensor) -> None:
    """The first of these points wherever the original draws some for a mask."""

    def rand(masks: int, number: int, _: int, device: torch.device) -> Tensor:
        return points[:number].repeat(masks, 1, 1)

    torch.rand = rand  # type: ignore[assignment]


def name_of(name: str) -> str:
    """The name that a term of the original has here."""
    return our_name(name.replace("mask_ce", "mask").replace("mask_dice", "dice"))


def original_targets(inputs: MaskInputs) -> list[dict[str, Tensor]]:
    """The labels as the original takes them."""
    others = inputs.others
    return [
        {"boxes": boxes, "labels": labels, "masks": masks.bool()}
        for boxes, labels, masks in zip(others.boxes, others.labels, inputs.masks)
    ]


def original_outputs(inputs: MaskInputs) -> dict[str, Any]:
    """The predictions as the original decoder returns them, but for the masks of "pre"."""
    outputs = outputs_without_masks(inputs.others, BIN_SCALE)
    *earlier, last = masks_of(inputs.embeddings, inputs.pixels)
    outputs["pred_masks"] = last
    for of_layer, masks in zip(outputs["aux_outputs"], earlier, strict=True):
        of_layer["pred_masks"] = masks
    outputs["pre_outputs"]["pred_masks"] = earlier[0]
    if inputs.denoising is not None:
        denoising = masks_of(inputs.denoising, inputs.pixels)
        for of_layer, masks in zip(outputs["dn_outputs"], denoising, strict=True):
            of_layer["pred_masks"] = masks
        outputs["dn_pre_outputs"]["pred_masks"] = denoising[0]
    return outputs


def masks_of(embeddings: Tensor, pixels: Tensor) -> list[Tensor]:
    """(B, N, h, w) logits of every layer."""
    masks = torch.einsum("lbnd,lbdhw->lbnhw", embeddings[..., :-1], pixels) + embeddings[..., -1, None, None]
    assert len(masks) == LAYERS
    return list(masks)


if __name__ == "__main__":
    main()

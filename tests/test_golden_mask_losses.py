"""Every loss term of ECSeg against the original code, see ``docs/scripts/golden_mask_losses.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvision.config import load_config
from mvision.heads.instance_seg import head as masks
from mvision.heads.instance_seg.points import MaskPoints, pack_masks, read_masks
from mvision.heads.query.matching import CLASS_COST
from tests.loss_inputs import BINS, LAYERS, QUERIES
from tests.mask_loss_inputs import POINTS, RATIO, MaskInputs, make_mask_inputs
from tests.test_golden_losses import training_outputs
from tests.test_heads import make_head

GOLDEN = json.loads(Path(__file__).with_name("golden_mask_losses.json").read_text())
PUBLISHED = GOLDEN["published"]
VARIANTS = [f"ecseg_{size}" for size in "smlx"]


def with_pre(embeddings: Tensor | None) -> Tensor | None:
    """In float32, as pixel features are read; "pre" has the masks of the first layer."""
    return None if embeddings is None else torch.cat((embeddings, embeddings[:1])).float()


def terms_of(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    inputs: MaskInputs = make_mask_inputs(case["seed"], tuple(case["counts"]))
    settings = load_config("ecseg_s").model.heads["instance-seg"].model_dump()
    own = {"num_bins": BINS, "num_layers": LAYERS, "num_queries": QUERIES, "embed_dim": 16, "num_heads": 4}
    scales = {"bin_scale": case["bin_scale"], "bin_reach": case["bin_reach"], "ffn_dim": 32, "mask_points": POINTS}
    head = make_head("instance-seg, refine", **{**settings, **own, **scales})
    queries, targets = training_outputs(inputs.others)
    for target, drawn in zip(targets, inputs.masks):
        target.masks = drawn
    points = inputs.points.float().repeat(len(targets), 1, 1)

    def given(targets: Any, count: int, device: torch.device) -> MaskPoints:
        assert count == points.shape[1]
        known = torch.zeros(len(targets), max(map(len, targets)), dtype=torch.bool).numpy()
        bits, slots, size = pack_masks(targets, known)
        labels = torch.zeros(*known.shape, count)
        read_masks(bits, slots, size, points, labels)
        return MaskPoints(points, labels, torch.from_numpy(known), known)

    monkeypatch.setattr(masks, "sample_mask_points", given)
    embeddings = with_pre(inputs.embeddings)
    assert embeddings is not None
    outputs = masks.MaskOutputs(queries, list(inputs.pixels), embeddings, with_pre(inputs.denoising))
    return head.loss(outputs, targets)  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["what"])
def test_every_term_is_that_of_the_original(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same points: matches with the costs of masks, weights and divisors are the original's."""
    terms = terms_of(case, monkeypatch)
    assert set(terms) == set(case["terms"])
    for name, value in terms.items():
        assert value.item() == pytest.approx(case["terms"][name], abs=1e-6, rel=0), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_are_the_published_ones(variant: str) -> None:
    config = load_config(variant).model
    head = masks.MaskConfig.model_validate(config.heads["instance-seg"].model_dump())
    weights = {"class": head.class_weight, "box": head.box_weight, "giou": head.giou_weight}
    weights |= {"fgl": head.fgl_weight, "ddf": head.ddf_weight, "mask": masks.MASK_WEIGHT, "dice": masks.DICE_WEIGHT}
    assert weights == PUBLISHED["weights"]
    assert (head.class_loss, head.gamma, head.shared_matches) == ("mal", PUBLISHED["gamma"], True)
    costs = {"class": CLASS_COST, "bbox": head.box_weight, "giou": head.giou_weight}
    costs |= {"mask_ce": masks.MASK_WEIGHT, "mask_dice": masks.DICE_WEIGHT}
    assert {f"cost_{name}": value for name, value in costs.items()} == PUBLISHED["costs"]
    assert head.mask_points == PUBLISHED["mask_points"] == config.image_size[0] * config.image_size[1] // 16 // RATIO

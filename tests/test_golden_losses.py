"""Every loss term of the D-FINE and DEIM recipes against the original code, see ``docs/scripts/golden_losses.py``."""

import json
from pathlib import Path

import pytest
import torch

from mvision.heads.query.head import DenoisingOutputs, QueryOutputs
from mvision.heads.query.matching import pad_targets
from mvision.structures import Targets
from tests.loss_inputs import BINS, LAYERS, QUERIES, make_inputs
from tests.test_heads import make_head

GOLDEN = json.loads(Path(__file__).with_name("golden_losses.json").read_text())["cases"]
RECIPES = {"dfine": {"class_loss": "vfl", "gamma": 2.0}, "deim": {"class_loss": "mal", "gamma": 1.5}}


def training_outputs(inputs):
    """The inputs as the outputs of a head in training, and the targets."""
    targets = [
        Targets(boxes=boxes, labels=labels, areas=boxes[:, 2] * boxes[:, 3])
        for boxes, labels in zip(inputs.boxes, inputs.labels)
    ]
    copies = inputs.groups * max(map(len, targets))
    padded = pad_targets(targets, torch.device("cpu"), torch.float64, copies, LAYERS + 1)
    assert padded.groups == inputs.groups
    matched, noisy = inputs.matched, None
    if inputs.denoising is not None:
        found = inputs.denoising
        noisy = DenoisingOutputs(found.logits[:-1], found.boxes[:-1], found.corners, found.initial)
    outputs = QueryOutputs(
        matched.logits, matched.boxes, None, noisy, padded, corners=matched.corners, initial=matched.initial
    )
    return outputs, targets


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['recipe']}, {case['what']}, {case['bin_scale']:g}")
def test_every_term_is_that_of_the_original(case):
    settings = {"num_bins": BINS, "bin_scale": case["bin_scale"], "bin_reach": case["bin_reach"]}
    head = make_head(
        "detection", **RECIPES[case["recipe"]], **settings, num_layers=LAYERS, num_queries=QUERIES,
        shared_matches=True, box_refinement="distribution",
    )  # fmt: skip
    terms = head.loss(*training_outputs(make_inputs(case["seed"], tuple(case["counts"]))))
    assert set(terms) == set(case["terms"])
    for name, value in terms.items():
        assert value.item() == pytest.approx(case["terms"][name], abs=1e-6, rel=0), name

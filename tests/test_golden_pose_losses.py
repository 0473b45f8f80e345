"""Every loss term of query poses against the original code, see ``docs/scripts/golden_pose_losses.py``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvision.heads.keypoints.targets import ClassTables
from mvision.heads.poses.losses import pose_terms
from mvision.heads.poses.outputs import Decoded
from mvision.heads.poses.settings import PoseConfig
from mvision.heads.poses.targets import pose_targets
from mvision.structures import Targets
from tests.pose_loss_inputs import CLASSES, LAYERS, QUERIES, SIGMAS, make_pose_inputs

GOLDEN = json.loads(Path(__file__).with_name("golden_pose_losses.json").read_text())["cases"]
LIKE = torch.zeros((), dtype=torch.float64)


def padded_targets(inputs, num_points):
    """The labels of the inputs in images with the input's shape."""
    targets = [
        Targets(torch.full((len(labels), 4), 0.5), labels, areas, keypoints=points)
        for labels, points, areas in zip(inputs.labels, inputs.points, inputs.areas)
    ]
    shape = (CLASSES, num_points)
    tables = ClassTables(np.broadcast_to(np.array(SIGMAS[num_points]) / 1000, shape), np.ones(shape, dtype=bool))
    copies = inputs.groups * max(map(len, targets))
    made = pose_targets(targets, range(CLASSES), tables, (64, 64), LIKE, QUERIES, LAYERS + 1, copies)
    assert made.groups == inputs.groups
    return made


def decoded(inputs):
    """The inputs as outputs of the decoder."""
    matched, noisy = inputs.matched, inputs.denoising
    parts = [(matched.logits, matched.points, matched.corners)]
    if noisy is not None:
        parts.insert(0, (noisy.logits, noisy.points, noisy.corners))
    logits, points, corners = (torch.cat(values, 2) for values in zip(*parts))
    return Decoded(
        logits[:LAYERS], points[:LAYERS], torch.full_like(logits[:LAYERS, ..., :1], 0.5).repeat(1, 1, 1, 4), None,
        corners, points[LAYERS], logits[LAYERS], points[LAYERS], matched.logits[-1], matched.points[-1],
    )  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['kind']}, {case['what']}, {case['points']}")
def test_every_term_is_that_of_the_original(case):
    inputs = make_pose_inputs(case["seed"], tuple(case["counts"]), case["points"])
    config = PoseConfig(num_layers=LAYERS, class_loss=case["kind"], ddf_weight=1.5)
    terms = pose_terms(decoded(inputs), padded_targets(inputs, case["points"]), config)
    terms = {name: value for name, value in terms.items() if name.split("_")[0] not in ("box", "giou")}
    assert set(terms) == set(case["terms"])
    for name, value in terms.items():
        assert value.item() == pytest.approx(case["terms"][name], abs=1e-6, rel=0), name

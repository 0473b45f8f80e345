"""Loss terms of the original DETRPose on the inputs of ``tests/pose_loss_inputs.py``, into a file for the tests.

    git clone https://github.com/SebastianJanampa/DETRPose && git -C DETRPose checkout a6ca202
    python docs/scripts/golden_pose_losses.py DETRPose

The original code is imported from that folder and run as it is, but in float64, and without a GPU (its part for
denoising queries asks for one). The criterion of EdgeCrafter 706d037 (ECPose) differs from it in the measurement of
times alone.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from golden_losses import count_contested, record_votes
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.pose_loss_inputs import BINS, CLASSES, LAYERS, PoseInputs, PredictedPoses, make_pose_inputs

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden_pose_losses.json"
COMMIT = "SebastianJanampa/DETRPose a6ca202"
COUNTS = {"objects": (3, 2, 5), "none": (0, 0), "one image empty": (4, 0, 2)}
WEIGHTS = {"loss_vfl": 2, "loss_mal": 2, "loss_keypoints": 10, "loss_oks": 4, "loss_dfl": 1.5}
NAMES = {"vfl": "class", "mal": "class", "keypoints": "point", "oks": "oks", "dfl": "ddf"}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detrpose", type=Path, help="checkout of DETRPose")
    classes = original_classes(parser.parse_args().detrpose / "src")
    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign, assignment]
    cases = [
        golden_case(classes, kind, what, num_points)
        for kind, what, num_points in itertools.product(("vfl", "mal"), COUNTS, (17, 14))
    ]
    made_by = {"script": "docs/scripts/golden_pose_losses.py", "from": COMMIT, "torch": torch.__version__}
    FILE.write_text(json.dumps({"made by": made_by, "cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} cases in {FILE}")


def original_classes(source: Path) -> tuple[type, type]:
    """The classes of the criterion and of the matcher; of the package, only what they need is imported."""
    folders = {"": None, ".misc": source / "misc", ".models": None, ".models.detrpose": source / "models" / "detrpose"}
    for name, folder in folders.items():
        module = types.ModuleType(f"original{name}")
        module.__path__ = [str(folder)] if folder else []
        sys.modules[module.__name__] = module
    processes = types.ModuleType("original.misc.dist_utils")
    processes.get_world_size = lambda: 1  # type: ignore[attr-defined]
    processes.is_dist_avail_and_initialized = lambda: False  # type: ignore[attr-defined]
    sys.modules[processes.__name__] = processes
    criterion, matcher = (
        importlib.import_module(f"original.models.detrpose.{name}") for name in ("criterion", "matcher")
    )
    return criterion.Criterion, matcher.HungarianMatcher


def golden_case(classes: tuple[type, type], kind: str, what: str, num_points: int) -> dict[str, Any]:
    """The terms on the first inputs where layers disagree about a query, but not with equally many votes.

    With equal votes the original keeps the object that its sort, which is not a stable one, happens to put first.
    """
    counts = COUNTS[what]
    criterion, matcher = classes
    for seed in range(1000):
        inputs = make_pose_inputs(seed, counts, num_points)
        made = criterion(
            num_classes=CLASSES,
            matcher=matcher(cost_class=2.0, cost_keypoints=10.0, cost_oks=4.0, num_body_points=num_points),
            weight_dict=WEIGHTS,
            losses=[kind, "keypoints", "local"],
            num_body_points=num_points,
        )
        votes = record_votes(made)
        terms = made(original_outputs(inputs), original_targets(inputs))
        contested, ties = count_contested(votes)
        if not ties and (contested or not any(counts)):
            named = {our_name(name): float(value) for name, value in terms.items() if not is_teacher(name, value)}
            print(f"{kind}, {what}, {num_points} points: seed {seed}, {contested} queries with two objects")
            return {"kind": kind, "what": what, "counts": counts, "points": num_points, "seed": seed, "terms": named}
    raise SystemExit(f"{what}: no seed without ties")


def original_targets(inputs: PoseInputs) -> list[dict[str, Tensor]]:
    """The labels as the original takes them: all places of an object, then whether they are labelled."""
    return [
        {
            "labels": labels,
            "keypoints": torch.cat((points[..., :2].flatten(1), points[..., 2]), 1),
            "area": areas,
            "boxes": points.new_zeros(len(points), 4),  # it takes their number
        }
        for labels, points, areas in zip(inputs.labels, inputs.points, inputs.areas)
    ]


def original_outputs(inputs: PoseInputs) -> dict[str, Any]:
    """The predictions as the original decoder returns them."""
    matched, denoising = inputs.matched, inputs.denoising
    *earlier, last = _layers(matched)
    outputs = {
        **{name: value for name, value in last.items() if not name.startswith("teacher")},
        "aux_outputs": earlier,
        "aux_pre_outputs": _plain(matched, LAYERS),
        "aux_interm_outputs": [_plain(matched, LAYERS + 1)],
        "up": torch.tensor([0.5], dtype=torch.float64),
        "reg_scale": torch.tensor([4.0], dtype=torch.float64),
        "reg_max": BINS,
    }
    if denoising is not None:
        outputs["dn_aux_outputs"] = _layers(denoising)
        outputs["dn_aux_pre_outputs"] = _plain(denoising, LAYERS)
        outputs["dn_meta"] = {"pad_size": denoising.logits.shape[2], "num_dn_group": inputs.groups}
    return outputs


def _plain(predicted: PredictedPoses, layer: int) -> dict[str, Tensor]:
    return {"pred_logits": predicted.logits[layer], "pred_keypoints": predicted.points[layer].flatten(-2)}


def _layers(predicted: PredictedPoses) -> list[dict[str, Tensor]]:
    corners = predicted.corners.flatten(-3)
    teacher = {"teacher_corners": corners[-1], "teacher_logits": predicted.logits[LAYERS - 1]}
    return [
        {**_plain(predicted, layer), "pred_corners": own, "ref_points": predicted.points[LAYERS], **teacher}
        for layer, own in enumerate(corners)
    ]


def our_name(name: str) -> str:
    """The name that a term of the original has here."""
    _, term, *place = name.split("_")
    suffixes = {(): "", ("pre",): "_pre", ("enc", "0"): "_encoder", ("dn", "pre"): "_denoising_pre"}
    suffix = suffixes.get(tuple(place))
    return NAMES[term] + ("_".join(("", *place)).replace("_dn", "_denoising") if suffix is None else suffix)


def is_teacher(name: str, value: Any) -> bool:
    """Whether this is the term of the last layer's distance to itself, which is 0 and not computed here."""
    teacher = name == f"loss_dfl_dn_{LAYERS - 1}"
    assert not teacher or not value
    return teacher


if __name__ == "__main__":
    main()

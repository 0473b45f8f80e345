"""Loss terms of the original D-FINE and DEIM on the inputs of ``tests/loss_inputs.py``, into a file for the tests.

    git clone https://github.com/Peterande/D-FINE && git -C D-FINE checkout 4a1f73a
    git clone https://github.com/Intellindust-AI-Lab/DEIM && git -C DEIM checkout 09d35d5
    python docs/scripts/golden_losses.py D-FINE DEIM

The original code is imported from those folders and run as it is, but in float64 (it converts some parts to float32).
Of its package, only the files of the criterion are imported; what they need of others stands in here for one process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.loss_inputs import BINS, LAYERS, LossInputs, Predicted, make_inputs

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden_losses.json"
COMMITS = {"dfine": "Peterande/D-FINE 4a1f73a", "deim": "Intellindust-AI-Lab/DEIM 09d35d5"}
COUNTS = {"objects": (3, 2, 5), "none": (0, 0), "one image empty": (4, 0, 2)}
WEIGHTS = {"loss_vfl": 1, "loss_mal": 1, "loss_bbox": 5, "loss_giou": 2, "loss_fgl": 0.15, "loss_ddf": 1.5}
COSTS = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}
NAMES = {"vfl": "class", "mal": "class", "bbox": "box", "giou": "giou", "fgl": "fgl", "ddf": "ddf"}
BIN_REACH = 0.5


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dfine", type=Path, help="checkout of D-FINE")
    parser.add_argument("deim", type=Path, help="checkout of DEIM")
    options = parser.parse_args()
    classes = {
        "dfine": criterion_class(
            options.dfine / "src" / "zoo" / "dfine", "zoo.dfine", "dfine_criterion.DFINECriterion"
        ),
        "deim": criterion_class(options.deim / "engine" / "deim", "deim", "deim_criterion.DEIMCriterion"),
    }
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    cases = []
    for recipe, (criterion, matcher) in classes.items():
        for what, counts in COUNTS.items():
            for bin_scale in (4.0, 8.0):
                cases.append(golden_case(recipe, criterion, matcher, what, counts, bin_scale))
    made_by = {"script": "docs/scripts/golden_losses.py", "from": COMMITS, "torch": torch.__version__}
    FILE.write_text(json.dumps({"made by": made_by, "cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} cases in {FILE}")


def criterion_class(folder: Path, inner: str, name: str) -> tuple[type, type]:
    """The classes of the criterion and of the matcher, from the files in ``folder`` alone."""
    root = f"original_{inner.rpartition('.')[2]}"
    for package in (root, f"{root}.misc", f"{root}.zoo", f"{root}.{inner}"):
        module = types.ModuleType(package)
        module.__path__ = [str(folder)] if package == f"{root}.{inner}" else []
        sys.modules[package] = module
    core = types.ModuleType(f"{root}.core")
    core.register = lambda: lambda cls: cls  # type: ignore[attr-defined]
    processes = types.ModuleType(f"{root}.misc.dist_utils")
    processes.get_world_size = lambda: 1  # type: ignore[attr-defined]
    processes.is_dist_available_and_initialized = lambda: False  # type: ignore[attr-defined]
    sys.modules |= {core.__name__: core, processes.__name__: processes}
    file, _, criterion = name.partition(".")
    modules = (importlib.import_module(f"{root}.{inner}.{module}") for module in (file, "matcher"))
    return tuple(getattr(module, cls) for module, cls in zip(modules, (criterion, "HungarianMatcher")))  # type: ignore[return-value]


def golden_case(
    recipe: str, criterion: type, matcher: type, what: str, counts: tuple[int, ...], bin_scale: float
) -> dict[str, Any]:
    """The terms on the first inputs where layers disagree about a query, but not with equally many votes.

    With equal votes the original keeps the object that its sort, which is not a stable one, happens to put first.
    """
    deim = recipe == "deim"
    for seed in range(1000):
        inputs = make_inputs(seed, counts)
        made = criterion(
            matcher=matcher(COSTS, use_focal_loss=True, alpha=0.25, gamma=2.0),
            weight_dict=WEIGHTS,
            losses=["mal" if deim else "vfl", "boxes", "local"],
            alpha=0.75,
            gamma=1.5 if deim else 2.0,
            num_classes=inputs.matched.logits.shape[-1],
            reg_max=BINS,
        )
        votes = record_votes(made)
        terms = made(original_outputs(inputs, bin_scale), original_targets(inputs))
        contested, ties = count_contested(votes)
        if not ties and (contested or not any(counts)):
            named = {our_name(name): value.item() for name, value in terms.items() if not is_teacher(name, value)}
            print(f"{recipe}, {what}, scale {bin_scale}: seed {seed}, {contested} queries with two objects")
            return {
                "recipe": recipe, "what": what, "counts": counts, "seed": seed, "bin_scale": bin_scale,
                "bin_reach": BIN_REACH, "terms": named,
            }  # fmt: skip
    raise SystemExit(f"{what}: no seed without ties")


def record_votes(criterion: Any) -> list[list[tuple[Tensor, Tensor]]]:
    """The matches of every layer, filled in when the criterion runs."""
    votes: list[list[tuple[Tensor, Tensor]]] = []
    union = criterion._get_go_indices

    def recorded(indices: Any, others: Any) -> Any:
        votes.extend([indices, *others])
        return union(indices, others)

    criterion._get_go_indices = recorded
    return votes


def count_contested(votes: list[list[tuple[Tensor, Tensor]]]) -> tuple[int, int]:
    """How many queries are matched with different objects by the layers, and for how many of them the votes tie."""
    counts: dict[tuple[int, int], dict[int, int]] = {}
    for layer in votes:
        for image, (queries, objects) in enumerate(layer):
            for query, index in zip(queries.tolist(), objects.tolist()):
                of_query = counts.setdefault((image, query), {})
                of_query[index] = of_query.get(index, 0) + 1
    contested = [sorted(of_query.values()) for of_query in counts.values() if len(of_query) > 1]
    return len(contested), sum(numbers[-1] == numbers[-2] for numbers in contested)


def original_targets(inputs: LossInputs) -> list[dict[str, Tensor]]:
    """The labels as the original takes them."""
    return [{"boxes": boxes, "labels": labels} for boxes, labels in zip(inputs.boxes, inputs.labels)]


def original_outputs(inputs: LossInputs, bin_scale: float) -> dict[str, Any]:
    """The predictions as the original decoder returns them."""
    matched, denoising = inputs.matched, inputs.denoising
    *earlier, last = _layers(matched)
    outputs = {
        **{name: value for name, value in last.items() if not name.startswith("teacher")},
        "aux_outputs": earlier,
        "pre_outputs": _plain(matched, LAYERS),
        "enc_aux_outputs": [_plain(matched, LAYERS + 1)],
        "enc_meta": {"class_agnostic": False},
        "up": torch.tensor([BIN_REACH], dtype=torch.float64),
        "reg_scale": torch.tensor([bin_scale], dtype=torch.float64),
    }
    if denoising is not None:
        outputs["dn_outputs"] = _layers(denoising)
        outputs["dn_pre_outputs"] = _plain(denoising, LAYERS)
        most = max(map(len, inputs.boxes))
        outputs["dn_meta"] = {
            "dn_num_group": inputs.groups,
            # Every group has its copies of all objects, then as many that have to predict none.
            "dn_positive_idx": [
                torch.cat([2 * most * group + torch.arange(len(boxes)) for group in range(inputs.groups)])
                for boxes in inputs.boxes
            ],
        }
    return outputs


def _plain(predicted: Predicted, layer: int) -> dict[str, Tensor]:
    return {"pred_logits": predicted.logits[layer], "pred_boxes": predicted.boxes[layer]}


def _layers(predicted: Predicted) -> list[dict[str, Tensor]]:
    teacher = {"teacher_corners": predicted.corners[-1], "teacher_logits": predicted.logits[LAYERS - 1]}
    return [
        {**_plain(predicted, layer), "pred_corners": corners, "ref_points": predicted.initial, **teacher}
        for layer, corners in enumerate(predicted.corners)
    ]


def our_name(name: str) -> str:
    """The name that a term of the original has here."""
    _, term, *place = name.split("_")
    kind, number = [*place, "", ""][:2]
    suffixes = {"": "", "aux": f"_{number}", "enc": "_encoder", "dn": f"_denoising_{number}", "pre": "_pre"}
    return NAMES[term] + suffixes[kind]


def is_teacher(name: str, value: Tensor) -> bool:
    """Whether this is the term of the last layer's distance to itself, which one of the two has, and as 0."""
    teacher = name == f"loss_ddf_dn_{LAYERS - 1}"
    assert not teacher or not value
    return teacher


if __name__ == "__main__":
    main()

"""What missing poses cost, and what a model's own poses on those pictures give back.

    python docs/scripts/partial_labels.py OUT --seeds 2
    python docs/scripts/partial_labels.py OUT --seeds 2 --forms joint --share 0.25
    python docs/scripts/partial_labels.py OUT --of OUT/runs/RUN

Trains keypoints on the built-in set, alone and together with boxes, with equal steps: with the poses of all pictures
(``all``), with those of a share of them (``part``), and with that share and own poses on the others (``own``): where
the moving average of the weights is sure of the pose of a labelled box, that pose is a label. Pictures without poses
keep their boxes. See ablation.py for what OUT has in the end.

``--of`` compares the poses of a run that was trained with ``part``, on the pictures without, with the labels that were
left out: those of the moving average, and those of the weights in training, for the same objects. What lies between
the two is all that the average could teach. A run is in OUT/runs until its training has ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ablation import Row, Trial, epochs_of, parser_of, run_trials, tables

from mvision import Instances, Model
from mvision.builtin import ensure_builtin
from mvision.config import DataConfig, load_config
from mvision.data import Batch, Dataset, build_eval_loader, read_data_sources
from mvision.data.formats.labels import PictureLabels
from mvision.engine import epoch as engine_epoch
from mvision.engine.trainer import Trainer
from mvision.errors import Stopped
from mvision.evaluation.tables import markdown_table
from mvision.storage.atomic import write_text
from mvision.structures import Targets
from mvision.structures.boxes import cxcywh_to_xyxy, iou
from mvision.structures.oks import keypoint_sigmas, oks

FORMS = {"alone": ("keypoints",), "joint": ("detection", "keypoints")}
ALL, PART, OWN = "all", "part", "own"
LABELS = (ALL, PART, OWN)
SIZE = 192  # of the joint model, for all
MIN_IOU = 0.6  # of a predicted box with the labelled one, for the pose to be that object's
THRESHOLDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
PERSON = 0


def main() -> None:
    """Train what has no row yet, and write the table; or look at a run's own poses."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    add("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    add("--share", type=float, default=0.5, metavar="X", help="of the pictures that keep their poses")
    add("--sure", type=float, default=0.5, metavar="X", help="own poses: the least score")
    add(
        "--own-from", type=float, default=0.4, metavar="X", help="own poses: the share of the steps at which they begin"
    )
    add("--of", type=Path, metavar="RUN", help="no training: the own poses of this run, beside the labels left out")
    options = parser.parse_args()
    if options.data:
        parser.error("--data: the pictures are those of the built-in set")
    folder = with_missing_poses(options.out / "pictures", options.share)
    if options.of is not None:
        print(compare_poses(options.of, folder))
        return
    plain, own = (list(trials(options, folder, labels)) for labels in ((ALL, PART), (OWN,)))
    run_trials(options, plain, table)
    with own_poses(options.sure, options.own_from):
        run_trials(options, own, table)


def with_missing_poses(folder: Path, share: float) -> Path:
    """The built-in set with one more file of annotations, ``part``: objects of some pictures have no keypoints."""
    if not folder.exists():
        shutil.copytree(ensure_builtin(), folder)
    content = json.loads((folder / "annotations" / "train.json").read_text(encoding="utf-8"))
    images = sorted(image["id"] for image in content["images"])
    without = set(random.Random(0).sample(images, round((1 - share) * len(images))))
    for entry in content["annotations"]:
        if entry["image_id"] in without:
            entry.pop("keypoints", None)
            entry.pop("num_keypoints", None)
    write_text(folder / "annotations" / f"{PART}.json", json.dumps(content))
    return folder


def trials(options: argparse.Namespace, folder: Path, kinds: tuple[str, ...]) -> Iterator[Trial]:
    """Seeds come last, so that a table of what is there compares all forms."""
    chosen = [labels for labels in options.labels if labels in kinds]
    for seed, form, labels in itertools.product(range(options.seeds), options.forms, chosen):
        keys: dict[str, Any] = {"data.root": str(folder), "model.image_size": SIZE, "train.patience": 0}
        keys |= {"data.train": "train" if labels == ALL else PART, "train.seed": seed}
        if options.epochs is not None:
            keys["train.epochs"] = options.epochs
        config = load_config(options.model, tasks=list(FORMS[form]), overrides=keys, assignments=options.set)
        config.train.epochs = epochs_of(config)
        facts: Row = {"share": 1.0 if labels == ALL else options.share}
        if labels == OWN:
            facts |= {"sure": options.sure, "own_from": options.own_from}
        yield Trial({"form": form, "labels": labels}, config, facts)


@contextmanager
def own_poses(sure: float, begin: float) -> Iterator[None]:
    """Trainings inside this context have own poses as labels; see ``with_own_poses``."""
    forward = engine_epoch._forward

    def taught(trainer: Trainer, batch: Batch) -> tuple[list[str], Tensor]:
        if trainer.ema is None:
            raise SystemExit("own poses are those of the moving average: train.ema_decay must not be 0")
        if trainer.progress.step >= begin * trainer.total_steps:
            with trainer.accelerator.autocast():
                labels = with_own_poses(trainer.ema.module, batch.images, batch.targets, sure)
            batch = replace(batch, targets=labels)
        return forward(trainer, batch)

    engine_epoch._forward = taught
    try:
        yield
    finally:
        engine_epoch._forward = forward


@torch.no_grad()
def with_own_poses(model: Model, images: Tensor, targets: list[Targets], sure: float) -> list[Targets]:
    """The labels of a batch, with the model's poses on pictures that have persons and no pose.

    An object gets the pose whose box fits it best, if that one's score is at least ``sure``. The others stay without.
    """
    chosen = [row for row, one in enumerate(targets) if is_without_poses(one)]
    if not chosen:
        return targets
    head = model.head("keypoints")
    found = head.postprocess(model(images[chosen])["keypoints"], [(1, 1)] * len(chosen), sure)
    labels = list(targets)
    for row, poses in zip(chosen, found):
        points, own_points = targets[row].keypoints, poses.keypoints
        assert points is not None
        assert own_points is not None
        keypoints = points.clone()
        for index, own in pairs_of(targets[row], poses):
            pose = torch.from_numpy(own_points[own])
            keypoints[index] = torch.cat((pose[:, :2], 2.0 * (pose[:, 2:] >= 0.5)), -1)
        labels[row] = replace(targets[row], keypoints=keypoints)
    return labels


def is_without_poses(targets: Targets) -> bool:
    """Whether there are persons in the picture, and none has a point."""
    points = targets.keypoints
    return points is not None and bool((targets.labels == PERSON).any()) and not bool((points[..., 2] > 0).any())


def pairs_of(targets: Targets, poses: Instances) -> list[tuple[int, int]]:
    """(object, pose) of persons and poses in fractions of the picture, by falling IoU, each in one pair at most."""
    overlaps, _ = iou(cxcywh_to_xyxy(targets.boxes)[:, None], torch.from_numpy(poses.boxes)[None])
    left = torch.where(targets.labels[:, None] == PERSON, overlaps, 0).numpy().copy()
    pairs = []
    while left.size and left.max() >= MIN_IOU:
        row, column = (int(index) for index in np.unravel_index(left.argmax(), left.shape))
        pairs.append((row, column))
        left[row], left[:, column] = 0, 0
    return pairs


def compare_poses(run: Path, folder: Path) -> str:
    """Markdown: by the least score of the moving average, how many poses it gives, and how near they are."""
    config = load_config(file=run / "config.yaml")
    tensors = load_file(run / "last" / "state.safetensors")
    average, current = (loaded(config.model, tensors, part) for part in ("average.", "model."))
    part, full = (
        read_data_sources(DataConfig(root=str(folder), train=name), ["keypoints"], 0, lambda line: None)[0].train
        for name in (PART, "train")
    )
    loader = build_eval_loader(part, DataConfig(workers=0), batch_size=16, image_size=config.model.image_size)
    labels = Dataset(full)
    total, found, first = 0, [], 0
    for batch in loader:
        chosen = [row for row, one in enumerate(batch.targets) if is_without_poses(one)]
        truth = [with_points(batch.targets[row], labels.labels(first + row)) for row in chosen]
        first += len(batch)
        total += sum(int((one.keypoints[..., 2] > 0).any(-1).sum()) for one in truth if one.keypoints is not None)
        if chosen:
            both = (poses_in(batch.images[chosen], model) for model in (average, current))
            found += [row for each in zip(truth, *both) for row in near(*each)]
    lines, rows = [], np.array(found)
    for threshold in THRESHOLDS:
        kept = rows[rows[:, 0] >= threshold]
        if len(kept):
            lines.append([f"{threshold:g}", f"{len(kept) / total:.2f}", *(f"{x:.3f}" for x in kept[:, 1:].mean(0))])
    header = ["score", "share of the objects", "OKS of the average", "OKS of the weights in training"]
    return "\n".join(markdown_table(header, lines))


def with_points(targets: Targets, labels: PictureLabels) -> Targets:
    """The same objects with all their points."""
    assert labels.keypoints is not None
    return replace(targets, keypoints=torch.from_numpy(labels.keypoints[~labels.crowd].astype(np.float32)))


def loaded(config: Any, tensors: dict[str, Tensor], part: str) -> Model:
    """The model with some of the tensors of a run's state."""
    model = Model(config)
    model.load_state_dict({name.removeprefix(part): x for name, x in tensors.items() if name.startswith(part)})
    return model.eval()


@torch.no_grad()
def poses_in(images: Tensor, model: Model) -> list[Instances]:
    """The model's poses, in fractions of the pictures."""
    return model.head("keypoints").postprocess(model(images)["keypoints"], [(1, 1)] * len(images), 0.0)


def near(truth: Targets, average: Instances, current: Instances) -> list[tuple[float, ...]]:
    """For each object that both have found: score of the average, and the OKS of both with the label."""
    found: list[tuple[float, ...]] = []
    points, others = truth.keypoints, dict(pairs_of(truth, current))
    assert points is not None
    height, width = truth.size
    scale = torch.tensor([(width / height) ** 0.5, (height / width) ** 0.5])
    sigmas = torch.tensor(keypoint_sigmas(average.categories[PERSON]))
    for index, own in pairs_of(truth, average):
        label = points[index]
        if index in others and (label[:, 2] > 0).any():
            scaled = torch.cat((label[:, :2] * scale, label[:, 2:]), -1)
            both = (pose_of(average, own), pose_of(current, others[index]))
            near_to = (oks(places * scale, scaled, truth.areas[index], sigmas).item() for places in both)
            found.append((float(average.scores[own]), *near_to))
    return found


def pose_of(instances: Instances, index: int) -> Tensor:
    """(K, 2) x, y of an object."""
    assert instances.keypoints is not None
    return torch.from_numpy(instances.keypoints[index, :, :2])


def table(rows: list[Row]) -> str:
    """Markdown, see ``tables``."""
    ordered = sorted(rows, key=lambda row: (row["task"], row["form"], LABELS.index(row["labels"])))
    return tables(ordered, ["form", "labels"], ["model", "poses", "share", "seconds"], cells)


def cells(row: Row) -> list[str]:
    return [row["form"], row["labels"], f"{row['share']:g}", f"{row['seconds']:.0f}"]


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        raise SystemExit("stopped; the same command continues") from None

"""Accuracy without NMS: the dense keypoint head's one-to-one layers compared with its one-to-many layers and box NMS.

The same weights, the same images. With the one-to-many layers, several grid points predict an object, and NMS keeps one
of them. Prints a Markdown table with one row per kind of layers and IoU threshold of NMS.

    python docs/scripts/keypoint_duplicates.py RUN
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import batched_nms

import mvision
from mvision.config import load_config
from mvision.data import CocoSplit, Loader, build_eval_loader, find_layout
from mvision.evaluation.evaluate import make_metrics
from mvision.heads.keypoints import KeypointHead
from mvision.heads.keypoints.grid import PoseLayers
from mvision.structures import Instances

NMS_IOUS = (0.5, 0.65, 0.8)
CANDIDATES = 300


def main(run: str) -> None:
    """One evaluation per row."""
    model = mvision.load(f"{run}/best.safetensors").eval()
    config = load_config(file=Path(run) / "config.yaml")
    fields = ("boxes", "keypoints")
    split = CocoSplit(find_layout(config.data.root).split(config.data.val, fields, poses_only=True), fields)
    loader = build_eval_loader(split, config.data, batch_size=16, image_size=config.model.image_size)
    head = model.head("keypoints")
    head.config.nms_iou = None  # it is done below
    assert isinstance(head, KeypointHead)
    print("| layers | NMS | AP | AP50 | AR |\n|---|---|---|---|---|")
    _row(model, split, loader, "one-to-one", None)
    for iou in NMS_IOUS:
        _row(model, split, loader, "one-to-one", iou)
    _predict_one2many(head)
    head.config.num_instances = CANDIDATES
    for iou in (None, *NMS_IOUS):
        _row(model, split, loader, "one-to-many", iou)


def _predict_one2many(head: KeypointHead) -> None:
    """Replace the one-to-one layers by the one-to-many layers, without their classes that have no keypoints."""
    layers = head.many
    assert isinstance(layers, PoseLayers)
    score = nn.Linear(layers.score.in_features, len(head.class_labels))
    with torch.no_grad():
        score.weight.copy_(layers.score.weight[head.class_labels])
        score.bias.copy_(layers.score.bias[head.class_labels])
    layers.score = score
    head.one, head.own = layers, nn.ModuleList()


@torch.no_grad()
def _row(model: mvision.Model, split: CocoSplit, loader: Loader, layers: str, iou: float | None) -> None:
    metric = make_metrics(model, split)["keypoints"][0]
    for batch in loader:
        found = model.postprocess(model(batch.images), [target.size for target in batch.targets], 0.0, multi_label=True)
        for instances, target in zip(found, batch.targets):
            kept = instances if iou is None else _suppress(instances, iou)
            metric.update(kept.to_coco(target.image_id), [target.image_id])
    figures = metric.compute()
    print(
        f"| {layers} | {iou or 'none'} | {figures['AP']:.3f} | {figures['AP50']:.3f} | {figures['AR']:.3f} |",
        flush=True,
    )


def _suppress(found: Instances, iou: float) -> Instances:
    boxes, scores, labels = (torch.from_numpy(x) for x in (found.boxes, found.scores, found.labels))
    keep = torch.zeros(len(found), dtype=torch.bool)
    keep[batched_nms(boxes, scores, labels, iou)] = True
    return found.filter(keep.numpy())


if __name__ == "__main__":
    main(sys.argv[1])

"""Which prediction has to predict which object: one-to-one matching for the decoder, one-to-many for all tokens.

The result is a list of pairs, whose length is known without a look at the GPU: losses gather at the pairs, so that none
of them has to wait for a number of positives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mvision.heads.query.union import in_every_layer, union_of_matches
from mvision.structures import Targets
from mvision.structures.boxes import cxcywh_to_xyxy, iou, plain_iou
from mvision.structures.transfer import start_to_host, to_device

# The class term of the matching cost is a focal loss, as in Deformable DETR and RT-DETR.
CLASS_COST, FOCAL_ALPHA, FOCAL_GAMMA = 2.0, 0.25, 2.0
WORTH_THREADS = 3e7
"""Threads share the images of a batch above this number of cost additions, about 2 ms of one core; starting them takes
half a millisecond."""
MAX_THREADS = 8


@dataclass
class Pairs:
    """P pairs of a prediction and the object that it has to predict.

    Attributes:
        layer, image, query, object: (P,) int64 indices, on the device of the predictions; ``object`` among those of
            its image.
        counted: (P,) bool; False for pairs without meaning, which fill up a fixed shape. None: all have a meaning, and
            no prediction has two objects.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    object: Tensor
    counted: Tensor | None = None


@dataclass
class Matches(Pairs):
    """Pairs that were found on the CPU, ordered by layer, then image, then query.

    Attributes:
        host: (P, 4) int64, their layer, image, query and object, on the CPU.
        shared: the union of all layers' pairs, which it has in every layer, see ``union_of_matches``; None unless it
            was asked for.
    """

    host: np.ndarray = field(kw_only=True)
    shared: Matches | None = field(kw_only=True, default=None)

    @classmethod
    def of(cls, host: np.ndarray, moved: Tensor) -> Matches:
        """From the array and its transpose (4, P) on the device."""
        return cls(*moved.unbind(), host=host)


@dataclass
class PaddedTargets:
    """The ground truth of a batch in tensors, padded to the largest number T of objects in one of its images.

    Attributes:
        boxes: (B, T, 4) cxcywh in 0..1; zeros where padded.
        labels: (B, T) int64; 0 where padded.
        valid: (B, T) bool.
        counts: number of objects in each image.
        total: the batch's number of objects, see ``divisor``; losses are divided by it.
        labelled_classes: see ``labelled_classes``.
        groups: number of copies of every object among the denoising queries; 0: there are none.
        denoising: the denoising queries that have to predict the object that they were made from, in every layer.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    counts: list[int]
    total: float | Tensor
    labelled_classes: Tensor | None
    groups: int
    denoising: Matches


def pad_targets(
    targets: list[Targets],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    num_denoising: int = 0,
    num_layers: int = 1,
) -> PaddedTargets:
    """Stack the boxes and labels of a batch, and move them to ``device`` in one copy that is not waited for.

    Args:
        targets: labels on the CPU.
        dtype: of the boxes.
        num_denoising: intended number of positive denoising queries per image: as many whole groups as fit, but at
            least one; 0 for none.
        num_layers: decoder layers, in each of which denoising queries have their pairs.
    """
    counts = [len(target) for target in targets]
    most = max(counts, default=0)
    groups = max(1, num_denoising // most) if num_denoising > 0 and most else 0
    boxes = torch.zeros(len(targets), most, 4, dtype=dtype)
    labels = torch.zeros(len(targets), most, dtype=torch.int64)
    for index, (target, count) in enumerate(zip(targets, counts)):
        boxes[index, :count] = target.boxes.to(boxes)
        labels[index, :count] = target.labels.cpu()
    pairs = denoising_pairs(counts, groups, num_layers)
    packed = {
        "boxes": boxes,
        "labels": labels,
        "valid": torch.arange(most) < torch.tensor(counts, dtype=torch.int64)[:, None],
        "pairs": torch.from_numpy(pairs.T.copy()),
    }
    classes = labelled_classes(targets)
    if classes is not None:
        packed["classes"] = classes
    moved = to_device(packed, device)
    return PaddedTargets(
        boxes=moved["boxes"],
        labels=moved["labels"],
        valid=moved["valid"],
        counts=counts,
        total=divisor(sum(counts), device),
        labelled_classes=moved.get("classes"),
        groups=groups,
        denoising=Matches.of(pairs, moved["pairs"]),
    )


def denoising_pairs(counts: list[int], groups: int, layers: int) -> np.ndarray:
    """``Matches.host`` of denoising queries: a group has T copies to predict the objects, then T that predict none."""
    most = max(counts, default=0)
    image, group, index = (
        np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        for parts in (
            [np.full(groups * count, image) for image, count in enumerate(counts)],
            [np.repeat(np.arange(groups), count) for count in counts],
            [np.tile(np.arange(count), groups) for count in counts],
        )
    )
    return in_every_layer(np.column_stack((image, group * 2 * most + index, index)), layers)


def labelled_classes(targets: list[Targets]) -> Tensor | None:
    """``Targets.labelled_classes`` of a batch, (B, C) or (B, 1) bool; None if every image has all classes labelled."""
    if all(target.labelled_classes is None for target in targets):
        return None
    one = torch.ones(1, dtype=torch.bool)
    rows = [one if target.labelled_classes is None else target.labelled_classes.cpu() for target in targets]
    width = max(map(len, rows))
    return torch.stack([row.expand(width) for row in rows])


def divisor(count: int, device: torch.device) -> float | Tensor:
    """What a loss over ``count`` objects is divided by: their mean number over all processes, at least 1.

    With one process a number; with several a tensor on ``device``, whose value nothing has to wait for.
    """
    mean = mean_count(count, device)
    return mean.clamp(min=1) if isinstance(mean, Tensor) else max(1.0, mean)


def mean_count(count: int, device: torch.device) -> float | Tensor:
    """The mean of ``count`` over all processes; with several a tensor on ``device``."""
    if not _several_processes():
        return float(count)
    return mean_over_processes(torch.full((), float(count), device=device))


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes.

    Processes average their gradients; if each divides its loss by this mean of their numbers of objects, the average is
    the gradient of one loss over the whole batch.
    """
    if _several_processes():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def start_matching(
    logits: Tensor,
    boxes: Tensor,
    targets: PaddedTargets,
    box_weight: float = 5.0,
    giou_weight: float = 2.0,
    more_costs: Tensor | None = None,
    shared: bool = False,
) -> Callable[[], Matches]:
    """Start the one-to-one matching with the smallest total cost, and return a function that finishes it.

    There is one copy of all costs to the CPU, which the returned function waits for, and one of all matches back. Work
    that is queued before it is called keeps a GPU busy.

    Args:
        logits: (L, B, Q, C) before the sigmoid.
        boxes: (L, B, Q, 4) cxcywh in 0..1.
        box_weight, giou_weight: of the L1 and GIoU terms of the cost.
        more_costs: (L, B, Q, T), added to those of class and box; already weighted.
        shared: whether to fill in ``Matches.shared``.

    Returns:
        As many pairs in every layer and image as it has objects or queries, whichever are fewer. Pairs whose cost is
        not finite are matched only if nothing else is left.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 3.1.
    """
    if not any(targets.counts):
        return no_matches(logits, shared)
    costs = _pair_costs(logits, boxes, targets, box_weight, giou_weight)
    if more_costs is not None:
        costs = costs + more_costs
    return start_assignment(costs, targets.counts, shared)


def no_matches(logits: Tensor, shared: bool) -> Callable[[], Matches]:
    """What ``start_assignment`` returns for a batch without objects."""
    return lambda: _on_device(np.empty((0, 4), dtype=np.int64), logits.device, len(logits) if shared else 0)


def start_assignment(costs: Tensor, counts: Sequence[int], shared: bool) -> Callable[[], Matches]:
    """``start_matching`` with costs (L, B, Q, T) of any kind, of which an image's first ``counts`` objects exist."""
    device, layers = costs.device, len(costs) if shared else 0
    # scipy refuses NaN; a huge cost has such pairs matched last.
    wait = start_to_host({"costs": torch.nan_to_num(costs, nan=1e6, posinf=1e6, neginf=1e6)})
    return lambda: _on_device(_solve(wait()["costs"].numpy(), counts), device, layers)


def _on_device(host: np.ndarray, device: torch.device, shared_layers: int) -> Matches:
    """The matches, and their union for ``shared_layers`` layers (0: none), in one copy."""
    arrays = {"own": host}
    if shared_layers:
        arrays["shared"] = in_every_layer(union_of_matches(host), shared_layers)
    moved = to_device({name: torch.from_numpy(array.T.copy()) for name, array in arrays.items()}, device)
    matches = Matches.of(host, moved["own"])
    if shared_layers:
        matches.shared = Matches.of(arrays["shared"], moved["shared"])
    return matches


def _solve(costs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """``Matches.host`` of costs (L, B, Q, T), of which an image's first ``counts`` objects exist."""
    layers, _, queries, _ = costs.shape

    def solve(image: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [linear_sum_assignment(costs[layer, image, :, : counts[image]]) for layer in range(layers)]

    images = [image for image, count in enumerate(counts) if count]
    threads = min(len(images), os.cpu_count() or 1, MAX_THREADS)
    if threads > 1 and layers * queries * sum(count**2 for count in counts) > WORTH_THREADS:
        with ThreadPoolExecutor(threads) as pool:  # scipy leaves Python's lock while it works
            solved = list(pool.map(solve, images))
    else:
        solved = [solve(image) for image in images]
    matched = [min(queries, counts[image]) for image in images]
    host = np.empty((layers, sum(matched), 4), dtype=np.int64)
    host[..., 0] = np.arange(layers)[:, None]
    host[..., 1] = np.repeat(images, matched)
    # scipy orders the pairs of an image by the query.
    for column in (0, 1):
        for layer in range(layers):
            np.concatenate([of_image[layer][column] for of_image in solved], out=host[layer, :, 2 + column])
    return host.reshape(-1, 4)


def _pair_costs(logits: Tensor, boxes: Tensor, targets: PaddedTargets, box_weight: float, giou_weight: float) -> Tensor:
    """(L, B, Q, T) costs of class and box of all pairs of a query and an object of its image."""
    class_cost = class_costs(logits, targets.labels, boxes.dtype)
    l1, giou = box_distances(boxes, targets.boxes)
    return CLASS_COST * class_cost + box_weight * l1 - giou_weight * giou


def box_distances(boxes: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """(L, B, Q, T) L1 distance and GIoU of all pairs of boxes (L, B, Q, 4) and (B, T, 4), cxcywh."""
    l1 = torch.cdist(boxes, objects[None].expand(len(boxes), -1, -1, -1), p=1)
    _, giou = iou(cxcywh_to_xyxy(boxes)[:, :, :, None], cxcywh_to_xyxy(objects)[None, :, None])
    return l1, giou


def class_costs(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """(L, B, Q, T) focal costs, without ``CLASS_COST``, of logits (L, B, Q, C) for the classes (B, T) of objects."""
    index = labels[None, :, None].expand(len(logits), -1, logits.shape[2], -1)
    prob = logits.gather(-1, index).to(dtype).sigmoid()
    negative = (1 - FOCAL_ALPHA) * prob**FOCAL_GAMMA * -(1 - prob + 1e-8).log()
    positive = FOCAL_ALPHA * (1 - prob) ** FOCAL_GAMMA * -(prob + 1e-8).log()
    return positive - negative


@torch.no_grad()
def anchor_assignment(anchors: Tensor, boxes: Tensor, valid: Tensor, top_k: int = 9) -> Pairs:
    """One-to-many assignment for dense predictions: for each object the tokens whose anchors overlap it most.

    It depends on the anchors alone, so it is the same from the first step to the last. (An assignment by the quality of
    predictions, as in TOOD, changes while that quality grows; from random weights it trained more slowly here.)

    Args:
        anchors: (S, 4) cxcywh in 0..1, one per token, larger on coarser levels.
        boxes, valid: of the objects, see ``PaddedTargets``.
        top_k: largest number of tokens per object.

    Returns:
        B * T * ``top_k`` pairs in layer 0, ``query`` being the token and ``counted`` those that are assigned. An object
        gets the token nearest to its centre, and otherwise only tokens whose centre lies inside its box. A token chosen
        for several objects is assigned to the one with the smallest box.

    Source: the level and centre priors of Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free
    Detection" (ATSS), CVPR 2020, with a fixed number of tokens in place of the statistical threshold.
    """
    batch, most = valid.shape
    top_k = min(top_k, len(anchors))
    places = torch.arange(batch * most, device=anchors.device)[:, None].expand(-1, top_k).flatten()
    if most == 0:
        return Pairs(places, places, places, places, places > 0)
    gt_boxes = cxcywh_to_xyxy(boxes)
    centres = anchors[:, :2]
    inside = ((centres > gt_boxes[:, :, None, :2]) & (centres < gt_boxes[:, :, None, 2:])).all(-1)
    distance = (centres - boxes[:, :, None, :2]).square().sum(-1)
    inside = inside.scatter(2, distance.argmin(-1, keepdim=True), True) & valid[..., None]
    anchor_iou = plain_iou(gt_boxes[:, :, None], cxcywh_to_xyxy(anchors))
    # Of tokens with one IoU (all anchors inside a large object have the same) those nearer to its centre come first.
    score = torch.where(inside, 1 + anchor_iou - 1e-3 * distance, torch.zeros_like(anchor_iou))
    best, index = score.topk(top_k, dim=-1)
    chosen = torch.zeros_like(inside).scatter(2, index, best > 0)
    area = boxes[..., 2] * boxes[..., 3]
    owner = torch.where(chosen, area[..., None], torch.inf).min(1).indices
    gt_index = places % most
    owned = owner.gather(1, index.flatten(1)).flatten() == gt_index
    image = places // most
    return Pairs(torch.zeros_like(places), image, index.flatten(), gt_index, owned & (best > 0).flatten())

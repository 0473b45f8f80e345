"""Loss terms of query poses, of all layers and of both kinds of queries at once, at the pairs that matching.py finds.

Source: Janampa and Pattichis, "DETRPose: Real-time end-to-end transformer model for multi-person pose estimation",
2025, section 3 (scores whose target is the OKS, L1 distance and OKS of the points, the union of all layers' matches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvision.heads.poses.matching import BoxCosts, start_pose_matching
from mvision.heads.poses.outputs import Decoded, DensePoses
from mvision.heads.poses.settings import PoseConfig
from mvision.heads.poses.targets import PoseTargets
from mvision.heads.query.fine_grained import Distributions, distillation_losses
from mvision.heads.query.losses import PairRows, labelled_rows, pair_rows, quality_focal
from mvision.heads.query.matching import Matches, Pairs, anchor_assignment, divisor, mean_over_processes
from mvision.structures.boxes import cxcywh_to_xyxy, iou
from mvision.structures.oks import labelled_mean, oks


@dataclass
class PoseSet:
    """Predictions of one kind of queries, and what they are compared with.

    Attributes:
        logits: (L, B, N, C) before the sigmoid: the F layers of the decoder, then the others.
        points: (L, B, N, K, 2) x, y in 0..1.
        boxes: (F, B, N, 4) cxcywh in 0..1.
        visibility: (F, B, N, K) before the sigmoid; None if it is not predicted.
        corners: (F, B, N, K, 2, bins + 1) logits of the points' distributions.
        pairs: of predictions and poses, for the class term; all other predictions have to be of no pose.
        total: number that the class term is divided by.
        point_pairs, point_total: for all other terms.
        ignored: ``PoseTargets.ignored``, or None where they do not matter.
        suffixes: of the names of each layer's terms, L strings.
    """

    logits: Tensor
    points: Tensor
    boxes: Tensor
    visibility: Tensor | None
    corners: Tensor
    pairs: Pairs
    total: float | Tensor
    point_pairs: Pairs
    point_total: float | Tensor
    ignored: Tensor | None
    suffixes: list[str]

    @property
    def pairs_of_decoder(self) -> Pairs:
        """Those of ``point_pairs`` in the first F layers. All layers have equally many."""
        pairs = self.point_pairs
        number = len(pairs.layer) // len(self.logits) * len(self.boxes)
        return Pairs(*(values[:number] for values in (pairs.layer, pairs.image, pairs.query, pairs.object)))


@dataclass
class Predictions:
    """Of one kind of queries; the selected ones come with those of the tokens that they were selected from.

    ``logits`` (L, B, N, C) and ``points`` (L, B, N, K, 2) of all layers, the decoder's first; ``boxes``,
    ``visibility`` and ``corners`` of the decoder's layers alone.
    """

    logits: Tensor
    points: Tensor
    boxes: Tensor
    corners: Tensor
    visibility: Tensor | None = None


def separated(decoded: Decoded, num_denoising: int) -> tuple[Predictions, Predictions | None]:
    """Predictions of the selected queries (L = layers, "pre", tokens), and of the denoising queries (layers, "pre").

    Args:
        decoded: of all layers.
        num_denoising: D; 0 if there are none.
    """
    logits = torch.cat((decoded.logits, _given(decoded.pre_logits)[None]))
    points = torch.cat((decoded.points, _given(decoded.pre_points)[None]))
    every = {"logits": logits, "points": points, "boxes": decoded.boxes, "corners": _given(decoded.corners)}
    if decoded.visibility is not None:
        every["visibility"] = decoded.visibility
    noisy = None
    if num_denoising:
        # The gradient of one split takes fewer operators than those of two slices.
        sizes = [num_denoising, logits.shape[2] - num_denoising]
        parts = {name: values.split(sizes, 2) for name, values in every.items()}
        noisy = Predictions(**{name: part[0] for name, part in parts.items()})
        every = {name: part[1] for name, part in parts.items()}
    every["logits"] = torch.cat((every["logits"], _given(decoded.encoder_logits)[None]))
    every["points"] = torch.cat((every["points"], _given(decoded.encoder_points)[None]))
    return Predictions(**every), noisy


def _given(value: Tensor | None) -> Tensor:
    """An output that the decoder gives in training alone."""
    if value is None:
        raise ValueError("the loss needs the outputs of every layer of the decoder")
    return value


def matched_set(found: Predictions, targets: PoseTargets, matches: Matches) -> PoseSet:
    """The selected queries; suffixes are ``_0``.., none of the last decoder layer, ``_pre`` and ``_encoder``."""
    total = point_total = targets.total
    if matches.shared is not None:
        point_total = divisor(len(matches.shared.host) // len(found.logits), found.logits.device)
    names = [*(f"_{index}" for index in range(len(found.boxes) - 1)), "", "_pre", "_encoder"]
    points = matches.shared or matches
    return PoseSet(**vars(found), pairs=matches, total=total, point_pairs=points, point_total=point_total,
                   ignored=targets.ignored, suffixes=names)  # fmt: skip


def denoising_set(found: Predictions, targets: PoseTargets) -> PoseSet:
    """The denoising queries; suffixes are ``_denoising_0``.. and ``_denoising_pre``.

    Their negatives stay negatives in ignored regions: they were made from a pose, and a crowd may fill the image.
    """
    assert targets.denoising is not None
    pairs, total = targets.denoising.matches, targets.total * targets.groups
    names = [*(f"_denoising_{index}" for index in range(len(found.boxes))), "_denoising_pre"]
    return PoseSet(**vars(found), pairs=pairs, total=total, point_pairs=pairs, point_total=total, ignored=None,
                   suffixes=names)  # fmt: skip


@dataclass
class Objects:
    """The poses of P pairs, see ``PoseTargets``; ``scale`` (P, 1, 2)."""

    points: Tensor
    boxes: Tensor
    areas: Tensor
    sigmas: Tensor
    point_exists: Tensor
    scale: Tensor

    @classmethod
    def at(cls, rows: PairRows, targets: PoseTargets) -> Objects:
        """The poses of these pairs."""
        names = ("points", "boxes", "areas", "sigmas", "point_exists")
        taken = {name: getattr(targets, name).flatten(0, 1).index_select(0, rows.gt_row) for name in names}
        image = torch.div(rows.gt_row, targets.labels.shape[1] or 1, rounding_mode="floor")
        return cls(**taken, scale=targets.scale.index_select(0, image)[:, None])

    def oks(self, points: Tensor) -> Tensor:
        """(P,) of predicted points (P, K, 2)."""
        labelled = torch.cat((self.points[..., :2] * self.scale, self.points[..., 2:]), -1)
        return oks(points * self.scale, labelled, self.areas, self.sigmas)

    def distance(self, points: Tensor) -> Tensor:
        """(P,) L1 distance of predicted points (P, K, 2), summed over the labelled ones."""
        return torch.where(self.points[..., 2:] > 0, (points - self.points[..., :2]).abs(), 0).sum((1, 2))


def pose_terms(
    decoded: Decoded, targets: PoseTargets, config: PoseConfig, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """The weighted terms of ``pose_losses`` and of ``point_distillation``, by their names with the suffix of a layer.

    Args:
        decoded: outputs of all layers, made with ``targets.denoising``.
        class_weights: (C,) of the class terms of poses, see ``quality_focal``.
    """
    count = 0 if targets.denoising is None else targets.denoising.labels.shape[1]
    found, noisy = separated(decoded, count)
    own_boxes = config.queries == "own"
    box_costs = None if own_boxes else BoxCosts(found.boxes[-1], config.box_weight, config.giou_weight)
    matches = start_pose_matching(
        found.logits.detach(), found.points.detach(), targets, config.point_weight, config.oks_weight,
        config.shared_matches, box_costs,
    )  # fmt: skip
    sets = [] if noisy is None else [denoising_set(noisy, targets)]
    sets.insert(0, matched_set(found, targets, matches()))
    losses = pose_losses(
        sets, targets, config.class_loss, config.alpha, config.gamma, own_boxes, config.quality_power, class_weights
    )
    if config.ddf_weight and config.num_layers > 1:
        losses["ddf"] = point_distillation(sets, targets)
    terms: dict[str, Tensor] = {}
    for name, of_sets in losses.items():
        weight = getattr(config, f"{name}_weight")
        for one, values in zip(sets, of_sets):
            terms |= {f"{name}{suffix}": weight * value for suffix, value in zip(one.suffixes, values)}
    return terms if decoded.dense is None else terms | dense_terms(decoded.dense, targets, config, class_weights)


def dense_terms(
    dense: DensePoses, targets: PoseTargets, config: PoseConfig, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """One-to-many supervision: the weighted terms ``class_dense``, ``point_dense`` and ``oks_dense``.

    Every pose teaches its points to the tokens whose anchors overlap its box most, and their score is to be 1 however
    far the points are away. So the features tell objects from background long before the OKS of a pose does. The terms
    are divided by the number of these tokens.
    """
    pairs = anchor_assignment(dense.anchors, targets.boxes, targets.valid)
    shape = dense.logits[None].shape
    rows = pair_rows([shape], [pairs], targets.labels.shape[1])
    assert rows.counted is not None
    gt = Objects.at(rows, targets)
    points = dense.points.flatten(0, 1).to(targets.points.dtype).index_select(0, rows.row)
    index = (rows.row, targets.labels.flatten().index_select(0, rows.gt_row))
    loss = quality_focal(
        dense.logits.flatten(0, 1), index, torch.ones_like(gt.areas), config.class_loss, config.alpha, config.gamma,
        labelled_rows([shape], targets.labelled_classes), rows.counted, class_weights,
    )  # fmt: skip
    if targets.ignored is not None:  # but not where a pose is to be predicted
        ignored = F.pad(_inside(dense.anchors[None, :, :2], targets.ignored).flatten(), (0, 1))
        # What does not count is written behind the end: another pair may count at the same token.
        ignored = ignored.index_fill(0, torch.where(rows.counted, rows.row, len(loss)), False)[:-1]
        loss = torch.where(ignored[:, None], 0, loss)
    total = mean_over_processes(rows.counted.sum().to(points.dtype)).clamp(min=1) / config.dense_weight
    found = {"point": gt.distance(points), "oks": 1 - gt.oks(points)}
    losses = {name: torch.where(rows.counted, values, 0) for name, values in found.items()} | {"class": loss}
    return {f"{name}_dense": getattr(config, f"{name}_weight") * x.sum() / total for name, x in losses.items()}


def pose_losses(
    sets: Sequence[PoseSet],
    targets: PoseTargets,
    kind: Literal["vfl", "mal"],
    alpha: float,
    gamma: float,
    own_boxes: bool = True,
    quality_power: float = 1.0,
    class_weights: Tensor | None = None,
) -> dict[str, list[Tensor]]:
    """The unweighted terms of every layer of every set.

    Args:
        kind, alpha, gamma, class_weights: of the class term, see ``quality_focal``.
        own_boxes: whether the boxes are predicted here; the head that objects are taken from teaches its boxes itself.
        quality_power: of the OKS, as the target of the class term.

    Returns:
        For every set a tensor (L,) of ``class``, ``point`` (L1, summed over the labelled points) and ``oks`` (one minus
        the OKS), and a tensor (F,) of ``box`` (L1), ``giou`` and ``visible`` (cross-entropy of "the point is labelled",
        a mean over the points of the object's class).
    """
    shapes = [one.logits.shape for one in sets]
    logits = torch.cat([one.logits.flatten(0, 2) for one in sets])
    points = torch.cat([one.points.flatten(0, 2) for one in sets]).to(targets.points.dtype)
    most = targets.labels.shape[1]

    own = rows = pair_rows(shapes, [one.point_pairs for one in sets], most)
    gt, pred = Objects.at(rows, targets), points.index_select(0, rows.row)
    similarity = gt.oks(pred)
    terms = _divided({"point": gt.distance(pred), "oks": 1 - similarity}, rows, sets, [shape[0] for shape in shapes])

    quality = similarity.detach()
    if any(one.pairs is not one.point_pairs for one in sets):
        own = pair_rows(shapes, [one.pairs for one in sets], most)
        with torch.no_grad():
            quality = Objects.at(own, targets).oks(points.index_select(0, own.row))
    index = (own.row, targets.labels.flatten().index_select(0, own.gt_row))
    labelled = labelled_rows(shapes, targets.labelled_classes)
    quality = quality**quality_power
    loss = quality_focal(logits, index, quality, kind, alpha, gamma, labelled, class_weights=class_weights)
    ignored = _ignored_rows(sets, points)
    if ignored is not None:  # but not where a pose is to be predicted
        loss = torch.where(ignored.index_fill(0, own.row, False)[:, None], 0, loss)
    parts = loss.split([one.logits[..., 0].numel() for one in sets])
    terms["class"] = [part.view(len(one.logits), -1).sum(1) / one.total for part, one in zip(parts, sets)]
    return terms | _decoder_terms(sets, targets, own_boxes)


def _decoder_terms(sets: Sequence[PoseSet], targets: PoseTargets, own_boxes: bool) -> dict[str, list[Tensor]]:
    """``box`` and ``giou`` of own boxes and, where it is predicted, ``visible``."""
    shapes = [one.boxes.shape for one in sets]
    rows = pair_rows(shapes, [one.pairs_of_decoder for one in sets], targets.labels.shape[1])
    gt = Objects.at(rows, targets)
    losses = {}
    if own_boxes:
        boxes = torch.cat([one.boxes.flatten(0, 2) for one in sets]).to(gt.boxes.dtype).index_select(0, rows.row)
        _, giou = iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt.boxes))
        losses = {"box": (boxes - gt.boxes).abs().sum(-1), "giou": 1 - giou}
    logits = [one.visibility.flatten(0, 2) for one in sets if one.visibility is not None]
    if logits:
        visibility = torch.cat(logits).to(gt.boxes.dtype).index_select(0, rows.row)
        is_labelled = (gt.points[..., 2] > 0).to(visibility)
        entropy = F.binary_cross_entropy_with_logits(visibility, is_labelled, reduction="none")
        losses["visible"] = labelled_mean(entropy, gt.point_exists)
    return _divided(losses, rows, sets, [shape[0] for shape in shapes]) if losses else {}


def _divided(
    losses: dict[str, Tensor], rows: PairRows, sets: Sequence[PoseSet], lengths: list[int]
) -> dict[str, list[Tensor]]:
    """The losses (P,) of all pairs, summed in each layer of each set and divided by the set's ``point_total``."""
    values = torch.stack(tuple(losses.values()))
    sums = values.new_zeros(len(values), sum(lengths)).index_add(1, rows.layer, values).split(lengths, 1)
    return dict(zip(losses, map(list, zip(*((part / one.point_total).unbind() for part, one in zip(sums, sets))))))


@torch.no_grad()
def _ignored_rows(sets: Sequence[PoseSet], points: Tensor) -> Tensor | None:
    """(rows,) bool: predictions of all sets whose points have their centre in an ignored region; None if there is none.

    COCO's evaluation ignores objects without labelled points, and predictions that match them. An annotator who gave a
    box alone has seen an object there: as a negative it would contradict the poses that are labelled.
    """
    if all(one.ignored is None for one in sets):
        return None
    centres = points.mean(1).split([one.logits[..., 0].numel() for one in sets])
    found = []
    for one, part in zip(sets, centres):
        if one.ignored is None:
            found.append(torch.zeros_like(part[:, 0], dtype=torch.bool))
            continue
        found.append(_inside(part.view(*one.logits.shape[:3], 2), one.ignored).flatten())
    return torch.cat(found)


def _inside(centres: Tensor, regions: Tensor) -> Tensor:
    """(..., B, N) bool: which centres (..., B or 1, N, 2) lie in one of the regions (B, U, 4) xyxy of their image."""
    low, high = regions[:, None].split(2, -1)
    return ((centres[..., None, :] > low) & (centres[..., None, :] < high)).all(-1).any(-1)


def point_distillation(sets: Sequence[PoseSet], targets: PoseTargets) -> list[Tensor]:
    """For every set (F - 1,): the distance of each earlier decoder layer's distributions from those of the last one.

    See ``distillation_losses``; in place of the IoU of the boxes it is weighted by the OKS.
    """
    corners = torch.cat([one.corners for one in sets], 2)
    layers, batch, queries = corners.shape[:3]
    sizes = [one.logits.shape[2] for one in sets]
    pairs, numbers, rows = [one.pairs_of_decoder for one in sets], [], []
    for number, found in enumerate(pairs):
        place = torch.add(found.query + sum(sizes[:number]), found.image, alpha=queries)
        rows.append(torch.add(place, found.layer, alpha=batch * queries))
        numbers.append(len(found.layer))
    points = torch.cat([one.points[:layers] for one in sets], 2).detach().flatten(0, 2).to(targets.points.dtype)
    row = torch.cat(rows)
    gt = Objects.at(pair_rows([one.boxes.shape for one in sets], pairs, targets.labels.shape[1]), targets)
    overlap = gt.oks(points.index_select(0, row))
    together = Distributions(corners.to(points.dtype).flatten(3, 4), sizes, numbers, row, overlap)
    logits = torch.cat([one.logits[layers - 1] for one in sets], 1).detach()
    return list(distillation_losses(together, logits).split(layers - 1))

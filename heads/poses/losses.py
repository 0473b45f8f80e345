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

from mvision.heads.poses.outputs import Decoded
from mvision.heads.poses.targets import PoseTargets
from mvision.heads.query.fine_grained import Distributions, distillation_losses
from mvision.heads.query.losses import PairRows, labelled_rows, pair_rows, quality_focal
from mvision.heads.query.matching import Matches, Pairs, divisor
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
    visibility: Tensor | None
    corners: Tensor


def separated(decoded: Decoded, num_denoising: int) -> tuple[Predictions, Predictions | None]:
    """Predictions of the selected queries (L = layers, "pre", tokens), and of the denoising queries (layers, "pre").

    Args:
        decoded: of all layers.
        num_denoising: D; 0 if there are none.
    """
    assert decoded.pre_logits is not None and decoded.pre_points is not None and decoded.corners is not None
    assert decoded.encoder_logits is not None and decoded.encoder_points is not None
    logits = torch.cat((decoded.logits, decoded.pre_logits[None]))
    points = torch.cat((decoded.points, decoded.pre_points[None]))
    both: list[list[Tensor | None]] = []
    for values in (logits, points, decoded.boxes, decoded.visibility, decoded.corners):
        # The gradient of one split takes fewer operators than those of two slices.
        sizes = [num_denoising, logits.shape[2] - num_denoising]
        both.append(
            [None, None] if values is None else list(values.split(sizes, 2)) if num_denoising else [None, values]
        )
    noisy, (logits, points, *others) = zip(*both)
    logits = torch.cat((logits, decoded.encoder_logits[None]))
    points = torch.cat((points, decoded.encoder_points[None]))
    return Predictions(logits, points, *others), Predictions(*noisy) if num_denoising else None


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


def pose_losses(
    sets: Sequence[PoseSet], targets: PoseTargets, kind: Literal["vfl", "mal"], alpha: float, gamma: float
) -> dict[str, Tensor]:
    """The unweighted terms of every layer of every set, as one tensor for each term.

    Args:
        kind, alpha, gamma: of the class term, see ``quality_focal``.

    Returns:
        ``class``, ``point`` (L1, summed over the labelled points) and ``oks`` (one minus the OKS), one number per layer,
        set after set; ``box`` (L1), ``giou`` and ``visible`` (cross-entropy of "the point is labelled", a mean over the
        points of the object's class), one per decoder layer.
    """
    most, dtype = targets.labels.shape[1], targets.points.dtype
    shapes = [one.logits.shape for one in sets]
    logits = torch.cat([one.logits.flatten(0, 2) for one in sets])
    points = torch.cat([one.points.flatten(0, 2) for one in sets]).to(dtype)

    rows = pair_rows(shapes, [one.point_pairs for one in sets], most)
    gt, pred = Objects.at(rows, targets), points.index_select(0, rows.row)
    similarity = gt.oks(pred)
    labelled = gt.points[..., 2:] > 0
    distance = torch.where(labelled, (pred - gt.points[..., :2]).abs(), 0).sum((1, 2))
    terms = dict(
        zip(("point", "oks"), _sums(torch.stack((distance, 1 - similarity)), rows, sets, lambda one: one.logits))
    )

    quality = similarity.detach()
    own = rows
    if any(one.pairs is not one.point_pairs for one in sets):
        own = pair_rows(shapes, [one.pairs for one in sets], most)
        with torch.no_grad():
            quality = Objects.at(own, targets).oks(points.index_select(0, own.row))
    terms["class"] = _class_terms(sets, logits, own, quality, targets, (kind, alpha, gamma))
    return terms | _decoder_terms(sets, targets)


def _sums(values: Tensor, rows: PairRows, sets: Sequence[PoseSet], layered: object) -> Tensor:
    raise NotImplementedError

"""What the pose decoder takes and gives. B images, L layers, K points of a class at most, C classes with points.

N = D + Q queries: D denoising queries, where there are any, come before the Q selected ones.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mvision.heads.query.matching import Matches


class DensePoses(NamedTuple):
    """What all S tokens predict, for one-to-many supervision.

    Attributes:
        logits: (B, S, C) before the sigmoid, by a classifier of its own.
        points: (B, S, K, 2) x, y in 0..1, by the layers that predict those of the selected tokens.
        anchors: (S, 4) cxcywh in 0..1, see ``make_anchors``.
    """

    logits: Tensor
    points: Tensor
    anchors: Tensor


class Decoded(NamedTuple):
    """Outputs of the decoder. Those that default to None are given where all layers were asked for, else L = 1.

    Attributes:
        logits: (L, B, N, C) before the sigmoid.
        points: (L, B, N, K, 2) x, y; 0..1 is the image, and points may lie outside of it.
        boxes: (L, B, N, 4) cxcywh in the same unit, without a gradient to ``points``.
        visibility: (L, B, N, K) before the sigmoid; None if the decoder was built without a layer for it.
        corners: (L, B, N, K, 2, num_bins + 1) logits of the distributions of x and y relative to ``initial``.
        initial: (B, N, K, 2), ``pre_points`` without gradient.
        pre_logits, pre_points: (B, N, C) and (B, N, K, 2), what the first layer predicts on its own: classes without
            the estimate of the points' quality, and the points that all layers refine.
        encoder_logits, encoder_points: (B, Q, C) and (B, Q, K, 2) of the selected tokens.
        dense: of all tokens; None unless the decoder was built with a ``dense_weight``, and with shared queries.
    """

    logits: Tensor
    points: Tensor
    boxes: Tensor
    visibility: Tensor | None = None
    corners: Tensor | None = None
    initial: Tensor | None = None
    pre_logits: Tensor | None = None
    pre_points: Tensor | None = None
    encoder_logits: Tensor | None = None
    encoder_points: Tensor | None = None
    dense: DensePoses | None = None


class PoseDenoising(NamedTuple):
    """Objects with noise as queries.

    Attributes:
        labels: (B, D) int64, index of the class among the C with noise; C for padding.
        points: (B, D, 1 + K, 2) x, y in 0..1 with noise, the centre first.
        mask: (D + Q, D + Q) bool, True where the query of a row may attend to that of a column.
        matches: which of these queries have to predict which objects, in all layers.
    """

    labels: Tensor
    points: Tensor
    mask: Tensor
    matches: Matches

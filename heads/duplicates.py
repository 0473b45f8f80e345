"""What heads without non-maximum suppression in their network still predict twice."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.ops import batched_nms


def without_duplicates(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float | None) -> np.ndarray:
    """Indices, by falling score, of the boxes whose IoU with a better one of their class is not above ``iou``.

    Args:
        boxes: (n, 4) xyxy.
        scores: (n,).
        labels: (n,).
        iou: 0..1; None keeps all, in their order.
    """
    if iou is None:
        return np.arange(len(scores))
    return batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels), iou).numpy()

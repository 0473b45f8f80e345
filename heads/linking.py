"""One object, one result: poses that one head of a joint model found, linked to the objects that another found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from mvision.structures import Instances
from mvision.structures.boxes import iou
from mvision.structures.masks import Masks, encode_mask

LEAST_IOU = 0.5  # of the boxes of an object and its pose


def link_poses(objects: Instances, poses: Instances, threshold: float) -> Instances:
    """The objects with the keypoints of the poses that fit them, and the poses of objects that were not found.

    A pose belongs to at most one object, of its own class and with an IoU of the boxes of at least ``LEAST_IOU``; of
    all ways to link them that with the largest sum of IoU times the pose's score is taken. The object's box and score
    stay. An object without a pose has zeros, keypoint scores too. A pose that is left over becomes an object of its
    own, with an empty mask, if its score reaches ``threshold`` and no object of its class lies where it is.

    Args:
        objects: what the first head found, all of it reaching the threshold.
        poses: of the same image and categories, with ``keypoints``, of any score: an object that is sure may have a
            pose that is not.
        threshold: 0..1.

    Returns:
        Sorted by falling score.
    """
    assert poses.keypoints is not None
    overlap = _overlap(objects, poses)
    value = np.where(overlap >= LEAST_IOU, overlap * poses.scores, 0)
    rows, columns = linear_sum_assignment(value, maximize=True)
    linked = value[rows, columns] > 0
    keypoints = np.zeros((len(objects), *poses.keypoints.shape[1:]), dtype=np.float32)
    keypoints[rows[linked]] = poses.keypoints[columns[linked]]
    whole = replace(objects, keypoints=keypoints)
    alone = (poses.scores >= threshold) & (overlap < LEAST_IOU).all(axis=0)
    return _joined(whole, poses.filter(alone)) if alone.any() else whole


def _overlap(objects: Instances, poses: Instances) -> np.ndarray:
    """(objects, poses) IoU, 0 between classes."""
    first, second = (torch.from_numpy(found.boxes).double() for found in (objects, poses))
    overlap = iou(first[:, None], second[None])[0].numpy()
    return overlap * (objects.labels[:, None] == poses.labels)


def _joined(objects: Instances, poses: Instances) -> Instances:
    assert objects.keypoints is not None
    assert poses.keypoints is not None
    masks = None
    if objects.masks is not None:
        nothing = encode_mask(np.zeros(objects.size, dtype=bool))
        masks = Masks([*objects.masks.rles, *([nothing] * len(poses))], objects.size)
    both = replace(
        objects,
        boxes=np.concatenate((objects.boxes, poses.boxes)),
        scores=np.concatenate((objects.scores, poses.scores)),
        labels=np.concatenate((objects.labels, poses.labels)),
        masks=masks,
        keypoints=np.concatenate((objects.keypoints, poses.keypoints)),
    )
    return both.filter(np.argsort(-both.scores, kind="stable"))

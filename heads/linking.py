"""Poses that one head of a joint model predicts, merged with the objects that another head predicts in the image.

Heads that share their queries say themselves which pose is whose (``link_by_query``); others are matched by their boxes
(``link_poses``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from mvision.structures import Instances
from mvision.structures.boxes import iou
from mvision.structures.masks import Masks, encode_mask

MIN_IOU = 0.5  # of the boxes of an object and its pose


def link_poses(objects: Instances, poses: Instances, threshold: float, new: Instances | None = None) -> Instances:
    """The objects, each with the keypoints of its pose, and the poses that have no object.

    Objects and poses are matched one to one, within a class and where the IoU of their boxes is at least ``MIN_IOU``,
    so that the sum of IoU times the pose's score is the largest. An object keeps its own box and score; without a pose
    all its keypoints and their scores are zero. A pose becomes an object with an empty mask if its score is at least
    ``threshold`` and its IoU with every object of its class is below ``MIN_IOU``.

    Args:
        objects: the results of the first head, with scores >= ``threshold``.
        poses: of the same image and categories, with ``keypoints`` and of any score: the pose of an object with a high
            score may have a low one.
        threshold: 0..1.
        new: those of the poses that may become objects; None: all with scores >= ``threshold``.

    Returns:
        Sorted by falling score.
    """
    assert poses.keypoints is not None
    if new is None:
        new = poses.filter(poses.scores >= threshold)
    box_iou, iou_of_new = _iou_within_classes(objects, poses, new)
    value = np.where(box_iou >= MIN_IOU, box_iou * poses.scores, 0)
    rows, columns = linear_sum_assignment(value, maximize=True)
    linked = value[rows, columns] > 0
    keypoints = np.zeros((len(objects), *poses.keypoints.shape[1:]), dtype=np.float32)
    keypoints[rows[linked]] = poses.keypoints[columns[linked]]
    with_poses = replace(objects, keypoints=keypoints)
    alone = np.asarray((iou_of_new < MIN_IOU).all(axis=0))
    return _concatenated(with_poses, new.filter(alone)) if alone.any() else with_poses


def link_by_query(objects: Instances, query: np.ndarray, points: np.ndarray) -> Instances:
    """The objects, each with the points that were predicted from its own query.

    Args:
        objects: of one image, with ``query``; they keep their boxes, scores and order.
        query: (N,) int64, the queries of the same head that have points, each of them once.
        points: (N, K, 3) x, y in pixels and a score.

    Returns:
        The instances with ``keypoints`` (objects, K, 3): zeros for an object whose query has no points, and for points
        that its class does not have.
    """
    assert objects.query is not None
    place = np.full(max(objects.query.max(initial=-1), query.max(initial=-1)) + 2, len(query))
    place[query] = np.arange(len(query))
    keypoints = np.concatenate((points, np.zeros_like(points, shape=(1, *points.shape[1:]))))[place[objects.query]]
    counts = np.array([len(category.keypoints) for category in objects.categories])[objects.labels]
    exists = np.arange(points.shape[1]) < counts[:, None]
    return replace(objects, keypoints=np.where(exists[..., None], keypoints, np.float32(0)))


def _iou_within_classes(objects: Instances, *poses: Instances) -> list[np.ndarray]:
    """For each of several sets of poses (objects, poses) IoU of the boxes, 0 where the classes differ."""
    boxes = np.concatenate([part.boxes for part in poses])
    labels = np.concatenate([part.labels for part in poses])
    first, second = (torch.from_numpy(corners).double() for corners in (objects.boxes, boxes))
    box_iou = iou(first[:, None], second[None])[0].numpy()
    box_iou = box_iou * (objects.labels[:, None] == labels)
    return np.split(box_iou, np.cumsum([len(part) for part in poses])[:-1], axis=1)


def _concatenated(objects: Instances, poses: Instances) -> Instances:
    assert objects.keypoints is not None
    assert poses.keypoints is not None
    masks = None
    if objects.masks is not None:
        empty = encode_mask(np.zeros(objects.size, dtype=bool))
        masks = Masks([*objects.masks.rles, *([empty] * len(poses))], objects.size)
    both = replace(
        objects,
        boxes=np.concatenate((objects.boxes, poses.boxes)),
        scores=np.concatenate((objects.scores, poses.scores)),
        labels=np.concatenate((objects.labels, poses.labels)),
        masks=masks,
        keypoints=np.concatenate((objects.keypoints, poses.keypoints)),
        query=None,
    )
    return both.filter(np.argsort(-both.scores, kind="stable"))


def thresholds_of_results(of_tasks: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str]) -> dict[str, float]:
    """One threshold for every class of merged results, from those of the tasks.

    The score of a merged result is that of the object, so the thresholds of objects come before those of poses, and
    these before those of regions.

    Args:
        of_tasks: task -> class -> threshold.
        kinds: ``Head.kind`` of the tasks of the model.
    """
    order = ("objects", "poses", "regions")
    merged: dict[str, float] = {}
    for task in sorted(kinds, key=lambda task: order.index(kinds[task])):
        merged = {**of_tasks.get(task, {}), **merged}
    return merged

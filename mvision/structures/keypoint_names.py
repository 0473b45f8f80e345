"""Names of the points of a person in COCO (17) and CrowdPose (14), with the standard deviations of their labels.

Sources: cocodataset.org/#keypoints-eval; Li et al., "CrowdPose: Efficient Crowded Scenes Pose Estimation and A New
Benchmark", CVPR 2019, and the order of its annotation files.
"""

from __future__ import annotations

from mvision.structures.oks import COCO_SIGMAS

CROWDPOSE_SIGMAS: dict[str, float] = {
    "left_shoulder": 0.079,
    "right_shoulder": 0.079,
    "left_elbow": 0.072,
    "right_elbow": 0.072,
    "left_wrist": 0.062,
    "right_wrist": 0.062,
    "left_hip": 0.107,
    "right_hip": 0.107,
    "left_knee": 0.087,
    "right_knee": 0.087,
    "left_ankle": 0.089,
    "right_ankle": 0.089,
    "head": 0.079,
    "neck": 0.079,
}

PERSONS: dict[int, tuple[dict[str, float], str]] = {
    len(COCO_SIGMAS): (COCO_SIGMAS, "COCO"),
    len(CROWDPOSE_SIGMAS): (CROWDPOSE_SIGMAS, "CrowdPose"),
}
"""Number of points -> their names with their standard deviations, and the data set."""

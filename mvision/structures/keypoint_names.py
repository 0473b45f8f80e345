"""Names of the points of a person in COCO (17) and CrowdPose (14), with the standard deviations of their labels.

Sources: cocodataset.org/#keypoints-eval; Li et al., "CrowdPose: Efficient Crowded Scenes Pose Estimation and A New
Benchmark", CVPR 2019, and the order of its annotation files.
"""

from __future__ import annotations

from mvision.structures.oks import COCO_SIGMAS

_BODY = [name for name in COCO_SIGMAS if not name.endswith(("nose", "eye", "ear"))]
CROWDPOSE_SIGMAS: dict[str, float] = {name: COCO_SIGMAS[name] for name in _BODY} | {"head": 0.079, "neck": 0.079}

PERSONS: dict[int, tuple[dict[str, float], str]] = {
    len(COCO_SIGMAS): (COCO_SIGMAS, "COCO"),
    len(CROWDPOSE_SIGMAS): (CROWDPOSE_SIGMAS, "CrowdPose"),
}
"""Number of points -> their names with their standard deviations, and the data set."""

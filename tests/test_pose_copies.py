"""A training step of query poses makes the CPU wait for a GPU once, for the matching costs."""

import pytest

from mvision.heads.poses import PoseConfig, QueryPoseHead
from tests.keypoint_heads import make_categories, make_objects
from tests.pretend_gpu import OnDevice, PretendedGpu, on_device
from tests.test_heads import make_features


@pytest.mark.parametrize("labelled", [True, False])
def test_a_step_copies_labels_to_the_device_and_costs_back(monkeypatch, labelled):
    config = PoseConfig(embed_dim=32, num_heads=4, ffn_dim=64, num_layers=2, num_queries=12, ddf_weight=1.0)
    head = QueryPoseHead(config, [16] * 3, [8, 16, 32], make_categories(4, 2))
    targets = [make_objects(head, 2), make_objects(head, 1)]
    for target in targets[labelled:]:  # one or both images have objects without labelled points alone
        target.keypoints[:] = 0
    maps = [OnDevice(values) for values in make_features(2)]
    on_device(head)
    gpu = PretendedGpu()
    with gpu.counted(monkeypatch):
        for _ in range(2):  # the bins of the points are copied in the first step alone
            gpu.waits.clear()
            gpu.transfers.clear()
            sum(head.loss(head(maps, targets=targets), targets).values()).backward()
    assert not gpu.waits
    assert gpu.transfers["to device"] == 2  # labels, and matches
    assert gpu.transfers["to host"] == labelled

"""Denoising queries of poses: how far from the labels they are, which of them are positives, and what they may see."""

import pytest
import torch

from mvision.structures.oks import point_similarity
from tests.pose_labels import QUERIES, collect, make_labels


def similarity(made):
    """(B, G, 2, T, K) of the noisy points and the labels."""
    batch, most, num_points, _ = made.points.shape
    noisy = made.denoising.points[:, :, 1:].unflatten(1, (made.groups, 2, most))
    scale = made.scale[:, None, None, None, None]
    gt = made.points[:, None, None, ..., :2]
    return point_similarity(noisy * scale, gt * scale, made.areas[:, None, None], made.sigmas[:, None, None])


@pytest.mark.parametrize("sigma", [0.03, 0.1])
@pytest.mark.parametrize("num_points", [1, 17, 133])
def test_noise_is_a_point_similarity(num_points, sigma):
    torch.manual_seed(0)
    labels = [make_labels(4, num_points), make_labels(2, num_points, seed=1)]
    made = collect(labels, num_points, sigmas=[sigma] * num_points, num_denoising=60)
    assert made.groups == 15
    found = similarity(made)[:, :, :, :2]  # of objects that both images have
    positive, negative = found[:, :, 0], found[:, :, 1]
    assert 0.5 - 1e-6 <= positive.min() < 0.55
    assert 0.95 < positive.max() <= 1
    assert 0.1 - 1e-6 <= negative.min() < 0.15
    assert 0.45 < negative.max() <= 0.5 + 1e-6


def test_noise_has_any_direction():
    torch.manual_seed(0)
    made = collect([make_labels(1, 17)], 17, num_denoising=40)
    moved = made.denoising.points[:, :, 1:] - made.points[:, :1, :, :2]
    assert moved.gt(0).double().mean((0, 1, 2)).tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_the_centre_is_that_of_the_noisy_points():
    labels = make_labels(2)
    labels.keypoints[1, 2] = 0
    made = collect([labels], num_denoising=2)
    centre, points = made.denoising.points.split((1, 3), 2)
    assert torch.allclose(centre[:, 0, 0], points[:, 0].mean(1))
    assert torch.allclose(centre[:, 1, 0], points[:, 1, :2].mean(1))


def test_points_without_a_label_start_at_the_centre_of_the_box():
    labels = make_labels(1)
    labels.keypoints[0, 1] = 0
    made = collect([labels], num_denoising=3)
    assert torch.equal(made.denoising.points[0, :, 2], made.boxes[0, 0, :2].expand(6, -1))


def test_noise_stays_in_the_image():
    labels = make_labels(3)
    labels.keypoints[..., :2] = 1.0
    made = collect([labels], sigmas=[0.5] * 3, num_denoising=30)
    assert made.denoising.points.max() <= 1


def test_padding_has_a_class_of_its_own_and_no_pair():
    made = collect([make_labels(3), make_labels(1)], num_denoising=6, label_noise=0)
    labels = made.denoising.labels.unflatten(1, (2, 2, 3))
    assert (labels[0] == 0).all()
    assert labels[1].tolist() == [[[0, 1, 1]] * 2] * 2
    assert (made.denoising.points.unflatten(1, (4, 3))[1, :, 1:] == 0.5).all()
    host = made.denoising.matches.host
    assert host[host[:, 0] == 0].tolist() == [
        [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 6, 0], [0, 0, 7, 1], [0, 0, 8, 2], [0, 1, 0, 0], [0, 1, 6, 0],
    ]  # fmt: skip
    assert len(host) == 4 * 8  # three layers, and "pre"


def test_half_of_the_label_noise_gets_a_random_class():
    torch.manual_seed(0)
    made = collect([make_labels(4, label=1)], 3, 3, 3, 3, num_denoising=400, label_noise=0.8)
    other = (made.denoising.labels != 1).double().mean().item()
    assert other == pytest.approx(0.4 * 3 / 4, abs=0.06)


def test_selected_queries_do_not_see_denoising_queries():
    made = collect([make_labels(2)], num_denoising=4)
    mask, size = made.denoising.mask, 8
    assert mask.shape == (size + QUERIES,) * 2
    assert not mask[size:, :size].any()
    assert mask[:, size:].all()
    assert mask[:4, :4].all()
    assert not mask[:4, 4:size].any()


@pytest.mark.parametrize(("count", "groups"), [(1, 20), (20, 1), (60, 1)])
def test_as_many_whole_groups_as_fit_but_at_least_one(count, groups):
    assert collect([make_labels(count)], num_denoising=20).groups == groups


def test_without_poses_or_with_none_wanted_there_are_none():
    assert collect([make_labels(0), make_labels(2, visible=0)], num_denoising=20).denoising is None
    assert collect([make_labels(2)], num_denoising=0).denoising is None


def test_objects_of_no_size_have_no_noise():
    labels = make_labels(1)
    labels.areas[:] = 0
    made = collect([labels], num_denoising=4)
    assert torch.equal(made.denoising.points[0, :, 1:], made.points[0, :1, :, :2].expand(8, -1, -1))

"""Contrastive denoising queries."""

import torch

from mvision.heads.query.denoising import make_denoising
from mvision.heads.query.matching import pad_targets
from mvision.structures.boxes import cxcywh_to_xyxy
from tests.test_matching import as_assignment, make_targets


def _make(*counts, num_denoising=12, num_layers=1, **settings):
    gt = pad_targets(make_targets(*counts), torch.device("cpu"), num_denoising=num_denoising, num_layers=num_layers)
    options = {"num_classes": 3, "num_queries": 7, "label_noise": 0.5, "box_noise": 1.0}
    return gt, make_denoising(gt, **{**options, **settings})


def test_groups_hold_a_positive_and_a_negative_of_every_object():
    gt, noisy = _make(3, 1)
    assert gt.groups == 4  # 12 intended, 3 objects in the fullest image
    assert noisy.labels.shape == (2, 4 * 2 * 3)
    padding = noisy.labels.view(2, 4, 2, 3)[1, :, :, 1:]
    assert (padding == 3).all()


def test_positives_have_to_predict_their_object_in_every_layer():
    gt, noisy = _make(3, 0, 1, num_layers=2)
    pairs = gt.denoising
    expected = torch.full((2, 3, 4, 2, 3), -1)
    expected[:, 0, :, 0] = torch.arange(3)
    expected[:, 2, :, 0, 0] = 0
    assert as_assignment(pairs, (2, *noisy.labels.shape)).equal(expected.flatten(2))
    assert len(pairs.host) == 2 * 4 * (3 + 1)
    assert pairs.host.tolist() == sorted(pairs.host.tolist())


def test_positives_stay_nearer_than_negatives():
    torch.manual_seed(0)
    gt, noisy = _make(4, num_denoising=400)
    half = gt.boxes[:, None, None, :, 2:].repeat(1, 1, 1, 1, 2) / 2
    moved = (cxcywh_to_xyxy(noisy.boxes.view(1, 100, 2, 4, 4)) - cxcywh_to_xyxy(gt.boxes)[:, None, None]).abs() / half
    assert moved[:, :, 0].max() <= 1 + 1e-4
    assert moved[:, :, 1].median() > 1  # one to two half sides, where the image's border does not clip
    assert ((noisy.boxes >= 0) & (noisy.boxes <= 1)).all()


def test_label_noise_changes_half_of_its_share_to_random_classes():
    torch.manual_seed(0)
    gt, noisy = _make(4, num_denoising=8000)
    changed = (noisy.labels.view(1, -1, 4) != gt.labels[:, None]).float().mean().item()
    assert abs(changed - 0.5 * 0.5 * 2 / 3) < 0.02  # a third of the random classes is the old one
    _, clean = _make(4, label_noise=0.0)
    assert (clean.labels.view(1, -1, 4) == gt.labels[:, None]).all()


def test_queries_attend_to_no_ground_truth_of_others():
    _, noisy = _make(3)
    size, group = noisy.labels.shape[1], 6
    mask = noisy.mask
    assert mask.shape == (size + 7, size + 7)
    assert not mask[size:, :size].any()  # selected queries do not attend to denoising queries
    assert mask[:, size:].all()
    blocks = mask[:size, :size].view(size // group, group, size // group, group)
    for row in range(size // group):
        for column in range(size // group):
            assert (blocks[row, :, column] == (row == column)).all()


def test_without_objects_or_switched_off_there_is_none():
    assert _make(0, 0)[1] is None
    gt, noisy = _make(3, num_denoising=0)
    assert noisy is None
    assert gt.groups == len(gt.denoising.host) == 0


def test_more_objects_than_intended_still_give_one_group():
    assert _make(5, num_denoising=2)[0].groups == 1

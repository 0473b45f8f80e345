"""Targets, matching and losses of query poses."""

import itertools

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval

from mvision.heads.poses.losses import Objects, pose_terms
from mvision.heads.poses.matching import start_pose_matching
from mvision.heads.poses.settings import PoseConfig
from mvision.heads.query.losses import pair_rows
from tests.pose_labels import QUERIES, collect, make_labels, predictions


def terms_of(targets, decoded, **settings):
    """The weighted terms; corners have 8 bins."""
    return pose_terms(decoded, targets, PoseConfig(num_bins=8, num_layers=len(decoded.logits), **settings))


def match(targets, decoded):
    every_logits, every_points = decoded.logits[..., -QUERIES:, :], decoded.points[..., -QUERIES:, :, :]
    return start_pose_matching(every_logits.detach(), every_points.detach(), targets, 10.0, 4.0, shared=True)()


def exact(targets, decoded):
    """All queries predict the first pose of their image."""
    points = targets.points[:, None, 0, :, :2]
    return decoded._replace(
        points=points.expand_as(decoded.points),
        pre_points=points.expand_as(decoded.pre_points),
        encoder_points=points.expand_as(decoded.encoder_points),
        boxes=targets.boxes[:, None, 0].expand_as(decoded.boxes),
    )


def test_oks_is_that_of_pycocotools():
    height, width = 480, 640
    random = np.random.RandomState(0)
    labels = make_labels(5, 17)
    labels.keypoints[1, 4:9, 2] = 0
    labels.size = (height, width)
    sigmas = [(1 + index) / 128 for index in range(17)]  # which float32 holds exactly, as it does those of a head
    made = collect([labels], 17, sigmas=sigmas)
    points = made.points[0, :, :, :2] + torch.from_numpy(random.normal(0, 0.03, (5, 17, 2)))
    evaluation = COCOeval(iouType="keypoints")
    evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    evaluation.params.imgIds, evaluation.params.catIds = [1], [1]
    scale = torch.tensor([width, height, 1], dtype=torch.float64)
    pixels = torch.cat((points, torch.ones(5, 17, 1)), -1) * scale
    gt_pixels, areas = made.points[0] * scale, made.areas[0] * height * width
    for index in range(5):
        box = {"bbox": [0, 0, 1, 1], "area": areas[index].item()}
        evaluation._gts[1, 1].append({"keypoints": gt_pixels[index].flatten().tolist(), **box})
        evaluation._dts[1, 1].append({"keypoints": pixels[index].flatten().tolist(), "score": 1 - 0.1 * index})
    expected = np.diag(evaluation.computeOks(1, 1))
    pairs = match(made, predictions(made))
    rows = pair_rows([torch.Size((1, 1, QUERIES))], [pairs], 5)
    found = Objects.at(rows._replace(gt_row=torch.arange(5)), made).oks(points)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert expected.min() < 0.5 < expected.max()


def test_only_poses_of_predicted_classes_with_a_labelled_point_are_learned():
    labels = make_labels(4, 3)
    labels.labels = torch.tensor([1, 0, 1, 2])
    labels.keypoints[2] = 0
    made = collect([labels, make_labels(0)], 3, 2, 0)
    assert made.counts == [2, 0]
    assert made.total == 2
    assert made.labels.tolist() == [[1, 0], [0, 0]]
    assert torch.equal(made.boxes[0], labels.boxes[:2].double())
    assert made.point_exists[0].tolist() == [[True, True, False], [True, True, True]]
    assert made.ignored.shape == (2, 1, 4)  # the third object; the class of the fourth has no points


def test_a_point_without_a_label_has_no_cost():
    labels = make_labels(2)
    made = collect([labels])
    points = made.points[:, :, :, :2].clone().expand(1, 1, 2, 3, 2).clone()
    logits = points.new_zeros(1, 1, 2, 1)
    matches = start_pose_matching(logits, points, made, 10.0, 4.0, shared=False)()
    assert matches.host[:, 2:].tolist() == [[0, 0], [1, 1]]
    # Each query now has the other object's third point.
    points[0, 0, :, 2] = points[0, 0, [1, 0], 2]
    labels.keypoints[:, :2, 2] = 0
    assert start_pose_matching(logits, points, collect([labels]), 10.0, 4.0, False)().host[:, 2:].tolist() == [
        [0, 1],
        [1, 0],
    ]


def test_costs_of_many_points_are_computed_in_parts(monkeypatch):
    made = collect([make_labels(3, 7), make_labels(1, 7, seed=1)], 7)
    decoded = predictions(made)
    expected = match(made, decoded)
    monkeypatch.setattr("mvision.heads.poses.matching.LARGEST_BLOCK", 300)
    assert (match(made, decoded).host == expected.host).all()


def test_exact_points_have_no_loss():
    made = collect([make_labels(1), make_labels(1, seed=1)], num_denoising=4)
    terms = terms_of(made, exact(made, predictions(made)))
    for name, value in terms.items():
        if name.split("_")[0] in ("point", "oks", "box", "giou"):
            assert value.item() == pytest.approx(0, abs=1e-6), name


def test_terms_have_the_names_of_their_layers():
    made = collect([make_labels(2)], num_denoising=4)
    names = set(terms_of(made, predictions(made), ddf_weight=1.0))
    decoder = ["_0", "_1", "", "_denoising_0", "_denoising_1", "_denoising_2"]
    expected = {term + layer for term in ("box", "giou", "visible") for layer in decoder}
    layers = [*decoder, "_pre", "_encoder", "_denoising_pre"]
    expected |= {term + layer for term in ("class", "point", "oks") for layer in layers}
    assert names == expected | {f"ddf{layer}" for layer in ("_0", "_1", "_denoising_0", "_denoising_1")}


CASES = {
    "no objects": [make_labels(0), make_labels(0)],
    "one image empty": [make_labels(0), make_labels(3)],
    "60 instances": [make_labels(60), make_labels(1)],
    "no size": [make_labels(2)],
    "no labelled points": [make_labels(2, visible=0)],
}
CASES["no size"][0].areas[:] = 0


@pytest.mark.parametrize("num_points", [1, 17, 133])
@pytest.mark.parametrize("what", CASES)
def test_all_terms_and_gradients_are_finite(what, num_points):
    labels = [make_labels(len(one), num_points, seed=3) for one in CASES[what]]
    for one, like in zip(labels, CASES[what]):
        one.areas = like.areas
        one.keypoints[..., 2] = like.keypoints[..., :1, 2]
    made = collect(labels, num_points, num_denoising=20)
    decoded = predictions(made)
    terms = terms_of(made, decoded, ddf_weight=1.0)
    sum(terms.values()).backward()
    assert all(np.isfinite(value.item()) for value in terms.values())
    for name in ("logits", "points", "boxes", "visibility", "corners", "pre_logits", "pre_points", "encoder_points"):
        assert getattr(decoded, name).grad.isfinite().all(), name


def class_gradient(labels, *counts, **changed):
    """(B, Q) of the last layer's class loss where the queries predict poses at the given centres."""
    made = collect(labels, *counts)
    decoded = predictions(made)._replace(**changed)
    terms_of(made, decoded)["class"].backward()
    return decoded.logits.grad[-1, ..., 0]


def test_queries_in_objects_without_labelled_points_are_no_negatives():
    labels = make_labels(2)
    labels.boxes[:] = torch.tensor([[0.25, 0.5, 0.3, 0.9], [0.75, 0.5, 0.3, 0.9]])
    labels.keypoints[0, :, :2] = labels.boxes[:1, :2]
    labels.keypoints[1] = 0
    points = torch.full((3, 1, QUERIES, 3, 2), 0.5, dtype=torch.float64)
    points[..., 0] = torch.linspace(0.05, 0.95, QUERIES)[:, None]
    gradient = class_gradient([labels], points=points)[0]
    ignored = (points[-1, 0, :, 0, 0] - 0.75).abs() < 0.15
    assert 0 < ignored.sum() < QUERIES
    assert ((gradient == 0) == ignored).all()


def test_a_positive_in_an_object_without_labelled_points_is_learned():
    labels = make_labels(2)
    labels.boxes[:] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    labels.keypoints[1] = 0
    gradient = class_gradient([labels])[0]
    assert (gradient != 0).sum() == 1


def test_images_without_keypoint_labels_have_no_negatives():
    labels = [make_labels(2), make_labels(1, seed=1)]
    labels[0].keypoints = None
    gradient = class_gradient(labels)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()


def test_objects_of_classes_without_points_are_negatives():
    labels = make_labels(2, label=1)
    labels.boxes[:] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    labels.keypoints[:] = 0
    assert (class_gradient([labels], 3, 0) != 0).all()


def test_negatives_of_denoising_are_learned_in_ignored_regions():
    labels = make_labels(2)
    labels.boxes[:] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    labels.keypoints[1] = 0
    made = collect([labels], num_denoising=1)
    decoded = predictions(made)
    terms_of(made, decoded)["class_denoising_2"].backward()
    assert (decoded.logits.grad[-1, 0, :2] != 0).all()


def test_classes_that_are_not_labelled_in_an_image_have_no_negatives():
    labels = make_labels(1)
    labels.labelled_classes = torch.tensor([True, False])
    made = collect([labels], 3, 3)
    decoded = predictions(made, classes=2)
    terms_of(made, decoded)["class"].backward()
    assert (decoded.logits.grad[-1, ..., 0] != 0).all()
    assert (decoded.logits.grad[-1, ..., 1] == 0).all()


def test_points_that_a_class_does_not_have_are_not_learned():
    labels = make_labels(1, 3, label=1)
    labels.keypoints[:, 2] = 0
    made = collect([labels], 3, 2)
    decoded = predictions(made, classes=2)
    sum(terms_of(made, decoded).values()).backward()
    for name in ("points", "visibility"):
        gradient = getattr(decoded, name).grad
        per_point = gradient.flatten(4).abs().sum((0, 1, 2, 4)) if name == "points" else gradient.abs().sum((0, 1, 2))
        assert (per_point[:2] > 0).all()
        assert per_point[2] == 0


def test_hidden_points_are_learned_as_invisible_alone():
    labels = make_labels(1)
    labels.keypoints[0, 1] = 0
    made = collect([labels])
    decoded = predictions(made)
    sum(terms_of(made, decoded).values()).backward()
    assert decoded.points.grad[..., 1, :].abs().sum() == 0
    pushed = decoded.visibility.grad[-1, 0].sum(0)
    assert (pushed[[0, 2]] < 0).all()
    assert pushed[1] > 0


def test_the_distance_of_a_large_image_is_in_fractions_and_the_oks_in_its_aspect_ratio():
    wide, square = make_labels(1), make_labels(1)
    wide.size, square.size = (50, 200), (100, 100)
    found = []
    for labels in (wide, square):
        made = collect([labels])
        decoded = exact(made, predictions(made))
        decoded = decoded._replace(points=decoded.points + torch.tensor([0.02, 0.0]))
        found.append(terms_of(made, decoded))
    assert found[0]["point"].item() == pytest.approx(found[1]["point"].item())
    assert found[0]["oks"] > found[1]["oks"] + 0.1


def test_without_shared_matches_every_layer_has_its_own_pairs():
    made = collect([make_labels(3)])
    for seed in itertools.count():
        decoded = predictions(made, seed=seed)
        own, shared = (terms_of(made, decoded, shared_matches=value) for value in (False, True))
        if own["point"] != shared["point"]:
            break
    assert own["class"] == shared["class"]
    assert seed < 5

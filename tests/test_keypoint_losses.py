"""The loss of keypoint heads: values of its terms, and what has a gradient."""

import math
from dataclasses import replace

import pytest
import torch

from mvision.engine import readings
from mvision.heads.keypoints import base as base_module
from mvision.heads.keypoints import losses as losses_module
from mvision.heads.keypoints.grid import Predictions
from mvision.heads.keypoints.heatmaps import MAX_SIGMA, RESOLUTION, window
from mvision.heads.keypoints.losses import (
    Candidates,
    box_losses,
    compare,
    ignored_grid_points,
    map_term,
    point_losses,
    score_target,
    sums_by_set,
    visibility_loss,
)
from mvision.heads.keypoints.targets import ClassTables, keypoint_targets
from mvision.structures import Category, Targets
from mvision.structures.oks import keypoint_sigmas
from tests.keypoint_heads import dense_head, exact_outputs, inside_box, make_objects, with_gradients
from tests.test_heads import make_features, make_head, make_targets, total

BRANCHES = ("one2one", "one2many")
WIDE = torch.tensor([[2.0, 0.5]])  # ``scale`` of an image that is four times as wide as high


def make_candidates(visibility=(2.0, 1.0, 0.0), exists=3, sigma=0.1, box=(0.5, 0.5, 0.4, 0.2), area=0.04):
    """One object with three points in a wide image, and two candidates that predict it with errors."""
    places = torch.tensor([[[0.4, 0.5], [0.6, 0.5], [0.9, 0.9]]])
    points = torch.cat((places, torch.tensor(visibility)[None, :, None]), -1)
    target = Targets(torch.tensor([box]), torch.tensor([0]), torch.tensor([area]), keypoints=points, size=(100, 400))
    tables = ClassTables.of([Category(id=1, name="a", keypoints=["p", "q", "r"], sigmas=[sigma] * 3)])
    tables.point_exists[0, exists:] = False
    gt = keypoint_targets([target], [[0]], tables, (64, 64), torch.zeros(1))
    pred_points = torch.tensor([[[[0.45, 0.5], [0.6, 0.54], [0.1, 0.1]], [[0.0, 0.0]] * 3]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    pred = Predictions(boxes, pred_points, torch.tensor([[[0.0, 1.0, 2.0]] * 2]))
    inside = torch.ones(1, 2, dtype=torch.bool)
    return Candidates(gt, torch.tensor([[0, 1]]), inside, pred, compare(pred, gt), torch.rand(1, 2))


def test_comparison_measures_lengths_in_an_image_of_area_one():
    comparison = make_candidates().comparison
    # 0.05 of the width is 0.1, 0.04 of the height 0.02; the standard deviation is 2 * 0.1 * sqrt(0.04) = 0.04.
    expected = [math.exp(-0.5 * (0.1 / 0.04) ** 2), math.exp(-0.5 * (0.02 / 0.04) ** 2)]
    torch.testing.assert_close(comparison.point_similarity[0, 0, :2], torch.tensor(expected))
    assert comparison.oks[0, 0].item() == pytest.approx(sum(expected) / 2)
    assert comparison.iou[0].tolist() == pytest.approx([0.5, 0.0])


def test_losses_of_boxes():
    losses = box_losses(make_candidates())
    assert losses["box"][0].tolist() == pytest.approx([0.2, 0.4 + 0.4 + 0.3 + 0.1])
    assert losses["giou"][0, 0].item() == pytest.approx(0.5)


def test_losses_are_summed_over_the_positives_of_every_set():
    """Three objects, the first of which belongs to the first set."""
    losses = {"a": torch.tensor([[1.0, 2.0], [4.0, torch.nan], [16.0, 32.0]])}
    losses["b"] = -losses["a"]
    positive = torch.tensor([[True, True], [True, False], [False, True]])
    assert sums_by_set(losses, positive, [1, 2]) == [{"a": 3, "b": -3}, {"a": 36, "b": -36}]
    assert sums_by_set(losses, positive, [0, 3])[0] == {"a": 0, "b": 0}
    assert sums_by_set({}, positive, [1, 2]) == [{}, {}]


def test_losses_of_points_are_means_over_labelled_points():
    found = make_candidates()
    losses = point_losses(found)
    assert losses["oks"][0, 0].item() == pytest.approx(1 - found.comparison.oks[0, 0].item())
    # Distances 0.1 and 0.02 by the root of the area, 0.2.
    assert losses["point"][0, 0].item() == pytest.approx((0.5 + 0.1) / 2)


def test_distances_of_tiny_objects_are_measured_by_the_smallest_side():
    losses = point_losses(make_candidates(area=1e-8))
    assert losses["point"][0, 0].item() == pytest.approx((0.1 + 0.02) / 2 / losses_module.MIN_SIDE)


def test_visibility_is_learned_for_the_points_of_the_class():
    labelled, unlabelled = math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(2.0))
    every = visibility_loss(make_candidates())[0, 0]
    assert every.item() == pytest.approx((math.log(2) + labelled + unlabelled) / 3)
    two = visibility_loss(make_candidates(exists=2))[0, 0]
    assert two.item() == pytest.approx((math.log(2) + labelled) / 2)


def test_the_target_of_scores_is_the_oks_or_a_part_of_the_iou():
    oks, iou = torch.tensor([0.9, 0.5, 0.01, 0.01]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(score_target(oks, iou), torch.tensor([0.9, 0.5, 0.4, 0.01]))


def test_scores_of_ignored_grid_points_and_of_unlabelled_classes_have_no_gradient():
    logits = torch.zeros(2, 4, 3, requires_grad=True)
    ignored = torch.zeros(2, 4, dtype=torch.bool)
    ignored[0, :2] = True  # grid point 1 is a positive none the less
    labelled_classes = torch.tensor([[True, True, True], [True, False, True]])
    # The third score is none that counts, at the place of the first one; the last one lies at an ignored grid point.
    index = (torch.tensor([0, 1, 0, 0]), torch.tensor([1, 3, 1, 0]), torch.tensor([2, 1, 2, 2]))
    quality, counted = torch.tensor([0.9, 0.8, 0.1, 0.1]), torch.tensor([True, True, False, False])
    head = dense_head(3, class_loss="vfl", alpha=0.75, gamma=2.0)
    head.score_term(logits, index, quality, counted, ignored, labelled_classes).backward()
    sign = logits.grad.sign()
    expected = torch.ones(2, 4, 3)
    expected[0, 0] = 0
    expected[0, 1, 2] = -1
    expected[1, :3, 1] = 0
    expected[1, 3, 1] = -1
    torch.testing.assert_close(sign, expected)
    # Varifocal loss: (p - q) * q at positives, p * alpha * p ** gamma at negatives.
    assert logits.grad[0, 1, 2].item() == pytest.approx((0.5 - 0.9) * 0.9)
    assert logits.grad[0, 2, 0].item() == pytest.approx(0.5 * 0.75 * 0.25)
    logits.grad = None
    head.score_term(logits, index, quality, counted, None, None).backward()
    assert (logits.grad != 0).all()


def test_grid_points_in_objects_without_labelled_points_are_ignored():
    inside, without = torch.tensor([[True, False, False]]), torch.tensor([False, True])
    assert ignored_grid_points(make_candidates()) is None
    found = replace(make_candidates(), inside=inside)
    found.gt.images_without_keypoints, found.gt.any_ignored = without, True
    assert ignored_grid_points(found).tolist() == [[False] * 3, [True] * 3]
    found = replace(make_candidates(visibility=(0.0, 0.0, 0.0)), inside=inside)
    found.gt.images_without_keypoints = without
    assert ignored_grid_points(found).tolist() == [[True, False, False], [True] * 3]
    found.gt.class_has_points = torch.tensor([False])
    assert ignored_grid_points(found).tolist() == [[False] * 3, [True] * 3]


class GaussianMaps:
    """Heatmaps that are Gaussians with a given standard deviation around the true places."""

    def __init__(self, points, std):
        self.points, self.std = points, std
        self.embed = torch.nn.Linear(1, 1)

    def sample(self, pixels, boxes):
        return torch.zeros(*boxes.shape[:2], 1, RESOLUTION, RESOLUTION)

    def logits(self, sampled, tokens, boxes, points):
        distances = [
            (places[..., None, :] - self.points[:, axis, None]) / self.std[:, axis, None]
            for axis, places in enumerate(window(boxes).unbind(-2))
        ]
        return -0.5 * (distances[0].square()[..., None, :] + distances[1].square()[..., None])


PIXELS, TOKENS = torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 1)


@pytest.mark.parametrize("sigma", [0.08, 0.3])
def test_heatmaps_learn_half_the_width_of_the_similarity(sigma, monkeypatch):
    """Along each axis of an image that is not square; and never wider than with the sigma of COCO's hips."""
    monkeypatch.setattr(losses_module, "PRIOR_NOISE", 0.0)
    monkeypatch.setattr(losses_module, "WINDOW_NOISE", 0.0)
    found = make_candidates(sigma=sigma, visibility=(2.0, 2.0, 0.0), box=(0.5, 0.5, 0.3, 0.6), area=0.25)
    length = min(sigma, MAX_SIGMA) * 0.5  # in an image of area 1: half of 2 * sigma * sqrt(area)
    std = torch.tensor([[length / 2.0, length / 0.5]] * 3)
    right = map_term(GaussianMaps(found.gt.points[0], std), PIXELS, TOKENS, found)
    assert right.item() == pytest.approx(0, abs=1e-3)
    for factor in (0.5, 2.0):
        wrong = map_term(GaussianMaps(found.gt.points[0], factor * std), PIXELS, TOKENS, found)
        assert wrong.item() > 0.2


def test_heatmaps_are_learned_by_the_best_aligned_grid_points_of_objects_with_points():
    found = make_candidates(box=(0.5, 0.5, 0.5, 0.6))
    maps = GaussianMaps(found.gt.points[0], torch.full((3, 2), 0.2))
    torch.manual_seed(0)
    assert map_term(maps, PIXELS, TOKENS, found) > 0.1
    found.alignment = torch.zeros(1, 2)
    assert map_term(maps, PIXELS, TOKENS, found) == 0
    found = make_candidates(visibility=(0.0, 0.0, 0.0))
    assert map_term(maps, PIXELS, TOKENS, found) == 0


def test_predicted_boxes_that_fit_are_the_windows(monkeypatch):
    """Others are too far off to learn from: there the true box is used, with noise."""
    monkeypatch.setattr(losses_module, "WINDOW_NOISE", 0.0)
    found = make_candidates()
    found.comparison.iou[:] = torch.tensor([[0.6, 0.4]])
    boxes, points = losses_module._noisy_windows_and_points(found, torch.tensor([[1, 0]]))
    torch.testing.assert_close(boxes[0], torch.stack((found.gt.boxes[0], found.pred.boxes[0, 0])))
    assert points.shape == (1, 2, 3, 2)


def test_poses_of_a_batch_are_sampled_in_their_own_images():
    """Two in the first image, none in the second, one in the third: each gets what its image has at its window."""
    found = make_candidates()
    image, number = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 0])
    poses = replace(found.gt.poses, image=image, number=number, most=2)
    rows = torch.rand(3, 4, 4)
    padded = losses_module._by_image(rows, poses, 3)
    assert padded.shape == (3, 2, 4, 4)
    torch.testing.assert_close(padded[image, number], rows)
    assert (padded[1] == 0).all()
    assert (padded[2, 1] == 0).all()


def test_exact_predictions_cost_nothing_but_confidence():
    head = dense_head(5)
    targets = [make_objects(head, 1)]
    terms = head.loss(exact_outputs(head, targets), targets)
    for name, value in terms.items():
        if name != "map_one2one":  # heatmaps are not made from the raw numbers: see test_heatmaps.py
            assert (value < 1e-3) != name.startswith("class"), (name, value)


@pytest.mark.parametrize("pixel_dim", [16, 0])
def test_scores_learn_the_iou_and_without_heatmaps_the_oks(pixel_dim):
    head = dense_head(5, pixel_dim=pixel_dim, class_weight=1.0)
    targets = [make_objects(head, 1)]
    shift = 0.03
    # The standard deviation of the similarity is 2 * sigma * sqrt(area), in an image of 96 x 64 and of area 1.
    sigmas = torch.tensor(keypoint_sigmas(head.categories[0]))
    length = shift * math.sqrt(64 / 96)
    oks = torch.exp(-0.5 * (length / (2 * sigmas * math.sqrt(0.06))) ** 2).mean().item()
    quality = 1.0 if pixel_dim else oks
    assert 0.5 < oks < 0.8
    outputs = with_gradients(exact_outputs(head, targets, shift))
    total(head.loss(outputs, targets)).backward()
    gradient = outputs.one2one.logits.grad[0, :, 0]
    row = gradient.argmin()
    score = outputs.one2one.logits[0, row, 0].sigmoid().item()
    assert gradient[row].item() == pytest.approx((score - quality) * quality, rel=1e-3)
    assert (gradient < 0).sum() == 1
    assert (outputs.one2many.logits.grad < 0).sum() == 10


def test_unlabelled_points_are_learned_as_not_visible_and_nothing_else():
    head = dense_head(5)
    targets = [make_objects(head, 1)]
    outputs = exact_outputs(head, targets)
    hidden = targets[0].keypoints.clone()
    hidden[0, 3:] = 0  # COCO writes zeros: as coordinates they would be far away
    targets[0].keypoints = hidden
    terms = head.loss(outputs, targets)
    assert max(terms["oks_one2one"], terms["point_one2one"], terms["oks_one2many"]) < 1e-3
    assert terms["visible_one2one"] > 1


@pytest.mark.parametrize("unlabelled", ["points", "image"])
def test_objects_without_labelled_points_train_their_box_alone(unlabelled):
    head = dense_head(5)
    targets = [make_objects(head, 1, visible=0.0)]
    if unlabelled == "image":
        targets[0].keypoints = None
    outputs = with_gradients(head(make_features(1), targets=targets))
    terms = head.loss(outputs, targets)
    assert all(terms[f"{term}_{branch}"] > 0.01 for term in ("box", "giou") for branch in BRANCHES)
    assert all(terms[f"{term}_{branch}"] == 0 for term in ("oks", "point", "visible") for branch in BRANCHES)
    assert terms["map_one2one"] == 0
    total(terms).backward()
    inside = inside_box(outputs, targets[0].boxes[0])
    for raw, positives in ((outputs.one2one, 1), (outputs.one2many, head.config.top_k)):
        assert (raw.points.grad == 0).all()
        learning = (raw.boxes.grad[0] != 0).any(-1)
        assert learning.sum() == positives
        assert inside[learning].all()
        gradient = raw.logits.grad[0, :, 0]
        assert (gradient[inside] == 0).all()
        # Elsewhere there is nothing, if anybody has looked for keypoints in this image at all.
        assert (gradient[~inside] > 0).all() if unlabelled == "points" else (gradient == 0).all()


def test_the_weight_of_a_label_does_not_depend_on_how_many_are_missing(monkeypatch):
    """Else, where half of the poses are not labelled, the others would count twice, with twice the noise."""
    monkeypatch.setattr(losses_module, "PRIOR_NOISE", 0.0)
    monkeypatch.setattr(losses_module, "WINDOW_NOISE", 0.0)
    # The alignment depends on whether points are labelled; here it is the location prior alone.
    monkeypatch.setattr(base_module, "compute_alignment", lambda location_prior, *_: location_prior)
    head = dense_head(5)
    outputs = head(make_features(2), targets=[make_objects(head)] * 2)

    def terms(*labelled):
        return head.loss(outputs, [make_objects(head, visible=2.0 * known) for known in labelled])

    both, first, second = terms(True, True), terms(True, False), terms(False, True)
    of_points = [f"{term}_{branch}" for term in ("oks", "point", "visible") for branch in BRANCHES]
    for name in ("map_one2one", *of_points):
        assert first[name] > 0
        torch.testing.assert_close(first[name] + second[name], both[name])


def test_classes_without_keypoints_train_the_one_to_many_layers_and_are_background_to_the_others():
    head = make_head("keypoints")
    (target,) = make_targets(1)
    target.labels[:] = 1  # the dog, which has none
    target.keypoints[:] = 0
    outputs = with_gradients(head(make_features(1), targets=[target]))
    terms = head.loss(outputs, [target])
    learned = {"class_one2one", "class_one2many", "box_one2many", "giou_one2many"}
    assert {name for name, value in terms.items() if value != 0} == learned
    total(terms).backward()
    assert (outputs.one2one.logits.grad > 0).all()
    gradient = outputs.one2many.logits.grad[0]
    assert (gradient[:, 1] < 0).any()
    assert (gradient[:, [0, 2]] > 0).all()
    assert (outputs.one2one.boxes.grad is None) or (outputs.one2one.boxes.grad == 0).all()
    assert (outputs.one2many.boxes.grad != 0).any()
    assert (outputs.one2many.points.grad == 0).all()


def test_terms_have_the_weights_of_the_config():
    weights = {"class": 3.0, "box": 1.5, "giou": 0.7, "oks": 1.3, "point": 0.9, "visible": 2.2, "map": 1.1}
    targets = [make_objects(dense_head(5))]
    terms = []
    for settings in (dict.fromkeys(weights, 1.0), weights):
        head = dense_head(5, many_weight=0.25, **{f"{name}_weight": value for name, value in settings.items()})
        outputs = head(make_features(1), targets=targets)
        torch.manual_seed(5)
        terms.append(head.loss(outputs, targets))
    for name in terms[0]:
        torch.testing.assert_close(terms[1][name], weights[name.split("_")[0]] * terms[0][name])


def test_one_to_many_terms_have_a_weight_of_their_own():
    head = dense_head(5)
    targets = [make_objects(head)]
    outputs = head(make_features(1), targets=targets)
    whole = head.loss(outputs, targets)
    head.config.many_weight = 0.25
    quarter = head.loss(outputs, targets)
    torch.testing.assert_close(quarter["class_one2many"], 0.25 * whole["class_one2many"])
    torch.testing.assert_close(quarter["class_one2one"], whole["class_one2one"])


def test_terms_are_means_over_positives():
    """The same image twice has twice the positives and the same loss."""
    head = dense_head(5, pixel_dim=0)
    target = make_objects(head)
    single = with_gradients(head(make_features(1), targets=[target]))

    def twice(raw):
        return type(raw)(*(value.repeat(2, 1, 1) for value in raw))

    double = single._replace(one2one=twice(single.one2one), one2many=twice(single.one2many))
    once, again = head.loss(single, [target]), head.loss(double, [target, target])
    for name, value in once.items():
        torch.testing.assert_close(again[name], value)


def test_logged_names_keep_the_branches_apart():
    names = ["class_one2one", "map_one2one", "oks_one2many"]
    logged = [readings._logged_name(f"keypoints/{name}") for name in names]
    assert logged == ["keypoints/one2one_class", "keypoints/one2one_map", "keypoints/one2many_oks"]

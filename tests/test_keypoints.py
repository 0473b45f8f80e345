"""The dense keypoint head: its two sets of last layers, learning, predictions and post-processing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils.operations import convert_to_fp32

from mvision.errors import UserError
from mvision.evaluation.evaluate import make_metrics
from mvision.heads import head_class
from mvision.heads.keypoints import KeypointConfig, KeypointHead
from mvision.heads.keypoints.base import KeypointOutputs
from mvision.heads.keypoints.grid import decode
from mvision.model import create_model
from mvision.structures import Category
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.oks import keypoint_sigmas, oks
from tests.keypoint_heads import dense_head, make_objects, predict, train
from tests.test_heads import CATEGORIES, make_features, make_head, make_targets

TERMS = ("class", "box", "giou", "oks", "point", "visible")
BRANCHES = ("one2one", "one2many")


def test_two_sets_of_layers_learn_and_one_predicts():
    head = make_head("keypoints")
    targets = make_targets(3, 1)
    terms = head.loss(head(make_features(), targets=targets), targets)
    assert set(terms) == {"map_one2one", *(f"{term}_{branch}" for term in TERMS for branch in BRANCHES)}
    head.eval()
    with torch.no_grad():
        before = head(make_features())
        for parameter in head.many.parameters():
            parameter.fill_(float("nan"))
        after = head(make_features())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_blocks_of_their_own_for_the_one_to_one_layers():
    """What predicts sees them, in training as in prediction, and the one-to-many layers do not."""
    head = dense_head(3, own_depth=1, num_instances=4).eval()
    torch.nn.init.normal_(head.one.score.weight, std=0.1)
    torch.nn.init.normal_(head.many.score.weight, std=0.1)
    features, targets = make_features(1), [make_objects(head)]
    with torch.no_grad():
        before, found = head(features, targets=targets), head(features)
        for number, block in enumerate(head.own):
            for parameter in block.parameters():
                parameter.mul_(1.5 + number)
        after = head(features, targets=targets)
    best = before.one2one.logits[0].amax(-1).topk(4).values
    torch.testing.assert_close(found["logits"][0].amax(-1), best)
    assert torch.equal(before.one2many.logits, after.one2many.logits)
    for shape in (slice(0, 96), slice(96, 120), slice(120, None)):  # the grid points of every map
        assert not torch.equal(before.one2one.logits[:, shape], after.one2one.logits[:, shape])
    losses = head.train().loss(head(features, targets=targets), targets)
    sum(value for name, value in losses.items() if name.endswith("one2many")).backward(retain_graph=True)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in head.own.parameters())
    losses["class_one2one"].backward()
    assert all(parameter.grad.any() for parameter in head.own.parameters())


def test_without_one_to_many_there_are_no_layers_for_it():
    head = dense_head(3, many_weight=0.0)
    targets = [make_objects(head)]
    terms = head.loss(head(make_features(1), targets=targets), targets)
    assert set(terms) == {"map_one2one", *(f"{term}_one2one" for term in TERMS)}
    assert head.many is None


def test_training_outputs_are_named_tuples_that_mixed_precision_converts():
    """accelerate converts what a model returns to float32, and does not look into classes that it does not know."""
    head = dense_head(3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(make_features(1), targets=[make_objects(head)])
    assert outputs.one2one.logits.dtype == outputs.tokens.dtype == torch.bfloat16
    converted = convert_to_fp32(outputs)
    assert isinstance(converted, KeypointOutputs)
    assert converted.shape == (12, 8)
    tensors = [*converted.grid, *converted.one2one, *converted.one2many, converted.tokens, converted.pixels]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize("counts", [(1,), (133,), (3, 1, 5)])
def test_any_number_of_points_is_learned_and_predicted_in_pixels(counts):
    """After training on one image its objects are predicted first, each once, with the points of its class."""
    head = dense_head(*counts)
    target = make_objects(head, max(2, len(counts)))
    features = train(head, [target, target])
    found = predict(head, features, threshold=0.3)[0]
    assert sorted(found.labels.tolist()) == sorted(target.labels.tolist())
    assert found.keypoints.shape == (len(target), max(counts), 3)
    for row, label in enumerate(target.labels.tolist()):
        distance = np.abs(found.boxes - cxcywh_to_xyxy(target.boxes[row]).numpy() * [64, 96, 64, 96]).sum(1)
        best = int(distance.argmin())
        assert found.labels[best] == label
        own = counts[label]
        expected = target.keypoints[row] * torch.tensor([64, 96, 1])
        value = oks(
            torch.from_numpy(found.keypoints[best])[:own, :2],
            expected[:own],
            target.areas[row] * 64 * 96,
            torch.tensor(keypoint_sigmas(head.categories[label])),
        )
        assert value > 0.7
        assert (found.keypoints[best, own:] == 0).all()
        assert (found.keypoints[best, :own, 2] > 0.5).all()
    assert [len(entry["keypoints"]) for entry in found.to_coco(1)] == [3 * counts[label] for label in found.labels]


def test_levels_and_number_of_instances():
    outputs = dense_head(2, levels="finest").eval()(make_features())
    assert outputs["logits"].shape == (2, 96, 1)
    assert dense_head(2).eval()(make_features())["keypoints"].shape == (2, 100, 2, 2)
    head = dense_head(2, 2, num_instances=7).eval()
    assert head(make_features())["boxes"].shape == (2, 7, 4)
    assert all(len(found) == 7 for found in predict(head, make_features()))


def test_the_best_grid_points_are_selected_with_their_own_predictions():
    head = dense_head(2, 3, num_instances=4, pixel_dim=0).eval()
    for layer in (head.one.score, head.one.box, head.one.points):
        torch.nn.init.normal_(layer.weight, std=0.1)
    features = make_features(1)
    with torch.no_grad():
        outputs = head(features)
        encoded = head(features, targets=make_targets(1))
        raw = encoded.one2one
        every = decode(raw, encoded.grid)
    best = raw.logits[0].amax(-1).argsort(descending=True)[:4]
    torch.testing.assert_close(outputs["logits"][0], raw.logits[0, best])
    torch.testing.assert_close(outputs["boxes"][0], every.boxes[0, best])
    torch.testing.assert_close(outputs["keypoints"][0], every.points[0, best])
    torch.testing.assert_close(outputs["visibility"][0], every.visibility[0, best])


def test_heatmaps_replace_the_points_of_the_last_layers():
    head = dense_head(3).eval()
    with torch.no_grad():
        outputs = head(make_features(1))
        head.maps = None
        plain = head(make_features(1))
    torch.testing.assert_close(outputs["boxes"], plain["boxes"])
    assert not torch.equal(outputs["keypoints"], plain["keypoints"])
    assert ((outputs["similarity"] > 0) & (outputs["similarity"] <= 1)).all()
    assert "similarity" not in dense_head(3, pixel_dim=0).eval()(make_features(1))


def outputs_of(logits, visibility, **more):
    """Outputs for one image of a head whose N = len(logits) grid points have these numbers."""
    count, points = len(logits), len(visibility[0])
    outputs = {
        "logits": torch.tensor([logits]),
        "visibility": torch.tensor([visibility]),
        "boxes": torch.tensor([0.5, 0.5, 0.2, 0.4]).repeat(1, count, 1),
        "keypoints": torch.full((1, count, points, 2), 0.5),
    }
    return outputs | {name: torch.tensor([value]) for name, value in more.items()}


def test_the_score_of_a_pose_is_that_of_its_box_and_of_its_visible_points():
    head = dense_head(3)
    visible = [[30.0, 30.0, -30.0]] * 2
    logits = [[0.0], [0.5]]
    box_score = torch.tensor(logits).sigmoid().flatten()
    (plain,) = head.postprocess(outputs_of(logits, visible), [(96, 64)], 0.0)
    np.testing.assert_allclose(plain.scores, box_score.sort(descending=True).values, rtol=1e-6)
    # The similarity of a point that is not visible does not count.
    outputs = outputs_of(logits, visible, similarity=[[0.9, 0.7, 0.0], [0.2, 0.4, 1.0]])
    (found,) = head.postprocess(outputs, [(96, 64)], 0.0)
    np.testing.assert_allclose(found.scores, (box_score * torch.tensor([0.8, 0.3])).sqrt(), rtol=1e-6)
    assert found.scores[0] > found.scores[1]


def test_a_score_equal_to_the_threshold_is_kept():
    head = dense_head(1)
    outputs = outputs_of([[0.0], [-1.0]], [[30.0], [30.0]])
    (found,) = head.postprocess(outputs, [(96, 64)], 0.5)
    assert found.scores.tolist() == [0.5]


def test_results_are_in_pixels_of_the_original_image_and_inside_it():
    head = dense_head(2, 1)
    outputs = outputs_of([[2.0, -9.0], [-9.0, 1.0]], [[0.0, 30.0]] * 2)
    outputs["keypoints"] = torch.tensor([[[[0.25, 0.75], [1.5, -0.5]], [[0.5, 0.5], [0.1, 0.1]]]])
    outputs["boxes"][0, 1] = torch.tensor([0.9, 0.5, 0.4, 0.5])
    (found,) = head.postprocess(outputs, [(200, 400)], 0.5)
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_allclose(found.boxes, [[160, 60, 240, 140], [280, 50, 400, 150]], rtol=1e-5)
    expected = [[[100, 150, 0.5], [400, 0, 1]], [[200, 100, 0.5], [0, 0, 0]]]
    np.testing.assert_allclose(found.keypoints, expected, rtol=1e-5)


def test_duplicates_can_be_dropped():
    outputs = outputs_of([[1.0, -9.0], [2.0, -9.0], [-9.0, 0.5], [0.2, -9.0]], [[30.0]] * 4)
    outputs["boxes"] = torch.tensor([[[0.5, 0.5, 0.4, side] for side in (0.36, 0.4, 0.36, 0.2)]])
    outputs["keypoints"] = torch.tensor([0.1, 0.2, 0.3, 0.4])[None, :, None, None].expand(1, 4, 1, 2)
    for iou, expected in ((None, [0.2, 0.1, 0.3, 0.4]), (0.7, [0.2, 0.3, 0.4]), (0.95, [0.2, 0.1, 0.3, 0.4])):
        (found,) = dense_head(1, 1, nms_iou=iou).postprocess(outputs, [(100, 100)], 0.5)
        np.testing.assert_allclose(found.keypoints[:, 0, 0], [100 * x for x in expected], rtol=1e-5)
        assert found.labels.tolist() == [int(x == 0.3) for x in expected]


def test_one_grid_point_may_be_two_objects_of_different_classes():
    head = dense_head(1, 1)
    (found,) = head.postprocess(outputs_of([[3.0, 2.0], [-5.0, -5.0]], [[0.0], [0.0]]), [(96, 64)], 0.5)
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(found.boxes[0], found.boxes[1])


def test_boxes_and_points_keep_float32_in_reduced_precision():
    head = dense_head(2).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = head(make_features())
    assert outputs["logits"].dtype == torch.bfloat16
    assert outputs["boxes"].dtype == outputs["keypoints"].dtype == torch.float32


def test_sigmas_of_the_config_replace_those_of_the_data():
    head = dense_head(2, 2, sigmas=[0.3, 0.4])
    assert [category.sigmas for category in head.classes] == [[0.3, 0.4]] * 2
    torch.testing.assert_close(head.sigmas, torch.tensor([[0.3, 0.4]] * 2))


def test_the_evaluator_expects_the_classes_that_the_head_predicts_with_the_same_sigmas():
    """Boxes of classes without keypoints do not count as missed, and the config's sigmas are those of the metric."""
    categories = [Category(id=1, name="box"), Category(id=2, name="tube", keypoints=["top", "end"], sigmas=[0.1, 0.1])]
    objects = [
        {
            "id": number,
            "image_id": 1,
            "category_id": number,
            "bbox": [0, 0, 9, 9],
            "area": 81,
            "iscrowd": 0,
            "keypoints": [1, 1, 2] * 2,
        }
        for number in (1, 2)
    ]
    data = {"images": [{"id": 1, "height": 9, "width": 9}], "annotations": objects}
    split = SimpleNamespace(coco_dict={**data, "categories": [{"id": c.id, "name": c.name} for c in categories]})
    settings = {"categories": categories, "image_size": 64, "heads__keypoints__sigmas": [0.3, 0.4]}
    points, boxes = make_metrics(create_model("tiny", ["keypoints"], **settings), split)["keypoints"]
    assert (points.name, boxes.name) == ("keypoints", "bbox")
    assert points.ground_truth.groups == [([1], [0.3, 0.4])]
    assert [category.name for category in boxes.categories] == ["tube"]
    assert boxes.ground_truth.counts([1]) == [1]


def test_mistakes_are_reported_with_their_remedy():
    config = KeypointConfig()
    with pytest.raises(UserError, match=r"none of the classes \(a, b\) has keypoints; name them"):
        KeypointHead(config, [16], [8], [Category(id=1, name="a"), Category(id=2, name="b")])
    with pytest.raises(UserError, match="heads.keypoints.sigmas: 1 sigmas for 3 keypoints of class 'class 0'"):
        dense_head(3, sigmas=[0.1])
    with pytest.raises(UserError, match="heads.keypoints.sigmas: sigma -1.0 is not above 0"):
        dense_head(1, sigmas=[-1.0])


def test_it_is_the_default_kind():
    assert head_class("keypoints") is head_class("keypoints", {"kind": "dense"}) is KeypointHead


@pytest.mark.parametrize("name", ["tiny", "rtkeypoint_192"])
def test_shipped_models_predict(name):
    person = Category(id=1, name="person", keypoints=["nose", "tail"])
    model = create_model(name, ["keypoints"], categories=[person], image_size=64).eval()
    with torch.no_grad():
        (found,) = model.postprocess(model(torch.rand(1, 3, 64, 64)), [(64, 64)], 0.0)
    assert len(found) > 0
    assert found.keypoints.shape[1:] == (2, 3)
    assert np.isfinite(found.keypoints).all()


def test_labels_are_those_of_the_full_list():
    (found,) = predict(make_head("keypoints"), make_features(1))
    assert set(found.labels.tolist()) == {0, 2}
    assert found.names == [category.name for category in CATEGORIES]

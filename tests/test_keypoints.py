"""The keypoint head: its two forms, what teaches it, and its post-processing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mvision.config import load_config
from mvision.errors import UserError
from mvision.evaluation.evaluate import make_metrics
from mvision.heads.keypoints import head as keypoint
from mvision.heads.keypoints import losses as keypoint_losses
from mvision.heads.keypoints.head import KeypointConfig, KeypointHead
from mvision.heads.keypoints.losses import score_target
from mvision.model import create_model
from mvision.neck.layers import fuse_modules
from mvision.structures import Category, Targets
from mvision.structures.boxes import cxcywh_to_xyxy
from mvision.structures.oks import keypoint_sigmas, oks
from tests.test_heads import CATEGORIES, make_features, make_head, make_targets, total

TERMS = {"class", "box", "giou", "oks", "point", "visible"}


def new_head(*counts, **settings):
    """A head for classes with these numbers of points."""
    torch.manual_seed(0)
    categories = [
        Category(id=10 + row, name=f"class {row}", keypoints=[f"p{index}" for index in range(count)])
        for row, count in enumerate(counts)
    ]
    return KeypointHead(KeypointConfig(**{"embed_dim": 16, **settings}), [16] * 3, [8, 16, 32], categories)


def objects(head, count=2, visible=2.0):
    """One image with objects of the head's classes in turn, points spread over their boxes."""
    torch.manual_seed(3)
    labels = torch.arange(count) % len(head.categories)
    centre = torch.linspace(0.25, 0.75, count)[:, None].repeat(1, 2)
    boxes = torch.cat((centre, torch.full((count, 2), 0.3)), -1)
    points = torch.zeros(count, head.num_points, 3)
    for row, label in enumerate(labels.tolist()):
        own = len(head.categories[label].keypoints)
        points[row, :own, :2] = boxes[row, :2] + (torch.rand(own, 2) - 0.5) * 0.3
        points[row, :own, 2] = visible
    return Targets(boxes, labels, torch.full((count,), 0.06), keypoints=points, size=(96, 64))


@torch.no_grad()
def predict(head, features, size=(96, 64), threshold=0.0):
    """Instances of every image."""
    return head.eval().postprocess(head(features), [size] * len(features[0]), threshold)


def train(head, targets, steps=150):
    """On one batch."""
    features = make_features(len(targets))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        loss = total(head.loss(head(features, targets=targets), targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return features


def perfect_outputs(head, targets):
    """Training outputs of a head whose cells all predict the (one) object of their image."""
    outputs = head(make_features(len(targets)), targets=targets)
    cells = outputs["centres"][None], outputs["sizes"][None, :, None]
    box = torch.stack([target.boxes[0] for target in targets])[:, None]
    points = torch.stack([target.keypoints[0] for target in targets])[:, None]
    relative = (points[..., :2] - box[..., None, :2]) / box[..., None, 2:]
    raw_boxes = torch.cat(((box[..., :2] - cells[0]) / cells[1], (box[..., 2:] / cells[1]).log()), -1)
    raw_points = torch.cat((relative.flatten(2), 40 * (points[..., 2] > 0) - 20.0), -1).expand(-1, len(cells[0][0]), -1)
    for branch in ("one", "many"):
        outputs |= {f"{branch}_boxes": raw_boxes, f"{branch}_points": raw_points}
    return outputs


def test_two_branches_teach_and_one_predicts():
    head = make_head("keypoints")
    targets = make_targets(3, 1)
    assert set(head.loss(head(make_features(), targets=targets), targets)) == {
        "map_one",
        *(f"{t}_{b}" for t in TERMS for b in ("one", "many")),
    }
    head.eval()
    with torch.no_grad():
        before = head(make_features())
        for parameter in head.many.parameters():
            parameter.fill_(float("nan"))
        after = head(make_features())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_one_to_many_there_are_no_layers_for_it():
    head = new_head(3, many_weight=0.0)
    terms = head.loss(head(make_features(1), targets=[objects(head)]), [objects(head)])
    assert set(terms) == {"map_one", *(f"{term}_one" for term in TERMS)}
    assert head.many is None


def test_perfect_predictions_cost_nothing_but_confidence():
    head = new_head(5)
    targets = [objects(head, 1)]
    terms = head.loss(perfect_outputs(head, targets), targets)
    for name, value in terms.items():
        if name != "map_one":  # no output of a cell: see test_point_maps.py
            assert (value < 1e-3) != name.startswith("class"), (name, value)


def test_points_without_label_teach_nothing_but_that_they_are_not_there():
    head = new_head(5)
    targets = [objects(head, 1)]
    outputs = perfect_outputs(head, targets)
    hidden = targets[0].keypoints.clone()
    hidden[0, 3:] = 0  # COCO writes zeros: as coordinates they would be far away
    targets[0].keypoints = hidden
    terms = head.loss(outputs, targets)
    assert max(terms["oks_one"], terms["point_one"], terms["oks_many"]) < 1e-3
    assert terms["visible_one"] > 1


def test_scores_are_taught_the_oks_and_a_fitting_box_where_it_says_nothing():
    near, overlap = torch.tensor([0.9, 0.5, 0.01, 0.01]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    target = score_target(near, overlap)
    torch.testing.assert_close(target, torch.tensor([0.9, 0.5, 0.4, 0.01]))


def test_objects_without_points_teach_their_box_and_no_score():
    head = new_head(5)
    targets = [objects(head, 1, visible=0.0)]
    outputs = head(make_features(1), targets=targets)
    for branch in ("one", "many"):
        outputs[f"{branch}_logits"] = outputs[f"{branch}_logits"].detach().requires_grad_()
    terms = head.loss(outputs, targets)
    assert terms["box_one"] > 0.01
    assert terms["box_many"] > 0.01
    assert all(terms[f"{term}_{branch}"] == 0 for term in ("oks", "point", "visible") for branch in ("one", "many"))
    total(terms).backward()
    box = cxcywh_to_xyxy(targets[0].boxes[0])
    inside = ((outputs["centres"] > box[:2]) & (outputs["centres"] < box[2:])).all(-1)
    pull = outputs["many_logits"].grad[0, :, 0]
    assert (pull[inside] == 0).all()
    assert (pull[~inside] > 0).all()


def test_what_a_label_weighs_does_not_depend_on_how_many_are_missing(monkeypatch):
    """Else half of the poses, missing, would make noise of the others that every task suffers from."""
    monkeypatch.setattr(keypoint_losses, "PRIOR_NOISE", 0.0)
    monkeypatch.setattr(keypoint_losses, "WINDOW_NOISE", 0.0)
    # Which cells learn an object depends on its points; here on the places of the cells alone.
    monkeypatch.setattr(keypoint, "cell_values", lambda closeness, *_: closeness)
    head = new_head(5)
    outputs = head(make_features(2), targets=[objects(head)] * 2)

    def terms(*labelled):
        return head.loss(outputs, [objects(head, visible=2.0 * known) for known in labelled])

    both, first, second = terms(True, True), terms(True, False), terms(False, True)
    for name in (
        "map_one",
        *(f"{term}_{branch}" for term in ("oks", "point", "visible") for branch in ("one", "many")),
    ):
        assert first[name] > 0
        torch.testing.assert_close(first[name] + second[name], both[name])


def test_classes_without_keypoints_teach_the_neck_and_are_background_to_predictions():
    head = make_head("keypoints")
    (target,) = make_targets(1)
    target.labels[:] = 1  # the dog, which has none
    target.keypoints[:] = 0
    outputs = head(make_features(1), targets=[target])
    for branch in ("one", "many"):
        outputs[f"{branch}_logits"] = outputs[f"{branch}_logits"].detach().requires_grad_()
    terms = head.loss(outputs, [target])
    assert {name for name, value in terms.items() if value != 0} == {"class_one", "class_many", "box_many", "giou_many"}
    total(terms).backward()
    assert (outputs["one_logits"].grad > 0).all()  # down, everywhere
    pull = outputs["many_logits"].grad[0]
    assert (pull[:, 1] < 0).any()
    assert (pull[:, [0, 2]] > 0).all()


@pytest.mark.parametrize("counts", [(1,), (133,), (3, 1, 5)])
def test_any_number_of_points_learns_and_comes_back_in_pixels(counts):
    """After training on one image its objects are found first, each once, with the points of its class."""
    head = new_head(*counts)
    target = objects(head, max(2, len(counts)))
    features = train(head, [target, target])
    found = predict(head, features, threshold=0.3)[0]
    assert sorted(found.labels.tolist()) == sorted(target.labels.tolist())
    assert found.keypoints.shape == (len(target), max(counts), 3)
    for row, label in enumerate(target.labels.tolist()):
        near = np.abs(found.boxes - cxcywh_to_xyxy(target.boxes[row]).numpy() * [64, 96, 64, 96]).sum(1)
        best = int(near.argmin())
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


def test_points_form_is_one_convolution_to_x_y_and_score():
    """The source's head: RepBlock(in -> 64), 1x1 convolution to K x (x, y, score), on the finest map."""
    head = new_head(4, predict="points", levels="finest", depth=1, embed_dim=64)
    weights = {
        name: tuple(value.shape) for name, value in fuse_modules(head).state_dict().items() if "many" not in name
    }
    assert weights == {
        "towers.0.0.conv.weight": (64, 16, 3, 3),
        "towers.0.0.conv.bias": (64,),
        "one.points.weight": (12, 64),
        "one.points.bias": (12,),
    }


def test_points_form_learns_and_draws_boxes_around_points():
    head = new_head(4, predict="points", levels="finest", depth=1)
    target = objects(head)
    features = train(head, [target, target])
    terms = head.loss(head(features, targets=[target, target]), [target, target])
    assert set(terms) == {f"{term}_{branch}" for term in ("class", "oks", "point") for branch in ("one", "many")}
    found = predict(head, features, threshold=0.3)[0]
    assert len(found) == 2
    expected = target.keypoints[:, :, :2].numpy() * [64, 96]
    order = np.argsort(found.keypoints[:, 0, 0]), np.argsort(expected[:, 0, 0])
    np.testing.assert_allclose(found.keypoints[order[0], :, :2], expected[order[1]], atol=4)
    low, high = found.keypoints[..., :2].min(1), found.keypoints[..., :2].max(1)
    np.testing.assert_allclose(found.boxes, np.concatenate((low, high), 1), atol=1e-3)


def test_levels_and_number_of_instances():
    outputs = new_head(2, levels="finest").eval()(make_features())
    assert outputs["logits"].shape == (2, 96, 1)
    assert new_head(2).eval()(make_features())["keypoints"].shape == (2, 100, 2, 2)
    head = new_head(2, 2, num_instances=7).eval()
    assert head(make_features())["boxes"].shape == (2, 7, 4)
    assert all(len(found) == 7 for found in predict(head, make_features()))


def test_boxes_and_points_keep_float32_in_reduced_precision():
    head = new_head(2).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = head(make_features())
    assert outputs["logits"].dtype == torch.bfloat16
    assert outputs["boxes"].dtype == outputs["keypoints"].dtype == torch.float32


def test_sigmas_of_the_config_replace_those_of_the_data():
    head = new_head(2, 2, sigmas=[0.3, 0.4])
    assert [category.sigmas for category in head.classes] == [[0.3, 0.4]] * 2
    torch.testing.assert_close(head.sigmas, torch.tensor([[0.3, 0.4]] * 2))


def test_the_evaluator_asks_for_what_the_head_finds_by_the_same_sigmas():
    """Boxes of classes without keypoints are not missed, and the config's sigmas are those of the figures."""
    categories = [Category(id=1, name="box"), Category(id=2, name="tube", keypoints=["top", "end"], sigmas=[0.1, 0.1])]
    objects = [
        {"id": n, "image_id": 1, "category_id": n, "bbox": [0, 0, 9, 9], "keypoints": [1, 1, 2] * 2} for n in (1, 2)
    ]
    data = {"images": [{"id": 1, "height": 9, "width": 9}], "annotations": objects}
    split = SimpleNamespace(coco_dict={**data, "categories": [{"id": c.id, "name": c.name} for c in categories]})
    settings = {"categories": categories, "image_size": 64, "heads__keypoints__sigmas": [0.3, 0.4]}
    points, boxes = make_metrics(create_model("tiny", ["keypoints"], **settings), split)["keypoints"]
    assert (points.name, boxes.name) == ("keypoints", "bbox")
    assert points.truth.groups == [([1], [0.3, 0.4])]
    assert [category.name for category in boxes.categories] == ["tube"]
    assert boxes.truth.counts([1]) == [1]


def test_mistakes_name_the_way_out():
    config = KeypointConfig()
    with pytest.raises(UserError, match=r"none of the classes \(a, b\) has keypoints; name them"):
        KeypointHead(config, [16], [8], [Category(id=1, name="a"), Category(id=2, name="b")])
    with pytest.raises(UserError, match="heads.keypoints.sigmas: 1 sigmas for 3 keypoints of class 'class 0'"):
        new_head(3, sigmas=[0.1])
    with pytest.raises(UserError, match="heads.keypoints.sigmas: sigma -1.0 is not above 0"):
        new_head(1, sigmas=[-1.0])
    with pytest.raises(UserError, match="predict: points has no scores for classes, and 2 have.*use instances"):
        new_head(3, 2, predict="points")


@pytest.mark.parametrize("name", ["tiny", "rtkeypoint_192"])
def test_shipped_models_build(name):
    person = Category(id=1, name="person", keypoints=["nose", "tail"])
    model = create_model(name, ["keypoints"], categories=[person], image_size=64).eval()
    with torch.no_grad():
        (found,) = model.postprocess(model(torch.rand(1, 3, 64, 64)), [(64, 64)], 0.0)
    assert found.keypoints.shape[1:] == (2, 3)


def test_the_literal_form_is_shipped():
    config = load_config("rtkeypoint_192").model
    assert config.neck.embed_dim == 192
    wanted = {"levels": "finest", "depth": 1, "embed_dim": 64, "predict": "points"}
    assert wanted.items() <= config.heads["keypoints"].model_dump().items()


def test_labels_are_those_of_the_full_list():
    (found,) = predict(make_head("keypoints"), make_features(1))
    assert set(found.labels.tolist()) <= {0, 2}
    assert found.names == [category.name for category in CATEGORIES]

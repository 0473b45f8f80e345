"""The minimal keypoint head, and weights files from before it was a head of its own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mvision.config import load_config
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.heads.keypoints import MinimalKeypointHead
from mvision.model import Model, create_model
from mvision.neck.layers import fuse_modules
from mvision.structures import Category
from mvision.structures.oks import point_similarity
from mvision.weights import init_from, load, save_weights
from tests import test_heads
from tests.keypoint_heads import inside_box, make_objects, minimal_head, predict, train, with_gradients
from tests.test_heads import make_features, total

# Every key that a section had when ``predict`` chose between the two forms, with values that differ from the defaults
# where the form used them.
OLD_KEYS = {
    "levels": "finest",
    "depth": 1,
    "embed_dim": 16,
    "num_instances": 7,
    "sigmas": [],
    "pixel_dim": 16,
    "map_dim": 8,
    "top_k": 9,
    "many_weight": 1.0,
    "class_loss": "mal",
    "alpha": 0.7,
    "gamma": 1.4,
    "class_weight": 4.5,
    "box_weight": 5.5,
    "giou_weight": 2.5,
    "oks_weight": 1.5,
    "point_weight": 2.5,
    "visible_weight": 0.75,
    "map_weight": 8.5,
}
ONLY_DENSE = {"pixel_dim", "map_dim", "box_weight", "giou_weight", "visible_weight", "map_weight"}
BRANCHES = ("one2one", "one2many")
PERSON = Category(id=1, name="person", keypoints=["nose", "left_hand", "right_hand"])


def conformance_head(task: str) -> MinimalKeypointHead:
    """``make_head`` of the conformance suite, whose classes have keypoints twice: here the cat has them alone."""
    torch.manual_seed(0)
    cls = head_class(task, {"kind": "minimal"})
    categories = [c if c.name == "cat" else c.model_copy(update={"keypoints": []}) for c in test_heads.CATEGORIES]
    return cls(cls.Config(embed_dim=16, num_instances=12), [16] * 3, test_heads.STRIDES, categories)


def conformance_cases() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every test of the conformance suite that takes a task, with every value of its other argument."""
    for name, check in vars(test_heads).items():
        if name.startswith("test_") and "task" in inspect.signature(check).parameters:
            marks = getattr(check, "pytestmark", [])
            yield from ((check, {mark.args[0]: value}) for mark in marks for value in mark.args[1])
            if not marks:
                yield check, {}


CASES = list(conformance_cases())


@pytest.mark.parametrize(("check", "more"), CASES, ids=[f"{check.__name__}-{more}" for check, more in CASES])
def test_conformance(check: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_heads, "make_head", conformance_head)
    check("keypoints", **more)


def test_the_whole_conformance_suite_is_found() -> None:
    assert len(CASES) >= 7


def test_it_is_one_convolution_to_x_y_and_score() -> None:
    """The source's head: RepBlock(in -> 64), 1x1 convolution to K x (x, y, score), on the finest map."""
    head = minimal_head(4, levels="finest", depth=1, embed_dim=64)
    weights = {
        name: tuple(value.shape) for name, value in fuse_modules(head).state_dict().items() if "many" not in name
    }
    assert weights == {
        "towers.0.0.conv.weight": (64, 16, 3, 3),
        "towers.0.0.conv.bias": (64,),
        "one.points.weight": (12, 64),
        "one.points.bias": (12,),
    }


def test_it_learns_and_draws_boxes_around_points() -> None:
    head = minimal_head(4, levels="finest", depth=1)
    target = make_objects(head)
    features = train(head, [target, target])
    terms = head.loss(head(features, targets=[target, target]), [target, target])
    assert set(terms) == {
        f"{term}_{branch}" for term in ("class", "oks", "point") for branch in ("one2one", "one2many")
    }
    found = predict(head, features, threshold=0.3)[0]
    assert len(found) == 2
    assert found.keypoints is not None
    expected = target.keypoints[:, :, :2].numpy() * [64, 96]
    order = np.argsort(found.keypoints[:, 0, 0]), np.argsort(expected[:, 0, 0])
    np.testing.assert_allclose(found.keypoints[order[0], :, :2], expected[order[1]], atol=4)
    low, high = found.keypoints[..., :2].min(1), found.keypoints[..., :2].max(1)
    np.testing.assert_allclose(found.boxes, np.concatenate((low, high), 1), atol=1e-3)


def test_an_objects_score_is_the_mean_of_its_points_scores() -> None:
    head = minimal_head(3, num_instances=5).eval()
    torch.nn.init.normal_(head.one.points.weight, std=0.5)
    (found,) = predict(head, make_features(1))
    assert found.keypoints is not None
    assert len(found) == 5
    assert np.ptp(found.scores) > 1e-3
    np.testing.assert_allclose(found.scores, found.keypoints[..., 2].mean(1), rtol=1e-5)


def test_a_score_equal_to_the_threshold_is_kept() -> None:
    head = minimal_head(1)
    outputs = {
        "logits": torch.tensor([[[0.0], [-1.0]]]),
        "visibility": torch.zeros(1, 2, 1),
        "boxes": torch.full((1, 2, 4), 0.5),
        "keypoints": torch.full((1, 2, 1, 2), 0.5),
    }
    (found,) = head.postprocess(outputs, [(96, 64)], 0.5)
    assert found.scores.tolist() == [0.5]


def test_every_points_score_learns_its_own_similarity() -> None:
    """Three points, one of them not labelled, predicted at three distances."""
    head = minimal_head(3, class_weight=1.0, many_weight=0.0)
    target = make_objects(head, 1)
    target.keypoints[0, 2, 2] = 0
    outputs = head(make_features(1), targets=[target])
    places = target.keypoints[0, :, :2] + torch.tensor([[0.0, 0.0], [0.03, 0.0], [0.3, 0.3]])
    grid = outputs.grid
    offsets = (places - grid.centres[:, None]) / grid.sizes[:, None, None]
    raw = torch.cat((offsets.flatten(1), torch.zeros(len(offsets), 3)), -1)[None]
    outputs = with_gradients(outputs._replace(one2one=outputs.one2one._replace(points=raw)))
    terms = head.loss(outputs, [target])
    terms["class_one2one"].backward()
    gradient = outputs.one2one.points.grad[0, :, 6:]
    row = gradient[:, 0].argmin()
    scale = torch.tensor([64.0, 96.0]) / (64 * 96) ** 0.5
    truth = target.keypoints[0, :, :2]
    quality = point_similarity(places * scale, truth * scale, target.areas[0], head.sigmas[0])
    assert 0.3 < quality[1] < 0.9
    # Varifocal loss, divided by the number of points: (p - q) * q at positives, 0.75 * p ** 2.5 at negatives.
    torch.testing.assert_close(gradient[row, :2], (0.5 - quality[:2]) * quality[:2] / 3)
    others = [index for index in range(len(gradient)) if index != row]
    torch.testing.assert_close(gradient[others], torch.full((len(others), 3), 0.75 * 0.5**2.5 / 3))


@pytest.mark.parametrize("unlabelled", ["points", "image"])
def test_objects_without_labelled_points_have_no_gradient(unlabelled: str) -> None:
    head = minimal_head(5)
    target = make_objects(head, 1, visible=0.0)
    if unlabelled == "image":
        target.keypoints = None
    outputs = with_gradients(head(make_features(1), targets=[target]))
    terms = head.loss(outputs, [target])
    assert all(terms[f"{term}_{branch}"] == 0 for term in ("oks", "point") for branch in BRANCHES)
    total(terms).backward()
    inside = inside_box(outputs, target.boxes[0])
    assert 0 < inside.sum() < len(inside)
    for raw in (outputs.one2one, outputs.one2many):
        assert (raw.points.grad[..., :10] == 0).all()
        scores = raw.points.grad[0, :, 10:]
        assert (scores[inside] == 0).all()
        assert (scores[~inside] > 0).all() if unlabelled == "points" else (scores == 0).all()


def test_terms_are_means_over_positives() -> None:
    """The same image twice has twice the positives and the same loss."""
    head = minimal_head(5)
    target = make_objects(head)
    single = head(make_features(1), targets=[target])

    def twice(raw: Any) -> Any:
        return type(raw)(*(None if value is None else value.repeat(2, 1, 1) for value in raw))

    double = single._replace(one2one=twice(single.one2one), one2many=twice(single.one2many))
    once, again = head.loss(single, [target]), head.loss(double, [target, target])
    for name, value in once.items():
        torch.testing.assert_close(again[name], value)


def test_several_classes_with_keypoints_are_refused() -> None:
    with pytest.raises(UserError, match="keypoints.kind: minimal has no scores for classes, and 2 have.*use dense"):
        minimal_head(3, 2)
    with pytest.raises(UserError, match="none of the classes"):
        minimal_head(0)
    assert [category.name for category in minimal_head(0, 2, 0).classes] == ["class 1"]


def test_keys_of_the_dense_head_are_refused() -> None:
    section = {"kind": "minimal", "pixel_dim": 8}
    with pytest.raises(UserError, match="model.heads.keypoints.*pixel_dim"):
        load_config("tiny", tasks=["keypoints"], overrides={"model.heads.keypoints": section})


def test_the_shipped_model_is_the_sources() -> None:
    config = load_config("rtkeypoint_192").model
    assert config.neck.embed_dim == 192
    settings = config.heads["keypoints"].model_dump()
    assert {"kind": "minimal", "levels": "finest", "depth": 1, "embed_dim": 64}.items() <= settings.items()
    assert not settings.keys() & ONLY_DENSE
    model = create_model("rtkeypoint_192", ["keypoints"], categories=[PERSON], image_size=64)
    assert isinstance(model.head("keypoints"), MinimalKeypointHead)
    assert not model.backbone.laterals


def make_model(kind: str) -> Model:
    torch.manual_seed(0)
    names = OLD_KEYS.keys() - (ONLY_DENSE if kind == "minimal" else set())
    settings = {f"heads__keypoints__{name}": OLD_KEYS[name] for name in names}
    settings |= {"heads__keypoints__kind": kind, "heads__keypoints__nms_iou": None, "heads__keypoints__own_depth": 0}
    model = create_model("tiny", ["keypoints"], categories=[PERSON], image_size=64, **settings).eval()
    head = model.head("keypoints")
    torch.nn.init.normal_(head.one.points.weight, std=0.5)
    return model


def write_old_header(model: Model, path: Path, predict_key: Any) -> None:
    """A weights file of ``model`` whose header has the head's section as it was before there were kinds."""
    save_weights(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata["mvision"])
    described["model"]["heads"]["keypoints"] = {**OLD_KEYS, "predict": predict_key}
    save_file(load_file(path), path, {**metadata, "mvision": json.dumps(described)})


@pytest.mark.parametrize(("old", "kind"), [("points", "minimal"), ("instances", "dense")])
def test_weights_files_from_before_the_kinds_give_the_same_outputs(old: str, kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    write_old_header(model, tmp_path / "old.safetensors", old)
    loaded = load(tmp_path / "old.safetensors")
    assert loaded.config == model.config
    assert loaded.config.heads["keypoints"].model_dump()["kind"] == kind
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images)["keypoints"], loaded(images)["keypoints"]
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    other = make_model(kind)
    torch.nn.init.zeros_(other.head("keypoints").one.points.weight)
    init_from(other, tmp_path / "old.safetensors")
    assert torch.equal(other.head("keypoints").one.points.weight, model.head("keypoints").one.points.weight)
    save_weights(loaded, tmp_path / "new.safetensors")
    assert load(tmp_path / "new.safetensors").config == model.config


def test_an_unknown_form_in_an_old_file_is_reported(tmp_path: Path) -> None:
    write_old_header(make_model("minimal"), tmp_path / "old.safetensors", "lines")
    with pytest.raises(UserError, match="model.heads.keypoints.predict: 'lines' is not supported any more"):
        load(tmp_path / "old.safetensors")


def test_configs_of_old_runs_load(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for old, kind in (("points", "minimal"), ("instances", "dense")):
        file.write_text(json.dumps({"model": {"heads": {"keypoints": {**OLD_KEYS, "predict": old}}}}))
        settings = load_config(file=file).model.heads["keypoints"].model_dump()
        assert settings["kind"] == kind
        assert settings["top_k"] == 9

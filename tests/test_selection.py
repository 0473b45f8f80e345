"""Which predictions a user gets: the best class of a query, thresholds by class, overlaps of any classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvision import Instances, Model, UserError, create_model
from mvision.cli.main import run
from mvision.commands import predict as predict_module
from mvision.deploy.exported import ExportedModel
from mvision.heads.linking import link_poses
from mvision.inference.predict import predict_images
from mvision.inference.selection import Selection
from mvision.structures import Category
from tests.fake_model import FakeModel, paint, save

CLASSES = [Category(id=1, name="cat"), Category(id=2, name="dog"), Category(id=3, name="a=b")]


def logits_of(*scores: list[float]) -> torch.Tensor:
    return torch.tensor([scores]).logit()


def detector() -> Model:
    return create_model("tiny", ["detection"], categories=CLASSES, image_size=64, neck__embed_dim=32)


def found_by(model: Model, logits: torch.Tensor, boxes: Any = None, **options: Any) -> list[tuple[str, float]]:
    """(class, score) of what post-processing keeps; without ``boxes`` they lie apart."""
    count = logits.shape[1]
    apart = [[(i + 0.5) / count, 0.5, 0.5 / count, 0.5] for i in range(count)]
    outputs = {"detection": {"logits": logits, "boxes": torch.tensor([apart if boxes is None else boxes])}}
    (found,) = model.postprocess(outputs, [(100, 100)], **options)
    return [(name, round(score, 3)) for name, score in zip(found.class_names, found.scores.tolist())]


@pytest.fixture(scope="module")
def model() -> Model:
    return detector()


@pytest.mark.parametrize("with_points", [1, 2])
@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"threshold": {"a": 0.6, "*": 0.4}}, {"multi_label": True}])
def test_poses_of_a_joint_model_are_selected_once(
    with_points: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the results of two selections: the poses that may become objects, and those of any score to be linked."""
    categories = [
        Category(id=i, name=n, keypoints=["p", "q"][: 2 * (i <= with_points)]) for i, n in ((1, "a"), (2, "b"))
    ]
    torch.manual_seed(0)
    model = create_model(
        "tiny", ["detection", "keypoints"], categories=categories, image_size=64, neck__embed_dim=32
    ).eval()
    with torch.no_grad():
        outputs = model(torch.rand(3, 3, 64, 64))
    for of_head in outputs.values():  # scores on both sides of the thresholds, boxes that meet
        of_head["logits"] = torch.randn_like(of_head["logits"])
        of_head["boxes"] = torch.rand_like(of_head["boxes"]) * torch.tensor([0.6, 0.6, 0.2, 0.2]) + 0.2
    outputs["keypoints"]["similarity"].fill_(1.0)
    outputs["detection"] = {name: value[:, :12] for name, value in outputs["detection"].items()}
    sizes = [(100, 80), (50, 60), (64, 64)]
    chosen = Selection(options.get("threshold", 0.5), options.get("multi_label", False))
    head = model.head("keypoints")
    best = outputs["keypoints"] if chosen.multi_label else head.best_class_only(outputs["keypoints"])
    new = [chosen.above(found) for found in head.postprocess(best, sizes, chosen.lowest)]
    poses = head.postprocess(outputs["keypoints"], sizes, 0.0)
    model.heads.pop("keypoints")
    objects = model.postprocess(outputs, sizes, chosen.threshold, multi_label=chosen.multi_label)
    model.heads["keypoints"] = head
    expected = [link_poses(of, pose, chosen.lowest, own) for of, pose, own in zip(objects, poses, new)]
    calls: list[int] = []
    postprocess = head.postprocess
    monkeypatch.setattr(head, "postprocess", lambda *given: calls.append(1) or postprocess(*given))
    found = model.postprocess(outputs, sizes, **options)
    assert calls == [1]
    assert max(len(one) - len(of) for one, of in zip(found, objects)) > 0  # poses that became objects
    for one, wanted in zip(found, expected, strict=True):
        assert np.array_equal(one.labels, wanted.labels)
        for name in ("boxes", "scores", "keypoints"):
            np.testing.assert_allclose(getattr(one, name), getattr(wanted, name), atol=1e-4)


def test_a_query_has_one_class_unless_several_are_asked_for(model: Model) -> None:
    logits = logits_of([0.8, 0.7, 0.1], [0.2, 0.3, 0.6])
    assert found_by(model, logits) == [("cat", 0.8), ("a=b", 0.6)]
    assert found_by(model, logits, multi_label=True) == [("cat", 0.8), ("dog", 0.7)]  # two queries: the two best pairs
    assert found_by(model, logits, threshold=0.0) == [("cat", 0.8), ("a=b", 0.6)]
    # Metrics take all classes.
    outputs = {"detection": {"logits": logits, "boxes": torch.full((1, 2, 4), 0.5)}}
    assert [r.class_names for r in model.results(outputs, [(9, 9)])["detection"]] == [["cat", "dog"]]


def test_a_threshold_for_each_class(model: Model) -> None:
    logits = logits_of([0.45, 0.1, 0.1], [0.1, 0.45, 0.1], [0.1, 0.1, 0.45], [0.65, 0.1, 0.1])
    assert found_by(model, logits, threshold={"dog": 0.4}) == [("cat", 0.65), ("dog", 0.45)]
    assert found_by(model, logits, threshold={"*": 0.4, "cat": 0.7}) == [("dog", 0.45), ("a=b", 0.45)]
    assert found_by(model, logits, threshold={"*": 1, "a=b": 0.45}) == [("a=b", 0.45)]
    assert found_by(model, logits, threshold={}) == [("cat", 0.65)]
    # The class is decided first: what is no cat for want of score is not a dog for it.
    assert found_by(model, logits_of([0.6, 0.5, 0.1]), threshold={"cat": 0.7, "dog": 0.1}) == []


def test_overlaps_of_any_classes(model: Model) -> None:
    logits = logits_of([0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.7])
    boxes = [[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.38], [0.8, 0.5, 0.2, 0.4]]
    assert [name for name, _ in found_by(model, logits, boxes)] == ["cat", "dog", "a=b"]
    assert [name for name, _ in found_by(model, logits, boxes, nms=0.9)] == ["cat", "a=b"]
    assert [name for name, _ in found_by(model, logits, boxes, nms=0.96)] == ["cat", "dog", "a=b"]


def test_mistakes_are_one_line() -> None:
    fake, image = FakeModel().eval(), paint((96, 128), [])
    wrong: dict[str, dict[str, Any]] = {
        "threshold 1.5: has to be": {"threshold": 1.5},
        "threshold nan: has to be": {"threshold": float("nan")},
        "threshold -1 of class 'red'": {"threshold": {"red": -1}},
        "threshold of class 'rde': the model has no such class; did you mean 'red'": {"threshold": {"rde": 0.3}},
        "nms 0:": {"nms": 0},
        "nms 1.5:": {"nms": 1.5},
    }
    for message, options in wrong.items():
        with pytest.raises(UserError, match=message):
            predict_images(fake, [image], **options)


def test_poses_become_objects_of_their_best_class_alone() -> None:
    box, points = [[10.0, 10, 50, 50]], np.ones((1, 2, 3), np.float32)

    def poses(labels: list[int], scores: list[float]) -> Instances:
        count = len(labels)
        return Instances(
            np.repeat(np.array(box, np.float32), count, 0),
            np.array(scores, np.float32),
            np.array(labels, dtype=int),
            (100, 100),
            CLASSES,
            keypoints=np.repeat(points, count, 0),
        )

    nothing = poses([], [])
    every, best = poses([0, 1], [0.9, 0.6]), poses([0], [0.9])
    assert link_poses(nothing, every, 0.5).class_names == ["cat", "dog"]
    assert link_poses(nothing, every, 0.5, best).class_names == ["cat"]
    # An object that the other head calls a dog gets the pose, whatever the pose is called most.
    dog = Instances(np.array(box, np.float32), np.array([0.8]), np.array([1]), (100, 100), CLASSES)
    linked = link_poses(dog, every, 0.5, poses([], []))
    assert linked.class_names == ["dog"]
    assert linked.keypoints is not None
    assert linked.keypoints.all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Selection(0.5)),
        (["--threshold", "0.3"], Selection(0.3)),
        (["--threshold", "cat=0.3"], Selection({"cat": 0.3})),
        (["--threshold", "0.4", "--threshold", "a=b=0.3", "--nms", "0.7"], Selection({"*": 0.4, "a=b": 0.3}, nms=0.7)),
        (["--multi-label"], Selection(0.5, True)),
    ],
)
def test_the_command_line(
    arguments: list[str], expected: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = save(tmp_path / "a.png", paint((96, 128), []))
    seen = []

    def predict_sources(*arguments: Any, **options: Any) -> str:
        _, _, _, threshold, _ = arguments
        seen.append(Selection(threshold, options["multi_label"], options["nms"]))
        return "done"

    monkeypatch.setattr(predict_module, "open_fastest", lambda *_: (FakeModel(), "runtime"))
    monkeypatch.setattr(predict_module, "predict_sources", predict_sources)
    assert run(["predict", str(photo), "--weights", "w", "--device", "cpu", *arguments]) == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "cat"], "'cat' is neither a number nor CLASS=NUMBER"),
        (["--threshold", "1.5"], "1.5 is not in the range from 0 to 1"),
        (["--threshold", "cat=nan"], "cat=nan is not in the range"),
        (["--threshold", "0.3", "--threshold", "0.4"], "two values for all classes"),
        (["--threshold", "cat=0.3", "--threshold", "cat=0.4"], "two values for class 'cat'"),
        (["--nms", "2"], "nms 2.0: an IoU above 0 and up to 1"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", "a.jpg", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_exported_model_selects_alike() -> None:
    assert ExportedModel.postprocess is Model.postprocess
    assert ExportedModel.predict is Model.predict

"""Joint models: one forward pass for several tasks, one result per object, and heads that can be dropped."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mvision import Instances, Model, UserError, load
from mvision.commands.val import validate
from mvision.config import load_config, parse_model_config
from mvision.engine.train import train
from mvision.heads.linking import link_poses
from mvision.structures import Category, Targets
from mvision.structures.boxes import xyxy_to_cxcywh
from mvision.weights import init_from, save_weights
from tests.small_runs import add_corners

TASKS = ["detection", "instance-seg", "keypoints"]
QUERIES = {"embed_dim": 32, "num_heads": 4, "num_layers": 2, "ffn_dim": 32, "num_queries": 10}
HEADS = {
    "detection": {},
    "instance-seg": {**QUERIES, "pixel_dim": 16, "mask_dim": 8, "mask_points": 64},
    "keypoints": {"embed_dim": 16, "pixel_dim": 16, "map_dim": 8, "num_instances": 12},
}
CATEGORIES = [
    Category(id=4, name="dog"),
    Category(id=9, name="person", keypoints=["nose", "left_hand", "right_hand"], skeleton=[(0, 1), (0, 2)]),
]


def make_model(tasks: list[str], **more: dict) -> Model:
    heads = {task: {**HEADS.get(task, {}), **more.get(task, {})} for task in tasks}
    if "instance-seg" not in tasks and "detection" in tasks:
        heads["detection"] = {**QUERIES, **more.get("detection", {})}
    torch.manual_seed(0)
    return Model(
        parse_model_config(
            {
                "backbone": {"name": "test_resnet"},
                "neck": {"embed_dim": 32, "num_heads": 4, "ffn_dim": 32, "depth": 1},
                "heads": heads,
                "categories": [category.model_dump() for category in CATEGORIES],
                "image_size": [64, 96],
            }
        )
    )


def make_targets(masks: bool = True, keypoints: bool = True) -> list[Targets]:
    boxes = xyxy_to_cxcywh(torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]]))
    points = torch.tensor([[0.0, 0, 0], [0.0, 0, 0], [0.0, 0, 0], [0.5, 0.5, 2], [0.6, 0.6, 1], [0.7, 0.8, 2]])
    shapes = torch.zeros(2, 32, 48, dtype=torch.uint8)
    shapes[0, 4:18, 6:22] = shapes[1, 10:28, 20:42] = 1
    target = Targets(
        boxes=boxes,
        labels=torch.tensor([0, 1]),
        areas=torch.tensor([0.2, 0.25]),
        masks=shapes if masks else None,
        keypoints=points.view(2, 3, 3) if keypoints else None,
    )
    return [target, target]


@pytest.fixture(scope="module")
def joint() -> Model:
    return make_model(TASKS).eval()


@pytest.fixture(scope="module")
def file(joint: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("joint") / "joint.safetensors"
    save_weights(joint, path)
    return path


def test_one_pass_gives_the_outputs_of_every_task(joint: Model) -> None:
    with torch.no_grad():
        outputs = joint(torch.rand(2, 3, 64, 96))
    assert sorted(outputs) == sorted(joint.tasks) == TASKS
    assert sorted(outputs["detection"]) == ["boxes", "logits"]
    assert torch.equal(outputs["detection"]["boxes"], outputs["instance-seg"]["boxes"])
    assert {"masks", "logits"} <= set(outputs["instance-seg"])
    assert outputs["keypoints"]["keypoints"].shape == (2, 12, 3, 2)


def test_detection_has_no_decoder_of_its_own_beside_masks(joint: Model) -> None:
    assert sorted(joint.heads) == ["instance-seg", "keypoints"]
    assert joint.head("detection") is joint.head("instance-seg")
    assert joint.config.heads["detection"].num_queries == 10
    assert sorted(make_model(["detection", "keypoints"]).heads) == ["detection", "keypoints"]


@pytest.mark.parametrize("kept", [kept for n in (1, 2, 3) for kept in itertools.combinations(TASKS, n)])
def test_dropping_tasks_leaves_the_others_bit_identical(joint: Model, file: Path, kept: tuple[str, ...]) -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    smaller = load(file, tasks=list(kept))
    with torch.no_grad():
        before, after = joint(images), smaller(images)
    assert sorted(after) == sorted(kept)
    for task in kept:
        assert sorted(after[task]) == sorted(before[task])
        for name, value in after[task].items():
            assert torch.equal(value, before[task][name]), (task, name)
    if len(kept) < len(TASKS):
        count = sum(parameter.numel() for parameter in smaller.parameters())
        assert (count < sum(parameter.numel() for parameter in joint.parameters())) != (
            "detection" not in kept and len(kept) == 2
        )


@pytest.mark.parametrize("kept", [("keypoints",), ("instance-seg",), ("instance-seg", "keypoints")])
def test_results_of_some_tasks_are_those_of_a_model_with_these_alone(
    joint: Model, file: Path, kept: tuple[str, ...]
) -> None:
    images, sizes = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)), [(64, 96), (50, 200)]
    alone = load(file, tasks=kept)
    with torch.no_grad():
        some = joint.postprocess(joint(images), sizes, 0.0, tasks=kept)
        expected = alone.postprocess(alone(images), sizes, 0.0)
    for found, own in zip(some, expected, strict=True):
        assert len(found) > 0
        for name in ("boxes", "scores", "labels", "keypoints"):
            assert np.array_equal(getattr(found, name), getattr(own, name)), name
        assert (found.masks is None) == (own.masks is None) == ("instance-seg" not in kept)


def test_settings_of_an_included_task_follow_or_are_refused(tmp_path: Path) -> None:
    heads = load_config("base", tasks=TASKS, assignments=["model.heads.instance-seg.num_queries=77"]).model.heads
    assert heads["detection"].num_queries == 77
    assert heads["detection"].class_weight == heads["instance-seg"].class_weight
    with pytest.raises(
        UserError, match=r"model.heads.detection.num_queries is 5 and .*instance-seg.num_queries is 300"
    ):
        load_config("base", tasks=TASKS, assignments=["model.heads.detection.num_queries=5"])
    whole = tmp_path / "config.yaml"
    whole.write_text(load_config("tiny", tasks=TASKS).to_yaml())
    assert load_config(file=whole).model.heads == load_config("tiny", tasks=TASKS).model.heads


def test_single_tasks_start_from_joint_weights_and_the_other_way(file: Path, joint: Model, tmp_path: Path) -> None:
    detection = make_model(["detection"])
    assert "head detection loaded" in init_from(detection, file)
    weight = "decoder.layers.0.self_attention.q_proj.weight"
    assert torch.equal(
        detection.state_dict()[f"heads.detection.{weight}"], joint.state_dict()[f"heads.instance-seg.{weight}"]
    )
    save_weights(detection, tmp_path / "detection.safetensors")
    line = init_from(make_model(TASKS), tmp_path / "detection.safetensors")
    assert "head instance-seg" in line
    assert "head keypoints not loaded" in line


@pytest.mark.parametrize(("masks", "keypoints"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_batch_that_lacks_labels_trains_what_it_has_and_touches_the_rest(masks: bool, keypoints: bool) -> None:
    model = make_model(TASKS)
    targets = make_targets(masks, keypoints)
    terms = model.loss(model(torch.rand(2, 3, 64, 96), targets), targets)
    assert all(value.isfinite() for value in terms.values())
    torch.stack([value.float() for value in terms.values()]).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    moved = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if name.endswith("weight") and parameter.grad.abs().max() > 0
    }
    assert ("heads.instance-seg.mask_embed.layers.2" in moved) == masks
    assert ("heads.keypoints.one.score" in moved) == keypoints
    assert "heads.instance-seg.decoder.memory_class" in moved


def gradients_by_part(model: Model, tasks: frozenset[str] | None) -> dict[str, float]:
    """Largest gradient of the parts of a joint model, for images that are labelled for these tasks."""
    targets = [replace(target, tasks=tasks) for target in make_targets()]
    model.zero_grad()
    terms = model.loss(model(torch.rand(2, 3, 64, 96), targets), targets)
    torch.stack([value.float() for value in terms.values()]).sum().backward()
    parts = {
        "boxes": "heads.instance-seg.decoder",
        "masks": "heads.instance-seg.mask_embed",
        "keypoints": "heads.keypoints",
        "backbone": "backbone",
    }
    return {
        part: max(p.grad.abs().max().item() for name, p in model.named_parameters() if name.startswith(prefix))
        for part, prefix in parts.items()
    }


@pytest.mark.parametrize(
    ("tasks", "trained"),
    [
        (None, {"boxes", "masks", "keypoints", "backbone"}),
        ({"detection"}, {"boxes", "backbone"}),
        ({"instance-seg"}, {"boxes", "masks", "backbone"}),
        ({"keypoints"}, {"keypoints", "backbone"}),
        ({"detection", "keypoints"}, {"boxes", "keypoints", "backbone"}),
        ({"semantic-seg"}, set()),
    ],
)
def test_an_image_trains_the_heads_of_its_tasks_alone(tasks: set[str] | None, trained: set[str]) -> None:
    """Everything is labelled in the images; ``Targets.tasks`` excludes what is not to be used."""
    gradients = gradients_by_part(make_model(TASKS), None if tasks is None else frozenset(tasks))
    assert {part for part, value in gradients.items() if value > 0} == trained


def test_each_image_of_a_batch_has_its_own_tasks() -> None:
    model, (target, _) = make_model(TASKS), make_targets()
    batch = [replace(target, tasks=frozenset({task})) for task in ("detection", "keypoints")]
    first, second = model._labels_for("instance-seg", batch)
    assert (len(first), first.masks, first.keypoints) == (2, None, None)
    assert len(second) == 0
    first, second = model._labels_for("keypoints", batch)
    assert len(first) == 0
    assert torch.equal(second.keypoints, target.keypoints)
    assert model._labels_for("instance-seg", [target]) == [target]


def test_an_object_above_the_threshold_gets_a_pose_below_it() -> None:
    model = make_model(["detection", "keypoints"])
    asked = {}

    def results(task: str, instances: Instances) -> None:
        def postprocess(outputs: object, sizes: object, threshold: float) -> list[Instances]:
            asked[task] = threshold
            return [instances.filter(instances.scores >= threshold)]

        model.heads[task].postprocess = postprocess

    results("detection", found([A, C], [0.9, 0.4], [1, 1]))
    results("keypoints", poses([B], [0.2]))
    (merged,) = model.postprocess({"detection": {}, "keypoints": {}}, [(100, 100)], threshold=0.5)
    assert asked == {"detection": 0.5, "keypoints": 0.0}
    assert len(merged) == 1
    assert merged.keypoints is not None
    assert merged.keypoints[0].any()


def test_metrics_of_included_tasks_are_reported_once() -> None:
    from mvision.evaluation import BoxMetric, MaskMetric

    joint, alone = make_model(["detection", "instance-seg"]), make_model(["instance-seg"])
    assert joint.evaluators("instance-seg") == [MaskMetric]
    assert joint.evaluators("detection") == [BoxMetric]
    assert alone.evaluators("instance-seg") == [MaskMetric, BoxMetric]


def found(boxes: list[list[float]], scores: list[float], labels: list[int], **more: np.ndarray) -> Instances:
    return Instances(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.array(scores, dtype=np.float32),
        labels=np.array(labels, dtype=np.int64),
        size=(100, 100),
        categories=CATEGORIES,
        **more,
    )


def poses(boxes: list[list[float]], scores: list[float]) -> Instances:
    points = np.arange(1, len(boxes) + 1, dtype=np.float32)[:, None, None] * np.ones((1, 3, 3), dtype=np.float32)
    return found(boxes, scores, [1] * len(boxes), keypoints=points)


A, B, C = [0, 0, 40, 40], [2, 0, 42, 40], [60, 60, 90, 90]


def test_a_pose_goes_to_the_object_that_it_fits() -> None:
    objects = found([A, C, A], [0.9, 0.8, 0.7], [1, 1, 0], masks=np.ones((3, 100, 100), dtype=bool))
    linked = link_poses(objects, poses([C, B], [0.1, 0.2]), threshold=0.5)
    assert linked.keypoints is not None
    assert linked.keypoints[:, 0, 0].tolist() == [2, 1, 0]  # the dog in the same place gets none
    assert linked.scores.tolist() == objects.scores.tolist()
    assert linked.masks is objects.masks


def test_a_pose_is_not_linked_to_an_object_of_another_class() -> None:
    linked = link_poses(found([A], [0.9], [0]), poses([A], [0.6]), threshold=0.5)
    assert linked.labels.tolist() == [0, 1]
    assert linked.keypoints is not None
    assert linked.keypoints[:, 0, 0].tolist() == [0, 1]


def test_of_two_poses_the_surer_one_is_taken_and_the_other_is_no_object() -> None:
    linked = link_poses(found([A], [0.9], [1]), poses([A, B], [0.2, 0.9]), threshold=0.1)
    assert linked.keypoints is not None
    assert linked.keypoints[:, 0, 0].tolist() == [2]


def test_a_pose_without_an_object_becomes_one_if_it_is_sure() -> None:
    objects = found([A], [0.5], [0], masks=np.ones((1, 100, 100), dtype=bool))
    linked = link_poses(objects, poses([C, A], [0.8, 0.3]), threshold=0.4)
    assert linked.scores.tolist() == pytest.approx([0.8, 0.5])
    assert linked.labels.tolist() == [1, 0]
    assert linked.masks is not None
    assert linked.masks.areas.tolist() == [0, 10000]
    assert linked.keypoints is not None
    assert linked.keypoints[:, 0, 0].tolist() == [1, 0]
    entries = linked.to_coco(3)
    assert len(entries[0]["keypoints"]) == 9
    assert {"segmentation", "keypoints", "bbox"} <= set(entries[0])
    assert "keypoints" not in entries[1]  # a dog has none


@pytest.mark.parametrize(("objects", "of_poses"), [(0, 0), (0, 1), (1, 0)])
def test_nothing_to_link(objects: int, of_poses: int) -> None:
    linked = link_poses(
        found([A][:objects], [0.9][:objects], [1][:objects]), poses([C][:of_poses], [0.9][:of_poses]), 0.5
    )
    assert len(linked) == objects + of_poses
    assert linked.keypoints is not None
    assert linked.keypoints.shape == (objects + of_poses, 3, 3)


def test_train_evaluate_and_predict_with_half_of_the_labels_missing(squares: Path, tmp_path: Path) -> None:
    add_corners(squares)
    for split in ("train", "val"):
        path = squares / "annotations" / f"{split}.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"][::2] if split == "train" else []:
            del annotation["segmentation"]
            annotation.pop("keypoints", None)
        path.write_text(json.dumps(content))
    options = {
        "train.epochs": 1,
        "train.batch_size": 2,
        "train.precision": "fp32",
        "data.workers": 0,
        "data.root": str(squares),
        "model.image_size": 64,
        "model.neck.embed_dim": 32,
        "model.heads.instance-seg": {**HEADS["instance-seg"], "num_denoising": 4, "dense_weight": 1.0},
        "model.heads.keypoints": HEADS["keypoints"],
    }
    run = train(load_config("tiny", tasks=TASKS, overrides=options), output=tmp_path / "run", device="cpu")
    figures = json.loads((run / "metrics.json").read_text())
    assert sorted(figures) == TASKS
    assert "bbox/AP" not in figures["instance-seg"]  # that is the detection's AP
    table = validate(str(run), tasks=["keypoints"], device="cpu")
    assert "OKS" in table
    assert "detection" not in table
    model = load(run)
    (result,) = model.predict(str(squares / "images" / "val_0.jpg"), threshold=0.0)
    assert result.masks is not None
    assert result.keypoints is not None
    assert len(result.masks) == len(result.keypoints) == len(result)
    result.draw(np.zeros((*result.size, 3), np.uint8))


def test_weights_of_tasks(squares: Path, tmp_path: Path) -> None:
    from mvision.engine.epoch import _total

    def total(**settings: object) -> float:
        config = load_config("tiny", overrides={f"train.{key}": value for key, value in settings.items()}).train
        return _total(["a/x", "a/y", "b/x"], torch.tensor([3.0, 1.0, 0.5]), config).item()

    assert total() == 4.5
    assert total(task_weights={"b": 2.0}) == 5.0
    overrides = {"train.task_weights": {"detection": 2.0}, "data.root": str(squares)}
    with pytest.raises(UserError, match="task_weights: there is no head detection in this model, only instance-seg"):
        train(load_config("tiny", tasks=["detection", "instance-seg"], overrides=overrides), output=tmp_path / "x")
    assert not (tmp_path / "x").exists()

"""Joint models whose poses continue with the queries of the objects: linked by the query, trained and exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvision import Instances, Model, UserError, load
from mvision.config import parse_model_config
from mvision.deploy.compare import difference
from mvision.deploy.export import write_export
from mvision.heads.linking import link_by_query
from mvision.heads.poses.matching import BoxCosts, start_pose_matching
from mvision.machine import cpu_has_bf16
from mvision.structures import Category, Targets
from mvision.structures.boxes import xyxy_to_cxcywh
from mvision.weights import init_from, save_weights

TASKS = ["detection", "instance-seg", "keypoints"]
QUERIES: dict[str, Any] = {"embed_dim": 32, "num_heads": 4, "num_layers": 2, "ffn_dim": 32, "num_queries": 10}
CATEGORIES = [
    Category(id=4, name="dog"),
    Category(id=9, name="person", keypoints=["nose", "left_hand", "right_hand"]),
    Category(id=11, name="owl", keypoints=["beak"]),
]


def make_model(tasks: list[str], **pose_settings: Any) -> Model:
    heads: dict[str, Any] = {
        "detection": {} if "instance-seg" in tasks else QUERIES,
        "instance-seg": {**QUERIES, "pixel_dim": 16, "mask_dim": 8, "mask_points": 64},
        "keypoints": {**QUERIES, "kind": "query", "queries": "shared", "num_queries": 6, **pose_settings},
    }
    torch.manual_seed(0)
    return Model(
        parse_model_config(
            {
                "backbone": {"name": "test_resnet"},
                "neck": {"embed_dim": 32, "num_heads": 4, "ffn_dim": 32, "depth": 1},
                "heads": {task: heads[task] for task in tasks},
                "categories": [category.model_dump() for category in CATEGORIES],
                "image_size": [64, 96],
            }
        )
    )


def make_targets() -> list[Targets]:
    boxes = xyxy_to_cxcywh(torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]]))
    points = torch.tensor([[0.3, 0.3, 2], [0.0, 0, 0], [0.0, 0, 0], [0.5, 0.5, 2], [0.6, 0.6, 1], [0.7, 0.8, 2]])
    shapes = torch.zeros(2, 32, 48, dtype=torch.uint8)
    shapes[0, 4:18, 6:22] = shapes[1, 10:28, 20:42] = 1
    areas = torch.tensor([0.2, 0.25])
    points, labels = points.view(2, 3, 3), torch.tensor([2, 1])
    return [
        Targets(boxes=boxes[:n], labels=labels[:n], areas=areas[:n], masks=shapes[:n], keypoints=points[:n])
        for n in (2, 0)
    ]


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(TASKS).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tasks", [TASKS, ["keypoints", "detection"]])
def test_poses_are_those_of_the_best_objects_with_points(tasks: list[str], images: torch.Tensor) -> None:
    """The heads may be in any order; outputs are in that of the config."""
    made = make_model(tasks).eval()
    with torch.no_grad():
        outputs = made(images)
    assert list(outputs)[: len(made.heads)] == list(made.heads)
    objects, poses = outputs[made.takes_queries_of["keypoints"]], outputs["keypoints"]
    assert sorted(poses) == ["boxes", "keypoints", "logits", "query", "visibility"]
    assert "queries" not in objects
    expected = objects["logits"][..., 1:].amax(-1).topk(6, dim=1).indices
    assert torch.equal(poses["query"], expected)
    assert torch.equal(poses["boxes"], objects["boxes"].gather(1, expected[..., None].expand(-1, -1, 4)))


def test_objects_are_those_of_the_model_without_poses(model: Model, images: torch.Tensor) -> None:
    alone = make_model(["instance-seg"]).eval()
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("heads.keypoints")})
    with torch.no_grad():
        expected, outputs = alone(images)["instance-seg"], model(images)["instance-seg"]
    for name, value in expected.items():
        assert torch.equal(outputs[name], value), name
    sizes = [(64, 96)] * 2
    with torch.no_grad():
        objects = alone.postprocess({"instance-seg": expected}, sizes, 0.01)
        merged = model.postprocess(model(images), sizes, 0.01)
    for before, after in zip(objects, merged):
        assert len(before) == len(after) > 0
        for name in ("boxes", "scores", "labels", "query"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_every_object_has_the_pose_of_its_query(model: Model, images: torch.Tensor) -> None:
    """Also where the pose's own score is low; classes have the points that they have."""
    with torch.no_grad():
        outputs = model(images)
    outputs["keypoints"]["logits"] = outputs["keypoints"]["logits"] - 100
    logits = outputs["instance-seg"]["logits"]
    outputs["instance-seg"]["logits"] = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    merged = model.postprocess(outputs, [(50, 200)] * 2, 0.0, multi_label=True)
    poses = outputs["keypoints"]
    seen = set()
    for image, found in enumerate(merged):
        for label, query, points in zip(found.labels, found.query, found.keypoints):
            place = (poses["query"][image] == int(query)).nonzero().flatten().tolist()
            count = len(CATEGORIES[label].keypoints) if place else 0
            seen.add((bool(place), int(label)))
            assert not points[count:].any()
            if place:
                expected = poses["keypoints"][image, place[0], :count].clamp(0, 1).numpy() * (200, 50)
                np.testing.assert_allclose(points[:count, :2], expected, rtol=1e-5)
    assert {(True, 1), (True, 2)} <= seen


def found(queries: list[int], labels: list[int]) -> Instances:
    count = len(queries)
    return Instances(
        boxes=np.zeros((count, 4), np.float32),
        scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
        labels=np.array(labels, dtype=np.int64),
        size=(100, 100),
        categories=CATEGORIES,
        query=np.array(queries, dtype=np.int64),
    )


def test_points_follow_their_query() -> None:
    points = np.arange(1, 4, dtype=np.float32)[:, None, None] * np.ones((3, 3, 3), np.float32)
    linked = link_by_query(found([7, 2, 5, 9, 2], [1, 1, 0, 1, 2]), np.array([2, 5, 7]), points)
    assert linked.keypoints is not None
    assert linked.keypoints[..., 0].tolist() == [[3, 3, 3], [1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert linked.filter(np.array([3, 0])).query.tolist() == [9, 7]
    nothing = link_by_query(found([], []), np.array([2, 5, 7]), points)
    assert nothing.keypoints is not None
    assert nothing.keypoints.shape == (0, 3, 3)


def losses(model: Model, targets: list[Targets]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.rand(2, 3, 64, 96)
    return model.loss(model(images, targets), targets)


@pytest.mark.parametrize("labelled", [True, False])
def test_every_parameter_has_a_gradient(labelled: bool) -> None:
    model, targets = make_model(TASKS), make_targets()
    terms = losses(model, targets if labelled else [targets[1]] * 2)
    assert all(value.isfinite() for value in terms.values())
    assert not [name for name in terms if name.startswith("keypoints/") and ("box" in name or "giou" in name)]
    torch.stack(list(terms.values())).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_poses_teach_the_queries_but_not_the_boxes_of_the_objects() -> None:
    model = make_model(TASKS)
    for mlp in (model.heads["keypoints"].decoder.memory_points,):  # starts at zero
        torch.nn.init.normal_(mlp.layers[-1].weight)
    targets = [replace(target, tasks=frozenset({"keypoints"})) for target in make_targets()]
    terms = losses(model, targets)
    torch.stack([value for name, value in terms.items() if name.startswith("keypoints/")]).sum().backward()
    decoder = model.heads["instance-seg"].decoder
    assert decoder.layers[-1].ffn.layers[0].weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in decoder.box_heads[-1].parameters())


def test_denoising_queries_of_the_objects_are_not_handed_over() -> None:
    model, targets = make_model(TASKS), make_targets()
    torch.manual_seed(1)
    images = torch.rand(2, 3, 64, 96)
    outputs, queries = model.run_head("instance-seg", model.features(images), targets, hand_over=True)
    assert outputs.queries.denoising is not None
    last = -2 if outputs.queries.corners is None else -3
    assert torch.equal(queries.boxes, outputs.queries.boxes[last])
    assert torch.equal(queries.logits, outputs.queries.logits[last])
    assert queries.features.shape == (2, 10, 32)
    decoded = model(images, targets)["keypoints"].decoded
    assert decoded.boxes.shape[2] == decoded.logits.shape[2] > 6


def test_of_two_equal_poses_the_one_with_the_objects_box_is_matched() -> None:
    model, targets = make_model(TASKS), make_targets()
    made = model(torch.rand(2, 3, 64, 96), targets)["keypoints"].targets
    logits, points = torch.zeros(1, 2, 3, 2), torch.full((1, 2, 3, 3, 2), 0.5)
    boxes = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.65, 0.6, 0.5, 0.6], [0.3, 0.35, 0.4, 0.5]]).expand(2, 3, 4)
    matches = start_pose_matching(logits, points, made, 10.0, 4.0, False, BoxCosts(boxes, 5.0, 2.0))()
    assert sorted(matches.host[:, 2:].tolist()) == [[1, 1], [2, 0]]


def test_heads_that_cannot_share_are_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^model.heads.keypoints: queries: shared needs another head with queries .*--task"
    ):
        make_model(["keypoints"])
    with pytest.raises(UserError, match=r"^model.heads.keypoints: embed_dim 16: .* model.heads.instance-seg, 32$"):
        make_model(TASKS, embed_dim=16)


def test_weights_of_own_queries_start_shared_ones(tmp_path: Path) -> None:
    own = make_model(TASKS, queries="own")
    save_weights(own, tmp_path / "own.safetensors")
    shared = make_model(TASKS)
    torch.nn.init.ones_(shared.heads["keypoints"].decoder.memory_points.layers[0].weight)
    init_from(shared, tmp_path / "own.safetensors")
    state = own.state_dict()
    assert set(state) - set(shared.state_dict()) == {name for name in state if ".keypoints.decoder.box_head." in name}
    for name, value in shared.state_dict().items():
        assert torch.equal(value, state[name]), name
    save_weights(shared, tmp_path / "shared.safetensors")
    assert load(tmp_path / "shared.safetensors", tasks=["detection", "keypoints"]).takes_queries_of == {
        "keypoints": "detection"
    }
    with pytest.raises(UserError, match="queries: shared needs another head"):
        load(tmp_path / "shared.safetensors", tasks=["keypoints"])


def test_one_graph_fused_and_in_bf16(model: Model, images: torch.Tensor) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, outputs = model(images), compiled(images)
    torch.testing.assert_close(outputs["keypoints"]["keypoints"], expected["keypoints"]["keypoints"])
    assert torch.equal(outputs["keypoints"]["query"], expected["keypoints"]["query"])
    picture = (255 * images[0]).permute(1, 2, 0).to(torch.uint8).numpy()
    of_persons = make_model(TASKS).eval()  # with random weights all may be of the class without points
    for layer in of_persons.head("detection").decoder.class_heads:
        torch.nn.init.constant_(layer.bias[1:2], 5.0)
    for precision in ("fp32", "bf16") if cpu_has_bf16() else ("fp32",):
        (result,) = of_persons.predict([picture], threshold=0.0, precision=precision)
        assert result.keypoints is not None
        assert result.keypoints.any()


def test_the_export_says_whose_the_poses_are(tmp_path: Path) -> None:
    fused = make_model(["detection", "keypoints"]).eval().fuse()
    write_export(fused, tmp_path / "joint.onnx", "onnx")
    exported = load(tmp_path / "joint.onnx")
    pixels = (255 * torch.rand(3, 3, 64, 96)).to(torch.uint8)
    with torch.no_grad():
        expected, outputs = fused(pixels), exported(pixels)
    assert difference(expected, outputs)[0] < 1e-4
    query = outputs["keypoints"]["query"]
    assert query.dtype == torch.int64
    boxes = outputs["detection"]["boxes"].gather(1, query[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(outputs["keypoints"]["boxes"], boxes)
    sizes = [(64, 96)] * 3
    merged = exported.postprocess(outputs, sizes, 0.0)
    for one, other in zip(merged, fused.postprocess(expected, sizes, 0.0)):
        assert one.keypoints is not None
        np.testing.assert_allclose(one.keypoints, other.keypoints, atol=0.1)

"""The conformance suite: the behaviour that every head has to have."""

import pytest
import torch

from mvision.errors import UserError
from mvision.heads import HEADS, head_class
from mvision.neck.layers import fuse_modules
from mvision.structures import Category, Instances, Targets
from mvision.structures.boxes import cxcywh_to_xyxy

# Classes with more keypoints, with fewer, and without any.
CATEGORIES = [
    Category(id=3, name="cat", keypoints=["nose", "left_ear", "right_ear"]),
    Category(id=7, name="dog"),
    Category(id=9, name="owl", keypoints=["beak"]),
]
STRIDES = [8, 16, 32]
QUERIES = {"embed_dim": 32, "num_queries": 12, "num_layers": 2, "num_heads": 4, "ffn_dim": 32}
SMALL = {
    "detection": QUERIES,
    "instance-seg": {**QUERIES, "pixel_dim": 16, "mask_dim": 8, "mask_points": 64},
    "keypoints": {"embed_dim": 16, "num_instances": 12},
    "semantic-seg": {"pyramid_dim": 16, "embed_dim": 32},
}


# Other forms of a head -> its task, and the settings in place of those above.
FORMS = {
    "instance-seg, refine": ("instance-seg", {"embed_dim": 16, "mask_form": "refine"}),
    "instance-seg, prototypes": (
        "instance-seg",
        {
            "mask_form": "prototypes",
            "boxes_from_masks": True,
            "fine_dim": 12,
            **dict.fromkeys(("shared_class_head", "shared_box_head", "output_norm"), True),
        },
    ),
}


def make_head(task, **settings):
    """A head on maps of the neck alone."""
    torch.manual_seed(0)
    task, form = FORMS.get(task, (task, {}))
    settings = {**form, **settings}
    cls = head_class(task)
    return cls(cls.Config(**{**SMALL[task], **settings}), [16, 16, 16], STRIDES, CATEGORIES)


def make_features(batch=2, height=96, width=64, strides=STRIDES):
    torch.manual_seed(1)
    return [torch.randn(batch, 16, height // stride, width // stride) for stride in strides]


def make_targets(*counts):
    torch.manual_seed(2)
    targets = []
    for count in counts:
        boxes = torch.rand(count, 4) * 0.3 + 0.3
        labels, areas = torch.randint(0, 3, (count,)), boxes[:, 2] * boxes[:, 3]
        masks, keypoints = filled_boxes(boxes), points_in(boxes, labels)
        targets.append(Targets(boxes=boxes, labels=labels, areas=areas, masks=masks, keypoints=keypoints))
    return targets


def points_in(boxes, labels):
    """(N, K, 3) keypoints somewhere in their boxes, all visible; zeros where the class has fewer."""
    count = torch.tensor([len(category.keypoints) for category in CATEGORIES])[labels]
    visible = (torch.arange(3) < count[:, None])[..., None]
    places = cxcywh_to_xyxy(boxes)[:, None, :2] + torch.rand(len(boxes), 3, 2) * boxes[:, None, 2:]
    return torch.cat((places, torch.full((len(boxes), 3, 1), 2.0)), -1) * visible


def filled_boxes(boxes, height=48, width=32):
    """(N, height, width) uint8 masks that fill their boxes."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height)[:, None] + 0.5) / height
    corners = cxcywh_to_xyxy(boxes)[..., None, None]
    inside = (x > corners[:, 0]) & (x < corners[:, 2]) & (y > corners[:, 1]) & (y < corners[:, 3])
    return inside.to(torch.uint8)


def total(terms):
    return torch.stack(list(terms.values())).sum()


@pytest.fixture(params=sorted([*HEADS, *FORMS]))
def task(request):
    return request.param


def test_every_parameter_gets_a_finite_gradient(task):
    head = make_head(task)
    targets = make_targets(3, 1)
    total(head.loss(head(make_features(), targets=targets), targets)).backward()
    assert not [name for name, parameter in head.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_batch_without_objects_trains(task, precision):
    head = make_head(task)
    targets = make_targets(0, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        outputs = head(make_features(), targets=targets)
    terms = head.loss(outputs, targets)
    assert all(value.isfinite() for value in terms.values())
    total(terms).backward()
    assert not [name for name, parameter in head.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_terms_are_scalars_and_fall_when_trained(task):
    head = make_head(task)
    features, targets = make_features(), make_targets(2, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        terms = head.loss(head(features, targets=targets), targets)
        assert all(value.ndim == 0 for value in terms.values())
        loss = total(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_results_are_sorted_inside_the_image_and_not_below_the_threshold(task):
    head, sizes = make_head(task).eval(), [(480, 640), (31, 17)]
    with torch.no_grad():
        outputs = head(make_features())
    every = head.postprocess(outputs, sizes, threshold=0.0)
    assert all(isinstance(instances, Instances) for instances in every)
    for index, (instances, (height, width)) in enumerate(zip(every, sizes)):
        assert len(instances)
        assert instances.size == (height, width)
        assert (instances.scores[:-1] >= instances.scores[1:]).all()
        assert (instances.boxes >= 0).all()
        assert (instances.boxes[:, 0::2] <= width).all()
        assert (instances.boxes[:, 1::2] <= height).all()
        assert instances.names == ["cat", "dog", "owl"]
        threshold = float(instances.scores[len(instances) // 2])
        fewer = head.postprocess(outputs, sizes, threshold)[index]
        # A score equal to the threshold is kept.
        assert fewer.scores.tolist() == instances.scores[instances.scores >= threshold].tolist()


def test_fused_equals_unfused(task):
    head = make_head(task).eval()
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        before = head(make_features())
        after = fuse_modules(head)(make_features())
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-4)


def test_export_with_a_free_batch(task):
    head = make_head(task).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        head, (make_features(3),), dynamic_shapes=([{0: batch} for _ in STRIDES],), strict=False
    )
    features = make_features(5)
    with torch.no_grad():
        expected = head(features)
    found = program.module()(features)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_unknown_tasks_are_named():
    with pytest.raises(UserError, match="unknown task 'detektion'.*detection"):
        head_class("detektion")

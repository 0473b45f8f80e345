"""Small keypoint heads, labels for them, and outputs of heads that predict them exactly; for several test files."""

from __future__ import annotations

import torch
from torch import Tensor

from mvision.heads.keypoints import KeypointConfig, KeypointHead, MinimalKeypointConfig, MinimalKeypointHead
from mvision.heads.keypoints.base import BaseKeypointHead, KeypointOutputs
from mvision.structures import Category, Instances, Targets
from tests.test_heads import make_features, total


def make_categories(*counts: int) -> list[Category]:
    """Classes with these numbers of points."""
    return [
        Category(id=10 + row, name=f"class {row}", keypoints=[f"p{index}" for index in range(count)])
        for row, count in enumerate(counts)
    ]


def dense_head(*counts: int, **settings) -> KeypointHead:
    """For classes with these numbers of points."""
    torch.manual_seed(0)
    config = KeypointConfig(**{"embed_dim": 16, **settings})
    return KeypointHead(config, [16] * 3, [8, 16, 32], make_categories(*counts))


def minimal_head(*counts: int, **settings) -> MinimalKeypointHead:
    """For classes with these numbers of points, one above 0."""
    torch.manual_seed(0)
    config = MinimalKeypointConfig(**{"embed_dim": 16, **settings})
    return MinimalKeypointHead(config, [16] * 3, [8, 16, 32], make_categories(*counts))


def make_objects(head: BaseKeypointHead, count: int = 2, visible: float = 2.0) -> Targets:
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


def exact_outputs(head: KeypointHead, targets: list[Targets], shift: float = 0.0) -> KeypointOutputs:
    """Training outputs of a head whose grid points all predict the only object of their image.

    The points are moved to the right by ``shift``, in fractions of the image.
    """
    outputs = head(make_features(len(targets)), targets=targets)
    centres, sizes = outputs.grid.centres[None], outputs.grid.sizes[None, :, None]
    boxes = torch.stack([target.boxes[0] for target in targets])[:, None]
    points = torch.stack([target.keypoints[0] for target in targets])[:, None]
    moved = points[..., :2] + torch.tensor([shift, 0.0])
    relative = (moved - boxes[..., None, :2]) / boxes[..., None, 2:]
    raw_boxes = torch.cat(((boxes[..., :2] - centres) / sizes, (boxes[..., 2:] / sizes).log()), -1)
    raw_points = torch.cat((relative.flatten(2), 40 * (points[..., 2] > 0) - 20.0), -1)
    exact = {"boxes": raw_boxes, "points": raw_points.expand(-1, centres.shape[1], -1)}
    return outputs._replace(
        one2one=outputs.one2one._replace(**exact),
        one2many=outputs.one2many and outputs.one2many._replace(**exact),
    )


def with_gradients(outputs: KeypointOutputs) -> KeypointOutputs:
    """The same outputs with raw numbers that are leaves, so that they get gradients of their own."""

    def leaves(raw):
        return raw and type(raw)(*(None if value is None else value.detach().requires_grad_() for value in raw))

    return outputs._replace(one2one=leaves(outputs.one2one), one2many=leaves(outputs.one2many))


def inside_box(outputs: KeypointOutputs, box: Tensor) -> Tensor:
    """(S,) bool: grid points whose centre lies in a box (4,) cxcywh."""
    return ((outputs.grid.centres - box[:2]).abs() < box[2:] / 2).all(-1)


@torch.no_grad()
def predict(
    head: BaseKeypointHead, features: list[Tensor], size: tuple[int, int] = (96, 64), threshold: float = 0.0
) -> list[Instances]:
    """Instances of every image."""
    return head.eval().postprocess(head(features), [size] * len(features[0]), threshold)


def train(head: BaseKeypointHead, targets: list[Targets], steps: int = 150) -> list[Tensor]:
    """On one batch, whose features are returned."""
    features = make_features(len(targets))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        loss = total(head.loss(head(features, targets=targets), targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return features

"""Box formats and overlaps."""

import torch
from torch.profiler import ProfilerActivity, profile
from torchvision.ops import box_iou, generalized_box_iou

from mvision.structures.boxes import cxcywh_to_xyxy, inverse_sigmoid, iou, plain_iou, xyxy_to_cxcywh


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator)
    return torch.cat((low, low + torch.rand(count, 2, generator=generator)), dim=1)


def test_known_box() -> None:
    box = torch.tensor([10.0, 20.0, 4.0, 8.0])
    assert cxcywh_to_xyxy(box).tolist() == [8.0, 16.0, 12.0, 24.0]
    assert xyxy_to_cxcywh(torch.tensor([8.0, 16.0, 12.0, 24.0])).tolist() == box.tolist()


def test_formats_round_trip_in_any_shape() -> None:
    boxes = random_boxes(12).reshape(3, 4, 4)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    assert cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)


def test_overlaps_are_torchvisions() -> None:
    a, b = random_boxes(20), random_boxes(30, seed=1)
    overlap, generalised = iou(a[:, None], b[None])
    torch.testing.assert_close(overlap, box_iou(a, b))
    assert plain_iou(a[:, None], b[None]).equal(overlap)
    torch.testing.assert_close(generalised, generalized_box_iou(a, b))
    assert (overlap > 0).any()
    assert (generalised < 0).any()


def test_boxes_without_area_are_finite() -> None:
    """Where torchvision returns NaN: two boxes without area at the same place."""
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    overlap, generalised = iou(point, point.detach())
    assert overlap.item() == 0
    assert torch.isfinite(generalised).all()
    (overlap + generalised).sum().backward()
    assert point.grad is not None
    assert torch.isfinite(point.grad).all()
    turned = torch.tensor([[0.8, 0.8, 0.2, 0.2]])
    overlap, generalised = iou(turned, random_boxes(1))
    assert overlap.item() == 0
    assert torch.isfinite(generalised).all()


def test_gradients_are_computed_without_waiting_for_a_number() -> None:
    """Of a GPU, that is. The profiler sees what autograd's own operators ask for; a dispatch mode does not."""
    boxes = random_boxes(20).requires_grad_()
    overlap, generalised = iou(boxes, random_boxes(20, seed=1))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        (overlap + generalised).sum().backward()
    called = {event.key for event in profiler.key_averages()}
    assert "aten::mul" in called
    assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}


def test_inverse_sigmoid() -> None:
    x = torch.linspace(-8, 8, 33)
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x, atol=1e-2, rtol=1e-3)
    extremes = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    assert torch.isfinite(extremes).all()
    assert extremes[0] == extremes[1]
    assert extremes[2] == extremes[3]
    torch.testing.assert_close(extremes[0], -extremes[2], atol=2e-3, rtol=0)  # 1 - 1e-5 is rounded in float32

"""The mask head: its terms, its pixel features, its prior, and its post-processing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mvision import UserError, create_model
from mvision.config import load_config, parse_model_config
from mvision.heads.instance_seg.head import MaskHead, MaskOutputs
from mvision.heads.instance_seg.logits import mask_at_points, mask_grid
from mvision.heads.instance_seg.points import read_features
from mvision.heads.query.head import QueryOutputs
from mvision.heads.query.matching import pad_targets
from mvision.model import Model
from mvision.structures.boxes import cxcywh_to_xyxy
from tests.test_heads import CATEGORIES, SMALL, filled_boxes, make_features, make_head, make_targets, total

TASK = "instance-seg"


def test_every_layer_has_mask_terms() -> None:
    head = make_head(TASK, dense_weight=1.0)
    targets = make_targets(2, 1)
    terms = head.loss(head(make_features(), targets=targets), targets)
    places = ["", "_0", "_encoder", "_denoising_0", "_denoising_1"]
    assert {name for name in terms if name.startswith(("mask", "dice"))} == {
        f"{term}{place}" for term in ("mask", "dice") for place in places
    }
    assert {"class_dense", "box_dense", "giou_dense"} < set(terms)


def test_images_without_objects_have_no_mask_loss() -> None:
    head = make_head(TASK)
    for targets, is_zero in ((make_targets(0, 0), True), (make_targets(0, 2), False)):
        terms = head.loss(head(make_features(), targets=targets), targets)
        assert all(value.isfinite() for value in terms.values())
        assert {terms[name].item() == 0 for name in terms if name.startswith(("mask", "dice"))} == {is_zero}


def test_objects_without_a_mask_have_no_mask_loss() -> None:
    """Of five objects in two images one has a mask: one query of each layer has a gradient."""
    head = make_head(TASK, num_denoising=0)
    targets = make_targets(2, 3)
    targets[0].masks = None
    assert targets[1].masks is not None
    targets[1].masks[1:] = 0
    outputs = head(make_features(), targets=targets)
    embeddings = outputs.embeddings.detach().requires_grad_()
    terms = head.loss(outputs._replace(embeddings=embeddings), targets)
    total({name: value for name, value in terms.items() if name.startswith(("mask", "dice"))}).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().amax(-1).gt(0).sum(-1).tolist() == [[0, 1]] * 3  # two layers and the encoder
    targets[1].masks = None
    terms = head.loss(outputs, targets)
    assert {value.item() for name, value in terms.items() if name.startswith(("mask", "dice"))} == {0.0}


def test_masks_decide_the_matching_where_boxes_cannot() -> None:
    """Two objects with the same box and class, two queries with that box: only their masks differ."""
    head = make_head(TASK, num_queries=2, num_layers=1, num_denoising=0)
    (target,) = make_targets(2)
    target.boxes = torch.tensor([[0.5, 0.5, 0.8, 0.8]] * 2)
    target.labels = torch.zeros(2, dtype=torch.int64)
    target.masks = torch.zeros(2, 40, 40, dtype=torch.uint8)
    target.masks[0, :, :20] = target.masks[1, :, 20:] = 1
    pixels = torch.zeros(1, 8, 8, 8)
    pixels[0, 0] = torch.linspace(-20, 20, 8)  # negative on the left, positive on the right
    embeddings = torch.zeros(2, 1, 2, 9)
    for swapped in (False, True):
        embeddings[:, 0, :, 0] = torch.tensor([1.0, -1.0]) if swapped else torch.tensor([-1.0, 1.0])
        boxes, logits = target.boxes[None], torch.zeros(1, 2, 3)
        padded = pad_targets([target], torch.device("cpu"))
        queries = QueryOutputs(logits.expand(2, -1, -1, -1), boxes.expand(2, -1, -1, -1), None, None, padded)
        assert head.loss(MaskOutputs(queries, [pixels], embeddings, None), [target])["dice"].item() < 5 * 0.25


def test_the_masks_of_the_loss_are_those_of_the_prediction() -> None:
    torch.manual_seed(3)
    embeddings, pixels = torch.randn(2, 5, 9), torch.randn(2, 8, 12, 10)
    boxes = torch.rand(2, 5, 4) * 0.3 + 0.3
    grid = mask_grid(embeddings, pixels, boxes)
    y, x = torch.meshgrid((torch.arange(12) + 0.5) / 12, (torch.arange(10) + 0.5) / 10, indexing="ij")
    points = torch.stack((x, y), -1).flatten(0, 1).expand(2, -1, -1)
    found = mask_at_points(embeddings, read_features(pixels, points), boxes, points)
    torch.testing.assert_close(found.unflatten(-1, (12, 10)), grid, atol=1e-4, rtol=1e-4)


def test_a_new_head_predicts_ellipses_in_its_boxes() -> None:
    head = make_head(TASK).eval()
    with torch.no_grad():
        head.mask_embed.layers[-1].weight.zero_()
        head.mask_embed.layers[-1].bias[:-1].zero_()
        head.decoder.memory_box.layers[-1].bias[2:] = torch.tensor([1.4, 2.0])  # anchors alone are too small to measure
        outputs = head(make_features(height=320, width=320))
    boxes, ellipses = outputs["boxes"][0], outputs["masks"][0] > 0
    corners = cxcywh_to_xyxy(boxes)
    whole = ((corners >= 0) & (corners <= 1)).all(-1) & (boxes[:, 2:] > 0.15).all(-1)
    assert whole.sum() >= 3
    filled = filled_boxes(boxes[whole], *ellipses.shape[1:]).bool()
    assert not (ellipses[whole] & ~filled).any()
    share = ellipses[whole].sum((1, 2)) / filled.sum((1, 2))
    assert share.tolist() == pytest.approx([np.pi / 4] * len(share), abs=0.06)
    y, x = (boxes[whole, 1] * 80).long(), (boxes[whole, 0] * 80).long()
    centres = outputs["masks"][0][whole][torch.arange(len(y)), y, x]
    assert centres.tolist() == pytest.approx([2.0] * len(y), abs=0.1)  # the logit of PRIOR_WEIGHT


def test_results_are_in_pixels_of_the_original() -> None:
    head = make_head(TASK, num_queries=3)
    logits = torch.full((1, 3, 3), -9.0)
    logits[0, 1, 2], logits[0, 1, 0], logits[0, 2, 1] = 4.0, 1.0, 2.0
    masks = torch.full((1, 3, 20, 30), -2.0)
    masks[0, 1, :10, :15] = 2.0
    masks[0, 2, 15:, 20:] = 2.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.25, 0.25, 0.5, 0.5], [0.8, 0.9, 0.3, 0.2]]])
    outputs = {"logits": logits, "boxes": boxes, "masks": masks}
    (found,) = head.postprocess(outputs, [(200, 600)], threshold=0.5)
    assert found.labels.tolist() == [2, 1, 0]
    assert found.masks.shape == (3, 200, 600)
    expected = np.zeros((200, 600), bool)
    expected[:100, :300] = True
    assert (found.masks[0] & expected).sum() / (found.masks[0] | expected).sum() > 0.97
    assert np.array_equal(found.masks[0], found.masks[2])  # the same query as another class
    assert found.masks.areas[1] == pytest.approx(50 * 200, rel=0.06)
    entry = found.to_coco(1)[0]
    assert entry["segmentation"]["size"] == [200, 600]


class TestLaterals:
    def model(self, backbone: str) -> Model:
        settings = {"heads__instance-seg": SMALL[TASK], "image_size": 64}
        return create_model(
            "tiny", [TASK], categories=CATEGORIES, backbone__name=backbone, neck__embed_dim=32, **settings
        ).eval()

    @pytest.mark.parametrize(
        ("backbone", "laterals"),
        [("test_resnet", [4]), ("test_convnext", [4]), ("test_vit", []), ("smp:mobilenet_v2", [4])],
    )
    def test_masks_have_stride_4(self, backbone: str, laterals: list[int]) -> None:
        model = self.model(backbone)
        assert list(model.backbone.laterals) == laterals
        assert (model.head(TASK).pixels.lateral is not None) == bool(laterals)
        width = 64 if backbone == "test_vit" else 96
        with torch.no_grad():
            outputs = model(torch.rand(2, 3, 64, width))
        assert outputs[TASK]["masks"].shape == (2, 12, 16, width // 4)

    def test_the_lateral_reaches_the_masks(self) -> None:
        model = self.model("test_resnet")
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            before = model(images)[TASK]
            model.head(TASK).pixels.lateral.norm.bias += 1
            after = model(images)[TASK]
        assert torch.equal(before["boxes"], after["boxes"])
        assert not torch.equal(before["masks"], after["masks"])


def kept_for_backward(head: MaskHead, scale: int) -> int:
    """Bytes kept for the backward pass, pixel features excluded; masks and features are ``scale`` times as large."""
    (target,) = make_targets(4)
    target.masks = filled_boxes(target.boxes, 48 * scale, 32 * scale)
    pixels = torch.randn(1, 8, 12 * scale, 8 * scale, requires_grad=True)
    outputs = head(make_features(1, 96, 64), targets=[target])._replace(pixels=[pixels])
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if tensor.shape == pixels.shape else tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        head.loss(outputs, [target])
    return sum(kept)


def test_memory_does_not_grow_with_resolution() -> None:
    head = make_head(TASK, num_denoising=0)
    assert kept_for_backward(head, 4) < 1.1 * kept_for_backward(head, 1)


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_shipped_models_have_one_decoder_for_detection_and_masks(name: str) -> None:
    """With the same settings but for the weight of the class loss, so that one task's weights start the other's."""
    detection = load_config(name, tasks=["detection"]).model.heads["detection"].model_dump()
    masks = load_config(name, tasks=[TASK]).model.heads[TASK].model_dump()
    assert {key for key, value in detection.items() if masks[key] != value} <= {"class_weight"}


def test_rtmaskformer_has_the_decoder_of_rtdetr_r50() -> None:
    """It starts from those published weights."""
    masks = load_config("rtmaskformer_r50", tasks=[TASK]).model
    published = load_config("rtdetr_r50").model
    assert (masks.backbone, masks.neck) == (published.backbone, published.neck)
    settings, decoder = masks.heads[TASK].model_dump(), published.heads["detection"].model_dump()
    assert {key for key, value in decoder.items() if settings[key] != value} <= {"class_weight"}


def test_weights_with_retired_settings_still_load() -> None:
    old = {"pixel_stride": 4, "mask_weight": 5.0, "dice_weight": 5.0}
    heads = parse_model_config({"heads": {TASK: {**old, "mask_dim": 16}}}).heads
    assert heads[TASK] == MaskHead.Config(mask_dim=16)
    with pytest.raises(UserError, match=r"model.heads.instance-seg.pixel_stride: 8 is not supported any more"):
        parse_model_config({"heads": {TASK: {"pixel_stride": 8}}})


def test_masks_are_divided_by_the_objects_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the mean number of objects per process is twice that of this one, the terms are half as large."""
    head, features, targets = make_head(TASK, num_denoising=0), make_features(), make_targets(2, 2)
    torch.manual_seed(7)
    alone = head.loss(head(features, targets=targets), targets)
    monkeypatch.setattr("mvision.heads.query.matching.divisor", lambda count, _: 2.0 * count)
    torch.manual_seed(7)
    shared = head.loss(head(features, targets=targets), targets)
    torch.testing.assert_close(alone["dice"], 2 * shared["dice"])
    torch.testing.assert_close(alone["mask"], 2 * shared["mask"])


def test_the_weight_of_a_mask_does_not_depend_on_how_many_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    head, features = make_head(TASK), make_features()
    targets = make_targets(2, 3)
    outputs = head(features, targets=targets)
    # Else the matching would change with the masks.
    monkeypatch.setattr(MaskHead, "_mask_costs", lambda *_: None)

    def terms(*labelled: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        some = [target if kept else replace(target, masks=None) for target, kept in zip(targets, labelled)]
        return head.loss(outputs, some)

    both, first, second = terms(True, True), terms(True, False), terms(False, True)
    for name in (name for name in both if name.startswith(("mask", "dice"))):
        assert first[name] > 0
        torch.testing.assert_close(first[name] + second[name], both[name])

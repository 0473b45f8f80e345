"""The detection head: its loss terms and its post-processing."""

import numpy as np
import pytest
import torch

from mvision.heads.query.head import QueryOutputs
from mvision.heads.query.matching import anchor_assignment, pad_targets
from mvision.structures.boxes import cxcywh_to_xyxy
from tests.test_heads import make_features, make_head, make_targets, total


def test_loss_names_say_where_each_term_comes_from():
    head = make_head("detection", dense_weight=1.0)
    targets = make_targets(2, 1)
    terms = head.loss(head(make_features(), targets=targets), targets)
    places = ["", "_0", "_encoder", "_denoising_0", "_denoising_1", "_dense"]
    assert set(terms) == {f"{term}{place}" for term in ("class", "box", "giou") for place in places}


def test_dense_terms_are_a_mean_over_positive_tokens():
    head, targets = make_head("detection", dense_weight=0.5, num_denoising=0), make_targets(2, 1)
    outputs = head(make_features(), targets=targets)
    terms = head.loss(outputs, targets)
    padded = pad_targets(targets, torch.device("cpu"))
    pairs = anchor_assignment(outputs.dense.anchors, padded.boxes, padded.valid)
    image, token, index = (values[pairs.counted] for values in (pairs.image, pairs.query, pairs.object))
    assert len(image) > padded.total
    l1 = (outputs.dense.boxes[image, token] - padded.boxes[image, index]).abs().sum(-1)
    torch.testing.assert_close(terms["box_dense"], 0.5 * 5.0 * l1.mean())


def test_weights_scale_their_terms():
    targets, features = make_targets(2, 1), make_features()
    plain = make_head("detection", num_denoising=0)
    double = make_head("detection", num_denoising=0, class_weight=2.0, giou_weight=2.0, box_weight=5.0)
    first, second = (head.loss(head(features, targets=targets), targets) for head in (plain, double))
    torch.testing.assert_close(second["class"], 2 * first["class"])
    torch.testing.assert_close(second["giou"], first["giou"])


def test_a_perfect_prediction_costs_nothing_but_confidence():
    head = make_head("detection", num_denoising=0)
    targets = make_targets(2)
    boxes = torch.full((1, 1, 12, 4), 0.9)
    boxes[0, 0, :2] = targets[0].boxes
    logits = torch.full((1, 1, 12, 3), -20.0)
    logits[0, 0, [0, 1], targets[0].labels] = 20.0
    padded = pad_targets(targets, torch.device("cpu"))
    outputs = QueryOutputs(torch.cat((logits, logits)), torch.cat((boxes, boxes)), None, None, padded)
    assert total(head.loss(outputs, targets)).item() == pytest.approx(0, abs=1e-4)


def test_postprocess_gives_the_best_pairs_in_pixels():
    head = make_head("detection", num_queries=4)
    logits = torch.full((1, 4, 3), -9.0)
    logits[0, 2, 1], logits[0, 0, 2], logits[0, 0, 0] = 3.0, 2.0, 1.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.9, 0.5, 0.4, 0.2], [0.5, 0.5, 1, 1]]])
    (found,) = head.postprocess({"logits": logits, "boxes": boxes}, [(100, 200)], threshold=0.5)
    assert found.labels.tolist() == [1, 2, 0]  # one query may show two classes
    np.testing.assert_allclose(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid(), rtol=1e-5)
    # The first box is cut off at the right border.
    np.testing.assert_allclose(found.boxes[0], [140, 40, 200, 60], atol=1e-3)
    np.testing.assert_allclose(
        found.boxes[1], cxcywh_to_xyxy(boxes[0, 0]) * torch.tensor([200, 100, 200, 100]), atol=1e-3
    )


def test_a_score_equal_to_the_threshold_is_kept():
    head = make_head("detection", num_queries=2)
    logits = torch.tensor([[[0.0, -9.0, -9.0], [-1e-3, -9.0, -9.0]]])  # probabilities 0.5 and a little less
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]])
    (kept,) = head.postprocess({"logits": logits, "boxes": boxes}, [(100, 100)], threshold=0.5)
    assert kept.scores.tolist() == [0.5]


def test_duplicates_can_be_dropped():
    logits = torch.tensor([[[2.0, -9.0, -9.0], [1.0, -9.0, -9.0], [-9.0, 0.5, -9.0], [0.2, -9.0, -9.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.36], [0.5, 0.5, 0.4, 0.36], [0.5, 0.5, 0.4, 0.2]]])
    for iou, expected in ((None, [0, 1, 2, 3]), (0.7, [0, 2, 3]), (0.95, [0, 1, 2, 3])):
        head = make_head("detection", num_queries=4, nms_iou=iou)
        (found,) = head.select({"logits": logits, "boxes": boxes}, threshold=0.5)
        assert found.query.tolist() == expected


def test_what_needs_no_matching_is_queued_while_its_costs_travel(monkeypatch):
    head, targets = make_head("detection", dense_weight=1.0), make_targets(2, 1)
    events = []

    def recorded(name, function):
        return lambda *args: events.append(name) or function(*args)

    def start(*args, real=head.start_matching):
        events.append("start")
        return recorded("wait", real(*args))

    monkeypatch.setattr(head, "start_matching", start)
    monkeypatch.setattr(head, "unmatched_sets", recorded("denoising and dense", head.unmatched_sets))
    head.loss(head(make_features(), targets=targets), targets)
    assert events == ["start", "denoising and dense", "wait"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "settings",
    [{"num_denoising": 0}, {}, {"box_refinement": "distribution", "location_quality": True, "shared_matches": True}],
    ids=str,
)
def test_on_a_gpu_the_cpu_waits_for_the_matching_and_the_results_alone(settings):
    head = make_head("detection", dense_weight=1.0, **settings)
    targets, features = make_targets(2, 0, 5), make_features(3)
    expected = head.loss(head(features, targets=targets), targets)
    head, features = head.cuda(), [x.cuda() for x in features]
    total(head.loss(head(features, targets=targets), targets)).backward()  # fills caches
    head.eval()(features)
    torch.cuda.set_sync_debug_mode("error")  # waiting for an event of one's own, as the transfers do, is no error
    try:
        found = head.train().loss(head(features, targets=targets), targets)
        total(found).backward()
        with torch.no_grad():
            outputs = head.eval()(features)
        head.postprocess(outputs, [(30, 40)] * 3, threshold=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in (name for name in expected if "denoising" not in name):  # whose noise is another one
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=2e-2, atol=2e-3)  # convolutions use TF32


def test_all_objects_of_a_crowded_image_can_be_found():
    head = make_head("detection", num_queries=400, num_denoising=30)
    targets = make_targets(350, 0)
    outputs = head(make_features(2, 256, 256), targets=targets)
    terms = head.loss(outputs, targets)
    assert outputs.logits.shape[2] == 400
    assert total(terms).isfinite()

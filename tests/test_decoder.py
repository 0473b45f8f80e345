"""The query decoder: selection, anchors, layers."""

import pytest
import torch

from mvision.heads.query import anchors as anchors_module
from mvision.heads.query import decoder as decoder_module
from mvision.heads.query.anchors import make_anchors
from mvision.heads.query.decoder import QueryDecoder
from mvision.heads.query.denoising import make_denoising
from mvision.heads.query.matching import pad_targets
from mvision.heads.query.settings import DecoderConfig
from mvision.structures.boxes import inverse_sigmoid
from tests.test_matching import make_targets

SMALL = DecoderConfig(embed_dim=32, num_queries=9, num_layers=2, num_heads=4, ffn_dim=48)


def _maps(batch=2, channels=16, sizes=((8, 6), (4, 3))):
    return [torch.randn(batch, channels, *size) for size in sizes]


def _decoder(config=SMALL, **options):
    torch.manual_seed(0)
    decoder = QueryDecoder(config, [16, 16], num_classes=5, **options)
    for layer in decoder.box_heads:  # zero at the start, which would hide mistakes
        torch.nn.init.normal_(layer.layers[-1].weight, std=0.2)
    return decoder


def test_anchors_are_centred_on_tokens_and_double_per_level():
    anchors, valid = make_anchors([(40, 40), (2, 2)], torch.device("cpu"), torch.float64)
    boxes = anchors.sigmoid()[0]
    torch.testing.assert_close(boxes[41], torch.tensor([1.5 / 40, 1.5 / 40, 0.05, 0.05], dtype=torch.float64))
    torch.testing.assert_close(boxes[1600], torch.tensor([0.25, 0.25, 0.1, 0.1], dtype=torch.float64))
    assert valid.all()


def test_tokens_at_the_border_have_no_anchor():
    anchors, valid = make_anchors([(80, 80), (40, 40), (20, 20)], torch.device("cpu"), torch.float32)
    border = torch.ones(80, 80, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert torch.equal(valid[0, :6400, 0], ~border.flatten())
    assert valid[0, 6400:].all()
    assert (anchors[0, ~valid[0, :, 0]] == torch.finfo(torch.float32).max).all()


def test_anchors_are_computed_once_for_a_shape(monkeypatch):
    calls = []
    monkeypatch.setattr(anchors_module, "make_anchors", lambda *args: calls.append(args) or make_anchors(*args))
    decoder = _decoder()
    with torch.inference_mode():
        first = decoder(_maps()).boxes
    decoder(_maps(), every_layer=True).boxes.sum().backward()  # what inference has kept serves training
    assert len(calls) == 1
    decoder(_maps(sizes=((8, 8), (4, 4))))
    decoder.double()([x.double() for x in _maps()])
    assert len(calls) == 3
    assert first.shape == (1, 2, 9, 4)


def test_a_compiled_decoder_gives_tokens_at_the_border_the_same_features(monkeypatch):
    """There the memory is multiplied by zeros; otherwise a few rows of the features are written."""
    decoder, maps = (
        _decoder(SMALL.model_copy(update={"num_queries": 420}), dense=True),
        _maps(1, 16, ((4, 80), (2, 40))),
    )
    results = []
    for compiled in (False, True):
        monkeypatch.setattr(decoder_module, "in_graph", lambda compiled=compiled: compiled)
        decoder.zero_grad()
        decoded = decoder(maps, every_layer=True)
        (decoded.dense.logits.square().sum() + decoded.encoder_logits.square().sum()).backward()
        gradients = [part.grad for part in (*decoder.memory_proj.parameters(), *decoder.input_proj.parameters())]
        results.append([decoded.dense.logits, decoded.encoder_logits, decoded.boxes, *gradients])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_tokens_at_the_border_are_selected_without_their_features():
    decoder = _decoder(SMALL.model_copy(update={"num_queries": 420})).eval()
    decoded = decoder(_maps(1, sizes=((4, 80), (2, 40))))  # all tokens are queries; eight lie at the border
    nothing = decoder.memory_class(decoder.memory_proj(torch.zeros(32)))
    same = torch.isclose(decoded.encoder_logits[0], nothing, atol=1e-6).all(-1)
    at_border = (decoded.encoder_boxes[0] == 1).all(-1)
    assert same.sum() == 8
    assert torch.equal(same, at_border)


@pytest.mark.parametrize("num_queries", [30, 420])
def test_gradients_of_the_selected_tokens_are_the_same_where_all_are_supervised(num_queries):
    """Features of all tokens have gradients there, elsewhere those of the selected ones; some lie at the border."""
    config = SMALL.model_copy(update={"num_queries": num_queries})
    few, every = _decoder(config).double(), _decoder(config, dense=True).double()
    every.load_state_dict(few.state_dict(), strict=False)
    results = []
    for decoder in (few, every):
        torch.manual_seed(1)
        maps = [x.double().requires_grad_() for x in _maps(2, sizes=((4, 80), (2, 40)))]
        decoded = decoder(maps, every_layer=True)
        outputs = decoded.encoder_logits, decoded.encoder_boxes, decoded.encoder_queries, decoded.logits
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs).backward()
        shared = [*decoder.memory_proj.parameters(), *decoder.memory_class.parameters()]
        results.append([*outputs, *(x.grad for x in (*maps, *shared))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_inference_returns_the_last_layer_alone_and_equals_training():
    decoder = _decoder().eval()
    maps = _maps()
    last, every = decoder(maps), decoder(maps, every_layer=True)
    assert last.logits.shape == (1, 2, 9, 5)
    assert every.logits.shape == (2, 2, 9, 5)
    torch.testing.assert_close(last.logits[0], every.logits[-1])
    torch.testing.assert_close(last.boxes[0], every.boxes[-1])


def test_selected_tokens_have_the_best_scores_and_their_own_boxes():
    decoder = _decoder().eval()
    maps = _maps()
    few = decoder(maps)
    decoder.config = SMALL.model_copy(update={"num_queries": 60})
    every = decoder(maps)  # all tokens, best first
    scores = every.encoder_logits.amax(-1)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    torch.testing.assert_close(few.encoder_logits, every.encoder_logits[:, :9])
    torch.testing.assert_close(few.encoder_boxes, every.encoder_boxes[:, :9])


def test_dense_predictions_have_heads_of_their_own_and_training_alone_has_them():
    decoder = _decoder(dense=True)
    maps = _maps()
    assert decoder(maps).dense is None
    dense = decoder(maps, every_layer=True).dense
    assert dense.logits.shape == (2, 60, 5)
    assert dense.boxes.shape == (2, 60, 4)
    (dense.logits.sum() + dense.boxes.sum()).backward()
    assert decoder.memory_class.weight.grad is None
    # The box head starts at zero: every token predicts its anchor.
    torch.testing.assert_close(dense.boxes, dense.anchors.expand(2, -1, -1))
    assert _decoder()(maps, every_layer=True).dense is None


def test_layers_refine_the_boxes_before_them():
    decoder = _decoder()
    for layer in decoder.box_heads:
        torch.nn.init.zeros_(layer.layers[-1].weight)
        layer.layers[-1].bias.data = torch.tensor([0.1, 0.0, 0.0, 0.0])
    decoded = decoder(_maps(), every_layer=True)
    expected = inverse_sigmoid(decoded.encoder_boxes)[..., 0]
    for layer in range(2):
        expected = expected + 0.1
        torch.testing.assert_close(inverse_sigmoid(decoded.boxes[layer])[..., 0], expected, atol=1e-4, rtol=0)


def test_number_of_queries_is_free_after_training():
    decoder = _decoder().eval()
    maps = _maps()
    few = decoder(maps).boxes[-1]
    decoder.config = SMALL.model_copy(update={"num_queries": 30})
    many = decoder(maps).boxes[-1]
    assert few.shape[1] == 9
    assert many.shape[1] == 30
    decoder.config = SMALL.model_copy(update={"num_queries": 500})
    assert decoder(maps).boxes[-1].shape[1] == 60  # no more than there are tokens


def test_denoising_queries_do_not_change_the_others():
    decoder = _decoder(num_denoising=10)
    noisy = make_denoising(pad_targets(make_targets(2, 1), torch.device("cpu"), num_denoising=10), 5, 9, 0.5, 1.0)
    maps = _maps()
    with_noise, without = decoder(maps, noisy, every_layer=True), decoder(maps, every_layer=True)
    split = noisy.labels.shape[1]
    assert with_noise.logits.shape[2] == split + 9
    torch.testing.assert_close(with_noise.logits[:, :, split:], without.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(with_noise.boxes[:, :, split:], without.boxes, atol=1e-5, rtol=1e-4)


def test_every_parameter_gets_a_gradient_even_without_denoising_queries():
    decoder = _decoder(num_denoising=10)
    decoded = decoder(_maps(), None, every_layer=True)
    total = decoded.logits.sum() + decoded.boxes.sum() + decoded.encoder_boxes.sum() + decoded.encoder_logits.sum()
    total.backward()
    assert not [name for name, parameter in decoder.named_parameters() if parameter.grad is None]


def test_boxes_stay_in_float32_under_autocast():
    decoder = _decoder().eval()
    maps = _maps()
    with torch.autocast("cpu", torch.bfloat16):
        decoded = decoder(maps)
    assert decoded.boxes.dtype == torch.float32
    assert decoded.boxes.isfinite().all()


def test_denoising_needs_its_embedding():
    noisy = make_denoising(pad_targets(make_targets(1), torch.device("cpu"), num_denoising=10), 5, 9, 0.5, 1.0)
    with pytest.raises(ValueError, match="num_denoising > 0"):
        _decoder()(_maps(1), noisy)

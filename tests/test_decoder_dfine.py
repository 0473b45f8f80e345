"""The decoder with D-FINE's settings against that of ``transformers``, from the maps of the neck on, in float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import DFineConfig, HGNetV2Config
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.d_fine.modeling_d_fine import DFineForObjectDetection

from mvision.heads.query.decoder import QueryDecoder
from mvision.heads.query.settings import DecoderConfig
from mvision.neck.layers import ConvNorm

CLASSES, DIM, LAYERS = 5, 16, 3
DFINE = {
    "input_projection": "if_needed",
    "position_limit": 10.0,
    "attention_projections": False,
    "gate": True,
    "box_refinement": "distribution",
    "location_quality": True,
}
# Names of transformers -> ours.
NAMES = [
    (r"^decoder_input_proj\.(\d)\.0\.", r"input_proj.\1.conv."),
    (r"^decoder_input_proj\.(\d)\.1\.", r"input_proj.\1.norm."),
    (r"^enc_output\.", "memory_proj."),
    (r"^enc_score_head\.", "memory_class."),
    (r"^enc_bbox_head\.", "memory_box."),
    (r"^decoder\.query_pos_head\.", "position."),
    (r"^decoder\.pre_bbox_head\.", "pre_box."),
    (r"^decoder\.class_embed\.", "class_heads."),
    (r"^decoder\.bbox_embed\.", "box_heads."),
    (r"^decoder\.lqe_layers\.(\d)\.reg_conf\.", r"quality_heads.\1."),
    (r"^decoder\.layers\.", "layers."),
    (r"\.self_attn\.o_proj\.", ".self_attention.out_proj."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.gateway\.gate\.", ".gate.linear."),
    (r"\.gateway\.norm\.", ".gate.norm."),
    (r"(layers\.\d)\.mlp\.", r"\1.ffn."),
    (r"\.final_layer_norm\.", ".norm3."),
]
CASES = {
    "points for each level": ([3, 6, 3], DIM, 4.0, [(8, 6), (4, 3), (2, 2)]),
    "two levels, a convolution before": ([6, 6], 24, 8.0, [(5, 9), (3, 5)]),
    "with tokens at the border": ([2, 1], DIM, 4.0, [(3, 80), (2, 40)]),
}


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, QueryDecoder, list[Tensor]]:
    """The model of transformers, our decoder with its weights, and maps for both."""
    points, channels, scale, shapes = CASES[request.param]
    reference = make_reference(points, channels, scale)
    torch.manual_seed(1)
    maps = [torch.randn(2, channels, *shape, dtype=torch.float64) for shape in shapes]
    return reference, make_decoder(reference, points, [channels] * len(points), bin_scale=scale), maps


def make_reference(points: list[int], channels: int, scale: float) -> nn.Module:
    """A small D-FINE with random weights and norms; its config has another ``reg_scale`` than its tensor."""
    torch.manual_seed(0)
    config = DFineConfig(
        backbone_config=HGNetV2Config(stem_channels=[3, 4, 4], out_indices=[2, 3, 4][-len(points) :]),
        num_labels=CLASSES,
        d_model=DIM,
        encoder_hidden_dim=channels,
        encoder_in_channels=[8] * len(points),
        decoder_in_channels=[channels] * len(points),
        feat_strides=[8, 16, 32][-len(points) :],
        encode_proj_layers=[len(points) - 1],
        encoder_ffn_dim=8,
        decoder_ffn_dim=24,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        decoder_layers=LAYERS,
        decoder_n_points=points,
        num_feature_levels=len(points),
        num_queries=7,
        freeze_backbone_batch_norms=False,
    )
    model = DFineForObjectDetection(config).double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("reg_scale"):
                tensor.fill_(scale)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and not name.endswith(("up", "num_points_scale")):
                tensor.normal_(0, 0.5 if tensor.ndim == 1 else 1.5 * tensor[0].numel() ** -0.5)
    return model


def make_decoder(reference: nn.Module, points: list[int], channels: list[int], **settings: object) -> QueryDecoder:
    """Ours with the reference's weights."""
    config = DecoderConfig(
        embed_dim=DIM, num_queries=7, num_layers=LAYERS, num_heads=4, ffn_dim=24, num_points=points,
        **{**DFINE, **settings},  # type: ignore[arg-type]
    )  # fmt: skip
    decoder = QueryDecoder(config, channels, CLASSES).double().eval()
    state = {}
    for name, tensor in reference.model.state_dict().items():
        if name.startswith(("decoder", "enc_")) and not name.endswith((".up", "reg_scale", "num_points_scale")):
            for pattern, ours in NAMES:
                name = re.sub(pattern, ours, name)
            state[name] = tensor
    decoder.load_state_dict(state)
    return decoder


def run_reference(reference: nn.Module, maps: list[Tensor]) -> object:
    """All outputs of the reference, of all layers."""
    reference.model.decoder.training = True
    with torch.no_grad():
        encoded = BaseModelOutput(last_hidden_state=maps)
        return reference.model(None, inputs_embeds=maps[0], encoder_outputs=encoded)


def test_equal_outputs_of_all_layers(pair: tuple[nn.Module, QueryDecoder, list[Tensor]]) -> None:
    reference, decoder, maps = pair
    expected = run_reference(reference, maps)
    with torch.no_grad():
        found = decoder(maps, every_layer=True)
        last = decoder(maps)
    # "pre" comes before the layers there.
    logits = torch.cat((found.pre_logits[None], found.logits)).transpose(0, 1)
    boxes = torch.cat((found.pre_boxes[None], found.boxes)).transpose(0, 1)
    order = by_first_box(boxes), by_first_box(expected.intermediate_reference_points)
    pairs = [
        (logits, expected.intermediate_logits),
        (boxes, expected.intermediate_reference_points),
        (found.corners.transpose(0, 1), expected.intermediate_predicted_corners),
        (found.initial[:, None], expected.initial_reference_points[:, :1]),
        (found.encoder_logits[:, None], expected.enc_topk_logits[:, None]),
        (found.encoder_boxes[:, None], expected.enc_topk_bboxes[:, None]),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(sorted_by(ours, order[0]), sorted_by(theirs, order[1]), rtol=0, atol=1e-9)
    torch.testing.assert_close(last.logits[0], found.logits[-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(last.boxes[0], found.boxes[-1], rtol=0, atol=1e-12)
    assert last.corners is last.initial is last.pre_logits is last.pre_boxes is None
    # The quality and the refinement matter.
    assert (found.logits[0] - found.pre_logits).abs().max() > 0.01
    assert (found.boxes[0] - found.pre_boxes).abs().max() > 0.01


def by_first_box(boxes: Tensor) -> Tensor:
    """(B, Q) the order of queries, which tokens with equal scores leave open."""
    return (boxes[:, 0] @ torch.tensor([1.0, 10, 100, 1000], dtype=boxes.dtype)).argsort(1)


def sorted_by(values: Tensor, order: Tensor) -> Tensor:
    """(B, L, Q, N) with its queries in this order."""
    return values.gather(2, order[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))


@pytest.mark.parametrize(
    "settings", [{"act": "silu"}, {"position_limit": 0.5}, {"bin_scale": 4.5}, {"bin_reach": 0.4}, {"num_points": 4}]
)
def test_another_setting_is_noticed(settings: dict[str, object]) -> None:
    """None of them but the points has tensors of its own: they load, and give other numbers."""
    reference = make_reference([3, 6, 3], DIM, 4.0)
    channels = [DIM] * 3
    if "num_points" in settings:  # as many points, but not in the same levels
        points, settings = [4, 4, 4], {}
    else:
        points = [3, 6, 3]
    torch.manual_seed(1)
    maps = [torch.randn(2, DIM, *shape, dtype=torch.float64) for shape in [(8, 6), (4, 3), (2, 2)]]
    expected = run_reference(reference, maps).intermediate_reference_points[:, -1]
    with torch.no_grad():
        found = make_decoder(reference, points, channels, **settings)(maps).boxes[0]
    assert (found - expected).abs().max() > 1e-3


def test_projected_maps_are_projected() -> None:
    reference = make_reference([6, 6], 24, 8.0)
    decoder = make_decoder(reference, [6, 6], [24, 24])
    assert [type(proj) for proj in decoder.input_proj] == [ConvNorm, ConvNorm]

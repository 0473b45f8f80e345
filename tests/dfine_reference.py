"""D-FINE in ``transformers``, of every published size and narrower, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config
from transformers.models.d_fine.modeling_d_fine import replace_batch_norm

from mvision import Model, load
from tests.reference import random_images, randomise, same_order, save_reference

SIZES = ((160, 160), (128, 224), (96, 192))
"""(height, width) of the images that are compared: one is square, and none is that of training."""


def hgnet(stem: list[int], middle: int, blocks: list[int], layers: int, affine: bool, outputs: list[int]) -> Any:
    """A backbone by the channels of its stem, those inside the first stage, and what a stage has."""
    narrow = layers < 6
    out = [stem[2] * 4, 256, 512, 1024] if layers == 3 else [96, 384, 768, 1536] if narrow else [128, 512, 1024, 2048]
    return HGNetV2Config(
        stem_channels=stem,
        stage_in_channels=[stem[2], *out[:3]],
        stage_mid_channels=[middle * 2**stage for stage in range(4)],
        stage_out_channels=out,
        stage_num_blocks=blocks,
        stage_numb_of_layers=[layers] * 4,
        use_learnable_affine_block=affine,
        out_indices=outputs,
        hidden_sizes=out,
    )


def b0(outputs: list[int]) -> Any:
    """``hgnetv2_b0``."""
    return hgnet([3, 16, 16], 16, [1, 1, 2, 1], 3, True, outputs)


def settings(size: str) -> dict[str, Any]:
    """The settings of a published size, n to x."""
    three = [2, 3, 4]
    if size == "n":
        return {
            "backbone_config": b0([3, 4]), "num_feature_levels": 2, "encoder_ffn_dim": 512, "encode_proj_layers": [1],
            "d_model": 128, "encoder_hidden_dim": 128, "decoder_ffn_dim": 512, "encoder_in_channels": [512, 1024],
            "decoder_n_points": [6, 6], "decoder_in_channels": [128, 128], "feat_strides": [16, 32],
            "depth_mult": 0.5, "decoder_layers": 3, "hidden_expansion": 0.34,
        }  # fmt: skip
    common: dict[str, Any] = {"decoder_n_points": [3, 6, 3]}
    if size == "s":
        more = {"encoder_in_channels": [256, 512, 1024], "decoder_layers": 3, "hidden_expansion": 0.5}
        return common | more | {"backbone_config": b0(three), "depth_mult": 0.34}
    if size == "m":
        backbone = hgnet([3, 24, 32], 32, [1, 1, 3, 1], 4, True, three)
        more = {"encoder_in_channels": [384, 768, 1536], "decoder_layers": 4, "depth_mult": 0.67}
        return common | more | {"backbone_config": backbone}
    if size == "l":
        return common | {"backbone_config": hgnet([3, 32, 48], 48, [1, 1, 3, 1], 6, False, three)}
    wide = {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384, 384, 384]}
    return common | wide | {"backbone_config": hgnet([3, 32, 64], 64, [1, 2, 5, 2], 6, False, three)}


def narrow(neck: int, decoder: int, **more: Any) -> dict[str, Any]:
    """Settings of three levels on the smallest backbone, of these widths."""
    widths = {"encoder_hidden_dim": neck, "decoder_in_channels": [neck] * 3, "d_model": decoder}
    return settings("s") | widths | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "decoder_layers": 2} | more


def build(given: dict[str, Any], reg_scale: float | None = None, num_labels: int = 80) -> nn.Module:
    """The library's model with random weights and statistics of norms, in eval mode.

    Args:
        reg_scale: what the tensor is set to; None: as the config says, 4.
    """
    config = DFineConfig(**{"num_queries": 40, "num_labels": num_labels, "freeze_backbone_batch_norms": False, **given})
    model = DFineForObjectDetection(config)
    randomise(model)
    with torch.no_grad():
        model.model.decoder.reg_scale.fill_(config.reg_scale if reg_scale is None else reg_scale)
        model.model.decoder.up.fill_(0.5)
    return model.eval()


def as_published(size: str) -> nn.Module:
    """A published size with all of its queries, the norms of its backbone frozen as in the published files."""
    model = build(settings(size) | {"num_queries": 300}, 8.0 if size == "x" else None)
    replace_batch_norm(model.model.backbone)
    model.config.freeze_backbone_batch_norms = True
    return model


def open_ours(theirs: nn.Module, folder: Path, names: list[str] | None = None) -> Model:
    """mvision's model of what the library saves."""
    return load(save_reference(theirs, folder, names))


@torch.no_grad()
def differences(theirs: nn.Module, ours: Model, size: tuple[int, int]) -> tuple[float, float]:
    """Largest differences of logits and boxes in float64, the queries in one order."""
    images: Tensor = random_images(1, *size, dtype=torch.float64)
    expected, found = theirs.double()(images), ours.double()(images)["detection"]
    logits, boxes = same_order(expected.logits, expected.pred_boxes, found["logits"], found["boxes"])
    assert expected.logits.std() > 0.05
    assert expected.pred_boxes.std() > 0.05
    return float((logits - expected.logits).abs().max()), float((boxes - expected.pred_boxes).abs().max())

"""Masks of ECSeg's original decoder for the inputs of ``tests/golden_masks.py``, into a file for the tests.

    git clone https://github.com/Intellindust-AI-Lab/EdgeCrafter && git -C EdgeCrafter checkout 706d037
    python docs/scripts/golden_masks.py EdgeCrafter

The original code is imported from that folder and run as it is, but in float64: in training, where layer i has the
blocks 0 to i, in prediction, where its masks have the first block alone, and as its export prepares it, with all.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from docs.scripts.golden_decoders import fill, original
from tests.decoder_inputs import make_weight
from tests.golden_masks import CLASSES, FILE, SETTINGS, SIZES, SMALL, STRIDES, WIDTH, make_maps, some

MADE_BY = "docs/scripts/golden_masks.py from Intellindust-AI-Lab/EdgeCrafter 706d037"
NAMES = [
    (r"\.dwconv\.", ".depthwise."),
    (r"\.pwconv1\.", ".linear."),
    (r"^spatial_features_proj\.", "spatial."),
    (r"^query_features_proj\.", "query."),
    (r"^query_features_block\.norm_in\.", "query_mlp.norm."),
    (r"^query_features_block\.layers\.0\.", "query_mlp.layers.0."),
    (r"^query_features_block\.layers\.2\.", "query_mlp.layers.1."),
]
"""Name in the original's mask head -> name in mvision's."""


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edgecrafter", type=Path, help="checkout of EdgeCrafter")
    folder = parser.parse_args().edgecrafter / "ecdetseg" / "engine" / "edgecrafter"
    cls = original(folder, "decoder.ECTransformer")
    arrays: dict[str, np.ndarray] = {"made by": np.array(f"{MADE_BY}, torch {torch.__version__}")}
    for size in SIZES:
        for name, masks in golden(cls, size).items():
            arrays[f"{size}, {name}"] = some(masks[0]).float().numpy()
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


@torch.no_grad()
def golden(cls: type[nn.Module], size: str) -> dict[str, Tensor]:
    """The masks of every layer in training, and those of prediction with the first block and with all."""
    model = cls(
        num_classes=CLASSES,
        hidden_dim=WIDTH,
        num_queries=SMALL["num_queries"],
        feat_channels=[WIDTH] * 3,
        feat_strides=STRIDES,
        num_points=SETTINGS["num_points"],
        nhead=SMALL["num_heads"],
        num_layers=SMALL["num_layers"],
        dim_feedforward=SMALL["ffn_dim"],
        num_denoising=0,
        mask_downsample_ratio=4,
        aux_loss=False,  # without denoising its collection of the other layers fails; a hook collects them here
    ).double()
    masks = model.decoder.segmentation_head
    masks.image_size = SIZES[size]
    model._generate_anchors = partial(model._generate_anchors, dtype=torch.float64)
    fill(model, "EdgeCrafter")
    for name, tensor in masks.named_parameters():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        tensor.data.copy_(make_weight(f"refine.{name}", tensor.shape))
    maps = make_maps(size)
    of_layers = list[Tensor]()
    hook = masks.register_forward_hook(lambda module, inputs, outputs: of_layers.extend(outputs))
    model.train()(maps, spatial_feat=maps[0])
    hook.remove()
    found = {f"layer {index}": layer for index, layer in enumerate(of_layers)}
    found["first"] = model.eval()(maps, spatial_feat=maps[0])["pred_masks"]
    masks.export()
    return found | {"all": model(maps, spatial_feat=maps[0])["pred_masks"]}


if __name__ == "__main__":
    main()

"""Outputs of the original decoders of DEIM and EdgeCrafter on ``tests/decoder_inputs.py``, into a file for the tests.

    git clone https://github.com/Intellindust-AI-Lab/DEIM && git -C DEIM checkout 09d35d5
    git clone https://github.com/Intellindust-AI-Lab/EdgeCrafter && git -C EdgeCrafter checkout 706d037
    python docs/scripts/golden_decoders.py DEIM EdgeCrafter

The original code is imported from those folders and run as it is, but in float64. Of its package, only the files of the
decoder are imported; the rest stands in here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.decoder_inputs import CLASSES, FAMILIES, SMALL, make_maps, make_weight

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden_decoders.json"
COMMITS = {"DEIM": "Intellindust-AI-Lab/DEIM 09d35d5", "EdgeCrafter": "Intellindust-AI-Lab/EdgeCrafter 706d037"}
# Names of the originals -> ours.
NAMES = [
    (r"^enc_output\.proj\.", "memory_proj.0."),
    (r"^enc_output\.norm\.", "memory_proj.1."),
    (r"^enc_score_head\.", "memory_class."),
    (r"^enc_bbox_head\.", "memory_box."),
    (r"^query_pos_head\.", "position."),
    (r"^pre_bbox_head\.", "pre_box."),
    (r"^dec_score_head\.", "class_heads."),
    (r"^dec_bbox_head\.", "box_heads."),
    (r"^decoder\.lqe_layers\.(\d)\.reg_conf\.", r"quality_heads.\1."),
    (r"^decoder\.layers\.", "layers."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.cross_attn\.", ".cross_attention."),
    (r"\.gateway\.gate\.", ".gate.linear."),
    (r"\.gateway\.norm\.", ".gate.norm."),
    (r"\.linear1\.", ".ffn.layers.0."),
    (r"\.linear2\.", ".ffn.layers.1."),
]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deim", type=Path, help="checkout of DEIM")
    parser.add_argument("edgecrafter", type=Path, help="checkout of EdgeCrafter")
    options = parser.parse_args()
    deim, edgecrafter = options.deim / "engine" / "deim", options.edgecrafter / "ecdetseg" / "engine" / "edgecrafter"
    classes = {
        "DEIM": (original(deim, "dfine_decoder.DFINETransformer"), {"mlp_act": "silu"}),
        "DEIM-RT-DETRv2": (
            original(deim, "rtdetrv2_decoder.RTDETRTransformerv2"),
            {"mlp_act": "silu", "query_pos_method": "as_reg"},
        ),
        # Its training fails without masks, which come with the outputs of the other layers.
        "EdgeCrafter": (original(edgecrafter, "decoder.ECTransformer"), {"aux_loss": False}),
    }
    families = {name: golden(name, *classes[name]) for name in FAMILIES}
    made_by = {"script": "docs/scripts/golden_decoders.py", "from": COMMITS, "torch": torch.__version__}
    FILE.write_text(json.dumps({"made by": made_by, "families": families}, indent=1) + "\n")
    print(f"{len(families)} families in {FILE}")


def original(folder: Path, name: str) -> type[nn.Module]:
    """A class from the files in ``folder`` alone."""
    root = f"original_{folder.name}"
    for package, path in ((root, []), (f"{root}.zoo", [str(folder)])):
        sys.modules.setdefault(package, types.ModuleType(package)).__path__ = path
    core = types.ModuleType(f"{root}.core")
    core.register = lambda: lambda cls: cls  # type: ignore[attr-defined]
    sys.modules[core.__name__] = core
    module, _, cls = name.partition(".")
    return getattr(importlib.import_module(f"{root}.zoo.{module}"), cls)  # type: ignore[no-any-return]


def golden(family: str, cls: type[nn.Module], settings: dict[str, Any]) -> dict[str, Any]:
    """The outputs of all layers."""
    ours, channels = FAMILIES[family]
    model = cls(
        num_classes=CLASSES,
        hidden_dim=SMALL["embed_dim"],
        num_queries=SMALL["num_queries"],
        feat_channels=list(channels),
        num_points=ours.get("num_points", 4),
        nhead=SMALL["num_heads"],
        num_layers=SMALL["num_layers"],
        dim_feedforward=SMALL["ffn_dim"],
        activation="silu",
        num_denoising=0,
        **settings,
    ).double()
    fill(model, family)
    model.train()  # for the outputs of all layers
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model._generate_anchors = partial(model._generate_anchors, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(make_maps(channels))
    layers = [*outputs.get("aux_outputs", []), outputs]
    found = {f"layer {SMALL['num_layers'] - 1 - index}": layer for index, layer in enumerate(reversed(layers))}
    if "enc_aux_outputs" in outputs:
        found["encoder"] = outputs["enc_aux_outputs"][0]
    if "pre_outputs" in outputs:
        found["pre"] = outputs["pre_outputs"]
    return {
        name: {"logits": rounded(layer["pred_logits"]), "boxes": rounded(layer["pred_boxes"])}
        for name, layer in found.items()
    }


def fill(model: nn.Module, family: str) -> None:
    """Give the original the weights that ours gets under its own names."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("reg_scale", "up", "num_points_scale")):
            continue
        ours = name
        for pattern, replacement in NAMES:
            ours = re.sub(pattern, replacement, ours)
        if family == "EdgeCrafter":  # its third norm is the second of a layer
            ours = re.sub(r"(layers\.\d)\.norm2\.", r"\1.norm3.", ours)
        if ".in_proj_" in ours:
            of_parts = (ours.replace("in_proj_", f"{part}_proj.") for part in "qkv")
            shape = torch.Size([len(tensor) // 3, *tensor.shape[1:]])
            values = torch.cat([make_weight(part, shape) for part in of_parts])
        else:
            values = make_weight(ours, tensor.shape)
        tensor.data.copy_(values)


def rounded(values: Tensor) -> Any:
    """As lists, of the first image."""
    return [[round(value, 10) for value in row] for row in values[0].tolist()]


if __name__ == "__main__":
    main()

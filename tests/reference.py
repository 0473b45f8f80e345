"""Published RT-DETR architectures in ``transformers``, with random weights that make every term matter.

Fresh models hide mistakes: their box heads are zero, their norms have no statistics, their biases vanish.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig, RTDetrV2Config
from transformers import RTDetrV2ForObjectDetection as RTDetrV2
from transformers.models.rt_detr.modeling_rt_detr import replace_batch_norm

from mvision.structures import Targets

# Branches that are added to something. They are weak here, as after training: random networks whose branches are as
# strong as their trunks are chaotic, and then amplify the rounding of float32.
BRANCH_NORM = re.compile(r"stages\.\d\.layers\.\d+\.layer\.\d\.normalization|bottlenecks")
BRANCH_OUTPUT = re.compile(r"(o_proj|output_proj|fc2|sampling_offsets|bbox_embed\.\d\.layers\.2)\.weight")
BASIC = {"hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
SMALL_NECK = {"encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5}
WIDE_NECK = {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384, 384, 384]}

# The hyper-parameters of PekingU/rtdetr_*: backbone, then everything else that differs from the library's defaults.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "r18": ({**BASIC, "depths": [2, 2, 2, 2]}, {**SMALL_NECK, "decoder_layers": 3}),
    "r34": ({**BASIC, "depths": [3, 4, 6, 3]}, {**SMALL_NECK, "decoder_layers": 4}),
    "r50": ({}, {}),
    "r101": ({"depths": [3, 4, 23, 3]}, WIDE_NECK),
}


def build_reference(name: str, num_labels: int = 80, **settings: Any) -> nn.Module:
    """A model of ``MODELS``, with ``v2_`` in front in its second version, in eval mode."""
    backbone, rest = MODELS[name.removeprefix("v2_")]
    config_class, model_class = (
        (RTDetrV2Config, RTDetrV2) if name.startswith("v2_") else (RTDetrConfig, RTDetrForObjectDetection)
    )
    backbone_config = RTDetrResNetConfig(out_indices=[2, 3, 4], **backbone)
    config = config_class(
        backbone_config=backbone_config,
        num_labels=num_labels,
        freeze_backbone_batch_norms=False,
        **{**rest, **settings},
    )
    model = model_class(config)
    randomise(model)
    # As published: the norms of the backbone have their statistics, parameters and counters taken away from training.
    replace_batch_norm(model.model.backbone)
    config.freeze_backbone_batch_norms = True
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random weights, biases and norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith("_points_scale"):
            continue
        is_scale = name.endswith("weight") and ("norm" in name.lower() or name.endswith("proj.1.weight"))
        if tensor.ndim == 1 and is_scale:
            low, high = (0.1, 0.4) if BRANCH_NORM.search(name) else (0.7, 1.3)
            tensor.uniform_(low, high, generator=generator)
        elif tensor.ndim == 1:
            tensor.add_(torch.empty_like(tensor).normal_(0, 0.2, generator=generator))
        else:
            gain = 0.3 if BRANCH_OUTPUT.search(name) else 1.0
            tensor.normal_(0, gain * tensor[0].numel() ** -0.5, generator=generator)
    _calibrate(model)


@torch.no_grad()
def _calibrate(model: nn.Module) -> None:
    """Give all norms the statistics of some images, so that activations neither vanish nor explode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(random_images(4, 128, 128))
    model.eval()
    for norm in norms:
        norm.momentum = 0.1


def random_images(count: int, height: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """Coarse and fine noise in 0..1: plain noise is the same everywhere after a few strides."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, max(2, height // 24), max(2, width // 24), generator=generator)
    fine = torch.rand(count, 3, height, width, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (0.8 * smooth + 0.2 * fine).to(dtype)


def same_order(logits: Tensor, boxes: Tensor, other_logits: Tensor, other_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The second predictions with the queries in the order of the first.

    Queries are sorted by a score of the encoder; in float32 nearly equal scores may swap places.
    """
    own, other = torch.cat((logits, boxes), -1), torch.cat((other_logits, other_boxes), -1)
    nearest = torch.cdist(own.double(), other.double()).argmin(-1)
    assert all(len(row.unique()) == len(row) for row in nearest), "not the same queries were selected"
    index = nearest.unsqueeze(-1)
    return (
        other_logits.gather(1, index.expand_as(logits)),
        other_boxes.gather(1, index.expand_as(boxes)),
    )


def save_reference(model: nn.Module, folder: Path, names: list[str] | None = None) -> Path:
    """Write ``config.json`` and ``model.safetensors``, with these class names."""
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"]
    return folder


def random_targets(counts: list[int], num_labels: int, dtype: torch.dtype = torch.float64) -> list[Targets]:
    """Images with so many objects."""
    generator = torch.Generator().manual_seed(1)
    targets = []
    for count in counts:
        sides = torch.rand(count, 2, generator=generator, dtype=dtype) * 0.4 + 0.05
        centres = torch.rand(count, 2, generator=generator, dtype=dtype) * (1 - sides) + sides / 2
        labels = torch.randint(0, num_labels, (count,), generator=generator)
        targets.append(Targets(boxes=torch.cat((centres, sides), 1), labels=labels, areas=sides.prod(1)))
    return targets


def as_labels(targets: list[Targets]) -> list[dict[str, Tensor]]:
    """The same in the library's form."""
    return [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]

"""Which published weights a new training could start from: a line for a user who may not know that there are any."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from mvision.config import ModelConfig, load_config
from mvision.heads.poses.settings import PoseConfig
from mvision.heads.query.settings import DecoderConfig
from mvision.weights.zoo import MODELS, ZooModel, of_config

# What may differ in models between which all weights of neck and decoder can move.
FREE = {"num_queries", "dropout", "sigmas"}
_QUERIES = (DecoderConfig, PoseConfig)
_KINDS = {"detection": "a detector", "instance-seg": "a model of masks", "keypoints": "a model of poses"}


def published_start(model: ModelConfig) -> str | None:
    """A line that names the published weights of this architecture, or, without any, those with its backbone.

    None if there are neither, or if the backbone has pretrained weights anyway and nothing else fits.
    """
    name = shipped_architecture(model)
    if name is not None:
        same = of_config(name)[0]
        return f"published weights have this architecture: --init {same.name} starts from them ({_figures(same)})"
    alike = [of_config(config)[0] for config, _ in _with_backbone(model)]
    if not alike or model.backbone.starts_trained:
        return None
    # AP of boxes and of keypoints cannot be compared, so another task counts only where there is none of the model's.
    best = max(alike, key=lambda found: (found.task in model.heads, found.task == "detection", found.ap))
    return (
        f"published weights have this backbone: --init {best.name} takes it from {_KINDS[best.task]} "
        f"({_figures(best)}), and with neither --model nor --config the whole model"
    )


def shipped_architecture(model: ModelConfig) -> str | None:
    """The shipped config of a published model from which all weights fit ``model``; None if there is none."""
    fitting = [found for found in _with_backbone(model) if _same_neck_and_decoder(model, found[1])]
    fitting.sort(key=lambda found: not set(found[1].heads) <= set(model.heads))  # its own task before another one's
    return fitting[0][0] if fitting else None


def _with_backbone(model: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """The shipped configs of published models that have the backbone of ``model``."""
    for config, shipped in _shipped().items():
        own, other = model.backbone, shipped.backbone
        if (own.name, own.stage1_shortcut) == (other.name, other.stage1_shortcut):
            yield config, shipped


@cache  # reading them all takes half a second
def _shipped() -> dict[str, ModelConfig]:
    """The shipped configs of published models by name; they are compared alone, and not changed."""
    names = dict.fromkeys(found.config for found in MODELS.values() if found.config is not None)
    return {name: load_config(name).model for name in names}


def _same_neck_and_decoder(model: ModelConfig, shipped: ModelConfig) -> bool:
    """Whether the neck and at least one head's decoder can take over all weights of the shipped model."""
    published = [_decoder(settings) for settings in shipped.heads.values() if isinstance(settings, _QUERIES)]
    own = [_decoder(settings) for settings in model.heads.values() if isinstance(settings, _QUERIES)]
    same_maps = model.backbone.strides == shipped.backbone.strides
    same_neck = model.neck.model_dump(exclude=FREE) == shipped.neck.model_dump(exclude=FREE)
    return same_maps and same_neck and any(settings in published for settings in own)


def _decoder(settings: DecoderConfig | PoseConfig) -> dict[str, Any]:
    fields = PoseConfig.model_fields if isinstance(settings, PoseConfig) else DecoderConfig.model_fields
    return {name: getattr(settings, name) for name in fields.keys() - FREE}


def _figures(model: ZooModel) -> str:
    data = model.measured.split()[0]
    return f"{model.of.title}, {model.ap:.1f} AP on {data}, {model.licence}; 'mvision models' lists more"

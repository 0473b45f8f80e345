"""Settings of the backbone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mvision.settings import Settings


class BackboneConfig(Settings):
    """A timm model (``features_only``) or, as ``smp:NAME``, an encoder of segmentation-models-pytorch.

    Attributes:
        name: the model's name in its library.
        pretrained: load the library's weights (needs network or its cache).
        strides: of the maps for the neck, finest first. A plain ViT has one stride only: ``len(strides)`` of its maps
            are taken, and the neck resamples them into a pyramid.
        normalize: ``auto`` uses the mean and standard deviation of the library's weights; ``none`` keeps 0..1.
        stage1_shortcut: add the projection that the published ResNet-18/34 "vd" have on their first shortcut.
    """

    name: str = Field("resnet18d", max_length=200)
    pretrained: bool = False
    strides: list[int] = Field([8, 16, 32], min_length=1, max_length=16)
    normalize: Literal["auto", "none"] = "auto"
    stage1_shortcut: bool = False

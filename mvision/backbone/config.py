"""Settings of the backbone."""

from __future__ import annotations

from typing import Literal

from mvision.settings import Settings


class BackboneConfig(Settings):
    """A timm model (``features_only``) or, as ``smp:NAME``, an encoder of segmentation-models-pytorch.

    Attributes:
        name: the model's name in its library.
        pretrained: load the library's weights (needs network or its cache).
        strides: the strides of the maps handed to the neck. A plain ViT has one stride only: its last
            ``len(strides)`` maps are taken, and the neck builds the pyramid.
        normalize: ``auto`` takes mean and std from the backbone's own config; ``none`` leaves images in 0..1.
        stage1_shortcut: add the projection that the published ResNet-18/34 "vd" have in their first stage.
    """

    name: str = "resnet18d"
    pretrained: bool = False
    strides: list[int] = [8, 16, 32]
    normalize: Literal["auto", "none"] = "auto"
    stage1_shortcut: bool = False

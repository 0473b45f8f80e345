"""Settings of the backbone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mvision.settings import MAX_WIDTH, Settings


class BackboneConfig(Settings):
    """A timm model (``features_only``), a ViT of EdgeCrafter (``ecvit_t``, ``ecvit_t_plus``, ``ecvit_s``,
    ``ecvit_s_plus``) or, as ``smp:NAME``, an encoder of segmentation-models-pytorch.

    Attributes:
        name: the model's name in its library.
        pretrained: load the library's weights (needs network or its cache).
        weights: a file of weights for a new model instead: safetensors, or a ``.pth`` of tensors alone, with the names
            that the library uses. Weights that were trained with another normalisation than the library's want
            ``normalize`` set. Ignored by what loads a whole model, such as a run that is resumed.
        strides: of the maps for the neck, finest first. A plain ViT has one stride only, see ``pyramid``.
        pyramid: of a plain ViT: ``last`` takes the maps of ``len(strides)`` blocks, the last among them, which the neck
            resamples; ``mean-bilinear`` resizes the mean of the last two blocks' maps to every stride. EdgeCrafter's
            ViTs have always the latter.
        detail: 0, or the width of a branch of convolutions, whose maps are appended to those of ``mean-bilinear``. Its
            map of stride 4 is there for heads that take one. As random weights, it has the learning rate of the neck.
        normalize: ``auto`` uses the mean and standard deviation of the library's weights; ``none`` keeps 0..1.
        stage1_shortcut: add the projection that the published ResNet-18/34 "vd" have on their first shortcut.
        freeze_norms: in training too, the network's batch norms use their stored mean and variance, which stay as they
            are; their scale and shift are trained. ``auto``: where a new run starts from the backbone's own weights
            (``pretrained`` or ``weights``), since small batches measure statistics badly.
    """

    name: str = Field("resnet18d", max_length=200)
    pretrained: bool = False
    weights: str | None = Field(None, max_length=4096)
    strides: list[int] = Field([8, 16, 32], min_length=1, max_length=16)
    pyramid: Literal["last", "mean-bilinear"] = "last"
    detail: int = Field(0, ge=0, le=MAX_WIDTH)
    normalize: Literal["auto", "none"] = "auto"
    stage1_shortcut: bool = False
    freeze_norms: bool | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _pyramid_of_ecvit(self) -> BackboneConfig:
        if self.name.startswith("ecvit_") and self.pyramid != "mean-bilinear":
            if "pyramid" in self.model_fields_set:
                raise ValueError(f"{self.name} has the pyramid mean-bilinear alone; set pyramid to it")
            self.pyramid = "mean-bilinear"
        return self

    @property
    def starts_trained(self) -> bool:
        """Whether a new model's backbone gets weights that were trained."""
        return self.pretrained or self.weights is not None

    @property
    def norms_are_frozen(self) -> bool:
        """Whether the network's batch norms keep their statistics in training."""
        return self.starts_trained if self.freeze_norms == "auto" else self.freeze_norms

    def forget_weights(self) -> None:
        """Ask for no weights: those of the whole model are loaded, or none are needed."""
        self.pretrained, self.weights = False, None

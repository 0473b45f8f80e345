"""The section ``train``: its keys with their types, ranges and defaults, and what remains once a run has begun."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mvision.machine import PrecisionOption
from mvision.settings import Replacement, Settings, without_retired

MOST_STEPS = 10**9  # far above every training; larger numbers are slips, and overflow in other libraries

Auto = Literal["auto"]


class TrainConfig(Settings):
    """The training run.

    What is ``auto`` is decided when a new run starts, see ``mvision.engine.auto``: the run says the number, and its own
    config has it.

    Attributes:
        epochs: ``auto`` is ``full_epochs``, or more where these would be fewer optimiser steps than ``least_steps``. A
            run whose backbone, neck and heads start from weights takes half of both.
        full_epochs: of a large data set, with ``epochs: auto``.
        least_steps: of a small data set, with ``epochs: auto``; but at most twenty times ``full_epochs``.
        optimizer: ``adamw``, or ``muon``: orthogonalised momentum for the weights of convolutions and linear
            layers, scaled so that AdamW's learning rates fit; learns faster from random weights. Norms, biases,
            embeddings and the last layers of classifiers get AdamW with Nesterov momentum. ``auto`` is ``adamw``
            for a run whose backbone, neck and heads start from weights, else ``muon``: a new head needs it.
        lr: peak learning rate of neck and heads; ``auto`` is ``base_lr`` times the root of the images in an optimiser
            step divided by 16.
        base_lr: peak learning rate at 16 images in a step; ``auto`` suits the optimiser.
        backbone_lr: peak learning rate of the backbone; None: the same as ``lr``. ``auto`` is that too, but a share of
            it where the backbone starts from weights.
        layer_decay: factor of the backbone's learning rate from each layer to the one before it (layers as timm groups
            them); 1 for none. Pretrained ViTs are often trained with 0.8, so that their first layers change little.
        weight_decay: on weights of convolutions and linear layers; norms, biases and embeddings have none. ``auto``
            suits the optimiser, as for ``beta2`` and ``clip_norm``.
        beta2: decay of the second moment in AdamW.
        warmup_steps: linear warm-up, in optimiser steps; ``auto`` is a twentieth of the run's steps, 1000 at most.
        schedule: after the warm-up: ``cosine`` to ``final_lr``, ``linear`` to it, ``constant``, or ``flat_cosine``: the
            peak until the share ``flat`` of the run, then a cosine to ``final_lr``, which it reaches where
            ``data.augment.last_epochs`` begin and keeps in them (RTMDet, DEIM).
        flat: share of the run's steps, 0..1, warm-up among them, at which the cosine of ``flat_cosine`` begins.
        final_lr: fraction of the peak that the schedule ends at.
        accumulate: batches per optimiser step, which uses the mean of their losses.
        clip_norm: largest gradient norm; 0 switches clipping off.
        ema_decay: of the exponential moving average that is evaluated and saved; 0 switches it off. ``auto`` averages
            over about a fiftieth of the run's steps, and has the largest decay, 0.9999, from 500,000 steps on.
        ema_warmup: steps over which the decay rises to its value (decay * (1 - exp(-step / ema_warmup))); ``auto`` is a
            hundredth of the run's steps.
        val_interval: epochs between evaluations (the last epoch is always evaluated); ``auto`` gives about fifty in a
            run, and one after every epoch of a shorter one.
        patience: evaluations without a better AP before the run stops early; 0 never stops. ``auto`` is as many as the
            run has until its learning rate has fallen to a quarter of the peak (two thirds of a cosine's), 10 at least
            and a quarter of the run; 0 where the run has fewer than 20 evaluations or the data sets more than 2000
            validation images. A run that is resumed keeps its number, also with more ``epochs``.
        precision: ``auto`` is bf16 where that is faster. On a GPU fp32 multiplies matrices in TF32.
        compile: compile backbone and neck with ``torch.compile``: faster steps, after minutes of compilation at the
            start, and again at each new size of images (``multi_scale``).
        cuda_graphs: on a single GPU, start the kernels of backbone and neck by CUDA graphs, see
            ``mvision.engine.graphs``: faster steps where the CPU is the slower one.
        freeze: parts that are not trained.
        task_weights: by head, the factor of its loss terms in the loss; 1 for the others. A head that serves two tasks
            has one factor: that of instance-seg applies to its boxes too.
        class_weights: how much an object counts in the class terms of the losses (for semantic-seg: its pixels), by its
            class: ``{name: weight}``, 1 for the others, or ``balanced``: in inverse proportion to the number of objects
            of the class. Both are scaled so that the mean over all objects is 1. With ``data.tile`` an object counts in
            every tile that has it. Where an object is, its mask and its points are learned with the same weight for all
            classes. None: all count alike.
        seed: of all random numbers; NumPy takes 32 bits.
        trackers: any of accelerate's trackers, such as tensorboard, wandb, mlflow.
    """

    epochs: Auto | Annotated[int, Field(ge=1, le=MOST_STEPS)] = "auto"
    full_epochs: int = Field(72, ge=1, le=MOST_STEPS)
    least_steps: int = Field(2000, ge=1, le=MOST_STEPS)
    batch_size: int = Field(16, ge=1, le=2**16)
    optimizer: Auto | Literal["adamw", "muon"] = "auto"
    lr: Auto | Annotated[float, Field(gt=0, le=100)] = "auto"
    base_lr: Auto | Annotated[float, Field(gt=0, le=100)] = "auto"
    backbone_lr: Auto | Annotated[float, Field(gt=0, le=100)] | None = "auto"
    layer_decay: float = Field(1.0, gt=0, le=1)
    weight_decay: Auto | Annotated[float, Field(ge=0, le=100)] = "auto"
    beta2: Auto | Annotated[float, Field(gt=0, lt=1)] = "auto"
    warmup_steps: Auto | Annotated[int, Field(ge=0, le=MOST_STEPS)] = "auto"
    schedule: Literal["cosine", "linear", "constant", "flat_cosine"] = "cosine"
    flat: float = Field(0.5, ge=0, le=1)
    final_lr: float = Field(0.01, ge=0, le=1)
    accumulate: int = Field(1, ge=1, le=MOST_STEPS)
    clip_norm: Auto | Annotated[float, Field(ge=0, le=1e12)] = "auto"
    ema_decay: Auto | Annotated[float, Field(ge=0, lt=1)] = "auto"
    ema_warmup: Auto | Annotated[int, Field(ge=1, le=MOST_STEPS)] = "auto"
    val_interval: Auto | Annotated[int, Field(ge=1, le=MOST_STEPS)] = "auto"
    patience: Auto | Annotated[int, Field(ge=0, le=MOST_STEPS)] = "auto"
    precision: PrecisionOption = "auto"
    compile: bool = False
    cuda_graphs: bool = True
    freeze: list[Literal["backbone", "neck"]] = []
    task_weights: dict[str, float] = {}
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0, le=1e6)]] | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    trackers: list[str] = []

    retired = {"channels_last": [Replacement(True)]}

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, value: Any) -> Any:
        return without_retired(cls, "train", value) if isinstance(value, dict) else value


class DecidedTrain(TrainConfig):
    """The section of a run that has begun: nothing is ``auto``."""

    epochs: int
    optimizer: Literal["adamw", "muon"]
    lr: float
    backbone_lr: float | None
    weight_decay: float
    beta2: float
    warmup_steps: int
    clip_norm: float
    ema_decay: float
    ema_warmup: int
    val_interval: int
    patience: int

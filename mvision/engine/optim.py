"""What is optimised how: parameter groups, the learning rate at a step, the moving average of the weights."""

from __future__ import annotations

import math

import torch
from timm.optim.muon import Muon
from timm.utils import ModelEmaV3
from torch import nn

from mvision.config import TrainConfig
from mvision.model import Model

MIN_ROWS = 16
NEWTON_SCHULZ_STEPS = 3


def build_optimizer(model: Model, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices and NAdamW for the rest; backbone and other parameters in groups of their own.

    Norms, biases and embeddings (one dimension, or an ``nn.Embedding``) are neither decayed nor orthogonalised; nor are
    matrices with fewer than ``MIN_ROWS`` rows orthogonalised, the last layers of classifiers and box heads. Every group
    remembers its peak learning rate as ``peak_lr``; ``set_learning_rate`` scales it.

    Muon's usual five Newton-Schulz steps are three here: the last two cost time and taught nothing (AP 0.220 against
    0.216 after 300 steps of the built-in set).

    Source of Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and id(parameter) not in embeddings
            matrix = config.optimizer == "muon" and decayed and len(parameter) >= MIN_ROWS
            groups.setdefault((name.startswith("backbone."), decayed, matrix), []).append(parameter)
    settings = []
    for (in_backbone, decayed, matrix), parameters in groups.items():
        peak = config.backbone_lr if in_backbone and config.backbone_lr is not None else config.lr
        decay = config.weight_decay if decayed else 0.0
        group = {"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        settings.append(group if config.optimizer == "adamw" else group | {"use_muon": matrix})
    betas = (0.9, config.beta2)
    if config.optimizer == "muon":
        return Muon(settings, betas=betas, nesterov=True, ns_steps=NEWTON_SCHULZ_STEPS)
    return torch.optim.AdamW(settings, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total: int) -> float:
    """Set the learning rates for this optimiser step (of ``total``), and return the factor on the peak, 0..1.

    The rate is a function of the step alone, so a resumed run needs no scheduler state.
    """
    factor = _factor(config, step, total)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


def _factor(config: TrainConfig, step: int, total: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    if config.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        shape = 1 - progress
    else:
        shape = 1.0
    return config.final_lr + (1 - config.final_lr) * shape


class Ema(ModelEmaV3):
    """Moving average of all weights and buffers whose decay rises as ``decay * (1 - exp(-step / warmup))``.

    The rise lets the average follow the fast changes of the first steps (as in RT-DETR's recipe).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: int) -> None:
        super().__init__(model, decay=decay)
        self.warmup = warmup

    def get_decay(self, step: int | None = None) -> float:
        """The decay at an optimiser step."""
        return self.decay * (1 - math.exp(-((step or 0) + 1) / self.warmup))

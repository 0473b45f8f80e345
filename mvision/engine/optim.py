"""The optimiser with its parameter groups, the learning rate at a step, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mvision.compat import copy_all, move_all_towards
from mvision.config import DecidedTrain
from mvision.engine.muon import Muon
from mvision.machine import computes_in_bf16
from mvision.model import Model

MIN_ROWS = 16
"""Muon leaves matrices with fewer rows to AdamW: the last layers of classifiers and box heads."""


def build_optimizer(model: Model, config: DecidedTrain) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon for weight matrices and AdamW with Nesterov momentum for the others.

    Parameters with one dimension (norms, biases), embeddings, and what timm excludes in the backbone (tokens, learned
    positions) have no weight decay, and AdamW in both cases. Every parameter group has its peak learning rate as
    ``peak_lr``, which ``set_learning_rate`` scales; the backbone's is ``backbone_lr`` where that is set, and falls by
    ``layer_decay`` from its last layer to its first. The branch of details beside a ViT counts as part of the neck.
    Either optimiser has the attribute ``found_inf``, see ``Muon``.

    Raises:
        UserError: a ``layer_decay`` for a backbone whose layers have no known order.
    """
    layers = {} if config.layer_decay == 1 else model.backbone.layers_from_end()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    plain = embeddings | {id(model.backbone.get_parameter(name)) for name in model.backbone.without_decay()}
    groups: dict[tuple[int | None, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and id(parameter) not in plain
            matrix = config.optimizer == "muon" and decayed and len(parameter) >= MIN_ROWS
            in_backbone = name.startswith("backbone.") and not name.startswith("backbone.detail.")
            layer = layers.get(name.removeprefix("backbone."), 0) if in_backbone else None
            groups.setdefault((layer, decayed, matrix), []).append(parameter)
    settings = []
    for (layer, decayed, matrix), parameters in groups.items():
        peak = config.backbone_lr if layer is not None and config.backbone_lr is not None else config.lr
        peak *= config.layer_decay ** (layer or 0)
        decay = config.weight_decay if decayed else 0.0
        group = {"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        settings.append(group if config.optimizer == "adamw" else group | {"use_muon": matrix})
    betas = (0.9, config.beta2)
    if config.optimizer == "muon":
        in_bf16 = computes_in_bf16(next(model.parameters()).device)
        return Muon(settings, betas, torch.bfloat16 if in_bf16 else torch.float32)
    return torch.optim.AdamW(settings, betas=betas, fused=True)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: DecidedTrain, step: int, total: int, last: int = 0
) -> float:
    """Set every group's learning rate for optimiser step ``step`` of ``total``; returns it as a fraction of the peak.

    The rate depends on the step alone, so a resumed run needs no scheduler state.

    Args:
        last: number of steps at the end of the run in which ``flat_cosine`` stays at its lowest rate.
    """
    factor = _factor(config, step, total, last)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


def falling_part(config: DecidedTrain, total: int, last: int) -> tuple[int, int]:
    """The first step at which the learning rate falls, and the first one at the end of the fall.

    A warm-up is never cut short; the fall has no step where nothing is left for it.
    """
    if config.schedule != "flat_cosine":
        return config.warmup_steps, total
    begin = max(config.warmup_steps, round(config.flat * total))
    return begin, max(begin, total - last)


def _factor(config: DecidedTrain, step: int, total: int, last: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    begin, end = falling_part(config, total, last)
    if step < begin:
        progress = 0.0
    else:
        progress = (step - begin) / (end - begin) if step < end else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    shapes = {"cosine": cosine, "flat_cosine": cosine, "linear": 1 - progress, "constant": 1.0}
    return config.final_lr + (1 - config.final_lr) * shapes[config.schedule]


class Ema(ModelEmaV3):
    """Moving average of all weights and buffers with a decay of ``decay * (1 - exp(-(step + 1) / warmup))``.

    The decay is low at first, so that the average follows the fast changes of the first steps (as RT-DETR does).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: int) -> None:
        super().__init__(model, decay=decay)
        self.warmup = warmup
        self._pairs: list[list[tuple[Tensor, Tensor]]] = []

    def get_decay(self, step: int | None = None) -> float:
        """The decay at an optimiser step."""
        return self.decay * (1 - math.exp(-((step or 0) + 1) / self.warmup))

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Called by ``update``, for the same model each time; timm's looks up all the tensors anew in every step."""
        if not self._pairs:
            pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
            self._pairs = [[pair for pair in pairs if pair[0].is_floating_point() is kind] for kind in (True, False)]
        means, counts = self._pairs
        move_all_towards([mean for mean, _ in means], [value for _, value in means], 1.0 - decay)
        copy_all([count for count, _ in counts], [value for _, value in counts])


def _tensors(model: nn.Module) -> list[Tensor]:
    """All weights and buffers that are saved."""
    return list(model.state_dict(keep_vars=True).values())

"""A model is a backbone, a neck and one head per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from mvision.backbone import Backbone
from mvision.config import ModelConfig, load_config
from mvision.errors import UserError
from mvision.evaluation import Metric
from mvision.heads import head_class, serving_task
from mvision.heads.base import Head
from mvision.heads.linking import link_poses
from mvision.inference.predict import predict_images
from mvision.neck import HybridEncoder
from mvision.neck.layers import fuse_modules
from mvision.structures import Category, Instances, Targets


class Features(NamedTuple):
    """``maps``: the neck's, each (B, C, H/s, W/s), finest first; ``laterals``: the backbone's own by their stride."""

    maps: list[Tensor]
    laterals: dict[int, Tensor]


class Model(nn.Module):
    """Backbone, neck and heads, wired by their channels and strides.

    Args:
        config: the complete description; ``categories`` and at least one head are required.

    Attributes:
        heads: by task name. A task that another one includes (detection beside instance-seg) has none of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.heads:
            raise UserError("model.heads is empty: name at least one task, such as detection")
        if not config.categories:
            raise UserError("model.categories is empty: pass num_classes or categories, or train on a data set")
        self.config = config
        own = [task for task in config.heads if serving_task(task, config.heads) == task]
        wanted = (self._class(task).lateral_stride(config.heads[task]) for task in own)
        self.backbone = Backbone(config.backbone, config.image_size, {stride for stride in wanted if stride})
        self.neck = HybridEncoder(
            in_channels=self.backbone.channels, strides=self.backbone.strides, **config.neck.model_dump()
        )
        self.heads = nn.ModuleDict({task: self.new_head(task, config.categories) for task in own})

    def new_head(self, task: str, categories: list[Category]) -> Head:
        """A head with random weights, wired to this model's maps, for these classes."""
        settings, cls = self.config.heads[task], self._class(task)
        lateral = self.backbone.laterals.get(cls.lateral_stride(settings) or 0)
        return cls(settings, self.neck.out_channels, self.neck.strides, categories, lateral)

    def _class(self, task: str) -> type[Head]:
        return head_class(task, self.config.heads[task])

    @property
    def categories(self) -> list[Category]:
        """The classes; labels index into this list."""
        return self.config.categories

    @property
    def tasks(self) -> list[str]:
        """What the model does."""
        return list(self.config.heads)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def head(self, task: str) -> Head:
        """The head that serves a task."""
        head = self.heads[serving_task(task, self.tasks)]
        assert isinstance(head, Head)
        return head

    def evaluators(self, task: str) -> list[type[Metric]]:
        """The metrics of a task, its main one first; none that another task of this model reports already."""
        cls = self._class(task)
        elsewhere = {self._class(other).evaluator for other in cls.includes if other in self.tasks}
        return [metric for metric in (cls.evaluator, *cls.more_evaluators) if metric not in elsewhere]

    def features(self, images: Tensor) -> Features:
        """What the heads work on.

        Args:
            images: (B, 3, H, W), float in 0..1 or uint8; normalisation happens inside.
        """
        maps = self.backbone(images)
        laterals = dict(zip(self.backbone.laterals, maps))
        return Features(self.neck(maps[len(laterals) :]), laterals)

    def run_head(self, task: str, features: Features, targets: list[Targets] | None = None) -> Any:
        """The raw outputs of the head ``task`` (a key of ``heads``), see ``Head.forward``."""
        lateral = features.laterals.get(self._class(task).lateral_stride(self.config.heads[task]) or 0)
        return self.heads[task](features.maps, lateral, targets)

    def forward(self, images: Tensor, targets: list[Targets] | None = None) -> dict[str, Any]:
        """Raw outputs by task name; in training by the name of the head.

        Args:
            images: (B, 3, H, W), float in 0..1 or uint8.
            targets: in training only; the outputs then hold what ``loss`` needs.
        """
        features = self.features(images)
        outputs = {
            task: self.run_head(task, features, None if targets is None else self._labels_for(task, targets))
            for task in self.heads
        }
        if targets is None:
            for task in self.tasks:
                if task not in outputs:
                    outputs[task] = self.head(task).outputs_of(task, outputs[serving_task(task, self.tasks)])
        return outputs

    def loss(self, outputs: dict[str, Any], targets: list[Targets]) -> dict[str, Tensor]:
        """Named, weighted terms of all heads, as ``task/term``; their sum is the loss."""
        return {
            f"{task}/{name}": value
            for task in self.heads
            for name, value in self.head(task).loss(outputs[task], self._labels_for(task, targets)).items()
        }

    def _labels_for(self, task: str, targets: list[Targets]) -> list[Targets]:
        """What a head may learn from every image: the labels that were made for the tasks that it serves."""
        served = [other for other in self.tasks if serving_task(other, self.tasks) == task]
        chosen = []
        for target in targets:
            if target.tasks is not None:
                needs = [self._class(other).needs for other in served if other in target.tasks]
                target = target.only(frozenset().union(*needs))
            chosen.append(target)
        return chosen

    def postprocess(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float = 0.5
    ) -> list[Instances]:
        """What was found in every image, in pixels of images of these (height, width).

        The heads of a joint model see the same objects. Poses are linked to what the first head of objects found (see
        ``mvision.heads.linking``), regions are in ``Instances.regions``.
        """
        order = ("objects", "poses", "regions")
        tasks = sorted(self.heads, key=lambda task: order.index(self.head(task).kind))
        first = self.head(tasks[0]).postprocess(outputs[tasks[0]], sizes, threshold)
        for task in tasks[1:]:
            head = self.head(task)
            if head.kind == "poses":
                # Which pose belongs to an object that is sure is a question of place, not of the pose's own score.
                found = head.postprocess(outputs[task], sizes, 0.0)
                first = [link_poses(*pair, threshold) for pair in zip(first, found)]
            elif head.kind == "regions":
                found = head.postprocess(outputs[task], sizes, threshold)
                first = [replace(objects, regions=regions) for objects, regions in zip(first, found)]
        return first

    def results(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float = 0.0
    ) -> dict[str, list[Instances]]:
        """What every head found, by task, each with its own scores and without links: what metrics are computed on."""
        found = {task: self.head(task).postprocess(outputs[task], sizes, threshold) for task in self.heads}
        return {task: found[serving_task(task, self.tasks)] for task in self.tasks}

    def predict(
        self, images: Sequence[str | Image | np.ndarray], threshold: float = 0.5, batch_size: int | None = None
    ) -> list[Instances]:
        """Find objects in files, PIL images or (H, W, 3) uint8 RGB arrays; scores >= ``threshold`` (0..1) are kept."""
        return predict_images(self, images, threshold=threshold, batch_size=batch_size)

    def fuse(self) -> Model:
        """Re-parameterise for inference, in place: same outputs, fewer operations, no more training."""
        self.backbone.fuse()
        fuse_modules(self)
        return self


def create_model(
    name: str = "tiny",
    tasks: Sequence[str] = ("detection",),
    num_classes: int | None = None,
    categories: Sequence[Category | str] | None = None,
    **settings: Any,
) -> Model:
    """A model with random weights (or a pretrained backbone, with ``backbone__pretrained=True``).

    Args:
        name: a shipped model or any timm feature backbone.
        tasks: the heads.
        num_classes: classes are then named "0", "1", ...; or give ``categories`` (names or ``Category``).
        settings: anything in the model's section of the config, levels joined by two underscores, such as
            ``neck__embed_dim=192`` or ``image_size=320``.
    """
    classes: Sequence[Category | str]
    if categories is not None:
        classes = categories
    elif num_classes is not None:
        classes = [str(index) for index in range(num_classes)]
    else:
        raise UserError("create_model needs num_classes or categories")
    described = [
        entry if isinstance(entry, Category) else Category(id=index, name=entry) for index, entry in enumerate(classes)
    ]
    overrides: dict[str, Any] = {f"model.{key.replace('__', '.')}": value for key, value in settings.items()}
    overrides["model.categories"] = [entry.model_dump() for entry in described]
    return Model(load_config(name, tasks=list(tasks), overrides=overrides).model)

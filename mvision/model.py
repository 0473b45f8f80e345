"""A model: a backbone, a neck and heads for its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from mvision.backbone import Backbone
from mvision.config import ModelConfig, load_config
from mvision.errors import UserError
from mvision.evaluation import Metric
from mvision.fast.copies import prepared_copy
from mvision.heads import head_class, serving_task
from mvision.heads.base import Head
from mvision.heads.linking import link_by_query, link_poses, thresholds_of_results
from mvision.inference.predict import predict_images
from mvision.inference.selection import AskedThreshold, Selection, Threshold
from mvision.inference.tiled import predict_tiled
from mvision.inference.tiles import make_tiling
from mvision.inference.tracked import TracksVideos
from mvision.machine import PrecisionOption, inference_precision, resolve_device, torch_dtype
from mvision.neck import HybridEncoder
from mvision.neck.layers import fuse_modules
from mvision.storage.hub_model import HubModel
from mvision.structures import Category, Instances, Targets


class Features(NamedTuple):
    """Inputs of the heads.

    ``maps``: the neck's, each (B, C, H / stride, W / stride), finest first. ``laterals``: maps that the backbone
    returned for the heads, by their stride.
    """

    maps: list[Tensor]
    laterals: dict[int, Tensor]


def query_sources(config: ModelConfig) -> dict[str, str]:
    """For every head that continues with the queries of another one: its task, and that of the other head.

    Raises:
        UserError: there is no head whose queries it can take.
    """
    classes = {
        task: head_class(task, settings)
        for task, settings in config.heads.items()
        if serving_task(task, config.heads) == task
    }
    dims = {task: cls.query_dim(config.heads[task]) for task, cls in classes.items()}
    found = {}
    for task, cls in classes.items():
        try:
            source = cls.takes_queries_of(config.heads[task], {other: dims[other] for other in dims if other != task})
        except ValueError as error:
            raise UserError(f"model.heads.{task}: {error}") from error
        if source is not None:
            found[task] = source
    return found


class Model(HubModel, TracksVideos, nn.Module):
    """Backbone, neck and heads, each built for the channels and strides of the one before.

    Args:
        config: the complete description; ``categories`` and at least one head are required.

    Attributes:
        heads: by task name. A task that another task of the model includes has no head of its own: instance-seg
            predicts boxes and classes, so its head serves detection too.
        fused: whether ``fuse`` was called.
        takes_queries_of: see ``query_sources``.

    Raises:
        UserError: no head, no categories, or a backbone or head that cannot be built as configured.
    """

    fused = False
    takes_queries_of: dict[str, str]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.heads:
            raise UserError("model.heads is empty: name at least one task, such as detection")
        if not config.categories:
            raise UserError("model.categories is empty: pass num_classes or categories, or train on a data set")
        self.config = config
        # Looked up here: a forward pass that imports by name cannot be compiled.
        self._served_by = {task: serving_task(task, config.heads) for task in config.heads}
        own = [task for task, server in self._served_by.items() if server == task]
        laterals = {self._lateral_stride(task) for task in own} - {0}
        self.backbone = Backbone(config.backbone, config.image_size, laterals)
        try:
            self.neck = HybridEncoder(self.backbone.channels, self.backbone.strides, **config.neck.model_dump())
        except ValueError as error:
            raise UserError(f"model.neck: {error}") from error
        self.heads = nn.ModuleDict({task: self.new_head(task, config.categories) for task in own})
        self.takes_queries_of = query_sources(config)

    def new_head(self, task: str, categories: list[Category]) -> Head:
        """A head with random weights for this model's maps and these classes."""
        lateral = self.backbone.laterals.get(self._lateral_stride(task))
        head, neck = self._class(task), self.neck
        try:
            return head(self.config.heads[task], neck.out_channels, neck.strides, categories, lateral)
        except ValueError as error:
            raise UserError(f"model.heads.{task}: {error}") from error

    def _class(self, task: str) -> type[Head]:
        return head_class(task, self.config.heads[task])

    def _lateral_stride(self, task: str) -> int:
        """Stride of the backbone's map that the head of a task takes besides the neck's; 0 for none."""
        return self._class(task).lateral_stride(self.config.heads[task]) or 0

    @property
    def categories(self) -> list[Category]:
        """The classes; labels index into this list."""
        return self.config.categories

    @property
    def tasks(self) -> list[str]:
        """The tasks of the model, those without a head of their own included."""
        return list(self.config.heads)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def best_thresholds(self) -> dict[str, float]:
        """The threshold of every class with the largest F1, see ``thresholds_of_results``; empty if not known."""
        return thresholds_of_results(self.config.thresholds, {task: self.head(task).kind for task in self.tasks})

    @property
    def own_threads(self) -> bool:
        """Whether a runtime with threads of its own computes the forward pass, as of an exported model."""
        return False

    def head(self, task: str) -> Head:
        """The head that serves a task."""
        head = self.heads[task if task in self.heads else serving_task(task, self.tasks)]
        assert isinstance(head, Head)
        return head

    def evaluators(self, task: str) -> list[type[Metric]]:
        """The metrics of a task, its main one first, without those that an included task of this model has already."""
        cls = self._class(task)
        included = {self._class(other).evaluator for other in cls.includes if other in self.tasks}
        return [metric for metric in (cls.evaluator, *cls.more_evaluators) if metric not in included]

    def features(self, images: Tensor) -> Features:
        """The inputs of the heads.

        Args:
            images: (B, 3, H, W) RGB, float in 0..1 or uint8 in 0..255; the backbone normalises them.
        """
        maps = self.backbone(images)
        laterals = dict(zip(self.backbone.laterals, maps))
        return Features(self.neck(maps[len(laterals) :]), laterals)

    def run_head(self, task: str, features: Features, targets: list[Targets] | None = None, **more: Any) -> Any:
        """The raw outputs of the head ``task`` (a key of ``heads``), see ``Head.forward``.

        ``more``: ``queries`` of the head that ``takes_queries_of`` names; ``hand_over``, see ``Head.query_dim``.
        """
        head = cast(Head, self.heads[task])
        return head(features.maps, features.laterals.get(head.lateral_stride(head.config) or 0), targets, **more)

    def run_heads(self, features: Features, targets: list[Targets] | None = None) -> dict[str, Any]:
        """The raw outputs of all heads by task, in the order of ``heads``; arguments as in ``forward``."""
        sources = set(self.takes_queries_of.values())
        outputs: dict[str, Any] = dict.fromkeys(self.heads)
        queries = {}
        # Heads that give their queries come first. (sorted keeps the order of the others.)
        for task in sorted(self.heads, key=lambda task: task in self.takes_queries_of):
            labels = None if targets is None else self._labels_for(task, targets)
            source = self.takes_queries_of.get(task)
            if task in sources:
                outputs[task], queries[task] = self.run_head(task, features, labels, hand_over=True)
            elif source is None:
                outputs[task] = self.run_head(task, features, labels)
            else:
                outputs[task] = self.run_head(task, features, labels, queries=queries[source])
        return outputs

    def forward(self, images: Tensor, targets: list[Targets] | None = None) -> dict[str, Any]:
        """Raw outputs by task; in training only of the tasks that have a head of their own, see ``heads``.

        Args:
            images: (B, 3, H, W) RGB, float in 0..1 or uint8 in 0..255.
            targets: in training only; each head then returns what its ``loss`` needs.
        """
        outputs = self.run_heads(self.features(images), targets)
        if targets is None:
            for task, server in self._served_by.items():
                if task not in outputs:
                    outputs[task] = cast(Head, self.heads[server]).outputs_of(task, outputs[server])
        return outputs

    def loss(self, outputs: dict[str, Any], targets: list[Targets]) -> dict[str, Tensor]:
        """The terms of all heads, named ``task/term`` and already weighted; their sum is the loss."""
        return {
            f"{task}/{name}": value
            for task in self.heads
            for name, value in self.head(task).loss(outputs[task], self._labels_for(task, targets)).items()
        }

    def _labels_for(self, task: str, targets: list[Targets]) -> list[Targets]:
        """The labels that supervise the head ``task``.

        An image may be labelled for some tasks only (``Targets.tasks``): the head gets the labels of those that it
        serves, and none if it serves none of them.
        """
        served = [other for other in self.tasks if serving_task(other, self.tasks) == task]
        needs = {other: self._class(other).needs for other in served}
        return [
            target
            if target.tasks is None
            else target.only({name for other in served if other in target.tasks for name in needs[other]})
            for target in targets
        ]

    def postprocess(
        self,
        outputs: dict[str, dict[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
        threshold: Threshold = 0.5,
        *,
        multi_label: bool = False,
        nms: float | None = None,
        tasks: Sequence[str] | None = None,
    ) -> list[Instances]:
        """The results of all heads, one ``Instances`` per image, in pixels of the original images.

        Poses are linked to objects (see ``mvision.heads.linking``): those that share the queries of the objects by the
        query, so that every reported object gets the pose of its query whatever that one's score, and all others by
        overlap. Regions are in ``Instances.regions``. Of several heads that predict objects the first one's results are
        taken; ``results`` has those of every head.

        Args:
            outputs: of ``forward``.
            sizes: (height, width) of the original images.
            threshold, multi_label, nms: see ``Selection``, not of regions; tasks: whose heads are asked, None: all.
        """
        chosen = Selection(threshold, multi_label, nms)
        order = ("objects", "poses", "regions")
        asked = {serving_task(task, self.tasks) for task in (self.tasks if tasks is None else tasks)}
        heads = [task for task in self.heads if task in asked]
        first, *others = sorted(heads, key=lambda task: order.index(self.head(task).kind))
        merged = self._chosen(first, outputs, sizes, chosen)
        for task in others:
            head = self.head(task)
            if self.takes_queries_of.get(task) == first:
                points = head.points_of_queries(outputs[task], sizes)
                merged = [link_by_query(found, *of_image) for found, of_image in zip(merged, points)]
            elif head.kind == "poses":
                poses, new = self._poses(task, outputs, sizes, chosen)
                linked = [link_poses(found, of, chosen.lowest, alone) for found, of, alone in zip(merged, poses, new)]
                merged = [chosen.without_overlaps(found) for found in linked]
            elif head.kind == "regions":
                regions = self._chosen(task, outputs, sizes, chosen)
                merged = [replace(objects, regions=others) for objects, others in zip(merged, regions)]
        return merged

    def _chosen(
        self, task: str, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], chosen: Selection
    ) -> list[Instances]:
        """What a selection takes of the results of one head: all regions, because a pixel has its best class."""
        head = self.head(task)
        if head.kind == "regions":
            return head.postprocess(outputs[task], sizes, 0.0)
        raw = outputs[task] if chosen.multi_label else head.best_class_only(outputs[task])
        return [chosen.without_overlaps(chosen.above(one)) for one in head.postprocess(raw, sizes, chosen.lowest)]

    def _poses(
        self, task: str, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], chosen: Selection
    ) -> tuple[list[Instances], list[Instances]]:
        """The poses of every image that objects may get, and those of them that a selection takes.

        The former have any score and class: an object above the threshold gets its pose even where that one's score is
        lower, or is higher for another class. Both come from one call of the head, whose results are copied once.
        """
        head, raw = self.head(task), outputs[task]
        best = raw if chosen.multi_label else head.best_class_only(raw)
        if best is raw:
            poses = of_best = head.postprocess(raw, sizes, 0.0)
        else:
            both = head.postprocess({name: torch.cat((raw[name], best[name])) for name in raw}, [*sizes, *sizes], 0.0)
            poses, of_best = both[: len(sizes)], both[len(sizes) :]
        return poses, [chosen.above(found.filter(found.scores >= chosen.lowest)) for found in of_best]

    def results(
        self, outputs: dict[str, dict[str, Tensor]], sizes: Sequence[tuple[int, int]], threshold: float = 0.0
    ) -> dict[str, list[Instances]]:
        """The results of every task, not merged, for metrics; arguments as in ``postprocess``."""
        by_head = {task: self.head(task).postprocess(outputs[task], sizes, threshold) for task in self.heads}
        return {task: by_head[serving_task(task, self.tasks)] for task in self.tasks}

    def predict(
        self,
        images: Sequence[str | Image | np.ndarray],
        threshold: AskedThreshold = 0.5,
        batch_size: int | None = None,
        *,
        multi_label: bool = False,
        nms: float | None = None,
        tile: int | tuple[int, int] | None = None,
        overlap: float | None = None,
        whole: bool = True,
        precision: PrecisionOption = "auto",
        device: str | torch.device | None = None,
    ) -> list[Instances]:
        """Predict on files, PIL images or (H, W, 3) uint8 RGB arrays, as fast as ``mvision predict`` does in PyTorch.

        The model stays as it is, in its mode and its precision. What runs is a prepared copy of it for the device and
        precision, which the first call makes (about a second) and which takes as much memory as the weights in that
        precision. After the weights have changed, the next call makes it anew. The logger ``mvision`` says once which
        runtime is taken, on stderr where a program has not set up its logging. A model that ``fuse`` has prepared runs
        as it is.

        Args:
            images, threshold, batch_size, multi_label, nms: see ``mvision.inference.predict.predict_images``.
            tile, overlap, whole: predict on tiles of so many pixels, see ``mvision.inference.tiles.make_tiling`` and
                ``mvision.inference.tiled.predict_tiled``.
            precision: ``fp32``, ``bf16`` or ``fp16``; ``auto``: the fastest one of this device, see
                ``mvision.machine.resolve_precision``. The difference in AP is in docs/measurements.md.
            device: None: where the model's weights are.

        Raises:
            UserError: as ``predict_images``; a device that cannot be used, or a precision that it does not have.
        """
        tiling = make_tiling(tile, overlap, whole)
        run = predict_images if tiling is None else partial(predict_tiled, tiling=tiling)
        model = self._for_prediction(precision, device)
        # A copy computes in its own precision, whatever the caller's autocast is set to.
        with nullcontext() if model is self else torch.autocast(model.device.type, enabled=False):
            return run(model, images, threshold=threshold, batch_size=batch_size, multi_label=multi_label, nms=nms)

    def _for_prediction(self, precision: PrecisionOption, device: str | torch.device | None) -> Model:
        """The model that ``predict`` runs: a prepared copy, or this one if it is prepared."""
        wanted = self.device if device is None else resolve_device(str(device))
        if not self.fused:
            return prepared_copy(self, wanted, inference_precision(precision, wanted))
        dtype = next(self.parameters()).dtype
        if torch.empty(0, device=wanted).device != self.device or (
            precision != "auto" and torch_dtype(precision) != dtype
        ):
            raise UserError(
                f"a fused model predicts as it is, on {self.device} in {str(dtype).removeprefix('torch.')}; load its "
                "weights again to choose another device or precision"
            )
        return self

    def fuse(self) -> Model:
        """Re-parameterise for inference, in place: the same outputs with fewer operations; training ends here."""
        self.backbone.fuse()
        fuse_modules(self)
        self.fused = True
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
        name: a shipped model or the name of a backbone (see ``BackboneConfig.name``).
        tasks: each gets a head; or the name of one.
        num_classes: classes are then named "0", "1", ...
        categories: the classes instead of their number, as names or ``Category``.
        settings: any key of the config's section ``model``, levels joined by two underscores, such as
            ``neck__embed_dim=192`` or ``image_size=320``.

    Raises:
        UserError: neither num_classes nor categories; an unknown name, task or setting.
    """
    if categories is None:
        if num_classes is None:
            raise UserError("create_model needs num_classes or categories")
        categories = [str(index) for index in range(num_classes)]
    described = [each if isinstance(each, Category) else Category(id=i, name=each) for i, each in enumerate(categories)]
    overrides: dict[str, Any] = {f"model.{key.replace('__', '.')}": value for key, value in settings.items()}
    overrides["model.categories"] = [entry.model_dump() for entry in described]
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    return Model(load_config(name, tasks=names, overrides=overrides).model)

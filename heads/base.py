"""The interface of a head: a module with a loss, a post-processing and a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mvision.evaluation import Metric
from mvision.settings import Settings
from mvision.structures import Category, Instances, Targets

ConfigT = TypeVar("ConfigT", bound=Settings)
OutputsT = TypeVar("OutputsT")
"""A head's training outputs: a NamedTuple, in which accelerate and DistributedDataParallel reach the tensors."""


class ObjectQueries(NamedTuple):
    """The Q queries of a head after its last layer, which another head of the same model continues with.

    ``features`` (B, Q, D), ``boxes`` (B, Q, 4) cxcywh in 0..1, and ``logits`` (B, Q, C) of all classes of the model.
    """

    features: Tensor
    boxes: Tensor
    logits: Tensor


class Head(nn.Module, ABC, Generic[ConfigT, OutputsT]):
    """A task on the neck's maps.

    The labels of a batch are on the CPU, whatever the device of the maps. A head computes there all that follows from
    labels alone, such as counts and padding, and moves it with ``mvision.structures.transfer.to_device``: one copy,
    which nothing waits for. Results come back in one copy by ``to_host``. In between, a head on a GPU must not make the
    CPU wait, as ``.item()``, ``.cpu()``, ``float(tensor)``, ``nonzero`` and indexing by a bool tensor do: the GPU would
    fall idle. ``forward`` without targets must not do so at all: it is captured in CUDA graphs and compiled.

    Class attributes:
        Config: the settings, with the keys of the task's section under ``model.heads`` of a config file.
        needs: the fields of ``Targets`` that supervise the head. A data set that lacks one of them is not used for its
            task.
        evaluator: the metric of the task.
        primary_metric: the figure of that metric by which the best weights of a run are chosen, the higher the better.
        more_evaluators: further metrics; their figures are reported with their name in front, such as ``bbox/AP``.
        kind: what ``postprocess`` returns: ``objects``, ``poses`` of objects, or ``regions``, one for each class in the
            image. A joint model links poses to objects and returns regions separately.
        weighs_classes: whether ``loss`` multiplies its class term by ``class_weights``.
        includes: other tasks whose outputs are part of this head's, see ``outputs_of``. In a joint model they get no
            head of their own. ``Config`` has to have all settings of theirs.
    """

    Config: ClassVar[type[Settings]]
    needs: ClassVar[frozenset[str]]
    evaluator: ClassVar[type[Metric]]
    primary_metric: ClassVar[str] = "AP"
    more_evaluators: ClassVar[tuple[type[Metric], ...]] = ()
    kind: ClassVar[Literal["objects", "poses", "regions"]] = "objects"
    weighs_classes: ClassVar[bool] = False
    includes: ClassVar[tuple[str, ...]] = ()
    class_weights: Tensor | None

    def __init__(
        self,
        config: ConfigT,
        channels: Sequence[int],
        strides: Sequence[int],
        categories: list[Category],
        lateral: int | None = None,
    ) -> None:
        """Build the head with random weights.

        Args:
            config: the settings.
            channels, strides: of the neck's maps, finest first.
            categories: all classes of the model.
            lateral: channels of the backbone's map of stride ``lateral_stride``; None where the backbone has none.
        """
        super().__init__()
        self.config = config
        self.categories = categories
        self.channels, self.strides, self.lateral_dim = channels, strides, lateral
        # (categories,) how often an object of each class counts in the class term; None: all count once. It belongs to
        # a training and is not in weights files.
        self.register_buffer("class_weights", None, persistent=False)
        self.build()

    def build(self) -> None:
        """Create the layers; the constructor calls this after it has stored its arguments."""

    @classmethod
    def lateral_stride(cls, config: ConfigT) -> int | None:
        """Stride of a map of the backbone that the head takes besides the neck's maps; None if it takes none.

        The head gets it only if the backbone has such a map, and if it is finer than all of the neck's.
        """
        return None

    @classmethod
    def query_dim(cls, config: ConfigT) -> int | None:
        """The length of the features of ``ObjectQueries`` that the head can give to others; None if it has no queries.

        A head with queries has one more argument of ``forward``, ``hand_over``: if it is true, the head returns a pair
        of its outputs and its ``ObjectQueries``, in training those without denoising.
        """
        return None

    @classmethod
    def takes_queries_of(cls, config: ConfigT, query_dims: Mapping[str, int | None]) -> str | None:
        """The task whose head gives this head its ``ObjectQueries``; None if the head needs none.

        A head that takes queries has one more argument of ``forward``, ``queries``, and ``points_of_queries``.

        Args:
            query_dims: ``query_dim`` of every head of the model, by task.

        Raises:
            ValueError: the head needs queries, and none of the others has such.
        """
        return None

    @classmethod
    def predicted(cls, categories: list[Category]) -> list[Category]:
        """Those of the model's classes that the head predicts, in order: all, unless a subclass can do some only."""
        return categories

    @property
    def classes(self) -> list[Category]:
        """The classes that this head predicts, see ``predicted``."""
        return self.predicted(self.categories)

    @classmethod
    def outputs_of(cls, task: str, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of an included task, taken from the inference outputs of this head."""
        raise NotImplementedError(f"{cls.__name__} includes no task {task}")

    @abstractmethod
    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | OutputsT | tuple[Any, ObjectQueries]:
        """Raw outputs.

        Args:
            maps: the neck's, each (B, C, H / stride, W / stride), finest first.
            lateral: the backbone's map (B, lateral, H / stride, W / stride), if the head was built with its channels.
            targets: the labels, on the CPU, in training only: denoising queries are made from them.

        Returns:
            Without ``targets`` a dictionary of tensors for ``postprocess``, with them the input of ``loss``.
        """

    @abstractmethod
    def loss(self, outputs: OutputsT, targets: list[Targets]) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; their sum is the loss. They are finite for a batch without objects.

        Args:
            outputs: of ``forward`` with targets.
            targets: the labels, on the CPU. The terms stay on the device of the outputs.
        """

    def points_of_queries(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of poses that continue with the queries of another head: whose they are, and their points, for every image.

        Args:
            outputs: of ``forward`` without targets.
            sizes: (height, width) of the original images.

        Returns:
            (N,) int64 indices of the other head's queries, each once, and (N, K, 3) x, y in pixels and a score.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no queries of other heads")

    def best_class_only(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same outputs without the classes that are not the best of their query, as ``postprocess`` needs them.

        For prediction, where an object is not to be reported twice under two names; metrics take all classes. A head
        whose objects have one class each already need not override it: the outputs themselves say that nothing is left
        out.
        """
        return outputs

    @abstractmethod
    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """The predictions with scores >= ``threshold`` (0..1), in pixels of the original images, on the CPU.

        Args:
            outputs: of ``forward`` without targets.
            sizes: (height, width) of the original images.
        """


def only_best_class(logits: Tensor) -> Tensor:
    """(..., C) the highest of the C logits, minus infinity in place of the others."""
    best = logits.argmax(-1, keepdim=True)
    return torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))

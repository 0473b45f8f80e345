"""The interface of a head: a module with its loss, its post-processing and its metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, Literal, TypeVar

from torch import Tensor, nn

from mvision.evaluation import Metric
from mvision.settings import Settings
from mvision.structures import Category, Instances, Targets

ConfigT = TypeVar("ConfigT", bound=Settings)
OutputsT = TypeVar("OutputsT")
"""What a head returns in training: a NamedTuple, which wrappers for mixed precision and several processes look into."""


class Head(nn.Module, ABC, Generic[ConfigT, OutputsT]):
    """One task on the neck's maps.

    Class attributes:
        Config: the settings, a pydantic model that the YAML's section of this head mirrors one to one.
        needs: the fields of ``Targets`` that supervise the head; images without them are skipped for it.
        evaluator: the metric of the task.
        primary_metric: the one of its figures by which the best weights of a run are chosen.
        more_evaluators: further metrics, whose figures are reported beside those of ``evaluator`` (as ``bbox/AP``).
        kind: what the results are: ``objects``, ``poses`` of objects, or ``regions``, one for each class in the image.
            In a joint model poses are linked to objects, and regions stay apart.
        includes: tasks of which this head gives everything itself. In a joint model it serves them as well, with what
            ``outputs_of`` says, and they get no head of their own; its settings have to contain theirs.
    """

    Config: ClassVar[type[Settings]]
    needs: ClassVar[frozenset[str]]
    evaluator: ClassVar[type[Metric]]
    primary_metric: ClassVar[str] = "AP"
    more_evaluators: ClassVar[tuple[type[Metric], ...]] = ()
    kind: ClassVar[Literal["objects", "poses", "regions"]] = "objects"
    includes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: ConfigT,
        channels: Sequence[int],
        strides: Sequence[int],
        categories: list[Category],
        lateral: int | None = None,
    ) -> None:
        """Build the head.

        Args:
            config: its settings.
            channels, strides: of the neck's maps, finest first.
            categories: all classes of the model.
            lateral: channels of the backbone's map that ``lateral_stride`` asks for; None where there is none.
        """
        super().__init__()
        self.config = config
        self.categories = categories

    @classmethod
    def lateral_stride(cls, config: ConfigT) -> int | None:
        """Stride of a map that the head wants from the backbone itself, besides the neck's; None for none.

        It is given where the backbone has it and the neck's maps are all coarser.
        """
        return None

    @classmethod
    def predicted(cls, categories: list[Category]) -> list[Category]:
        """Those of the classes that the head can find, which have a row of their own in its layers: all by default."""
        return categories

    @property
    def classes(self) -> list[Category]:
        """The classes that this head finds, see ``predicted``."""
        return self.predicted(self.categories)

    @classmethod
    def outputs_of(cls, task: str, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the head of an included task would give, out of this one's outputs (not in training)."""
        raise NotImplementedError(f"{cls.__name__} includes no task {task}")

    @abstractmethod
    def forward(
        self, maps: list[Tensor], lateral: Tensor | None = None, targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | OutputsT:
        """Raw outputs.

        Args:
            maps: the neck's, each (B, C, H/s, W/s), finest first.
            lateral: the backbone's map of stride ``lateral_stride``, where the head was built with its channels.
            targets: in training only (denoising queries are made from them).

        Returns:
            A dictionary of tensors for ``postprocess``; in training what ``loss`` reads.
        """

    @abstractmethod
    def loss(self, outputs: OutputsT, targets: list[Targets]) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; their sum is the loss. Without any object they are finite."""

    @abstractmethod
    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """Instances in pixels of the original images, whose (height, width) are ``sizes``; scores >= ``threshold``."""

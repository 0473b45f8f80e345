"""The interface of a head: a module with its loss and its post-processing beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, Literal, TypeVar

from torch import Tensor, nn

from mvision.settings import Settings
from mvision.structures import Category, Instances, Targets

ConfigT = TypeVar("ConfigT", bound=Settings)


class Head(nn.Module, ABC, Generic[ConfigT]):
    """One task on the neck's features.

    Class attributes:
        Config: the settings, a pydantic model that the YAML's section of this head mirrors one to one.
        needs: the fields of ``Targets`` that supervise the head; images without them are skipped for it.
        metric: picks the evaluator: ``bbox``, ``segm``, ``keypoints`` or ``semantic``.
        figure: the one of its figures by which the best weights of a run are chosen.
        kind: what the results are: ``objects``, ``poses`` of objects, or ``regions``, one for each class in the image.
            In a joint model poses are linked to objects, and regions stay apart.
        also: further evaluators, whose figures are reported beside those of ``metric`` (as ``bbox/AP``).
        includes: tasks of which this head gives everything itself. In a joint model it serves them as well, with what
            ``outputs_of`` says, and they get no head of their own; its settings have to contain theirs.
    """

    Config: ClassVar[type[Settings]]
    needs: ClassVar[frozenset[str]]
    metric: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()
    figure: ClassVar[str] = "AP"
    kind: ClassVar[Literal["objects", "poses", "regions"]] = "objects"
    includes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, config: ConfigT, channels: Sequence[int], strides: Sequence[int], categories: list[Category]
    ) -> None:
        """Build the head for features of these channels and strides (finest first) and these classes.

        A head that asks for a lateral (see ``lateral_stride``) takes ``lateral=True`` as well: the first map is then
        the backbone's.
        """
        super().__init__()
        self.config = config
        self.categories = categories

    @classmethod
    def lateral_stride(cls, config: ConfigT) -> int | None:
        """Stride of a map that the head wants from the backbone itself, before the neck's; None for none.

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

    @classmethod
    def separable(cls, config: ConfigT) -> bool:
        """Whether the included tasks can go on without the rest of this head, with the same outputs."""
        return True

    @abstractmethod
    def forward(self, features: list[Tensor], targets: list[Targets] | None = None) -> dict[str, Tensor]:
        """Raw outputs from the neck's maps, each (B, C, H/s, W/s), finest first.

        ``targets`` are given in training only (denoising queries are made from them).
        """

    @abstractmethod
    def loss(self, outputs: dict[str, Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; their sum is the loss. Without any object they are finite."""

    @abstractmethod
    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[Instances]:
        """Instances in pixels of the original images, whose (height, width) are ``sizes``; scores >= ``threshold``."""

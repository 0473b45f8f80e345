"""A data set's folder with its settings: which files serve as training set and as validation set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mvision.config import DataConfig, MoreDataConfig
from mvision.data.formats.layouts import Layout, find_layout, is_builtin
from mvision.data.formats.split import Fold, Split
from mvision.errors import UserError
from mvision.heads import head_class


@dataclass(frozen=True)
class Folder:
    """One data set of a config.

    Attributes:
        config: its settings.
        layout: what was found in the folder.
        seed: of shares of the images.
        fold: a number, counted from 1, and how many folds there are: the images of both splits are divided into these,
            and the one of this number is for validation.
    """

    config: DataConfig | MoreDataConfig
    layout: Layout
    seed: int
    fold: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        root = self.config.root
        return "built-in" if root is None or is_builtin(root) else Path(root).resolve().name

    @property
    def holds_out(self) -> bool:
        """Whether images of the training set serve for validation."""
        return self.fold is None and self.config.val_fraction > 0 and self.config.val not in self.layout.splits

    @property
    def note(self) -> str | None:
        """What the user has to know about the choice of files."""
        if self.fold is not None:
            number, of = self.fold
            return f"fold {number} of {of}: validation on one part of the images of {' and '.join(self._divided)}"
        if self.holds_out:
            return f"validation on {self.config.val_fraction:g} of the training images, which are not trained on"
        if self.config.val_fraction > 0:
            return f"data.val_fraction is not used: {self.layout.root} has a split '{self.config.val}'"
        return None

    def split(self, name: str, tasks: Iterable[str]) -> Split:
        """The files of a split that these tasks read.

        Raises:
            UserError: there is no such split.
        """
        tasks = list(tasks)
        poses_only = all(head_class(task).kind == "poses" for task in tasks)
        split = self.layout.split(name, needs(tasks), poses_only=poses_only)
        return replace(split, ignore_iscrowd=self.config.ignore_iscrowd)

    def training(self, tasks: Iterable[str], fraction: float = 1.0) -> Split:
        """The training set, without images that are held out; ``fraction`` of it.

        Raises:
            UserError: there is none.
        """
        name = self.config.train
        if name not in self.layout.splits:
            raise UserError(
                f"{self.layout.root}: no split '{name}' to train on{self._why(name)}: it has {self._listing}; "
                f"choose one of them with -o data.train={next(iter(self.layout.splits), 'NAME')}"
            )
        split = replace(self.split(name, tasks), fraction=fraction, seed=self.seed)
        if self.fold is not None:
            return replace(split, fold=Fold(*self.fold, tuple(self.split(part, tasks) for part in self._divided)))
        return replace(split, val_fraction=self.config.val_fraction) if self.holds_out else split

    def validation(self, tasks: Iterable[str]) -> Split:
        """The validation set: the split of that name, or the images that are held out.

        Raises:
            UserError: there is no such split, and no share is to be held out.
        """
        name = self.config.val
        alone = name == "val" and name not in self.layout.missing  # the name by default, of a split that may be absent
        if self.holds_out or (self.fold is not None and (alone or name in self.layout.splits)):
            return replace(self.training(tasks), held_out=True)
        if name not in self.layout.splits:
            raise UserError(
                f"{self.layout.root}: no split '{name}' to validate on{self._why(name)}: it has {self._listing}; "
                "choose one of them (in training: -o data.val=NAME, else --split NAME), or train with a share of the "
                "training images held out: -o data.val_fraction=0.2"
            )
        return self.split(name, tasks)

    @property
    def _divided(self) -> list[str]:
        """The splits whose images are divided into folds: both, or that for training where it is the only one."""
        names = dict.fromkeys((self.config.train, self.config.val))
        return [name for name in names if name in self.layout.splits]

    def _why(self, name: str) -> str:
        return f" ({self.layout.missing[name]})" if name in self.layout.missing else ""

    @property
    def _listing(self) -> str:
        return ", ".join(list(self.layout.splits)[:10]) or "none"


def open_folders(config: DataConfig, seed: int) -> list[Folder]:
    """All data sets of a config.

    Raises:
        UserError: a folder that is not there, or in which no data set is recognised.
    """
    configs: list[DataConfig | MoreDataConfig] = [config, *config.more]
    return [Folder(one, find_layout(one.root), seed, config.fold) for one in configs]


def needs(tasks: Iterable[str]) -> frozenset[str]:
    """The fields of ``Targets`` that supervise these tasks."""
    return frozenset[str]().union(*(head_class(task).needs for task in tasks))

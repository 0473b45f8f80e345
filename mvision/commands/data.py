"""``mvision data``: check a data set, show its labels, or convert it to plain COCO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mvision.config import AugmentConfig, load_config
from mvision.data import find_layout
from mvision.data.formats.problems import Problems
from mvision.data.tools import check as checking
from mvision.data.tools import convert as converting
from mvision.data.tools.show import contact_sheet, write_image
from mvision.errors import UserError
from mvision.structures.messages import decoder_messages_hidden


def check(
    folder: str | None,
    splits: Sequence[str] = (),
    *,
    quick: bool = False,
    tasks: Sequence[str] = (),
    file: Path | None = None,
    assignments: Sequence[str] = (),
) -> checking.Report:
    """Read a data set and report its contents and its faults, see ``mvision.data.tools.check``.

    Args:
        folder: data folder; None: that of the config, else the built-in data set.
        splits: names; empty: those that a training reads, and ``test``.
        quick: read the annotations only, not the images.
        tasks: that the data is to serve; empty: as ``mvision train`` chooses them.
        file, assignments: see ``mvision.config.load_config``.

    Raises:
        UserError: no data set is recognised, it has no such split, or a mistake in the config.
    """
    options = {} if folder is None else {"data.root": folder}
    config = load_config(file=file, tasks=list(tasks), overrides=options, assignments=list(assignments))
    with decoder_messages_hidden(), tqdm(desc="reading", unit="img", leave=False, disable=None) as bar:
        return checking.check(config, splits, quick=quick, progress=bar.update)


def show(
    folder: str | None,
    output: str,
    *,
    split: str = "train",
    count: int = 16,
    augmented: bool = False,
    seed: int = 0,
    file: Path | None = None,
    assignments: Sequence[str] = (),
) -> str:
    """Write a picture of random images with their labels; returns the lines to print.

    Args:
        folder: data folder; None: the built-in data set.
        output: a .jpg or .png file.
        augmented: show the images as training uses them, with the default augmentation or that of the config.
        seed: decides which images are drawn.
        file, assignments: see ``mvision.config.load_config``; they change the augmentation alone.

    Raises:
        UserError: the data or the output file cannot be used, a mistake in the config, or a config without
            ``augmented``.
    """
    configured = file is not None or bool(assignments)
    if configured and not augmented:
        raise UserError("--config and -o change the augmentation, which is shown with --augmented alone: add it")
    augment = AugmentConfig() if augmented else None
    if configured:
        augment = load_config(file=file, assignments=list(assignments)).data.augment
    layout = find_layout(folder)
    write_image(output, contact_sheet(layout, split, count, seed=seed, augment=augment))
    return f"{layout.description}\nsheet: {output}"


def convert(folder: str, destination: Path, splits: Sequence[str] = ()) -> str:
    """Copy a data set of any readable layout into a new folder as plain COCO; returns the lines to print.

    Raises:
        UserError: the data cannot be used, or the folder is not empty.
    """
    layout = find_layout(folder)
    with decoder_messages_hidden(), tqdm(desc="copying", unit="img", leave=False, disable=None) as bar:
        problems = Problems()
        converted = converting.convert(layout, destination, splits, bar.update, problems)
    return "\n".join([layout.description, converted.description, *(f"! {problem}" for problem in problems)])

"""``mvision label``: a folder of pictures with what a model finds in them, in the format of a tool for labelling.

Every picture is predicted on once and written to a journal. When all are done, the output is made of it beside its
place and takes its name at the end: it is complete or not there, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from mvision.data.formats.label_formats import LabelFormat, check_request
from mvision.data.formats.labelled import LabelledPicture, Request, labelled_picture
from mvision.data.tools.label_journal import DATA, Journal
from mvision.errors import Stopped, UserError, printable
from mvision.inference.pipeline import ordered_map
from mvision.inference.predict import WORKERS, Predictor, Prepared, eval_mode, infer
from mvision.inference.reading import Frame, read_frames
from mvision.inference.selection import Selection, Threshold
from mvision.inference.sources import Source, Sources
from mvision.structures import Instances

LOWEST = 0.1  # scores from which objects that are left out are counted
SHOWN = 20  # files that are named; of more, the number
ODD = re.compile(
    r"[\x00-\x1f\x7f\\\ud800-\udfff\ufffe\uffff]"
)  # what XML, JSON or another system cannot hold in a name

REGIONS = "pictures with regions of semantic-seg, which are left out (--task semantic-seg writes them alone)"
RENAMED = "pictures under another name, because two names differ in their ending alone or have an odd character"
LINKED = "pictures linked by their path, because they lie on another file system (cp -rL copies them)"


@dataclass(frozen=True)
class Marking:
    """Which objects are written, and which of them are to be reviewed.

    Attributes:
        threshold: the lowest score of those that are written.
        review: those with a lower score are marked.
        nms: see ``Selection``.
    """

    threshold: Threshold
    review: Threshold
    nms: float | None = None


@dataclass
class LabelSummary:
    """What was done, for the user.

    Attributes:
        output: the folder.
        form: its format.
        marking: the thresholds.
        pictures: how many were written.
        earlier: how many of them an earlier run had done.
        objects: by class.
        review: objects to be reviewed, and pictures that have some.
        dropped: objects with too low a score, from ``LOWEST`` on.
        notes: numbers of things by what was left out or replaced.
        skipped: (file, reason) of each picture that cannot be read.
        sources: what was left out of the folder.
    """

    output: Path
    form: LabelFormat
    marking: Marking
    pictures: int = 0
    earlier: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    review: list[int] = field(default_factory=lambda: [0, 0])
    dropped: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.objects.most_common()) or "nothing found"
        before = f" ({self.earlier} of them by an earlier run)" if self.earlier else ""
        lines = [f"{self.pictures} pictures{before}: {counts}"]
        marked, of_pictures = self.review
        if marked:
            lines.append(
                f"to review: {marked} of {self.objects.total()} objects, in {of_pictures} pictures, have a score below "
                f"{_text(self.marking.review)}; marked by {self.form.review}"
            )
        if self.dropped:
            lines.append(
                f"left out: {self.dropped} objects with scores from {LOWEST} to {_text(self.marking.threshold)} "
                f"(--threshold {LOWEST} writes them)"
            )
        lines += [f"{count} x {note}" for note, count in self.notes.most_common() if count]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped[:SHOWN]]
        lines += [f"skipped: {len(self.skipped) - SHOWN} more"] * (len(self.skipped) > SHOWN)
        lines += [*self.sources, f"{self.form.title}: {self.output}", self.form.next_step.format(folder=self.output)]
        return "\n".join(map(printable, lines))


def _text(threshold: Threshold) -> str:
    return str(threshold) if isinstance(threshold, float | int) else "that of their class"


def label(
    model: Predictor,
    sources: Sources,
    target: Path,
    form: LabelFormat,
    request: Request,
    marking: Marking,
    settings: dict[str, object],
    progress: bool = True,
) -> LabelSummary:
    """Predict on pictures and write the output.

    Args:
        model: in any mode, which it keeps.
        sources: pictures; videos and others are left out and counted.
        target: a folder that does not exist yet, or is empty.
        form, request, marking: what is written.
        settings: what tells this run from others, for one that goes on.
        progress: show progress bars.

    Raises:
        UserError: the format cannot hold it, the folder is not empty or cannot be written, or no picture can be read.
        Stopped: by Ctrl-C or SIGTERM; the same call goes on.
    """
    check_request(form, request)
    for selection in (Selection(marking.threshold, nms=marking.nms), Selection(marking.review)):
        selection.check(request.categories)
    check_target(target)
    pictures = _pictures(sources)
    with Journal(target, settings) as journal:
        summary = LabelSummary(target, form, marking, sources=[*sources.notes()])
        if gone := journal.keep_only({source.name for source in pictures}):
            summary.sources.append(f"{gone} pictures of the earlier run are not in the folder any more: left out")
        todo = Sources(source for source in pictures if not journal.has(source.name, _stamp(source)))
        summary.earlier = len(pictures) - len(todo)
        try:
            with eval_mode(model):
                _predict(model, todo, journal, marking, request, summary, progress)
            if not len(journal):
                name, reason = summary.skipped[0]
                raise UserError(f"none of {len(pictures)} pictures can be read; the first is {name}: {reason}")
            _write(journal, target, form, request, pictures, summary, progress)
        except KeyboardInterrupt as error:
            hint = f"{len(journal)} pictures are done; the same command goes on" if len(journal) else ""
            raise Stopped(getattr(error, "number", signal.SIGINT), hint) from error
        except OSError as error:
            reason = f"cannot be written ({error.strerror or error}); the same command goes on where it stopped"
            raise UserError(f"--output {target}: {reason}") from error
    return summary


def check_target(target: Path) -> None:
    """Raise a ``UserError`` if there is something in the way of the output."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError(f"--output {target}: is there already and not empty; choose a new folder")


def _pictures(sources: Sources) -> Sources:
    pictures = Sources(source for source in sources if source.kind == "image" and "://" not in source.path)
    if others := len(sources) - len(pictures):
        sources.left_out["videos or streams, whose frames have to be pictures for labelling"] += others
    if not pictures:
        raise UserError(f"source {sources[0].shown}: no pictures; take the frames out of videos first")
    return pictures


def _stamp(source: Source) -> list[int]:
    """Size and time of a file; one that has changed is predicted on again."""
    try:
        found = Path(source.path).stat()
    except OSError:
        return []  # it is named when it is read
    return [found.st_size, found.st_mtime_ns]


@dataclass(frozen=True)
class _Made:
    frame: Frame
    stamp: list[int]
    picture: LabelledPicture | None
    notes: Counter[str]


DROPPED = "dropped"


def _predict(
    model: Predictor,
    todo: Sources,
    journal: Journal,
    marking: Marking,
    request: Request,
    summary: LabelSummary,
    progress: bool,
) -> None:
    """Reading, predicting and outlining overlap; memory does not grow with the number of pictures."""
    wanted = Selection(marking.threshold, nms=marking.nms)
    counted = Selection(min(LOWEST, wanted.lowest), nms=marking.nms)
    size, pixel_range = model.config.image_size, model.config.pixel_range
    frames = read_frames(todo, ahead=WORKERS, pixel_range=pixel_range, input_size=size, keep=False)
    inferred = infer(model, _prepared(frames), [counted], None, len(todo))
    make = partial(_make, wanted, Selection(marking.review), request.masks == "rle")
    with closing(ordered_map(make, inferred, WORKERS, ahead=WORKERS)) as results:
        shown = tqdm(results, desc="predicting", total=len(todo), unit="img", disable=not progress or None, leave=False)
        for made in shown:
            summary.notes.update(made.frame.notes)
            if made.picture is None:
                summary.skipped.append((made.frame.source.shown, made.frame.problem))
            else:
                journal.add(made.picture, made.stamp, made.notes)


def _prepared(frames: Iterator[Frame]) -> Iterator[Prepared[Frame]]:
    with closing(frames) as opened:  # type: ignore[type-var]
        for frame in opened:
            yield frame, frame.model_input, frame.size


def _make(wanted: Selection, review: Selection, rle: bool, item: tuple[Frame, list[Instances] | None]) -> _Made:
    frame, found = item
    if found is None:
        return _Made(frame, [], None, Counter())
    # In float32, as the heads compare.
    every = found[0]
    kept = every.filter(every.scores >= wanted.of_each(every).astype(np.float32))
    doubtful = kept.scores < review.of_each(kept).astype(np.float32)
    picture, notes = labelled_picture(frame.source.name, kept, doubtful, rle)
    notes[DROPPED] += len(every) - len(kept)
    notes[REGIONS] += kept.regions is not None and len(kept.regions) > 0
    return _Made(frame, _stamp(frame.source), picture, notes)


def _write(
    journal: Journal,
    target: Path,
    form: LabelFormat,
    request: Request,
    sources: Sequence[Source],
    summary: LabelSummary,
    progress: bool,
) -> None:
    """The output of all that the journal has."""
    folder = journal.folder / DATA
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _count(journal, request, summary)
    paths = {source.name: source.path for source in sources}
    names = _link(journal, folder / form.pictures, paths, summary, progress)

    def pictures() -> Iterator[LabelledPicture]:
        for picture, _ in journal.entries():
            picture.name = names.get(picture.name, picture.name)
            yield picture

    form.write(folder, request, pictures, summary.notes)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():  # it is empty
        target.rmdir()
    folder.replace(target)
    journal.remove()


def _count(journal: Journal, request: Request, summary: LabelSummary) -> None:
    names = [category.name for category in request.categories]
    for picture, notes in journal.entries():
        summary.pictures += 1
        summary.objects.update(names[one.label] for one in picture.objects)
        marked = sum(one.review for one in picture.objects)
        summary.review[0] += marked
        summary.review[1] += marked > 0
        summary.dropped += notes.pop(DROPPED, 0)
        summary.notes.update(notes)


def _link(
    journal: Journal, folder: Path, paths: dict[str, str], summary: LabelSummary, progress: bool
) -> dict[str, str]:
    """Put the pictures into the output, which takes no space; returns the new names of those that got one."""
    taken: set[str] = set()
    renamed: dict[str, str] = {}
    parents: set[Path] = set()
    entries = tqdm(
        journal.entries(), desc="writing", total=len(journal), unit="img", leave=False, disable=not progress or None
    )
    for picture, _ in entries:
        name = _new_name(picture.name, taken)
        if name != picture.name:
            renamed[picture.name] = name
            summary.notes[RENAMED] += 1
        place = folder / name
        if place.parent not in parents:
            place.parent.mkdir(parents=True, exist_ok=True)
            parents.add(place.parent)
        summary.notes[LINKED] += _link_one(Path(paths[picture.name]), place)
    return renamed


def _link_one(source: Path, place: Path) -> bool:
    """Link a picture; returns whether only its path could be linked."""
    real = source.resolve()
    try:
        os.link(real, place)
    except OSError:  # another file system, or one without links; a file that belongs to somebody else
        place.symlink_to(real)
        return True
    return False


def _new_name(name: str, taken: set[str]) -> str:
    """A name without odd characters, and with a stem of its own: label files of YOLO and CVAT's frames go by it."""
    path = PurePosixPath(ODD.sub("_", name))
    stem, number = path.with_suffix(""), 1
    while str(stem).casefold() in taken:
        number += 1
        stem = path.with_name(f"{path.stem}-{number}")
    taken.add(str(stem).casefold())
    return f"{stem}{path.suffix}"

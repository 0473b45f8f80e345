"""What a prediction on sources did, for the last lines of ``mvision predict``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mvision.errors import printable

PREDICTIONS = "predictions.json"
SHOWN = 20  # files that are named; of more, the number


@dataclass
class Summary:
    """What ``predict_sources`` did.

    Attributes:
        output: the folder with pictures and ``predictions.json``.
        pictures: whether it has pictures.
        images: number of pictures predicted on (frames of videos each count).
        instances: number of instances by class name.
        regions: number of pictures with a semantic region of the class, by class name; of joint models.
        skipped: (file, reason) of each file, or rest of a video, that could not be read.
        not_drawn: (file, reason) of each picture whose results are in ``predictions.json`` alone.
        unknown: number of results by class name that ``predictions.json`` lacks, because the data set lacks the class.
        remarks: number of pictures by what was left out of them or replaced in them.
        tracks: number of tracks in videos by class name; None: nothing was tracked.
        notes: further lines for the user.
        seconds: duration in seconds.
    """

    output: Path
    pictures: bool = True
    images: int = 0
    instances: Counter[str] = field(default_factory=Counter)
    regions: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    not_drawn: list[tuple[str, str]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    tracks: Counter[str] | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = [f"{count} {name}" for name, count in self.instances.most_common()]
        counts += [f"region {name} in {count}" for name, count in self.regions.most_common()]
        rate = self.images / max(self.seconds, 1e-9)
        lines = [f"{self.images} images in {self.seconds:.1f} s ({rate:.1f}/s): {', '.join(counts) or 'nothing found'}"]
        if self.tracks is not None:
            counts = [f"{count} {name}" for name, count in self.tracks.most_common()]
            lines.append(f"tracks: {', '.join(counts) or 'none'}")
        lines += _named("skipped", self.skipped) + _named("not drawn", self.not_drawn)
        if self.unknown:
            names = ", ".join(list(self.unknown)[:5])
            lines.append(
                f"not in {PREDICTIONS}: {self.unknown.total()} results of classes that the data lacks ({names})"
            )
        lines += [f"{count} x {remark}" for remark, count in self.remarks.most_common()]
        written = f"pictures and {PREDICTIONS}" if self.pictures else PREDICTIONS
        return "\n".join(map(printable, [*lines, *self.notes, f"{written}: {self.output}"]))


def _named(what: str, files: list[tuple[str, str]]) -> list[str]:
    lines = [f"{what} {name}: {reason}" for name, reason in files[:SHOWN]]
    return lines + [f"{what}: {len(files) - SHOWN} more"] * (len(files) > SHOWN)

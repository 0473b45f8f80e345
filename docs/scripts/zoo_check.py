"""Check the published models: download, load, predict, and compare AP on COCO val2017 with the published figure.

    python docs/scripts/zoo_check.py --coco /data/coco --output zoo_check.md      # all; on a machine with network
    python docs/scripts/zoo_check.py dfine-s rtdetr-r18 --device cuda

``--coco`` is COCO's own layout with ``val2017/`` and ``annotations/instances_val2017.json`` (and
``person_keypoints_val2017.json`` for poses); without it AP is not measured. A model that cannot be had (no network, on
Google Drive) or read is one line in the table. The table has the commit and the SHA-256 of what was downloaded, which
the table in ``mvision/weights/zoo.py`` can then pin. A model's own copy (``mvision models NAME``
says where it has to be) is checked in place of a download.

Exit codes: 0 all models are as published, 1 at least one is not, or could not be checked.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvision.commands.val import METRICS, validate
from mvision.errors import UserError
from mvision.evaluation.tables import markdown_table
from mvision.storage.atomic import write_text
from mvision.storage.download import sha256_of
from mvision.weights import load, resolve_weights, zoo

TOLERANCE = 0.1  # AP in percent
HEADER = ("name", "commit", "SHA-256", "published AP", "AP", "difference", "minutes", "result")


@dataclass
class Checked:
    """What was found about one model; texts are empty where nothing was found."""

    name: str
    commit: str = ""
    sha256: str = ""
    ap: float | None = None
    seconds: float = 0.0
    result: str = ""

    @property
    def good(self) -> bool:
        """Whether everything that was asked for was done, and is as published."""
        return self.result in ("as published", "predicts")

    def row(self) -> tuple[str, ...]:
        """Its row of the table."""
        published = zoo.MODELS[self.name].ap
        measured = ("", "") if self.ap is None else (f"{self.ap:.2f}", f"{self.ap - published:+.2f}")
        return (
            *(self.name, self.commit, self.sha256, f"{published:.1f}", *measured),
            *(f"{self.seconds / 60:.1f}", self.result.replace("|", "/")),
        )


def check(name: str, coco: Path | None, device: str | None, batch_size: int | None = None) -> Checked:
    """Check one model; what a user would be told in one line is the result."""
    found, start = Checked(name), time.monotonic()
    model = zoo.get(name)
    try:
        path = resolve_weights(name)
        found.commit = path.name if len(path.name) == 40 else ""
        found.sha256 = sha256_of(path / "model.safetensors" if path.is_dir() else path)
        _predict(name, device)
        found.result = "predicts"
        if coco is not None and model.measured == "COCO val2017":
            found.ap = _ap(name, coco, device, batch_size)
            close = abs(round(found.ap - model.ap, 2)) <= TOLERANCE
            found.result = "as published" if close else "another AP than published"
    except UserError as error:
        found.result = str(error)
    found.seconds = time.monotonic() - start
    return found


def _predict(name: str, device: str | None) -> None:
    """Predict on two pictures of noise, one of them not square: scores have to be finite and boxes inside."""
    random = np.random.default_rng(0)
    model = load(name, device=device or "cpu")
    for height, width in ((480, 640), (333, 200)):
        (result,) = model.predict([random.integers(0, 256, (height, width, 3), dtype=np.uint8)], threshold=0.0)
        inside = (result.boxes >= 0).all() and (result.boxes <= np.array([width, height] * 2)).all()
        if not (np.isfinite(result.scores).all() and inside and len(result.scores)):
            raise UserError(f"{name}: scores that are not finite, or boxes outside of the picture")


def _ap(name: str, coco: Path, device: str | None, batch_size: int | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        validate(name, data=str(coco), output=Path(folder), device=device, batch_size=batch_size)
        metrics = json.loads((Path(folder) / METRICS).read_text(encoding="utf-8"))
    return 100 * metrics[zoo.get(name).task]["AP"]


def main(arguments: list[str] | None = None) -> int:
    """Check, print and write the table; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="short names; none: all models")
    parser.add_argument("--coco", type=Path, metavar="DIR", help="COCO with val2017")
    parser.add_argument("--device", metavar="D")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the table is written, as Markdown")
    options = parser.parse_args(arguments)
    try:
        names = [zoo.get(name).name for name in options.names] or list(zoo.MODELS)
    except UserError as error:
        parser.error(str(error))
    checked = []
    for name in names:
        checked.append(check(name, options.coco, options.device, options.batch_size))
        print("  ".join(filter(None, checked[-1].row())), flush=True)
        if options.output is not None:  # after every model: a check of all takes hours
            lines = markdown_table(HEADER, [found.row() for found in checked])
            write_text(options.output, "\n".join(lines) + "\n")
    bad = [found.name for found in checked if not found.good]
    print(f"{len(checked) - len(bad)} of {len(checked)} models are good" + (f"; not {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

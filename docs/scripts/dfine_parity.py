"""D-FINE of every published size, with random weights, in mvision and in transformers: the largest differences.

    python docs/scripts/dfine_parity.py [SIZE...]

In float64, so that a difference is a mistake and not rounding. Every model is written by transformers, read by mvision
as published weights are, and both are run on images of three sizes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.dfine_reference import SIZES, build, differences, open_ours, settings

SCALES = {"x": 8.0}
"""Sizes that were published with another ``reg_scale`` than their description says."""


def main() -> None:
    """Print a line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["n", "s", "m", "l", "x"], help="n, s, m, l or x")
    for size in parser.parse_args().sizes:
        theirs = build(settings(size), SCALES.get(size))
        with tempfile.TemporaryDirectory() as folder:
            ours = open_ours(theirs, Path(folder))
        parameters = sum(parameter.numel() for parameter in ours.parameters())
        found = [differences(theirs, ours, image) for image in SIZES]
        logits, boxes = (max(column) for column in zip(*found))
        print(f"D-FINE-{size.upper()}, {parameters / 1e6:.2f} M: logits {logits:.1e}, boxes {boxes:.1e}", flush=True)


if __name__ == "__main__":
    main()

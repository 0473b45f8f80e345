"""Small faults planted one at a time: does a test fail?

    python docs/scripts/mutations.py                      # every mutation of mutations.yaml
    python docs/scripts/mutations.py ema accumulate       # those whose name contains one of these words
    python docs/scripts/mutations.py --jobs 2             # two at a time
    python docs/scripts/mutations.py --list FILE          # another list
    python docs/scripts/mutations.py --table docs/mutations.md

A mutation is a file, a piece of text in it that occurs once, what takes its place, and the tests that should fail. The
checkout is copied to a temporary folder first, so that nothing here is ever changed. A mutation is killed when its
tests fail with it; they have to pass without. The exit code is 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
LIST = Path(__file__).with_suffix(".yaml")
PYTEST_FAILED = 1  # pytest's exit code where tests ran and some failed; 2 and more are errors of the run itself


@dataclass(frozen=True)
class Mutation:
    """``old`` in ``file`` becomes ``new``; ``tests`` are files or node ids below the checkout's root."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> str:
        """Change the file below ``root``; returns its text before."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            sys.exit(f"{self.name}: the text to replace occurs {count} times in {self.file}, and has to occur once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text


def main() -> None:
    """Plant, test, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the mutations whose name contains one of these")
    parser.add_argument("--list", type=Path, default=LIST, help="a YAML list of mutations")
    parser.add_argument("--jobs", type=int, default=1, help="mutations that are tried at the same time")
    parser.add_argument("--table", type=Path, help="write the result as a Markdown table")
    options = parser.parse_args()
    entries = yaml.safe_load(options.list.read_text(encoding="utf-8"))
    mutations = [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    chosen = [m for m in mutations if not options.words or any(word in m.name for word in options.words)]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies = [copy_checkout(Path(folder) / str(number)) for number in range(options.jobs)]
        for mutation in chosen:  # only that the text is there
            (copies[0] / mutation.file).write_text(mutation.apply(copies[0]), encoding="utf-8")
        if run(copies[0], sorted({test for mutation in chosen for test in mutation.tests}), show=True) != 0:
            sys.exit("the tests fail without any mutation: mend that first")
        shares = [chosen[number :: options.jobs] for number in range(options.jobs)]
        done = pool.map(lambda copy, share: [plant(copy, mutation) for mutation in share], copies, shares)
        killed = {mutation: was_killed for rows in done for mutation, was_killed in rows}
    rows = [(mutation, killed[mutation]) for mutation in chosen]
    survivors = [mutation.name for mutation, was_killed in rows if not was_killed]
    if options.table:
        options.table.write_text(table(rows), encoding="utf-8")
    print(f"{len(rows) - len(survivors)} of {len(rows)} killed" + "".join(f"\nsurvived: {name}" for name in survivors))
    sys.exit(1 if survivors else 0)


def copy_checkout(target: Path) -> Path:
    """The files that git knows or would add, copied."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def plant(copy: Path, mutation: Mutation) -> tuple[Mutation, bool]:
    """One mutation, and whether its tests failed."""
    original = mutation.apply(copy)
    code = run(copy, mutation.tests)
    (copy / mutation.file).write_text(original, encoding="utf-8")
    print(
        f"{'killed' if code == PYTEST_FAILED else 'SURVIVED' if code == 0 else f'error {code}'}  {mutation.name}",
        flush=True,
    )
    return mutation, code == PYTEST_FAILED


def run(copy: Path, tests: Sequence[str], show: bool = False) -> int:
    """pytest's exit code, with the copy's code and not the installed one; ``show`` prints why tests fail."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=-q", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if show and done.returncode:
        print(done.stdout + done.stderr)
    return done.returncode


def table(rows: list[tuple[Mutation, bool]]) -> str:
    """One row per mutation."""
    lines = [
        "# Mutations",
        "",
        "Small faults, planted one at a time by `python docs/scripts/mutations.py`, and the tests that notice them.",
        "",
        "| fault | file | tests | killed |",
        "|---|---|---|---|",
    ]
    for mutation, killed in rows:
        tests = ", ".join(f"`{test}`" for test in mutation.tests)
        lines.append(f"| {mutation.name} | `{mutation.file}` | {tests} | {'yes' if killed else '**no**'} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()

"""Is anything lost when a command is killed, stopped, or finds the disk full?

    python docs/scripts/kills.py train                 # a kill before every file operation of trainings
    python docs/scripts/kills.py predict export        # the same, over the results of an earlier command
    python docs/scripts/kills.py random term disk      # 50 SIGKILLs, 10 SIGTERMs, 10 full disks, at random moments
    python docs/scripts/kills.py term --only train2    # of one command: a training with two loading processes
    python docs/scripts/kills.py all --findings FILE   # everything, with a line in FILE for whatever is wrong

After each fault every file is opened, and the command is given once more (``--resume`` for a training): it has to end
well and to leave what the undisturbed command leaves, byte for byte but for running times, and nothing besides. Linux
with a C compiler; ``--shots 1/4`` tries a quarter of the faults. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import kills_lab as lab
from kills_lab import FULL, KILL, Contents, Fault, Outcome

EVERY_OPERATION = {"train": ("train", "train1", "train2"), "predict": ("predict",), "export": ("onnx", "openvino")}
PARTS = (*EVERY_OPERATION, "random", "term", "disk")
COMMANDS = ("train", "train1", "train2", "predict", "onnx", "openvino", "val", "transfer")
"""Trainings have the number of their loading processes behind them, exports are of a format."""


@dataclass
class Command:
    """A command with everything to judge it by.

    Attributes:
        again: what finishes it after a fault.
        earlier: a command that leaves results in its place first; none for an empty folder.
        before, after: files that the earlier command, and then this one undisturbed, leave.
        operations: on files, of the undisturbed command.
        unstable: files that differ between two undisturbed runs, which are not compared.
    """

    name: str
    arguments: list[str]
    again: list[str]
    earlier: list[str] | None = None
    before: Contents = field(default_factory=dict)
    after: Contents = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)
    unstable: set[str] = field(default_factory=set)
    seconds: float = 0.0


@dataclass
class Row:
    """A line of the table: faults tried, those that ended in a finished command with the right files, and failures."""

    name: str
    operations: int = 0
    tried: int = 0
    equal: int = 0
    failures: list[str] = field(default_factory=list)


class Kills:
    """Commands, faults, findings."""

    def __init__(
        self, work: Path, share: Fraction, findings: Path | None, seed: int, only: Sequence[str] = COMMANDS
    ) -> None:
        self.work, self.share, self.findings, self.only = work, share, findings, only
        self.random = random.Random(seed)
        self.case = work / "case"
        self.data = lab.write_data(work / "data")
        self.config = lab.write_config(work / "config.yaml", self.data)
        self.known: dict[str, Command] = {}
        self.weights = work / "weights" / "run"
        self.weights.parent.mkdir()
        self.must(lab.run([*self.training(0)[:-2], "--output", str(self.weights)], self.weights.parent), "weights")

    def training(self, workers: int) -> list[str]:
        return f"train --config {self.config} --device cpu --workers {workers} --output run".split()

    def command(self, name: str) -> Command:
        """A command whose undisturbed results are known."""
        if name not in self.known:
            self.known[name] = command = self.make(name)
            for number in range(2):
                outcome = self.undisturbed(command)
                found = lab.contents(self.case)
                command.unstable |= {n for n in found if number and command.after.get(n) != found[n]}
                command.after, command.operations, command.seconds = found, outcome.operations, outcome.seconds
            if command.unstable:
                print(f"{name}: not compared, as two runs differ: {', '.join(sorted(command.unstable))}", flush=True)
        return self.known[name]

    def make(self, name: str) -> Command:
        if name.startswith("train"):
            workers = int(name[5:] or 0)
            again = f"train --resume run --device cpu --workers {workers}".split()
            return Command(name, self.training(workers), again)
        if name == "predict":
            base = (
                f"predict {self.data}/images --weights {self.weights} --device cpu --output found --threshold".split()
            )
            return Command(name, [*base, "0.0"], [*base, "0.0"], [*base, "0.9"])
        if name in ("onnx", "openvino"):
            base = f"export --weights {self.weights} --format {name} --output model{'.onnx' * (name == 'onnx')}".split()
            return Command(name, base, base, [*base, "--image-size", "96"])
        if name == "val":
            base = f"val --weights {self.weights} --data {self.data} --workers 0 --device cpu --output val".split()
            return Command(name, base, base, None)
        base = f"transfer --init {self.weights} --task detection --fraction 1.0 --seeds 1 --epochs 1".split()
        base += f"--data {self.data} --device cpu --output matrix -o train.batch_size=2 -o data.workers=0".split()
        return Command(name, base, base, None)

    def prepare(self, command: Command) -> None:
        """The case's folder as it is before the command."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        if command.earlier is None:
            return
        kept = self.work / "earlier" / command.name
        if not kept.is_dir():
            self.must(lab.run(command.earlier, self.case), f"{command.name}, earlier")
            command.before = lab.contents(self.case)
            shutil.copytree(self.case, kept)
        else:
            shutil.copytree(kept, self.case, dirs_exist_ok=True)

    def undisturbed(self, command: Command) -> Outcome:
        self.prepare(command)
        return self.must(lab.run(command.arguments, self.case), command.name)

    def must(self, outcome: Outcome, name: str) -> Outcome:
        if outcome.code != 0:
            sys.exit(f"{name} fails without any fault (code {outcome.code}):\n{outcome.text[-3000:]}")
        return outcome

    def try_fault(self, row: Row, command: Command, fault: Fault, label: str) -> None:
        """One fault, and everything that is looked at after it."""
        self.prepare(command)
        outcome = lab.run(command.arguments, self.case, fault)
        row.tried += 1
        problems = [*self.look(command, outcome), *self.finish(row, command)]
        self.note(row, label, problems)

    def note(self, row: Row, label: str, problems: Sequence[str]) -> None:
        """Keep what is wrong, and show now and then how far the row is."""
        for problem in problems:
            row.failures.append(f"{row.name}, {label}: {problem}")
            print(row.failures[-1], flush=True)
            if self.findings is not None:
                with self.findings.open("a") as file:
                    file.write(row.failures[-1] + "\n")
        if row.tried % 10 == 0:
            print(f"  {row.name}: {row.tried} faults, {row.equal} equal", file=sys.stderr, flush=True)

    def look(self, command: Command, outcome: Outcome) -> Iterator[str]:
        """What is wrong right after the fault."""
        if outcome.problem:
            yield outcome.problem
        for file in lab.half_written(self.case):
            yield f"half-written {file}"
        found = lab.contents(self.case)
        if command.name == "predict":
            old, new = command.before, command.after
            is_old = found.get("found/predictions.json") == old["found/predictions.json"]
            if is_old and any(found[n] == new[n] != old.get(n) for n in found if n in new):
                yield "an old predictions.json beside new pictures"
        weights = {"onnx": "model.onnx", "openvino": "model", "predict": None, "val": None, "transfer": None}
        usable = weights.get(command.name, "run" if (self.case / "run" / "best.safetensors").is_file() else None)
        if usable:  # there is an earlier export in its place
            arguments = f"predict {self.data}/images --weights {usable} --output {self.work}/used".split()
            used = lab.run(arguments, self.case)
            if used.code != 0:
                yield f"predict with {usable}: {used.problem or used.text.strip()[-150:]}"

    def finish(self, row: Row, command: Command) -> Iterator[str]:
        """Give the command once more; what is wrong with what it leaves."""
        again = lab.run(command.again, self.case)
        training = command.name.startswith("train")
        if training and again.code == 2 and not (self.case / "run" / "last" / "state.safetensors").is_file():
            row.equal += 1  # nothing was saved yet, and it says so
            if again.problem:
                yield f"again: {again.problem}"
            return
        if again.code != 0:
            yield f"again: {again.problem or again.text.strip()[-200:]}"
            return
        found = lab.contents(self.case)
        left = sorted(set(found) - set(command.after))
        gone = sorted(set(command.after) - set(found))
        different = sorted(
            n for n in set(found) & set(command.after) - command.unstable if found[n] != command.after[n]
        )
        row.equal += not (left or gone or different)
        for what, names in (("left behind", left), ("missing", gone), ("different", different)):
            if names:
                yield f"again: {what}: {', '.join(names[:4])}"

    def chosen(self, count: int) -> int:
        return max(1, round(count * self.share))

    def before_every_operation(self, name: str) -> Row:
        command = self.command(name)
        row = Row(f"kill before each operation: {name}", len(command.operations))
        every = list(lab.points(command.operations))
        for number, operation in sorted(self.random.sample(every, self.chosen(len(every)))):
            self.try_fault(row, command, Fault(KILL, number), f"before operation {number} ({operation})")
        return row

    def at_random(self, number: int, title: str, count: int) -> Iterator[Row]:
        for index, name in enumerate(self.only):
            shots = len(range(index, self.chosen(count), len(self.only)))
            command = self.command(name)
            row = Row(f"{title}: {name}", len(command.operations))
            for _ in range(shots):
                seconds = self.random.uniform(0, command.seconds)
                self.try_fault(row, command, Fault(signal=number, seconds=seconds), f"{title} after {seconds:.2f} s")
            if shots:
                yield row

    def full_disks(self, count: int) -> Iterator[Row]:
        """Full from one operation on (writes fail), and a file system that is too small where one can be mounted."""
        for index, name in enumerate(self.only):
            command = self.command(name)
            row = Row(f"full disk: {name}", len(command.operations))
            for _ in range(max(1, len(range(index, self.chosen(count), len(self.only))))):
                number = self.random.randint(1, len(command.operations))
                label = f"full from operation {number} ({command.operations[number - 1]})"
                self.try_fault(row, command, Fault(FULL, number), label)
                self.too_small(row, command)
            yield row

    def too_small(self, row: Row, command: Command) -> None:
        needed = sum(map(len, command.after.values())) // 1024
        size = max(self.random.randint(1, max(needed, 2)), 4)
        self.case.mkdir(exist_ok=True)
        shutil.rmtree(self.case)
        self.case.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(self.case)]
        if command.earlier is not None or subprocess.run(mount, capture_output=True).returncode != 0:
            return
        row.tried += 1
        try:
            outcome = lab.run(command.arguments, self.case)
            problems = [*self.look(command, outcome)] if outcome.code != -9 else ["killed"]
            subprocess.run([*mount[:4], "remount,size=1g", str(self.case)], check=True)
            problems += self.finish(row, command)
        finally:
            subprocess.run(["umount", str(self.case)], check=True)
        self.note(row, f"a disk of {size} kB of {needed}", problems)


def rows(kills: Kills, parts: list[str]) -> Iterator[Row]:
    """The table, part by part."""
    for part in PARTS if "all" in parts else parts:
        if part in EVERY_OPERATION:
            names = [name for name in EVERY_OPERATION[part] if name in kills.only]
            yield from (kills.before_every_operation(name) for name in names)
        elif part == "random":
            yield from kills.at_random(signal.SIGKILL, "SIGKILL", 50)
        elif part == "term":
            yield from kills.at_random(signal.SIGTERM, "SIGTERM", 10)
        else:
            yield from kills.full_disks(10)


def main() -> None:
    """Parse, load the library that counts operations, try the faults, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--only", choices=COMMANDS, action="append", help="these commands (repeatable); default: all")
    parser.add_argument("--shots", type=Fraction, default=Fraction(1), help="share of the faults to try")
    parser.add_argument("--findings", type=Path, help="a file that gets a line for whatever is wrong")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "KILLS_WORK" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="kills") as folder:
            shim = lab.compile_shim(Path(folder))
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            environment = {**os.environ, **threads, "LD_PRELOAD": str(shim), "KILLS_WORK": folder}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    lab.warm_up()
    kills = Kills(
        Path(os.environ["KILLS_WORK"]), options.shots, options.findings, options.seed, options.only or COMMANDS
    )
    print(f"{'':45} operations  faults  equal  wrong")
    failed = 0
    for row in rows(kills, options.parts):
        failed += len(row.failures)
        print(f"{row.name:45} {row.operations:10}  {row.tried:6}  {row.equal:5}  {len(row.failures):5}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

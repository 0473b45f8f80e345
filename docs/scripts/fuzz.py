"""Hostile input for the command line: damaged data sets, pictures, configs, weights, exports, runs and options.

    python docs/scripts/fuzz.py                                  # 3,240 cases, one at a time
    python docs/scripts/fuzz.py --jobs 2 --count 800             # fewer, two at a time
    python docs/scripts/fuzz.py --kinds coco,yolo                # those of some kinds alone
    python docs/scripts/fuzz.py --only 1234                      # one case, which is kept and printed

A case is a function of the seed and its number. Its commands run in a process of their own, forked from one that has
imported everything. They have to end with exit code 0 or 2; with 2 there is one line on stderr (or a report on stdout)
and no control character anywhere. Failures are: a traceback, death by a signal, another exit code, more than 60 s,
more than 4 GiB of memory, code from a file that ran, and ``data check`` and ``train`` that disagree on a data set. The
exit code of this script is 1 if there is one. It needs a POSIX system.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing.util
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

# Before torch is imported: a process with threads cannot be forked safely.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from fuzz_data import Case, coco, files, pictures, yolo
from fuzz_files import prepare
from fuzz_programs import config, exports, options, runs, weights

KINDS: dict[str, Callable[[Random, Path, Path], Case]] = {
    function.__name__: function for function in (coco, yolo, files, pictures, config, weights, exports, runs, options)
}

SECONDS, GIBIBYTES = 60.0, 4.0
PROGRESS = re.compile(r"[^\n\r]*\r")  # a progress bar draws over its line
WARNING = re.compile(r"^\S+:\d+: \w*Warning", re.MULTILINE)  # Python's, with a line of source below it
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Outcome:
    """What became of a case: for each command its exit code or exception and its last line, and what is wrong."""

    number: int
    kind: str
    case: Case | None = None
    codes: list[int | str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    gibibytes: float = 0.0

    def text(self) -> str:
        """The case with its commands, how they ended, and their last lines on stderr."""
        if self.case is None:
            return f"{self.number} {self.kind}"
        ends = zip(map(_short, self.case.commands), self.codes, self.lines)
        shown = "".join(f"\n    {command}: {code} {line}" for command, code, line in ends)
        return f"{self.number} {self.kind}: {self.case.what[:300]!a}{shown}"


def build(seed: int, number: int, base: Path, folder: Path) -> tuple[str, Case]:
    """Write the files of a case into an empty folder; its kind and what to run there."""
    kind = list(KINDS)[number % len(KINDS)]
    return kind, KINDS[kind](Random(f"{seed}:{number}"), base, folder)


def run_command(arguments: Sequence[str]) -> int:
    """One command of the command line in this process, or ``load SOURCE``; its exit code."""
    from mvision.cli.main import run
    from mvision.errors import UserError, printable

    if arguments[0] != "load":
        return run(arguments)
    import mvision

    try:
        mvision.load(arguments[1])
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


def run_case(seed: int, number: int, base: Path, folder: Path) -> None:
    """In a child process: build the case and run its commands, with a file for the output of each.

    ``case.json`` has the case, and ``codes.jsonl`` a line for every command that has ended.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = folder / "place"
    place.mkdir(parents=True)
    os.chdir(place)
    kind, case = build(seed, number, base, place)
    described = {"kind": kind, "what": case.what, "commands": case.commands, "agree": case.agree}
    (folder / "case.json").write_text(json.dumps(described), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for index, arguments in enumerate(case.commands):
        for stream, target in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{index}.{target}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        result: dict[str, int | str] = {}
        try:
            result["code"] = run_command(arguments)
        except BaseException as error:  # noqa: BLE001 - whatever leaves the command line is what is looked for
            result = {"code": f"{type(error).__name__} at {_last_own_frame(error)}: {str(error)[:200]}"}
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        with (folder / "codes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def _last_own_frame(error: BaseException) -> str:
    """The last line of the package in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if re.search(r"/(mvision|heads|cli)/", frame.filename)]
    frame = (own or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


@dataclass
class Child:
    """A running case."""

    number: int
    pid: int
    folder: Path
    started: float
    finished: int = 0  # commands
    peak: float = 0.0
    problem: str = ""

    def watch(self) -> None:
        """Kill it where a command takes too long or all its processes together too much memory."""
        codes = self.folder / "codes.jsonl"
        lines = codes.read_text(encoding="utf-8").count("\n") if codes.is_file() else 0
        if lines > self.finished:
            self.finished, self.started = lines, time.monotonic()
        self.peak = max(self.peak, _memory(self.pid))
        if time.monotonic() - self.started > SECONDS:
            self.problem = f"more than {SECONDS:.0f} s"
        elif self.peak > GIBIBYTES:
            self.problem = f"more than {GIBIBYTES:.0f} GiB"
        if self.problem:
            os.killpg(self.pid, signal.SIGKILL)


def _memory(pid: int) -> float:
    """GiB of a process and those that it started."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for part in (process, *process.children(recursive=True)):
            total += part.memory_info().rss
    except psutil.NoSuchProcess:
        return 0.0
    return total / 2**30


def judge(child: Child, status: int, peak: float) -> Outcome:
    """Read what a case left and say what is wrong with it."""
    folder, outcome = child.folder, Outcome(child.number, "?")
    outcome.gibibytes = max(child.peak, peak)
    if not (folder / "case.json").is_file():
        outcome.failures.append(child.problem or f"the case could not be built (status {status})")
        return outcome
    described = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    outcome.kind = described.pop("kind")
    outcome.case = case = Case(**described)
    codes = folder / "codes.jsonl"
    lines = codes.read_text(encoding="utf-8").splitlines() if codes.is_file() else []
    outcome.codes = [json.loads(line)["code"] for line in lines]
    if len(outcome.codes) < len(case.commands):
        how = child.problem or f"died with status {status} (signal {status & 127})"
        outcome.failures.append(f"{_short(case.commands[len(outcome.codes)])}: {how}")
    elif outcome.gibibytes > GIBIBYTES:
        outcome.failures.append(f"{outcome.gibibytes:.1f} GiB")
    for index, (arguments, code) in enumerate(zip(case.commands, outcome.codes)):
        texts = [(folder / f"{index}.{name}").read_bytes().decode("utf-8", "replace") for name in ("out", "err")]
        outcome.failures += [f"{_short(arguments)}: {fault}" for fault in faults(code, *texts)]
        outcome.lines.append(ascii((PROGRESS.sub("", texts[1]).strip().splitlines() or [""])[-1][:300])[1:-1])
    if case.agree and len(set(map(str, outcome.codes))) > 1 and not outcome.failures:
        outcome.failures.append(f"check ends with {outcome.codes[0]}, train with {outcome.codes[1]}")
    if list(folder.glob("place/**/ran")):
        outcome.failures.append("code from a file was run")
    return outcome


def faults(code: int | str, out: str, err: str) -> list[str]:
    """What is wrong with a command that ended with this code (or exception) and these outputs."""
    if code not in (0, 2):
        return [f"ends with {code}"]
    found = []
    shown = [line for line in PROGRESS.sub("", err).split("\n") if line.strip()]
    if code == 2 and not (len(shown) == 1 and shown[0].startswith("error: ")) and (shown or not out.strip()):
        found.append(f"code 2 with {len(shown)} lines on stderr: {shown[:3]!r}")
    if "Traceback" in err or WARNING.search(err):
        found.append(f"a traceback or warning on stderr: {err[-200:]!r}")
    for name, text in (("stdout", out), ("stderr", PROGRESS.sub("", err))):
        odd = CONTROL.search(text)
        if odd:
            found.append(f"{odd.group()!r} on {name}: {text[max(0, odd.start() - 30) : odd.end() + 30]!r}")
    return found


def _short(arguments: Sequence[str]) -> str:
    return " ".join(arguments[:2] if arguments[0] in ("data", "benchmark") else arguments[:1])


def run_cases(numbers: Iterable[int], base: Path, work: Path, options: argparse.Namespace) -> list[Outcome]:
    """Run cases, each in a forked child, and print every failure when it is known."""
    waiting, running, outcomes = list(numbers)[::-1], [], []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            running.append(_start(waiting.pop(), options.seed, base, work))
        for child in list(running):
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if not pid:
                if not child.problem:
                    child.watch()
                continue
            running.remove(child)
            outcome = judge(child, status, usage.ru_maxrss / 2**20)
            outcomes.append(outcome)
            for failure in outcome.failures:
                print(f"{outcome.number} {outcome.kind}: {failure}\n    {_what(outcome)}", flush=True)
            if options.show:
                print(outcome.text(), flush=True)
            if not options.only:
                shutil.rmtree(child.folder, ignore_errors=True)
            if len(outcomes) % 100 == 0:
                bad = sum(bool(outcome.failures) for outcome in outcomes)
                print(f"-- {len(outcomes)} cases, {bad} failed, {len(waiting)} to go", flush=True)
        time.sleep(0.02)
    return outcomes


def _what(outcome: Outcome) -> str:
    return ascii(outcome.case.what)[1:300] if outcome.case else ""


def _start(number: int, seed: int, base: Path, work: Path) -> Child:
    folder = work / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pid = _fork(lambda: run_case(seed, number, base, folder))
    return Child(number, pid, folder, time.monotonic())


def prepare_in_child(base: Path) -> None:
    """Make the sound inputs in a process of its own, so that this one stays without threads."""

    def quietly() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        prepare(base, lambda *arguments: _sound([str(argument) for argument in arguments]))

    if os.waitpid(_fork(quietly), 0)[1]:
        shutil.rmtree(base, ignore_errors=True)
        sys.exit("the sound inputs could not be made")


def _fork(work: Callable[[], object]) -> int:
    """The number of a new process that does the work, and ends with code 1 where it raises."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            gc.collect()  # loaders in circles of references give their semaphores back, as at the end of a program
            multiprocessing.util._exit_function()  # and threads that are still doing so come to their end
            code = 0
        except BaseException:  # noqa: BLE001 - shown here, because the process ends without cleaning up
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def _sound(arguments: list[str]) -> None:
    code = run_command(arguments)
    if code:
        raise RuntimeError(f"{arguments} ends with {code}")


def import_everything() -> None:
    """Every module of the package, so that no child has to import one.

    Not ONNX Runtime and OpenVINO, which start threads when they are imported: then it would not be safe to fork.
    """
    import cv2
    import torch

    from mvision.heads import head_class, known_tasks

    for name in ("mvision", "mvision.cli", "mvision.heads"):
        # The first folder alone: in a checkout the package's path also holds the root, which contains the package.
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__[:1], f"{name}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for task in known_tasks():
        head_class(task)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line for every kind, and the totals."""
    lines = []
    for kind in [*KINDS, "?"]:
        chosen = [outcome for outcome in outcomes if outcome.kind == kind]
        if not chosen:
            continue
        codes = Counter(str(code)[:20].split(" ")[0] for outcome in chosen for code in outcome.codes)
        failed = sum(bool(outcome.failures) for outcome in chosen)
        ends = ", ".join(f"{code}: {count}" for code, count in codes.most_common(6))
        lines.append(f"{kind:9} {len(chosen):5} cases, {failed:4} failed; exit codes {ends}")
    failed = sum(bool(outcome.failures) for outcome in outcomes)
    most = max((outcome.gibibytes for outcome in outcomes), default=0.0)
    return "\n".join([*lines, f"{len(outcomes)} cases, {failed} failed; at most {most:.1f} GiB"])


def main() -> None:
    """Run the cases that the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3240, help="how many cases, before --kinds chooses among them")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, action="append", help="this number alone; its folder is kept")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--show", action="store_true", help="print every case, not only those that failed")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument(
        "--base", type=Path, help="folder of the sound inputs, made where it is missing; else temporary"
    )
    options = parser.parse_args()
    options.show |= bool(options.only)
    kinds = options.kinds.split(",")
    numbers = range(options.first, options.first + options.count)
    chosen = options.only or [number for number in numbers if list(KINDS)[number % len(KINDS)] in kinds]
    import_everything()
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    base = (options.base or work / "base").resolve()
    if not base.is_dir():
        prepare_in_child(base)
    start = time.monotonic()
    outcomes = run_cases(chosen, base, work, options)
    print(f"{summary(outcomes)}; {time.monotonic() - start:.0f} s")
    if options.only:
        print(f"the files are in {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    main()

"""The formats for phones against PyTorch, task by task: differences of the outputs, size and time of one image.

    python docs/scripts/deploy.py deploy.jsonl [--model tiny] [--task detection]... [--runtime litert]...

needs the extras ``export``, ``executorch`` and ``litert``. Weights are random (with statistics in the norms), so that
nothing has to be trained. The runtimes take turns in one process (see ``mvision benchmark model``). A line of JSON is
added to the file for every task; the table of all lines is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from mvision.commands.benchmark_model import benchmark_model
from mvision.deploy.formats import MOBILE, NAMES
from mvision.evaluation.tables import markdown_table
from mvision.heads import known_tasks


def measured(model: str, task: str, runtimes: list[str], repeats: int) -> dict[str, Any]:
    """One task: the largest difference by format, and milliseconds and their ratio to PyTorch by runtime."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        benchmark_model(
            model=model, tasks=[task], batches=[1], precisions=["fp32"], runtimes=runtimes, repeats=repeats,
            device="cpu", output=Path(folder), log=lines.append,
        )  # fmt: skip
        document = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
    differences: dict[str, float] = {}
    found: list[float] = []
    for line in lines:
        if "largest difference from PyTorch" in line:
            found.append(float(line.rpartition("PyTorch ")[2].split()[0]))
        elif line.partition(":")[0] in NAMES:
            differences[line.partition(":")[0]] = max(found)
            found = []
    times = {row["runtime"]: (row["milliseconds"], row["ratio"]) for row in document["totals"]}
    about = {key: document[key] for key in ("model", "size", "machine")}
    return {**about, "task": task, "differences": differences, "times": times}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", action="append", choices=known_tasks())
    parser.add_argument("--runtime", action="append", choices=["onnx", *MOBILE])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    for task in options.task or known_tasks():
        row = measured(options.model, task, options.runtime or ["onnx", *MOBILE], options.repeats)
        with options.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    rows = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines()]
    cells = [
        [row["task"], NAMES[name], f"{row['differences'][name]:.1e}", f"{row['times'][name][0]:.1f} ms",
         f"{row['times'][name][1]:.2f}"]
        for row in rows
        for name in row["differences"]
    ]  # fmt: skip
    print("\n".join(markdown_table(["task", "format", "largest difference", "one image", "of PyTorch fp32"], cells)))


if __name__ == "__main__":
    main()

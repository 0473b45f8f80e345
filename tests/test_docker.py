"""The Dockerfile copies what the package needs, and nothing that is not sent to the builder."""

from __future__ import annotations

import configparser
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
STEPS = [(word, rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in TEXT.splitlines()) if word]
ARGUMENTS = dict(rest.split("=") for word, rest in STEPS if word == "ARG")
COPIED = [Path(source) for word, rest in STEPS if word == "COPY" for source in rest.split()[:-1]]


def sent(path: Path) -> bool:
    """Whether .dockerignore lets a file through: the last pattern that fits it or a folder above it decides."""
    answer = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and any(
            fnmatch(str(part), pattern) or fnmatch(part.name, pattern) for part in (path, *path.parents[:-1])
        ):  # fmt: skip
            answer = line.startswith("!")
    return answer


def test_what_is_copied_is_there_and_sent() -> None:
    assert len(COPIED) >= 9
    for path in COPIED:
        assert (ROOT / path).exists(), path
        assert sent(path), path
    for path in (".git/config", "runs/detection/1/best.safetensors", "tests/test_cli.py", "mvision/__pycache__/a.pyc"):
        assert not sent(Path(path)), path


def test_the_package_is_copied_whole() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    folders = {line.partition("=")[2].strip() for line in setup["options"]["package_dir"].splitlines() if line}
    assert folders <= {str(path) for path in COPIED}
    assert {"setup.cfg", "pyproject.toml", "LICENSE", "README.md"} <= {str(path) for path in COPIED}
    extras = setup["options.extras_require"]
    for extra in ARGUMENTS["EXTRAS"].split(","):
        assert extra in extras, extra


@pytest.mark.parametrize(("variant", "code", "expected"), [
    ("cpu", 0, ["pip install torch torchvision --index-url"]),
    ("cuda", 0, ["apt-get update", "apt-get install -y", "rm -rf", "pip install torch torchvision"]),
    ("gpu", 2, []),
])  # fmt: skip
def test_variants(variant: str, code: int, expected: list[str], tmp_path: Path) -> None:
    (step,) = (rest for word, rest in STEPS if word == "RUN" and "VARIANT" in rest)
    for name in ("pip", "apt-get", "rm"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": str(tmp_path), "VARIANT": variant}
    done = subprocess.run(["/bin/bash", "-c", step], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected))
    if variant == "cuda":
        assert lines[-1] == "pip install torch torchvision", "the wheels of the package index have CUDA"
    if code:
        assert done.stderr == "VARIANT=gpu: is cpu or cuda\n"

"""What is installed is what is in the tree."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.pages import README, blocks

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mvision", "heads", "cli", "configs")


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_packages_are_those_of_the_tree(setup_cfg: configparser.ConfigParser) -> None:
    in_tree = set()
    for folder in FOLDERS:
        top = "mvision" if folder == "mvision" else f"mvision.{folder}"
        for init in (ROOT / folder).rglob("__init__.py"):
            in_tree.add(".".join((top, *init.parent.relative_to(ROOT / folder).parts)))
    assert set(_lines(setup_cfg["options"]["packages"])) == in_tree


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in FOLDERS:
        bare = {p.parent for p in (ROOT / folder).rglob("*.py") if not (p.parent / "__init__.py").is_file()}
        assert not bare


def test_torch_is_not_capped(setup_cfg: configparser.ConfigParser) -> None:
    """A cap can pick a torch whose torchvision does not import."""
    (torch,) = (line for line in _lines(setup_cfg["options"]["install_requires"]) if re.match(r"torch\b", line))
    assert torch == "torch>=2.6"


def test_one_version(setup_cfg: configparser.ConfigParser) -> None:
    import mvision

    assert setup_cfg["metadata"]["version"] == mvision.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{mvision.__version__}]" in changelog


def test_readme_names_the_distribution_and_its_commands_are_what_ci_runs(setup_cfg: configparser.ConfigParser) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert setup_cfg["metadata"]["name"] in readme
    assert "@@" not in readme, "figures that are still to be filled in"
    # On the public index the plain name belongs to another package.
    assert not re.search(r"pip install (-\S+ )*[\"']?mvision(?!-)", readme)
    for command in ('pip install -e ".[dev]"', "python -m pytest -n 2"):
        assert command in readme, command
        assert command in ci, command


def test_neck_of_the_readme_runs() -> None:
    import torch

    (block,) = (block for block in blocks(README, "python") if "HybridEncoder" in block.text)
    names = {"images": torch.zeros(1, 3, 64, 96)}
    exec(block.text, names)
    assert [names[level].shape for level in ("p3", "p4", "p5")] == [(1, 192, 8, 12), (1, 192, 4, 6), (1, 192, 2, 3)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, unpacked as pip would."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools to build a wheel")
    copy, wheels = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheels")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    done = subprocess.run([*command, str(wheels), str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("mvision_framework-*.whl")
    target = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_wheel_holds_every_module_and_config(installed: Path) -> None:
    expected = {"py.typed"}
    for folder in FOLDERS:
        prefix = Path() if folder == "mvision" else Path(folder)
        files = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]
        expected |= {(prefix / file.relative_to(ROOT / folder)).as_posix() for file in files}
    found = {path.relative_to(installed / "mvision").as_posix() for path in (installed / "mvision").rglob("*.*")}
    assert found == expected
    # One top-level name, and no second copy of heads/ or cli/ beside it.
    assert {path.name for path in installed.iterdir()} == {
        "mvision",
        next(installed.glob("*.dist-info")).name,
    }
    assert list(installed.glob("*.dist-info/**/LICENSE"))


def test_wheel_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import mvision, mvision.cli.main, mvision.heads\n"
        "from mvision.config import load_config\n"
        "print(mvision.__file__, mvision.heads.__file__, len(load_config('tiny').model.heads), sep='\\n')"
    )
    environment = {"PYTHONPATH": str(installed), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    package, heads, number = done.stdout.split()
    assert Path(package).parent == installed / "mvision"
    assert Path(heads).parent == installed / "mvision" / "heads"
    assert number == "1"

"""Imports between folders go downwards only, files and functions stay small, and what promises to be light is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"mvision": "mvision", "heads": "mvision.heads", "cli": "mvision.cli", "configs": "mvision.configs"}

# From the ground up, a layer each: a folder imports those before it and no others.
LAYERS = (
    *("errors", "settings", "compat", "machine", "neck", "storage", "builtin", "drawing", "structures", "inference"),
    *("evaluation", "backbone", "heads", "config", "model", "data", "weights", "engine", "deploy", "commands", "cli"),
)
# The same inside folders that are divided once more.
LAYERS_INSIDE = {
    "mvision.data": ("formats", "augment", "loading", "tools"),
    "mvision.heads": (
        *("base", "pixel_features", "query", "detection", "instance_seg", "keypoints", "semantic", "linking"),
    ),
}
# What may stand above all layers: the package's own names (which load what is asked for), and ``python -m mvision``.
FACADES = {"mvision", "mvision.__main__", "mvision.data", "mvision.heads"}
MOST_LAYERS, MOST_LOOSE_MODULES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 22, 6, 400, 60


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = _modules()


def _imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports anywhere: inside functions and for type checkers count as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in MODULES else str(node.module)


TREES = {name: ast.parse(path.read_text(encoding="utf-8"), filename=str(path)) for name, path in MODULES.items()}
IMPORTS = {name: set(_imports(tree)) for name, tree in TREES.items()}


def _below(module: str, package: str) -> str:
    """The folder or module right below ``package`` that ``module`` is or lies in."""
    return module.removeprefix(f"{package}.").partition(".")[0]


def test_every_folder_has_a_layer() -> None:
    folders = {_below(name, "mvision") for name in MODULES if name not in {"mvision", "mvision.__main__"}}
    assert folders - {"configs"} == set(LAYERS)  # configs/ holds YAML alone
    assert len(folders) <= MOST_LAYERS
    for package, layers in LAYERS_INSIDE.items():
        assert {_below(name, package) for name in MODULES if name.startswith(f"{package}.")} == set(layers)


@pytest.mark.parametrize("package", ["mvision", *LAYERS_INSIDE])
def test_imports_go_down(package: str) -> None:
    layers = LAYERS_INSIDE.get(package, LAYERS)
    wrong = [
        f"{name} -> {imported}"
        for name, imports in IMPORTS.items()
        for imported in imports
        if name.startswith(f"{package}.") and imported.startswith(f"{package}.") and name not in FACADES
        if _below(name, package) != _below(imported, package)
        if layers.index(_below(imported, package)) > layers.index(_below(name, package))
    ]
    assert not wrong


def test_the_package_itself_is_not_imported_from_within() -> None:
    """Its version apart, which it has before it loads anything."""
    users = {name for name, imports in IMPORTS.items() if "mvision" in imports}
    for name in users:
        names = {
            alias.name
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.ImportFrom) and node.module == "mvision"
            for alias in node.names
        }
        assert names <= {"__version__"}, name


def test_no_cycles_between_modules() -> None:
    graph = {name: {i for i in IMPORTS[name] if i in MODULES} for name in MODULES if name not in FACADES}
    TopologicalSorter({name: needed - FACADES for name, needed in graph.items()}).prepare()  # raises CycleError


def test_few_loose_modules() -> None:
    loose = [path.name for path in (ROOT / "mvision").glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= MOST_LOOSE_MODULES, loose


def test_files_and_functions_are_small() -> None:
    scripts = [*(ROOT / "docs").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    long = []
    for path in [*MODULES.values(), *scripts]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MOST_LINES:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    assert not long


def test_mapped_folders_are_imported_by_their_package_name() -> None:
    """``import heads`` would make second copies of every class."""
    outside = {name.partition(".")[0] for imports in IMPORTS.values() for name in imports}
    tests = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")]
    outside |= {name.partition(".")[0] for tree in tests for name in _imports(tree)}
    assert not outside & {"heads", "cli", "configs"}


def test_albumentations_is_used_in_one_place() -> None:
    users = {name for name, imports in IMPORTS.items() if any(i.split(".")[0] == "albumentations" for i in imports)}
    assert users <= {"mvision.data.augment.transforms"}


def test_the_neck_needs_torch_alone() -> None:
    """It and all that it stands on: a user may take the folder away."""
    needed, outside, queue = {"mvision.neck"}, set(), ["mvision.neck"]
    while queue:
        for imported in IMPORTS[queue.pop()]:
            if imported in MODULES and imported not in needed:
                needed.add(imported)
                queue.append(imported)
            outside.add(imported.split(".")[0])
    assert outside - sys.stdlib_module_names <= {"torch", "mvision"}
    assert all(name.startswith("mvision.neck") for name in needed)


@pytest.mark.parametrize(
    ("imported", "banned"),
    [
        ("mvision", "torch numpy timm pydantic"),
        ("mvision.cli.main", "torch numpy timm pydantic accelerate"),
        ("mvision.neck", "timm albumentations cv2 pydantic accelerate"),
        ("mvision.heads", "torch numpy timm pydantic"),
    ],
)
def test_light_imports(imported: str, banned: str) -> None:
    code = f"import sys, {imported}; print([name for name in {banned.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stderr or done.stdout

"""Imports between the rooms go downwards only, and what promises to be light is light."""

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

# From the ground up. A module of mvision/ that is named nowhere belongs to the pure modules.
FOUNDATION, PURE, HEADS, MODEL, DATA, ENGINE, CLI = range(7)
ROOMS = {
    "mvision.errors": FOUNDATION,
    "mvision.settings": FOUNDATION,
    "mvision.config.explain": FOUNDATION,
    "mvision.heads": HEADS,
    "mvision.configs": MODEL,
    "mvision.config": MODEL,
    "mvision.model": MODEL,
    "mvision.weights.rtdetr": MODEL,
    "mvision.weights.transfer": MODEL,
    "mvision.weights": MODEL,
    "mvision.data": DATA,
    "mvision.deploy": ENGINE,
    "mvision.engine": ENGINE,
    "mvision.inference": ENGINE,
    "mvision.commands.info": ENGINE,
    "mvision.cli": CLI,
    "mvision.__main__": CLI,
}
# Conveniences that a user finds on an object although the work is done upstairs; imported when called, never before.
CALLED_UPWARDS = {
    ("mvision.structures", "mvision.drawing.draw"),
    ("mvision.model", "mvision.inference.predict"),
}


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = _modules()


def _room(module: str) -> int:
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((ROOMS[name] for name in names if name in ROOMS), PURE)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, bool]]:
    """(imported module, whether only when a function is called), without imports for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if _is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield (below if below in MODULES else str(node.module)), inside_function
        deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _imports(node, inside_function or deeper)


IMPORTS = {
    name: set(_imports(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))))
    for name, path in MODULES.items()
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    upwards = {
        (imported, deferred)
        for imported, deferred in IMPORTS[module]
        if imported.startswith("mvision.") and _room(imported) > _room(module)
    }
    allowed = {(imported, True) for caller, imported in CALLED_UPWARDS if caller == module}
    assert upwards <= allowed, f"{module} imports from a room above it"


def test_no_cycles() -> None:
    graph = {name: {imported for imported, _ in IMPORTS[name] if imported in MODULES} for name in MODULES}
    for caller, imported in CALLED_UPWARDS:
        graph[caller].discard(imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_mapped_folders_are_imported_by_their_package_name() -> None:
    """``import heads`` would make second copies of every class."""
    outside = {name.partition(".")[0] for imports in IMPORTS.values() for name, _ in imports}
    tests = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")]
    outside |= {name.partition(".")[0] for tree in tests for name, _ in _imports(tree)}
    assert not outside & {"heads", "cli", "configs"}


def test_albumentations_has_one_door() -> None:
    users = {name for name, imports in IMPORTS.items() if any(i.split(".")[0] == "albumentations" for i, _ in imports)}
    assert users <= {"mvision.data.augment.transforms"}


def test_the_neck_needs_torch_alone() -> None:
    """It and all that it stands on: a user may take these files away."""
    needed, outside, queue = {"mvision.neck"}, set(), ["mvision.neck"]
    while queue:
        for imported, _ in IMPORTS[queue.pop()]:
            if imported in MODULES and imported not in needed:
                needed.add(imported)
                queue.append(imported)
            outside.add(imported.split(".")[0])
    assert outside - sys.stdlib_module_names <= {"torch", "mvision"}


@pytest.mark.parametrize(
    ("imported", "banned"),
    [
        ("mvision", "torch numpy timm pydantic"),
        ("mvision.cli.main", "torch numpy timm pydantic accelerate"),
        ("mvision.neck", "timm albumentations cv2 pydantic accelerate"),
    ],
)
def test_light_imports(imported: str, banned: str) -> None:
    code = f"import sys, {imported}; print([name for name in {banned.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stderr or done.stdout

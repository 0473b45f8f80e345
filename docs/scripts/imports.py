"""The layers of the package, from the top down, and what each of them imports.

    python docs/scripts/imports.py

Imports inside functions and for type checkers count too. ``tests/test_architecture.py`` checks what is listed here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Folder of the checkout -> name of its package.
FOLDERS = {"mvision": "mvision", "heads": "mvision.heads", "cli": "mvision.cli", "configs": "mvision.configs"}
# From the bottom up: a layer imports those before it in this list, and no others.
LAYERS = {
    "mvision": (
        *("errors", "settings", "compat", "storage", "machine", "neck", "builtin", "drawing", "structures"),
        *("inference", "evaluation", "backbone", "fast", "heads", "config", "model", "data", "weights", "engine"),
        *("deploy", "commands", "cli"),
    ),
    "mvision.data": ("formats", "augment", "loading", "tools"),
    "mvision.heads": (
        *("base", "pixel_features", "duplicates", "query", "detection", "instance_seg", "keypoints", "poses"),
        *("semantic", "linking"),
    ),
}


def find_modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    modules = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules[".".join((package, *parts)).removesuffix(".__init__")] = path
    return modules


MODULES = find_modules()


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


TREES = {name: ast.parse(path.read_text(encoding="utf-8"), filename=str(path)) for name, path in MODULES.items()}
IMPORTS = {name: set(imported_modules(tree)) for name, tree in TREES.items()}


def layer_of(module: str, package: str) -> str | None:
    """The folder or module directly below ``package`` that a module is or lies in; None if it lies elsewhere."""
    return module.removeprefix(f"{package}.").partition(".")[0] if module.startswith(f"{package}.") else None


def layer_imports(package: str) -> dict[str, set[str]]:
    """Layer -> the layers that its modules import, itself left out."""
    graph: dict[str, set[str]] = {layer: set() for layer in LAYERS[package]}
    for name, imported in IMPORTS.items():
        layer = layer_of(name, package)
        if layer is not None and layer != "__main__":
            graph.setdefault(layer, set()).update(filter(None, (layer_of(other, package) for other in imported)))
    return {layer: others - {layer} for layer, others in graph.items()}


if __name__ == "__main__":
    for package, layers in LAYERS.items():
        graph = layer_imports(package)
        print(f"{package}: {len(layers)} layers, {sum(map(len, graph.values()))} dependencies")
        for layer in reversed(layers):
            print(f"  {layer:<15} {', '.join(sorted(graph[layer], key=layers.index)) or '-'}")

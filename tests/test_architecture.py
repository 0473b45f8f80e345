"""Imports between folders go downwards only, files and functions stay small, and light modules import little.

The layers and the imports themselves are read by ``docs/scripts/imports.py``, which also prints them.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LAYERS, MAX_LOOSE_MODULES, MAX_LINES, MAX_LINES_OF_A_FUNCTION = 22, 6, 400, 60
# cli parses, calls one function of commands and prints. Beside these it takes the names of tasks and precisions from
# heads and machine, for help texts and choices, and suggestions from errors.
CLI_IMPORTS = {"commands", "errors", "heads", "machine"}

spec = importlib.util.spec_from_file_location("imports", ROOT / "docs" / "scripts" / "imports.py")
assert spec is not None
assert spec.loader is not None
imports = importlib.util.module_from_spec(spec)
spec.loader.exec_module(imports)


def check_imports(graph: dict[str, set[str]], layers: tuple[str, ...]) -> list[str]:
    """``layer -> imported`` for every import that does not go down, and every layer that is not in the list."""
    order = {layer: number for number, layer in enumerate(layers)}
    return [
        f"{layer} -> {other}"
        for layer, imported in graph.items()
        for other in imported
        if layer not in order or other not in order or order[other] >= order[layer]
    ]


@pytest.mark.parametrize("package", imports.LAYERS)
def test_every_folder_has_a_layer_and_imports_lower_ones_only(package: str) -> None:
    layers, graph = imports.LAYERS[package], imports.layer_imports(package)
    assert set(graph) - {"configs"} == set(layers)  # configs/ holds YAML files alone
    assert len(set(layers)) == len(layers) <= MAX_LAYERS
    assert check_imports(graph, layers) == []
    TopologicalSorter(graph).prepare()


def test_imports_upwards_and_circles_are_noticed() -> None:
    layers = ("low", "middle", "high")
    assert check_imports({"low": set(), "middle": {"low"}, "high": {"low", "middle"}}, layers) == []
    assert check_imports({"low": {"high"}, "middle": {"low"}}, layers) == ["low -> high"]
    assert check_imports({"low": {"new"}}, layers) == ["low -> new"]
    code = "def f():\n    import mvision.cli.main\nif TYPE_CHECKING:\n    from mvision.data import Batch\n"
    assert set(imports.imported_modules(ast.parse(code))) == {"mvision.cli.main", "mvision.data"}
    assert set(imports.imported_modules(ast.parse("from mvision import errors, load"))) == {"mvision.errors", "mvision"}


def test_no_circles_between_modules() -> None:
    graph = {name: imports.IMPORTS[name] & imports.MODULES.keys() for name in imports.MODULES}
    # The package's own module names what ``mvision.load`` and others are; nothing below imports it but for its version.
    graph["mvision"] = set()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_within_the_package_only_its_version_is_imported_from_the_package_itself() -> None:
    for name, tree in imports.TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "mvision":
                names = {alias.name for alias in node.names if f"mvision.{alias.name}" not in imports.MODULES}
                assert names <= {"__version__"}, name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mvision":
                assert node.attr == "__version__" or f"mvision.{node.attr}" in imports.MODULES, name


def test_cli_imports_commands_and_little_else() -> None:
    assert imports.layer_imports("mvision")["cli"] <= CLI_IMPORTS
    users = {name for name, imported in imports.IMPORTS.items() if any("mvision.commands" in i for i in imported)}
    assert {imports.layer_of(name, "mvision") for name in users} <= {"cli", "commands"}


def test_few_loose_modules() -> None:
    loose = [path.name for path in (ROOT / "mvision").glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= MAX_LOOSE_MODULES, loose


def test_files_and_functions_are_small() -> None:
    scripts = [path for folder in ("docs", "tests") for path in (ROOT / folder).rglob("*.py")]
    long = []
    for path in [*imports.MODULES.values(), *scripts]:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        if len(text.splitlines()) > MAX_LINES:
            long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_LINES_OF_A_FUNCTION:
                    long.append(f"{name}:{node.lineno}: {node.name} has {lines} lines")
    assert long == []


def test_mapped_folders_are_imported_by_their_package_name() -> None:
    """``import heads`` would make second copies of every class."""
    outside = {name.partition(".")[0] for imported in imports.IMPORTS.values() for name in imported}
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        outside |= {name.partition(".")[0] for name in imports.imported_modules(tree)}
    assert not outside & {"heads", "cli", "configs"}


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("albumentations", {"mvision.data.augment"}),
        ("click", {"mvision.cli"}),
        ("supervision", {"mvision.drawing", "mvision.structures"}),
        ("huggingface_hub", {"mvision.compat", "mvision.storage", "mvision.weights"}),
        ("tifffile", {"mvision.inference.large_images"}),
        ("gradio", {"mvision.deploy.demo_page"}),
    ],
)
def test_libraries_with_one_place(library: str, users: set[str]) -> None:
    for name, imported in imports.IMPORTS.items():
        if any(other.partition(".")[0] == library for other in imported):
            assert any(f"{name}.".startswith(f"{user}.") for user in users), name


def test_the_neck_needs_torch_alone() -> None:
    """A user may take the folder away, so it and all modules that it imports stay in it."""
    needed, outside, queue = {"mvision.neck"}, set(), ["mvision.neck"]
    while queue:
        for imported in imports.IMPORTS[queue.pop()]:
            if imported in imports.MODULES and imported not in needed:
                needed.add(imported)
                queue.append(imported)
            outside.add(imported.partition(".")[0])
    assert outside - sys.stdlib_module_names <= {"torch", "mvision"}
    assert all(name.startswith("mvision.neck") for name in needed)


@pytest.mark.parametrize(
    ("imported", "banned"),
    [
        ("mvision", "torch numpy timm pydantic"),
        ("mvision.cli.main", "torch numpy timm pydantic accelerate"),
        ("mvision.compat", "torch accelerate openvino huggingface_hub"),
        ("mvision.machine", "torch numpy pydantic"),
        ("mvision.builtin.drawing", "torch pydantic"),
        ("mvision.neck", "timm albumentations cv2 pydantic accelerate"),
        ("mvision.heads", "torch numpy timm pydantic"),
        ("mvision.commands.early", "torch numpy pydantic"),  # it is there to start before these are imported
        # Every process that loads images.
        ("mvision.data.loading.loader", "timm torchvision accelerate huggingface_hub mvision.heads.base mvision.model"),
        (
            "mvision.data.loading.loader",
            "supervision matplotlib onnx openvino segmentation_models_pytorch",
        ),
    ],
)
def test_light_imports(imported: str, banned: str) -> None:
    code = f"import sys, {imported}; print([name for name in {banned.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stderr or done.stdout


def test_the_script_prints_every_layer() -> None:
    script = ROOT / "docs" / "scripts" / "imports.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    printed = {line[0]: line[1] for line in lines if len(line) == 2}
    assert set(imports.LAYERS["mvision"]) <= set(printed)
    assert {"evaluation", "config"} <= set(printed["model"].split(", "))
    assert printed["neck"] == "-"

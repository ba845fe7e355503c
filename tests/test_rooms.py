"""Data flows one way: a room imports only rooms below it, and no modules import in a circle, also inside functions."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nemotron_dspark"
ROOMS = (
    "cli",
    "recipe",
    "deepspec",
    "stages",
    "serving",
    "engines",
    "evaluation",
    "decoding",
    "training",
    "drafts",
    "cache",
    "data",
    "chat",
    "targets",
    "config",
)
BASE = ("_version", "distributed", "errors", "files", "folders", "memory", "processes", "resources")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in PACKAGE.rglob("*.py")}


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Modules of this package that ``source`` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                kept = package[: len(package) - node.level + 1]
                origin = ".".join([*kept, origin] if origin else kept)
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES else names | {origin}  # a module of a package, not the package
    return {name for name in found if name.split(".")[0] == PACKAGE.name}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def wrong_way(module: str, imported: set[str]) -> list[str]:
    """Imports that go up, or from the base into a room."""
    height = {name: len(ROOMS) - place for place, name in enumerate(ROOMS)} | dict.fromkeys(BASE, 0)
    height[""] = height["__main__"] = len(ROOMS) + 1  # the package itself hands on what it imports lazily
    here = height.get(room(module), 0)
    return sorted(name for name in imported if room(name) in height and height[room(name)] > here)


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_place():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert (rooms | files) - {"configs", "templates"} == {*ROOMS, *BASE}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down(path):
    name = module_name(path)
    assert wrong_way(name, imports(path.read_text(), name, path.name == "__init__.py")) == []


def test_no_modules_import_in_a_circle():
    graph = {
        module_name(path): imports(path.read_text(), module_name(path), path.name == "__init__.py") for path in SOURCES
    }
    graph = {name: {other for other in found if other in graph and other != name} for name, found in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nemotron_dspark.targets.spec", "def f():\n    from nemotron_dspark.drafts import builder"),
        ("nemotron_dspark.targets.spec", "from ..cli import shell"),
        ("nemotron_dspark.targets.spec", "import nemotron_dspark.recipe.tiny"),
        ("nemotron_dspark.targets.spec", "from nemotron_dspark import cache"),
        ("nemotron_dspark.files", "from nemotron_dspark.config.run import RunConfig"),
    ],
)
def test_an_import_that_goes_up_is_seen(module, source):
    assert wrong_way(module, imports(source, module, is_package=False))

"""Tests for the architecture: folders, files and imports of the package, read from the source without importing it.

Every test lists its faults, each with the remedy. None has a list of exceptions.
"""

import ast
import collections
import functools
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlip_jax"
MAX_LINES, MAX_FILES = 400, 20

# Rooms of the package (files and folders at its top), from the ground up: a room imports only from rooms before it.
ORDER = (
    "structure",
    "workers",
    "checkpoint",
    "configs",
    "defaults",
    "config",
    "workdir",
    "distributed",
    "datasets",
    "graphs",
    "models",
    "terms",
    "potential",
    "predictor",
    "importers",
    "training",
    "simulation",
    "fine_tuning",
    "reports",
    "sweeps",
    "tasks",
    "cli",
    "main",
)

# Plug-in folders, whose files are found by name: what each file defines. Their helpers live in subfolders.
PLUGINS = {
    "models": "class Model",
    "terms": "class Term",
    "importers": "def load",
    "datasets/readers": "class Reader",
    "tasks": "def run",
    "simulation/relaxation/minimizers": "class {NAME}",
}


@functools.cache
def sources() -> dict[str, Path]:
    """Files of the package by module, "training.loop"; a package's `__init__` by the name of its folder."""
    files = [p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts]
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .strip("."): p
        for p in sorted(files)
    }


class Facts(NamedTuple):
    """What the tests need of a module; each is parsed and walked once."""

    lines: int
    imports: set[str]
    relative: list[int]
    classes: list[ast.ClassDef]
    definitions: set[str]
    hides_imports: bool


@functools.cache
def facts(module: str) -> Facts:
    text = sources()[module].read_text(encoding="utf-8")
    tree = ast.parse(text)
    imported, relative, classes = set(), [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
            relative += [node.lineno] if node.level else []
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            classes.append(node)
    defined = {
        f"{'class' if isinstance(node, ast.ClassDef) else 'def'} {node.name}"
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    return Facts(text.count("\n"), imported, relative, classes, defined, "TYPE_CHECKING" in text)


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that a module imports, at its top or inside of functions."""
    found = set()
    for name in facts(module).imports:
        first, *parts = name.split(".")
        if first == PACKAGE.name:
            # `from mlip_jax.a import b`: b is a module, or a name in the module a
            found.add(
                next((m for m in (".".join(parts), ".".join(parts[:-1])) if m in sources()), "")
            )
    return frozenset(found - {"", module})


def room(module: str) -> str:
    return module.split(".")[0]


def check(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_every_room_has_its_place():
    check(
        [
            f"{name}: a new room of the package; add it to ORDER, after all that it imports from"
            for name in sorted({room(m) for m in sources() if m} - set(ORDER))
        ]
    )


def test_imports_run_downward():
    place = {name: k for k, name in enumerate(ORDER)}
    check(
        [
            f"{module} imports {other}, but {room(other)} is above {room(module)}: move what it needs from there to "
            f"{room(module)} or below"
            for module in sources()
            for other in sorted(imports(module))
            if module and place.get(room(other), 0) > place.get(room(module), len(ORDER))
        ]
    )


def test_imports_are_absolute():
    check(
        [
            f"{module}, line {line}: a relative import; write it as `from mlip_jax...`"
            for module in sources()
            for line in facts(module).relative
        ]
    )


def children() -> dict[str, dict[str, set[str]]]:
    """{folder: {file or folder in it: those beside it that it imports from}} of every folder of the package."""
    graphs = collections.defaultdict(lambda: collections.defaultdict(set))
    for module in sources():
        for other in imports(module):
            a, b = module.split("."), other.split(".")
            depth = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), None)
            if depth is not None:  # otherwise one of them is the other's folder
                graphs[".".join(a[:depth])][a[depth]].add(b[depth])
    return graphs


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of a graph, its first node twice; [] if there is none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        found = next((c for other in sorted(graph.get(node, ())) if (c := visit(other))), [])
        path.pop()
        done.add(node)
        return found

    return next((c for node in sorted(graph) if (c := visit(node))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_folders_have_no_circles():
    check(
        [
            f"mlip_jax/{folder.replace('.', '/')}: {' -> '.join(found)} import each other in a circle: move what both "
            "need to a file below them"
            for folder, graph in sorted(children().items())
            if (found := circle(graph))
        ]
    )


def test_files_are_short():
    check(
        [
            f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_LINES} are allowed; split it by subject"
            for module, path in sources().items()
            if (lines := facts(module).lines) > MAX_LINES
        ]
    )


def test_folders_are_small():
    counts = collections.Counter(path.parent for path in sources().values())
    check(
        [
            f"{folder.relative_to(ROOT)}: {count} files, at most {MAX_FILES} are allowed; group them in subfolders"
            for folder, count in counts.items()
            if count > MAX_FILES
        ]
    )


@pytest.mark.parametrize("folder", PLUGINS)
def test_every_file_of_a_plug_in_folder_is_a_plug_in(folder):
    prefix, faults = folder.replace("/", ".") + ".", []
    plugins = [
        m
        for m, p in sources().items()
        if m.rpartition(".")[0] + "." == prefix and p.name != "__init__.py"
    ]
    assert plugins, f"mlip_jax/{folder} holds no plug-ins: correct PLUGINS"
    for module in plugins:
        definition = PLUGINS[folder].format(NAME=module.rpartition(".")[2].upper())
        if definition not in facts(module).definitions:
            faults.append(
                f"mlip_jax/{module.replace('.', '/')}.py does not define `{definition}`, as each file of "
                "this plug-in folder does: define it, or move the file to a subfolder"
            )
    check(faults)


def test_a_class_name_means_one_thing():
    """An underscore in front does not make it another name. Plug-ins implement their interface under its name."""
    interfaces = {(folder.replace("/", "."), what.split()[1]) for folder, what in PLUGINS.items()}
    places = collections.defaultdict(set)
    for module in sources():
        for node in facts(module).classes:
            # all plug-ins of a folder, and the class that they derive from, count as one
            is_plugin = (module.rpartition(".")[0], node.name) in interfaces
            bases = {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
            if not (is_plugin and node.name in bases):
                places[node.name.lstrip("_")].add(
                    module.rpartition(".")[0] if is_plugin else module
                )
    check(
        [
            f"{name} is defined in {', '.join(sorted(modules))}: say in each name what is particular about it, or merge "
            "them"
            for name, modules in sorted(places.items())
            if len(modules) > 1
        ]
    )


def test_types_need_no_imports_of_their_own():
    check(
        [
            f"{module}: uses TYPE_CHECKING, which hides a circle of imports; import the module as it is, or move the "
            "type to a file below both"
            for module in sources()
            if facts(module).hides_imports
        ]
    )

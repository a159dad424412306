"""Tests for the architecture: folders, files and imports.

They read the source without importing it, and list all violations with the remedy. No test has a
list of exceptions.
"""

import ast
import collections
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlip_jax"
MAX_LINES, MAX_FILES = 400, 20

# Files and folders at the top of the package. Each imports only from those before it.
ORDER = (
    "files",
    "foreign_text",
    "wording",
    "limits",
    "foreign_files",
    "state_labels",
    "structure",
    "executors",
    "workers",
    "compilation_cache",
    "matmul_precision",
    "target_device",
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
    "label_budget",
    "reports",
    "sweeps",
    "tasks",
    "library",
    "cli",
    "main",
)

# Plug-in folders, whose files are found by name, and the definition in each file. Helpers are in
# subfolders.
PLUGINS = {
    "models": "class Model",
    "terms": "class Term",
    "importers": "def load",
    "importers/predictors": "def load",
    "models/bond_graphs": "class BondModel",
    "datasets/readers": "class Reader",
    "tasks": "def run",
    "simulation/relaxation/minimizers": "class {NAME}",
}


@functools.cache
def sources() -> dict[str, Path]:
    """Return the files by module ("training.loop"); an `__init__` has the name of its folder."""
    files = [p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts]
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .strip("."): p
        for p in sorted(files)
    }


class Facts(NamedTuple):
    """Contents of a module, which is parsed only once."""

    lines: int
    imports: set[str]
    relative: list[int]
    classes: list[ast.ClassDef]
    definitions: set[str]
    hides_imports: bool
    writes: list[int]


@functools.cache
def facts(module: str) -> Facts:
    text = sources()[module].read_text(encoding="utf-8")
    tree = ast.parse(text)
    imported, relative, classes, writes = set(), [], [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
            relative += [node.lineno] if node.level else []
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            classes.append(node)
        elif isinstance(node, ast.Call) and opens_for_writing(node):
            writes.append(node.lineno)
    defined = {
        f"{'class' if isinstance(node, ast.ClassDef) else 'def'} {node.name}"
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    hides_imports = "TYPE_CHECKING" in text
    return Facts(text.count("\n"), imported, relative, classes, defined, hides_imports, writes)


def opens_for_writing(call: ast.Call) -> bool:
    """Return whether a call opens a file for writing other than by the functions of files.py."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    parts = [
        part for argument in call.args for part in ast.walk(argument)
    ]  # also of "a if b else c"
    modes = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
    modes += [k.value.value for k in call.keywords if k.arg == "mode" and hasattr(k.value, "value")]
    is_method = isinstance(call.func, ast.Attribute)
    return (
        name == "open"
        and any(re.fullmatch("[rwaxbt+]{1,3}", m) and set(m) & set("wax+") for m in modes)
        or is_method
        and name in ("write_text", "write_bytes", "touch", "symlink_to", "savetxt", "to_csv")
    )


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of the package that a module imports, also inside of functions."""
    modules = set()
    for name in facts(module).imports:
        first, *parts = name.split(".")
        if first == PACKAGE.name:
            # `from mlip_jax.a import b`: b is a module, or a name in the module a
            modules.add(
                next((m for m in (".".join(parts), ".".join(parts[:-1])) if m in sources()), "")
            )
    return frozenset(modules - {"", module})


def top(module: str) -> str:
    """Return the file or folder at the top of the package that contains a module."""
    return module.split(".")[0]


def check(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def test_every_top_level_name_is_in_the_order():
    check(
        [
            f"{name}: not in ORDER. Add it after everything that it imports."
            for name in sorted({top(m) for m in sources() if m} - set(ORDER))
        ]
    )


def test_imports_follow_the_order():
    rank = {name: k for k, name in enumerate(ORDER)}
    check(
        [
            f"{module} imports {other}, but {top(other)} comes after {top(module)} in ORDER. Move "
            f"the imported code to {top(module)} or to a folder before it."
            for module in sources()
            for other in sorted(imports(module))
            if module and rank.get(top(other), 0) > rank.get(top(module), len(ORDER))
        ]
    )


def test_imports_are_absolute():
    check(
        [
            f"{module}, line {line}: relative import. Write `from mlip_jax...`."
            for module in sources()
            for line in facts(module).relative
        ]
    )


def children() -> dict[str, dict[str, set[str]]]:
    """Return {folder: {entry: other entries of the folder that it imports}}."""
    graphs = collections.defaultdict(lambda: collections.defaultdict(set))
    for module in sources():
        for other in imports(module):
            a, b = module.split("."), other.split(".")
            depth = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), None)
            if depth is not None:  # otherwise one is the folder of the other
                graphs[".".join(a[:depth])][a[depth]].add(b[depth])
    return graphs


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a circle of a graph, the first one twice, or [] if there is none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        nodes = next((c for other in sorted(graph.get(node, ())) if (c := visit(other))), [])
        path.pop()
        done.add(node)
        return nodes

    return next((c for node in sorted(graph) if (c := visit(node))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_folders_have_no_circles():
    check(
        [
            f"mlip_jax/{folder.replace('.', '/')}: circular imports {' -> '.join(nodes)}. Move the "
            "common code to another file."
            for folder, graph in sorted(children().items())
            if (nodes := circle(graph))
        ]
    )


def test_files_are_short():
    check(
        [
            f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_LINES}. Split it by subject."
            for module, path in sources().items()
            if (lines := facts(module).lines) > MAX_LINES
        ]
    )


def test_folders_are_small():
    counts = collections.Counter(path.parent for path in sources().values())
    check(
        [
            f"{folder.relative_to(ROOT)}: {count} files, at most {MAX_FILES}. Use subfolders."
            for folder, count in counts.items()
            if count > MAX_FILES
        ]
    )


@pytest.mark.parametrize("folder", PLUGINS)
def test_every_file_of_a_plug_in_folder_is_a_plug_in(folder):
    prefix, violations = folder.replace("/", ".") + ".", []
    plugins = [
        m
        for m, p in sources().items()
        if m.rpartition(".")[0] + "." == prefix and p.name != "__init__.py"
    ]
    assert plugins, f"mlip_jax/{folder}: no plug-ins. Correct PLUGINS."
    for module in plugins:
        definition = PLUGINS[folder].format(NAME=module.rpartition(".")[2].upper())
        if definition not in facts(module).definitions:
            violations.append(
                f"mlip_jax/{module.replace('.', '/')}.py: `{definition}` is missing, which every "
                "file of this plug-in folder defines. Define it, or move the file to a subfolder."
            )
    check(violations)


def test_class_names_are_unique():
    """Names that differ by an underscore are equal. Plug-ins have the name of their interface."""
    interfaces = {(folder.replace("/", "."), text.split()[1]) for folder, text in PLUGINS.items()}
    modules_of = collections.defaultdict(set)
    for module in sources():
        for node in facts(module).classes:
            # all plug-ins of a folder, and the class that they derive from, count as one
            is_plugin = (module.rpartition(".")[0], node.name) in interfaces
            bases = {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
            if not (is_plugin and node.name in bases):
                modules_of[node.name.lstrip("_")].add(
                    module.rpartition(".")[0] if is_plugin else module
                )
    check(
        [
            f"{name} is defined in {', '.join(sorted(modules))}. Choose specific names, or merge "
            "the classes."
            for name, modules in sorted(modules_of.items())
            if len(modules) > 1
        ]
    )


def test_types_have_no_conditional_imports():
    check(
        [
            f"{module}: TYPE_CHECKING hides a circle of imports. Import the module directly, or "
            "move the type to another file."
            for module in sources()
            if facts(module).hides_imports
        ]
    )


def test_files_are_written_by_one_module():
    """Other functions follow symbolic links in output folders of other people."""
    check(
        [
            f"mlip_jax/{module.replace('.', '/')}.py:{line}: opens a file for writing. Use "
            "mlip_jax/files.py, which never follows symbolic links."
            for module in sources()
            if module != "files"
            for line in facts(module).writes
        ]
    )


def test_hdf5_is_read_by_one_module():
    """Files of other people can refer to private files of the user, which hdf5.py rejects."""
    own = {"datasets.hdf5", "simulation.dynamics.h5md", "datasets.builtin.storage"}
    own |= {"datasets.isolation.program"}
    check(
        [
            f"{module}: uses h5py. Use mlip_jax/datasets/hdf5.py, which rejects links."
            for module in sources()
            if any(name.split(".")[0] == "h5py" for name in facts(module).imports)
            and module not in own
        ]
    )


_SMALL_FILES = r"yaml\.\w*load|np\.load\((?!.*mmap_mode)|json\.loads?\(.*(read_text|read_bytes)\("


def test_small_files_are_read_by_one_module():
    """Nested JSON, references in YAML and compressed zeros cost far more than the size of a file."""
    violations = []
    for module, path in sources().items():
        text = path.read_text(encoding="utf-8")
        if not module.startswith("foreign_files") and re.search(
            r"yaml\.\w*load|np\.load\((?!.*mmap_mode)", text
        ):
            violations.append(f"{module}: use mlip_jax/foreign_files/.")
    allowed = {"datasets.selection.split_files", "terms.layers.d3_reference"}  # npy; our own file
    check([v for v in violations if v.split(":")[0] not in allowed])


def test_native_parsers_run_in_isolation():
    """A corrupted database or SMILES can crash its parser, or keep it busy without end."""
    program = "datasets.isolation.program"
    # SMILES that the package generates, or has checked when it read them
    generated = {
        f"datasets.builtin.{name}"
        for name in ("conformations", "conformers", "generate", "kinds.jobs")
    }
    violations = []
    for module, path in sources().items():
        text = path.read_text(encoding="utf-8")
        parses = re.search(r"MolFrom(Smiles|MolBlock)\(", text) and "is_safe_" not in text
        if parses and module not in {program, *generated}:
            violations.append(f"{module}: first call is_safe_smiles of datasets/isolation.")
        if "sqlite3.connect(" in text and module != program:
            violations.append(f"{module}: use connect of datasets/formats/ase_database.py.")
    check(violations)

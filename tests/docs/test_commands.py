"""Tests of the commands and Python blocks of the documentation.

The fast tests parse each command as the program does, and check the names and arguments in each
block. The slow test runs the commands of the guides with small sizes, in a folder with the files and
runs that they name.
"""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import molecule
from ase.io import read, write

from mlip_jax.datasets.atoms_list import write_trajectory
from mlip_jax.datasets.reader import ReadReport
from mlip_jax.datasets.readers import open_data
from mlip_jax.defaults import TASKS
from mlip_jax.sweeps.overrides import override

_spec = importlib.util.spec_from_file_location(
    "docs_commands", Path(__file__).with_name("commands.py")
)
docs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(docs)
markdown = docs.markdown
PAGES = {str(p.relative_to(markdown.ROOT)): p.read_text() for p in markdown.pages()}
# files that the how-to pages create
CREATED = {b.title for text in PAGES.values() for b in markdown.blocks(text) if b.title}
COMMANDS = [c for page, text in PAGES.items() for c in docs.commands(page, text)]
PARSED = sorted(
    {
        c.arguments
        for c in COMMANDS
        if "--help" not in c.arguments and f"configs/{c.config.partition(':')[0]}.py" not in CREATED
    }
)


def test_commands_are_found():
    """Detects an extraction that misses the commands of a page."""
    assert {"README.md", "docs/getting-started.md", "docs/simulations.md", "docs/training.md"} <= {
        c.page for c in COMMANDS
    }
    text = "Run `mlip-jax relax a.smi` and `--config=md --config.limit=3`.\n```sh\n"
    text += "python -m mlip_jax.main --config=spice \\\n  --workdir='a b' # twice\nls; mlip-jax md\n```\n"
    assert [c.arguments for c in docs.commands("page", text)] == [
        ("--config=spice", "--workdir=a b"),
        ("md",),
        ("relax", "a.smi"),
        ("--config=md", "--config.limit=3"),
    ]


@pytest.mark.parametrize("arguments", PARSED, ids=" ".join)
def test_every_command_is_accepted(arguments):
    """Detects commands with unknown configs, fields or flags, or with invalid values."""
    docs.parse(arguments)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_use_names_and_arguments_that_exist(page):
    for block in markdown.blocks(PAGES[page]):
        if block.language == "python":
            _check_block(block.text)


def test_wrong_names_and_arguments_are_detected():
    good = "from mlip_jax import relax\nfrom mlip_jax import MLIPCalculator as M\n"
    _check_block(good + "relax('CCO', 'runs/spice', fmax=0.1)\nM.from_workdir('x', dtype='y')")
    for wrong in ("relax('CCO', 'runs/spice', f_max=0.1)", "M.from_wrkdir('x')", "relax()()(x=)"):
        with pytest.raises((AttributeError, TypeError, SyntaxError)):
            _check_block(good + wrong)


def _check_block(text: str) -> None:
    """Raise if an imported name of this package lacks an attribute, or rejects an argument."""
    tree, names = ast.parse(text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlip_jax"):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                names[name.asname or name.name] = getattr(module, name.name)
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("mlip_jax"):
                    module = importlib.import_module(name.name)
                    names[name.asname or "mlip_jax"] = (
                        module if name.asname else sys.modules["mlip_jax"]
                    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = _resolve(node.func, names)
            is_error = inspect.isclass(called) and issubclass(called, Exception)
            starred = any(isinstance(a, ast.Starred) for a in node.args)
            if called is not None and not is_error and not starred:
                keywords = {k.arg: None for k in node.keywords if k.arg}
                inspect.signature(called).bind_partial(*node.args, **keywords)
        elif isinstance(node, ast.Attribute):
            _resolve(node, names)


def _resolve(node, names):
    """Return the object that an expression of names and attributes denotes; None if unknown."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, names)
        known = inspect.ismodule(owner) or inspect.isclass(owner)
        return getattr(owner, node.attr) if known else None
    return None


# --- Runs ---

GUIDES = (
    "README.md",
    "docs/getting-started.md",
    "docs/training.md",
    "docs/data.md",
    "docs/models.md",
    "docs/simulations.md",
    "docs/properties.md",
    "docs/scaling.md",
)
# Words of commands that need data or weights from elsewhere, or that run for hours.
_EXTERNAL = (
    *("lmdb", "pkl", "SPICE-", "rmd17", "paper_force2geo", "pubchemqcr", "dft_", "mine.npz"),
    *("diversity_", "geom_like", "--sweep", "scheduler="),
)
# Files in place of placeholders, and a trained force field in place of downloads.
_VALUES = {
    "FILE": "mine.xyz",
    "DATA": "molecules.csv",
    "FILE.hdf5": "my_file.hdf5",
    "sevennet-0": "runs/spice",
    "X.model": "runs/spice",
}
_FEATURES = 24  # divisible by the numbers of heads and degrees of all models
# Small sizes by task.
SMALL = {
    "train": {
        "train.num_steps": 4,
        "train.valid_every": 4,
        "train.checkpoint_every": 4,
        "optimizer.warmup_steps": 1,
        "report.max_domain": 50,
    },
    "property": {
        "train.num_epochs": 1.0,
        "train.batch_size": 8,
        "train.valid_every": 2,
        "report.max_domain": 20,
    },
    "relax": {"max_steps": 3, "fmax": 1.0},
    "md": {"num_steps": 20},
    "minima": {
        "num_conformers": 2,
        "num_reference_minima": 0,
        "search.rounds": 0,
        "search.max_steps": 5,
        "search.fmax": 1.0,
        "search.final_fmax": 1.0,
    },
    "stability": {
        "picoseconds": 0.01,
        "nve_picoseconds": 0.01,
        "replicas": 1,
        "temperatures": (300.0,),
    },
    "vibrations": {"max_steps": 5, "fmax": 1.0},
    "audit": {"checks": ("bonds",)},
    "active_learning": {
        "budget": 20,
        "held_out.num_test": 2,
        "rounds.num_rounds": 2,
        "propose.kinds": ("conformers", "modes"),
        "propose.num_conformers": 1,
        "train.num_steps": 4,
    },
    "fine_tune": {"num_steps": 4, "recipes": ("full",), "curve": (), "old.num_replay": 4},
    "crystal": {"fmax": 1.0, "max_steps": 3, "num_volumes": 5, "supercell_length": 4.0, "mesh": 2},
    "neb": {"num_images": 1, "max_steps": 3, "fmax": 10.0},
    "force2geo_eval": {"data.num_molecules": 2, "relax.max_steps": 5, "oracle.max_steps": 5},
    "generate": {"data.num_conformations": 20},
    "predict": {"max_steps": 3, "fmax": 1.0},
}


@pytest.mark.parametrize("task", SMALL)
def test_small_sizes_are_those_of_fields(task):
    """Detects renamed fields before the slow test does."""
    override(TASKS[task].build(), SMALL[task])


@pytest.fixture(scope="module")
def guide_folder(tmp_path_factory):
    """Folder with the files and runs that the guides name."""
    folder = tmp_path_factory.mktemp("guides")
    data = markdown.ROOT / "tests/data/gfn2_small.hdf5"
    (folder / "data").mkdir()
    shutil.copy(data, folder / "my_file.hdf5")
    shutil.copy(data, folder / "data/SPICE-small.hdf5")  # where the program looks for data
    # active learning holds molecules out, so that three are too few
    smiles = ("C", "CC", "CO", "CN", "CCO", "C=O", "CC=O", "COC")
    (folder / "molecules.smi").write_text("".join(f"{s}\n" for s in smiles))
    (folder / "mine.smi").write_text("CCO\nCO\n")
    rows = [f"{'C' * n}{end},{5 + n / 10}" for n in range(1, 9) for end in ("", "O", "N", "=O")]
    (folder / "molecules.csv").write_text("smiles,gap\n" + "\n".join(rows) + "\n")
    (folder / "new.csv").write_text("smiles\nCCO\nCCN\n")
    with open_data(data) as source:
        structures = list(source.read(range(len(source)), ReadReport()))
    write_trajectory(folder / "frames.traj", structures)
    frames = read(folder / "frames.traj", ":")
    for name in ("mine", "test", "salts", "oxides"):
        write(folder / f"{name}.xyz", frames, format="extxyz")
    write(folder / "mols.xyz", frames[:2], format="extxyz")
    write(folder / "crystals.xyz", _methane_crystal(), format="extxyz")
    write(folder / "reactions.xyz", _rotation_of_hydroxyl(), format="extxyz")
    # The parameters of the package keep molecules intact in the simulations.
    train = "--config=train --config.data.path=my_file.hdf5 --config.init.workdir=drugs-gfn2"
    train += " --config.model.name= --config.optimizer.learning_rate_end=1e-6 --config.optimizer.learning_rate=1e-6"
    prepare = {
        "runs/spice": train,
        "runs/b": f"{train} --config.seed=1",
        "runs/c": f"{train} --config.seed=2",
        "runs/gap": "--config=force2prop:scratch --config.data.path=molecules.csv",
        "runs/gap_2d": "--config=force2prop:scratch,gin_virtual,small --config.data.path=molecules.csv",
        "stores/mine": "--config=convert --config.data.path=mine.xyz",
    }
    for workdir, text in prepare.items():
        failure = _run(docs.Command("", tuple(text.split())), workdir, folder)
        assert not failure, failure
    copies = {
        "spice": ("qcr", "a", "salts", "metals", "oxides", "spice-0"),
        "b": ("spice-1",),
        "c": ("spice-2",),
    }
    for name, others in copies.items():
        for other in others:
            shutil.copytree(folder / "runs" / name, folder / "runs" / other)
    return folder


def _methane_crystal():
    """Return a cubic cell with one molecule."""
    crystal = molecule("CH4", cell=[4.2] * 3, pbc=True)
    crystal.center()
    return crystal


def _rotation_of_hydroxyl():
    """Return methanol with two positions of the hydrogen of the hydroxyl group."""
    ends = [molecule("CH3OH") for _ in range(2)]
    carbon, oxygen, hydrogen = 0, 1, 3
    ends[1].rotate_dihedral(2, carbon, oxygen, hydrogen, 120, indices=[hydrogen])
    return ends


@pytest.mark.slow  # about 60 processes
@pytest.mark.parametrize("page", GUIDES)
def test_the_commands_of_the_guides_run(page, guide_folder):
    """Detects commands that are accepted and then fail."""
    commands = [
        c
        for c in docs.commands(page, PAGES[page])
        if not any(word in " ".join(c.arguments) for word in _EXTERNAL)
    ]
    failures = [
        _run(command, f"out/{Path(page).stem}-{k}", guide_folder)
        for k, command in enumerate(commands)
    ]
    assert commands and not any(failures), "\n\n".join(filter(None, failures))


def _run(command, workdir: str, folder: Path) -> str:
    """Run a command with small sizes in another workdir; return its output if it fails, or ""."""
    arguments = [_with_value(a) for a in command.arguments if not a.startswith("--workdir")]
    if "--help" not in arguments:
        arguments += [f"--overrides={_overrides(command)!r}", f"--workdir={workdir}"]
    done = subprocess.run(
        [sys.executable, "-m", "mlip_jax.main", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(markdown.ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = f"{' '.join(arguments)}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return output if done.returncode else ""


def _with_value(argument: str) -> str:
    """Return an argument with a file in place of a placeholder."""
    flag = re.match("--[^=]*=|", argument)[0]
    name, mark, rest = argument[len(flag) :].partition("#")  # a force field may have options
    return f"{flag}{_VALUES.get(name, name)}{mark}{rest}"


def _overrides(command) -> dict:
    """Return small sizes for the task of a command."""
    config = docs.parse(command.arguments)
    small = dict(SMALL.get(config["task"], {}))
    options = config.get("model", {}).get("options", {})
    if "num_features" in options:
        small["model.options"] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
        } | {"num_features": _FEATURES}
    return small

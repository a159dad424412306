"""Files without a reader as further targets of the fuzzer: checkpoints, stores, weights, molecules.

A target creates a sample in a folder and reads a file or folder. `errors` are the exceptions that a
corrupted copy may cause.
"""

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TESTS = Path(__file__).parents[1]


class Target(NamedTuple):
    """Kind of file without a reader."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    errors: Callable[[], tuple[type[Exception], ...]]


def _weights(name: str) -> Target:
    """Return the target of a file in tests/importers/files, which is loaded as a force field."""

    def make(folder: Path) -> Path:
        content = (TESTS / f"importers/files/{name}.xz").read_bytes()
        (folder / name).write_bytes(lzma.decompress(content))
        return folder / name

    def read(path: Path) -> None:
        from mlip_jax.importers import load_force_field

        load_force_field(path)

    def errors():
        from mlip_jax.checkpoint import CheckpointError

        return (CheckpointError, ValueError, FileNotFoundError)

    return Target(make, read, errors)


def _make_checkpoint(folder: Path) -> Path:
    from mlip_jax.checkpoint import CheckpointStore

    store = CheckpointStore(folder / "checkpoints")
    store.save(3, {"params": {"w": np.arange(600.0).reshape(20, 30)}}, {"config": {"a": [1, "x"]}})
    store.close()
    return folder / "checkpoints"


def _read_checkpoint(path: Path) -> None:
    from mlip_jax.potential import read_checkpoint

    read_checkpoint(path)


def _checkpoint_errors():
    from mlip_jax.checkpoint import CheckpointError

    return (CheckpointError,)


def _make_store(folder: Path) -> Path:
    from mlip_jax.datasets.store.conversion import ConversionSpec, convert

    path = TESTS / "data/spice_1.1.4_small.hdf5"
    return convert(ConversionSpec(str(path)), folder / "store", num_processes=1, progress=False)


def _read_store(path: Path) -> None:
    from mlip_jax.datasets.store.store import INDEX, Store

    store = Store(path)
    for _, columns in store.chunks():
        list(columns)
    for name in INDEX:
        np.array(store.index(name))
    store.texts("smiles")


def _dataset_errors():
    from mlip_jax.datasets.reader import DatasetError

    return (DatasetError,)


def _molecules(name: str, text: str) -> Target:
    """Return the target of a file of molecules."""

    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    def read(path: Path) -> None:
        from mlip_jax.datasets.molecules.files import read_molecules

        list(read_molecules(path, num_processes=1))

    def errors():
        from mlip_jax.config import ConfigError

        return (*_dataset_errors(), ConfigError)

    return Target(make, read, errors)


def _file_of(
    name: str, save: Callable[[Path], Any], load: Callable[[Path], Any], errors: Callable
) -> Target:
    """Return the target of one file, by the functions that write and read it."""

    def make(folder: Path) -> Path:
        save(folder / name)
        return folder / name

    return Target(make, load, errors)


def _frames(name: str) -> Target:
    """Return the target of a file of crystals that ASE reads, by the suffix of its name."""

    def save(path: Path) -> None:
        from ase.build import bulk
        from ase.calculators.singlepoint import SinglePointCalculator

        atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=atoms.positions)
        atoms.write(path)

    def load(path: Path) -> None:
        from mlip_jax.datasets.molecules.files import read_molecules
        from mlip_jax.datasets.readers import open_data

        list(read_molecules(path))
        with open_data(path, "ase") as source:
            list(source)

    def errors():
        from mlip_jax.config import ConfigError

        return (*_dataset_errors(), ConfigError)

    return _file_of(name, save, load, errors)


def _save_trajectory(path: Path) -> None:
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    from mlip_jax.simulation.dynamics import h5md

    for step in range(3):
        atoms = Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"step": step, "time_fs": 0.5 * step})
        atoms.calc = SinglePointCalculator(atoms, energy=0.0)
        h5md.append(path, [atoms])


def _load_trajectory(path: Path) -> None:
    from mlip_jax.simulation.dynamics import h5md

    h5md.read(path)


def _save_domain(path: Path) -> None:
    from mlip_jax.simulation.trust.domain import Domain

    rng = np.random.default_rng(0)
    Domain.fit(rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), {"a": np.ones(9)}).save(path)


def _load_domain(path: Path) -> None:
    from mlip_jax.simulation.trust.domain import Domain

    domain = Domain.load(path)
    domain.distance(np.zeros((2, 4)))


def _make_parameters(folder: Path) -> Path:
    import jax

    from mlip_jax import models
    from mlip_jax.importers import parameters
    from mlip_jax.potential import Potential, example_graph

    model = models.create("schnet", num_features=4, num_layers=1, cutoff=3.0)
    weights = jax.tree.map(np.asarray, model.init(jax.random.key(0), example_graph()))
    potential = Potential(model, weights, 3.0, np.zeros(119), 1.0, (1, 8), {"statistics": {}})
    return Path(parameters.save(potential, folder / "field"))


def _load_parameters(path: Path) -> None:
    from mlip_jax.importers import parameters

    parameters.load(path)


def _parameter_errors():
    from mlip_jax.importers.formats.weights import WeightsError

    return WeightsError, FileNotFoundError


_MOL_BLOCK = """water
     RDKit          3D

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0021    0.4041    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
   -0.7790   -0.1990    0.0000 H   0  0  0  0  0  0  0  0  0  0  0  0
    0.7769   -0.2051    0.0000 H   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0
  1  3  1  0
M  CHG  1   1   0
M  END
$$$$
"""
TARGETS = {
    "ase_cif": _frames("a.cif"),
    "ase_pdb": _frames("a.pdb"),
    "ase_traj": _frames("a.traj"),
    "ase_vasp": _frames("a.vasp"),
    "checkpoint": Target(_make_checkpoint, _read_checkpoint, _checkpoint_errors),
    "domain": _file_of("domain.npz", _save_domain, _load_domain, _checkpoint_errors),
    "molecules_csv": _molecules("a.csv", "smiles,name\nCCO,ethanol\nc1cc[nH]c1,\nC/C=C/F,x\n"),
    "molecules_sdf": _molecules("a.sdf", 2 * _MOL_BLOCK),
    "molecules_smi": _molecules("a.smi", "C1CC1 a\n[O-][N+](=O)C b\nN[C@@H](F)O c\n"),
    "parameters": Target(_make_parameters, _load_parameters, _parameter_errors),
    "store": Target(_make_store, _read_store, _dataset_errors),
    "trajectory": _file_of(
        "a.h5", _save_trajectory, _load_trajectory, lambda: (OSError, ValueError)
    ),
    "weights_nequip": _weights("nequip.ckpt"),
    "weights_nequix": _weights("nequix_indexed.nqx"),
    "weights_schnet": _weights("schnetpack_schnet.ckpt"),
}

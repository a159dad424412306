"""Workload of benchmarks/models.py: the same molecules in the same order for all packages, as .npz.

The molecules are 60 drugs (drugs.smi: 20 to 59 atoms, 37 on average) in 50 conformations each,
generated and labeled by mlip_jax, or the structures of a store or of a data file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule

from mlip_jax.datasets import statistics
from mlip_jax.datasets.builtin import generate_embedded, read_smiles_file
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store, is_store

DRUGS = Path(__file__).with_name("drugs.smi")
MAX_STRUCTURES = 6000
SMALL, MEDIUM = 20, 60
WATERS = 7  # along each side of the cluster: 343 molecules, 1,029 atoms
WATER_VOLUME = 29.9  # Å³ per molecule at room temperature


def make_work(folder: Path, data: str | None, conformations: int, seed: int = 0) -> Path:
    """Return the path of the workload in `folder`; generate it if it is missing.

    Args:
      folder: Folder of the workload.
      data: Store or data file; None for the drugs.
      conformations: Number of conformations per drug.
      seed: Seed of the generation and the order.

    Raises:
      ValueError: No structure of the data has energy and forces.
    """
    name = hashlib.sha256(
        f"{data and Path(data).resolve()} {conformations} {seed}".encode()
    ).hexdigest()[:12]
    path = folder / f"work-{name}.npz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        store = _open(folder, data, conformations, seed, name)
        columns = _shuffle(store, seed)
        arrays = {
            name: getattr(columns, name) for name in ("numbers", "positions", "forces", "offsets")
        }
        np.savez(
            path.with_suffix(".tmp.npz"),
            **arrays,
            energy=_remainders(columns),
            **latency_systems(columns, seed),
        )
        path.with_suffix(".tmp.npz").rename(path)
    return path


def _open(folder: Path, data: str | None, conformations: int, seed: int, name: str) -> Store:
    if data and is_store(data):
        return Store(data)
    if data is None:
        drugs, problems = read_smiles_file(DRUGS)
        if problems:
            raise ValueError("; ".join(problems))
        data = str(
            generate_embedded(
                folder / f"drugs-{conformations}.h5",
                molecules=drugs,
                seed=seed,
                num_conformations=conformations * len(drugs),
            )
        )
    return Store(
        convert(ConversionSpec(data, filters={"require": "forces"}), folder / f"store-{name}")
    )


def _shuffle(store: Store, seed: int) -> Columns:
    if not len(store):
        raise ValueError(f"{store.path}: no structure with energy and forces")
    return store.take(np.random.default_rng(seed).permutation(len(store))[:MAX_STRUCTURES])


def _remainders(columns: Columns) -> np.ndarray:
    """Return energies minus a linear fit to the composition, (S,) eV."""
    counts = statistics.element_counts(columns.numbers, columns.n_atoms)
    fitted, *_ = np.linalg.lstsq(counts, columns.energy, rcond=None)
    return columns.energy - counts @ fitted


def latency_systems(columns: Columns, seed: int) -> dict[str, np.ndarray]:
    """Return numbers and positions of the systems of part latency.

    These are the structures closest to SMALL and MEDIUM atoms, and a water cluster.
    """
    arrays = {}
    for name, size in (("small", SMALL), ("medium", MEDIUM)):
        nearest = columns[int(np.argmin(np.abs(columns.n_atoms - size)))]
        arrays |= {f"{name}_numbers": nearest.numbers, f"{name}_positions": nearest.positions}
    cluster = water_cluster(WATERS, seed)
    return arrays | {"cluster_numbers": cluster.numbers, "cluster_positions": cluster.positions}


def water_cluster(side: int, seed: int) -> Atoms:
    """Return side³ randomly rotated water molecules on a cubic lattice, as dense as the liquid."""
    rng, water = np.random.default_rng(seed), molecule("H2O")
    cluster, spacing = Atoms(), WATER_VOLUME ** (1 / 3)
    for site in np.ndindex(side, side, side):
        rotated = water.copy()
        rotated.euler_rotate(*rng.uniform([0, 0, 0], [360, 180, 360]), center="COP")
        rotated.positions += spacing * np.array(site) - rotated.positions.mean(axis=0)
        cluster += rotated
    return cluster

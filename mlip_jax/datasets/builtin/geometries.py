"""Conformations of the built-in molecules for tests and training of existing force fields.

They are thermal frames on a molecular-mechanics surface, with GFN2-xTB labels on request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ase.units import Bohr, Hartree

from mlip_jax import workers
from mlip_jax.datasets.builtin import labels, sampling
from mlip_jax.datasets.builtin.conformations import stable_hash
from mlip_jax.datasets.builtin.generate import quiet_rdkit
from mlip_jax.datasets.builtin.molecules import Molecule, embedded_molecules
from mlip_jax.datasets.isolation.molecules import is_safe_smiles
from mlip_jax.datasets.smiles.embedding import charge_and_unpaired
from mlip_jax.structure import Structure

_TEMPERATURES = (150.0, 1000.0)  # range of temperatures of the frames (K)


class GeometryTask(NamedTuple):
    """Job of `make_geometries`.

    Attributes:
      molecule: Molecule.
      count: Number of conformations.
      seed: Seed of all molecules.
      labelled: Whether to compute GFN2-xTB energies and forces.
    """

    molecule: Molecule
    count: int
    seed: int
    labelled: bool


def make_geometries(task: GeometryTask) -> list[Structure]:
    """Return intact conformations of a molecule; fewer, or none, if sampling or labels fail."""
    from rdkit import Chem

    if not is_safe_smiles(task.molecule.smiles):
        return []
    quiet_rdkit()
    rng = np.random.default_rng(stable_hash(task.seed, task.molecule.smiles))
    mol = Chem.AddHs(Chem.MolFromSmiles(task.molecule.smiles))
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.int32)
    charge, unpaired = charge_and_unpaired(mol)
    try:
        ids = sampling.embed(mol, 1, int(rng.integers(2**31 - 1)), max_iterations=20)
        surface = sampling.Surface(mol)
    except ValueError:  # no geometry, or no parameters
        return []
    minima = [surface.minimum(conf_id) for conf_id in ids]
    frames = sampling.thermal_frames(surface, minima, task.count, _TEMPERATURES, rng)
    radii, bonded = labels.covalent_radii(numbers), labels.bond_matrix(mol)
    structures = []
    for frame in frames:
        if not labels.is_intact(frame, radii, bonded):
            continue
        energy, forces = float("nan"), None
        if task.labelled:
            try:
                energy, gradient = labels.energy_and_gradient(
                    numbers, frame / Bohr, charge, unpaired
                )
            except labels.NotConverged:
                continue
            energy, forces = energy * Hartree, -gradient * (Hartree / Bohr)
        structures.append(
            Structure(
                numbers=numbers,
                positions=np.asarray(frame, np.float64),
                energy=energy,
                forces=forces,
                charge=float(charge),
                spin=float(unpaired),
                molecule=task.molecule.smiles,
                smiles=task.molecule.smiles,
            )
        )
    return structures


def builtin_molecules(elements: set[int], charges: set[float] | None) -> list[Molecule]:
    """Return the built-in molecules of these elements and total charges (None for any charge)."""
    from rdkit import Chem

    kept = []
    for molecule in filter(lambda m: is_safe_smiles(m.smiles), embedded_molecules()):
        mol = Chem.AddHs(Chem.MolFromSmiles(molecule.smiles))
        inside = {atom.GetAtomicNum() for atom in mol.GetAtoms()} <= elements
        if inside and (charges is None or float(Chem.GetFormalCharge(mol)) in charges):
            kept.append(molecule)
    return kept


def iterate_geometries(
    tasks: list[GeometryTask], num_processes: int | None = None
) -> Iterator[list[Structure]]:
    """Yield the conformations of each task, in order, computed in worker processes.

    Args:
      tasks: Jobs.
      num_processes: Number of worker processes; None for one per core.
    """
    yield from workers.stream(make_geometries, tasks, num_processes)

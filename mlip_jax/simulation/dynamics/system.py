"""System of a simulation: molecules or cells as arrays that are constant during the dynamics.

M   molecules (or cells), each an independent simulation
N   atoms of all molecules, including padding
n   atoms of the largest molecule
B   monitored bonds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from mlip_jax.datasets.near_origin import is_far
from mlip_jax.datasets.quality.geometry import bond_limit
from mlip_jax.graphs.graph import spread_by_graph
from mlip_jax.graphs.long_range import find_lattice_obstacle
from mlip_jax.graphs.neighbors import neighbor_list
from mlip_jax.graphs.shapes import NODE_MULTIPLE, round_up
from mlip_jax.graphs.slots import Slots
from mlip_jax.potential import Potential
from mlip_jax.structure import STATES, electronic_value, hill_formula
from mlip_jax.target_device import target_platform


class Particles(NamedTuple):
    """Constant properties of the atoms on the device.

    Padding atoms belong to molecule M and have a mass of 1 amu.

    Attributes:
      slots: Atomic numbers, number of atoms, charge and spin; one molecule per slot.
      slot_atoms: Atom of each place of a slot, (M, n) int32; arbitrary for unused slot_atoms.
      masses: Masses (amu), (N,).
      mass_fractions: Masses over the mass of the molecule, (N,).
      molecule: Molecule of each atom, (N,) int32.
      number: Number of the atom within its molecule, (N,) int32.
      dof: Degrees of freedom with kinetic energy, (M,).
      target: k T of the thermostat (eV), (M,).
      stream: Number of the random stream of each molecule, (M,) int32.
      hottest: Temperature above which a molecule counts as broken, as k T (eV), (M,).
      bonds: Atoms of the bonds, (B, 2) int32.
      bond_length: Sum of the covalent radii (Å), (B,).
      bond_shifts: Lattice translations of the second atom, (B, 3) int32, or None.
      periodic: Periodicity along each lattice vector, (M, 3) bool, or None if all are open.
    """

    slots: Slots
    slot_atoms: jax.Array
    masses: jax.Array
    mass_fractions: jax.Array
    molecule: jax.Array
    number: jax.Array
    dof: jax.Array
    target: jax.Array
    stream: jax.Array
    hottest: jax.Array
    bonds: jax.Array
    bond_length: jax.Array
    bond_shifts: jax.Array | None
    periodic: jax.Array | None

    def of_atoms(self, values: jax.Array, padding: float | bool) -> jax.Array:
        """Return the value of each atom's molecule, `padding` for padding atoms: (M, ...) -> (N, ...)."""
        if target_platform() == "cpu":
            end = jnp.full((1, *values.shape[1:]), padding, values.dtype)
            return jnp.append(values, end, axis=0)[self.molecule]
        found = spread_by_graph(values, self.molecule)
        real = (self.molecule < len(values)).reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(real, found, jnp.asarray(padding, values.dtype))


@dataclasses.dataclass(frozen=True)
class System:
    """Molecules of a simulation, on the host.

    Attributes:
      molecules: Copies of the input with initial momenta; open ones, and cells whose atoms are far
        from it, are centered at the origin.
      origin: Positions of the input minus those of `molecules` (Å), (M, 3).
      first: Number of the first molecule in its run.
    """

    molecules: tuple[Atoms, ...]
    origin: np.ndarray
    first: int = 0

    def part(self, begin: int, end: int) -> System:
        """Return the molecules from number `begin` to `end`, exclusive, as a system."""
        return System(self.molecules[begin:end], self.origin[begin:end], self.first + begin)

    @property
    def begin(self) -> np.ndarray:
        """Return the first atom of each molecule, followed by the number of atoms, (M + 1,)."""
        return np.concatenate([[0], np.cumsum([len(a) for a in self.molecules])])

    @property
    def nodes(self) -> int:
        """Return the number of atoms including padding (N)."""
        return round_up(int(self.begin[-1]) + 1, NODE_MULTIPLE)

    @property
    def is_periodic(self) -> bool:
        """Return whether the molecules are cells."""
        return bool(self.molecules[0].pbc.any())

    @property
    def cell(self) -> np.ndarray | None:
        """Return the lattice vectors (Å), (M, 3, 3), or None.

        Directions without periodicity have a vector that completes the basis.
        """
        return (
            np.stack([a.cell.complete().array for a in self.molecules])
            if self.is_periodic
            else None
        )

    @property
    def periodic(self) -> np.ndarray | None:
        """Return the periodicity along each lattice vector, (M, 3) bool, or None."""
        return np.stack([a.pbc for a in self.molecules]) if self.is_periodic else None

    def padded(self, name: str, dtype) -> np.ndarray:
        """Return an array of the atoms of all molecules, (N, ...), zero for padding atoms."""
        values = np.concatenate(
            [a.arrays[name] if name in a.arrays else np.zeros((len(a), 3)) for a in self.molecules]
        )
        return np.concatenate(
            [values, np.zeros((self.nodes - len(values), *values.shape[1:]))]
        ).astype(dtype)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Split values of atoms (N, ...) by molecule."""
        begin = self.begin
        return [values[a:b] for a, b in zip(begin, begin[1:])]

    def particles(
        self,
        dtype,
        dof: np.ndarray,
        target: np.ndarray,
        hottest: np.ndarray,
        stop_on_bond_break: bool,
    ) -> Particles:
        """Return the `Particles` of the system, as NumPy arrays.

        The random stream of a molecule is its number in the run.
        """
        counts = np.array([len(a) for a in self.molecules], np.int32)
        num, size, begin = len(counts), int(counts.max()), self.begin
        local, rows = np.arange(size), np.zeros((num, size), np.int32)
        for m, atoms in enumerate(self.molecules):
            rows[m, : len(atoms)] = atoms.numbers
        molecule = np.full(self.nodes, num, np.int32)
        molecule[: begin[-1]] = np.repeat(np.arange(num), counts)
        number = np.arange(self.nodes) - np.append(begin[:-1], begin[-1])[molecule]
        masses = np.ones(self.nodes, dtype)
        masses[: begin[-1]] = np.concatenate([a.get_masses() for a in self.molecules])
        fractions = np.zeros(self.nodes, dtype)
        fractions[: begin[-1]] = np.concatenate(
            [a.get_masses() / a.get_masses().sum() for a in self.molecules]
        )
        bonds, lengths, shifts = self.bonds() if stop_on_bond_break else _no_bonds()

        states = (
            np.array([electronic_value(a, name) for a in self.molecules], dtype) for name in STATES
        )
        return Particles(
            Slots(rows, counts, *states),
            np.where(local < counts[:, None], begin[:-1, None] + local, 0).astype(np.int32),
            masses,
            fractions,
            molecule,
            number.astype(np.int32),
            dof.astype(dtype),
            target.astype(dtype),
            np.arange(self.first, self.first + num, dtype=np.int32),
            hottest.astype(dtype),
            bonds,
            lengths.astype(dtype),
            shifts if self.is_periodic else None,
            self.periodic,
        )

    def bonds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return atoms, sums of covalent radii and translations of the initially bonded pairs."""
        parts_by_molecule = [_no_bonds()]
        for atoms, first in zip(self.molecules, self.begin):
            radii = covalent_radii[atoms.numbers]
            box = (atoms.cell.array, atoms.pbc) if atoms.pbc.any() else ()
            neighbors = neighbor_list(
                atoms.positions, bond_limit(atoms.numbers, atoms.numbers).max(), *box
            )
            once = neighbors.pair_order[: len(neighbors.pair_order) // 2]
            i, j = neighbors.receivers[once], neighbors.senders[once]
            shifts = (
                np.zeros((len(i), 3), np.int32)
                if neighbors.shifts is None
                else neighbors.shifts[once]
            )
            vectors = atoms.positions[j] - atoms.positions[i] + shifts @ atoms.cell.array
            bonded = np.linalg.norm(vectors, axis=1) < bond_limit(
                atoms.numbers[i], atoms.numbers[j]
            )
            parts_by_molecule.append(
                (
                    (np.stack([i, j], 1) + first)[bonded].astype(np.int32),
                    (radii[i] + radii[j])[bonded],
                    shifts[bonded],
                )
            )
        return tuple(np.concatenate(parts) for parts in zip(*parts_by_molecule))


def _no_bonds():
    """Return the arrays of `System.bonds` without any bond."""
    return np.zeros((0, 2), np.int32), np.zeros(0), np.zeros((0, 3), np.int32)


def make(molecules: Sequence[Atoms], potential: Potential) -> System:
    """Create the system of molecules that are simulated in one batch.

    Raises:
      ValueError: If a molecule cannot be simulated, with the reason, or if some are open and some
        periodic.
    """
    molecules = list(molecules)
    if not molecules:
        raise ValueError("no molecules to simulate: give at least one")
    for m, atoms in enumerate(molecules):
        reason = _obstacle(atoms, potential)
        if reason:
            raise ValueError(
                f"molecule {m} ({hill_formula(atoms.numbers) or 'empty'}) cannot be simulated: "
                f"{reason}"
            )
    kinds = [bool(a.pbc.any()) for a in molecules]
    if any(kinds) != all(kinds):
        raise ValueError(
            f"molecule {kinds.index(True)} is periodic and molecule {kinds.index(False)} is "
            "not. Simulate open and periodic structures in separate runs."
        )
    copies = [atoms.copy() for atoms in molecules]
    origin = np.zeros((len(copies), 3))
    for m, copy in enumerate(copies):
        if not copy.pbc.any():
            origin[m] = copy.get_center_of_mass()
        elif is_far(copy.positions):
            origin[m] = copy.positions.mean(0)
        copy.positions -= origin[m]  # float32 has fewer digits far from the origin
    return System(tuple(copies), origin)


def _obstacle(atoms: Atoms, potential: Potential) -> str:
    """Return the reason why a molecule cannot be simulated, or ""."""
    if len(atoms) == 0:
        return "the molecule has no atoms"
    for name, values in (("positions", atoms.positions), ("momenta", atoms.get_momenta())):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            return f"{name} are not finite: atom {bad[0]} has {values[bad[0]].tolist()}"
    if not (atoms.get_masses() > 0).all():
        return f"atom {int(np.argmin(atoms.get_masses()))} has no mass"
    if atoms.constraints:
        return f"unsupported constraints: {', '.join(type(c).__name__ for c in atoms.constraints)}"
    if atoms.pbc.any() and not atoms.cell.array.any(axis=1)[atoms.pbc].all():
        return f"pbc is {atoms.pbc.tolist()}, but a periodic direction has no lattice vector"
    if atoms.pbc.any():
        far = potential.long_range_cutoff
        if reason := find_lattice_obstacle(far, atoms.cell.array, atoms.pbc):
            return reason
    try:
        for name in STATES:
            electronic_value(atoms, name)
        potential.check_elements(atoms.numbers)
    except ValueError as error:
        return str(error)
    return ""

"""Search for the minima of molecules: embedded geometries and frames of hot dynamics, relaxed, each minimum once.

All molecules go through it side by side. Starting geometries (RDKit's ETKDG for a SMILES) are relaxed in batches; in
each round that follows, dynamics at a high temperature begin from the lowest minima found so far and their frames are
relaxed. A molecule for which a round finds nothing new is done. Minima are the same where their energies and, over the
symmetries of the molecule, their heavy atoms are; mirror images are told apart. A minimum with other bonds than the
start is a product of a reaction, and is left out.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from mlip_jax.datasets.molecules.rmsd import Conformers, cross_rmsd
from mlip_jax.datasets.molecules.symmetry import SymmetryQuery, symmetries_of
from mlip_jax.datasets.quality.geometry import bond_limit
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.structure import electronic_state

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How to search. Energies are in eV, lengths in Å, temperatures in K.

    Attributes:
      rounds: Of dynamics, after the starting geometries; 0: none.
      replicas: Dynamics of a molecule in a round. temperature, picoseconds: Of each. frames: That are relaxed of each.
      window: Minima so far above the lowest one are kept, and begin dynamics.
      fmax, max_steps: Of the relaxations: eV/Å, and steps.
      same_energy, same_rmsd: Minima closer than both are one.
      timestep: fs. dtype: "float32" or "float64". seed: Of the dynamics.

    Raises:
      ValueError: A value that makes no sense.
    """

    rounds: int = 2
    replicas: int = 8
    temperature: float = 600.0
    picoseconds: float = 1.0
    frames: int = 4
    window: float = 0.5
    fmax: float = 0.02
    max_steps: int = 500
    same_energy: float = 0.005
    same_rmsd: float = 0.125
    timestep: float = 0.5
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        for name, least in (("rounds", 0), ("replicas", 1), ("frames", 1), ("max_steps", 1)):
            if int(getattr(self, name)) != getattr(self, name) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, received {getattr(self, name)}")
        for name in ("temperature", "picoseconds", "window", "fmax", "same_energy", "same_rmsd", "timestep"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, received {getattr(self, name)}")


@dataclasses.dataclass
class Minimum:
    """A minimum.

    Attributes:
      atoms: With energy and forces. energy: eV. round: That found it first, 0 that of the starting geometries.
      times: How often it was found.
    """

    atoms: Atoms
    energy: float
    round: int
    times: int = 1


@dataclasses.dataclass
class MinimaResult:
    """What a search found of a molecule.

    Attributes:
      minima: By energy, the lowest first. relaxed, new: Geometries that were relaxed, and minima found, in each round.
      left_out: Reasons of relaxed geometries that are no minimum of the molecule, and how many there were.
    """

    minima: list[Minimum]
    relaxed: list[int]
    new: list[int]
    left_out: collections.Counter


def find_minima(starts: Sequence[Sequence[Atoms]], force_field: Potential | str | Path,
                **options) -> list[MinimaResult]:
    """The minima of molecules, from one or more geometries of each; a result for each molecule.

    >>> from mlip_jax import from_smiles
    >>> found, = find_minima([[from_smiles("CCCCO")]], "runs/spice", temperature=800)  # doctest: +SKIP
    >>> [m.energy - found.minima[0].energy for m in found.minima]  # doctest: +SKIP

    Args:
      starts: Geometries of each molecule, with their atoms in one order.
      force_field: Or the workdir of a training run, or what else `load_force_field` reads.
      **options: Fields of `SearchOptions`.

    Raises:
      ValueError: An option that makes no sense, or a molecule without a geometry.
      CheckpointError: No force field is in that place.
    """
    search = SearchOptions(**options)
    potential = force_field if isinstance(force_field, Potential) else load_force_field(str(force_field))
    relaxer = Relaxer(potential, fmax=search.fmax, max_steps=search.max_steps, dtype=search.dtype)
    pools = [_MinimumPool(geometries, search, symmetries)
             for geometries, symmetries in zip(starts, _symmetries(starts))]
    _relax(relaxer, pools, [(m, atoms) for m, geometries in enumerate(starts) for atoms in geometries], 0)
    for number in range(1, search.rounds + 1):
        active = [m for m, pool in enumerate(pools) if pool.minima and pool.new[-1]]
        if not active:
            break
        _relax(relaxer, pools, list(_hot_frames(potential, pools, active, search, number)), number)
    return [pool.found() for pool in pools]


def _symmetries(starts: Sequence[Sequence[Atoms]]) -> Iterator[np.ndarray | None]:
    """Orders of the heavy atoms of each molecule that are the same, (Q, n); None where RDKit can make nothing of it."""
    for geometries in starts:
        if not geometries:
            raise ValueError("each molecule needs one geometry to start from")
    entries = (SymmetryQuery(g[0].numbers, g[0].positions, g[0].info.get("smiles", "")) for g in starts)
    return (None if found is None else found.permutations for found in symmetries_of(entries, num_processes=1))


def _relax(relaxer: Relaxer, pools: list[_MinimumPool], geometries: list[tuple[int, Atoms]], number: int) -> None:
    """Relax geometries of molecules and put what comes out into their pools."""
    for pool in pools:
        pool.relaxed.append(0)
        pool.new.append(0)
    done = dict(relaxer.stream((place, atoms) for place, (_, atoms) in enumerate(geometries)))
    for place, (m, _) in enumerate(geometries):  # in their order, so that results do not depend on who was done first
        pools[m].add(done[place], number)


def _hot_frames(potential: Potential, pools: list[_MinimumPool], active: list[int], search: SearchOptions, number: int
                ) -> Iterator[tuple[int, Atoms]]:
    """(molecule, geometry): frames of dynamics from the lowest minima of the molecules `active`."""
    begin = [(m, atoms) for m in active for atoms in pools[m].lowest(search.replicas)]
    steps = max(round(1000 * search.picoseconds / search.timestep), search.frames)
    dynamics = MolecularDynamics(
        [atoms for _, atoms in begin], potential, ensemble="langevin", temperature=search.temperature,
        timestep=search.timestep, frame_every=steps // search.frames, record_every=steps, dtype=search.dtype,
        seed=search.seed + number)
    for (m, _), trajectory in zip(begin, dynamics.run(steps)):
        last = trajectory.broken.step if trajectory.broken else steps + 1
        if trajectory.broken:
            pools[m].left_out["dynamics broke"] += 1
        for step, atoms in zip(trajectory.steps, trajectory.frames):
            if 0 < step < last:
                yield m, _bare(atoms)


class _MinimumPool:
    """Minima of one molecule."""

    def __init__(self, geometries: Sequence[Atoms], search: SearchOptions, permutations: np.ndarray | None):
        first = geometries[0]
        heavy = np.flatnonzero(first.numbers > 1)
        self._atoms = heavy if len(heavy) > 2 else np.arange(len(first))
        self._permutations = permutations if len(heavy) > 2 else None
        self._search, self._bonds = search, _bonded(first)
        self.minima: list[Minimum] = []
        self.relaxed: list[int] = []
        self.new: list[int] = []
        self.left_out: collections.Counter = collections.Counter()

    def add(self, result, number: int) -> None:
        """A relaxation of this molecule."""
        self.relaxed[-1] += 1
        if not result.converged:
            self.left_out[result.reason or result.status] += 1
        elif not np.array_equal(_bonded(result.atoms), self._bonds):
            self.left_out["other bonds"] += 1
        else:
            self._keep(Minimum(result.atoms, result.energy, number))

    def _keep(self, new: Minimum) -> None:
        near = [old for old in self.minima if abs(old.energy - new.energy) < self._search.same_energy]
        distances = cross_rmsd(Conformers(
            new.atoms.positions[None, self._atoms], np.array([m.atoms.positions[self._atoms] for m in near]),
            self._permutations))[0] if near else np.zeros(0)
        if len(near) and distances.min() < self._search.same_rmsd:
            old = near[int(distances.argmin())]
            old.times += 1
            if new.energy < old.energy:
                old.atoms, old.energy = new.atoms, new.energy
        else:
            self.minima.append(new)
            self.new[-1] += 1

    def lowest(self, count: int) -> list[Atoms]:
        """So many geometries: of the lowest minima within the window, and again from the first where there are few."""
        minima = self._within()
        return [_bare(minima[k % len(minima)].atoms) for k in range(count)]

    def found(self) -> MinimaResult:
        kept = self._within()
        if len(kept) < len(self.minima):
            self.left_out["above the window"] += len(self.minima) - len(kept)
        return MinimaResult(kept, self.relaxed, self.new, self.left_out)

    def _within(self) -> list[Minimum]:
        by_energy = sorted(self.minima, key=lambda m: m.energy)
        return [m for m in by_energy if m.energy <= by_energy[0].energy + self._search.window]


def _bonded(atoms: Atoms) -> np.ndarray:
    """Which atoms are bonded, (n, n)."""
    numbers = atoms.numbers
    return atoms.get_all_distances(mic=bool(atoms.pbc.any())) < bond_limit(numbers[:, None], numbers[None])


def _bare(atoms: Atoms) -> Atoms:
    """Without momenta, which dynamics would go on with, and without results."""
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=electronic_state(atoms))

"""Search for the minima of molecules by embedding, relaxation and hot dynamics.

All molecules are searched in batches:

1. relax the starting geometries (RDKit's ETKDG for a SMILES);
2. start dynamics at a high temperature from the lowest minima found so far;
3. relax frames of the dynamics and add the new minima;
4. repeat 2 and 3; a molecule is done when a round finds no new minimum;
5. relax the minima tightly in float64 and merge those that have become equal.

Two minima are the same if their energies agree and their heavy atoms agree over the symmetries of
the molecule; molecules with at most two heavy atoms are compared with their hydrogens. Mirror
images are distinct unless an option merges them. A minimum with other bonds than the start is a
reaction product and is rejected.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax.datasets.molecules.arguments import molecule_records, usable_atoms
from mlip_jax.datasets.molecules.rmsd import Conformers, cross_rmsd
from mlip_jax.datasets.molecules.symmetry import SymmetryQuery, symmetries_of
from mlip_jax.datasets.quality.geometry import bond_limit
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators.conservation import already_warned
from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.relaxation.minima_result import MinimaResult, Minimum
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.simulation.relaxation.result import Relaxation
from mlip_jax.structure import electronic_state

log = logging.getLogger(__name__)

_APART = 1.1  # pairs beyond this times `bond_limit` are not bonded


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Options of the search. Energies are in eV, lengths in Å, temperatures in K.

    Attributes:
      rounds: Number of rounds of dynamics after the starting geometries; 0 runs none.
      replicas: Number of trajectories per molecule and round.
      temperature: Temperature of the dynamics (K).
      picoseconds: Length of a trajectory (ps).
      frames: Number of frames per trajectory that are relaxed.
      window: Largest energy of a minimum above the lowest one (eV). Higher minima are dropped and
        start no dynamics.
      fmax: Largest force of a relaxed geometry during the search (eV/Å).
      final_fmax: Largest force of a minimum (eV/Å), which is relaxed further in float64.
      max_steps: Maximum number of steps per relaxation.
      energy_tolerance: Energy difference (eV) below which two minima may be the same one.
      rmsd_tolerance: Root mean square distance (Å) below which such minima are the same one.
      merge_mirror_images: Whether a minimum and its mirror image are one minimum, as of molecules
        without stereocenters. Populations still count both.
      timestep: Time step of the dynamics (fs).
      dtype: "float32" or "float64", of the search; the minima are relaxed in float64.
      seed: Seed of the dynamics.

    Raises:
      ValueError: If a value is invalid.
    """

    rounds: int = 2
    replicas: int = 8
    temperature: float = 600.0
    picoseconds: float = 1.0
    frames: int = 4
    window: float = 0.5
    fmax: float = 0.02
    final_fmax: float = 0.001
    max_steps: int = 500
    energy_tolerance: float = 0.005
    rmsd_tolerance: float = 0.125
    merge_mirror_images: bool = False
    timestep: float = 0.5
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        for name, min_value in (("rounds", 0), ("replicas", 1), ("frames", 1), ("max_steps", 1)):
            value = getattr(self, name)
            if int(value) != value or value < min_value:
                raise ValueError(
                    f"{name} must be an integer of at least {min_value}, received {value}"
                )
        for name in (
            "temperature",
            "picoseconds",
            "window",
            "fmax",
            "final_fmax",
            "energy_tolerance",
            "rmsd_tolerance",
            "timestep",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, received {getattr(self, name)}")


def find_minima(
    molecules: Any, force_field: Any = BUNDLED, *, num_conformers: int = 20, **options
) -> list[MinimaResult]:
    """Find the minima of molecules from one or more geometries each.

    >>> result, = find_minima("CCCCO", "runs/spice", temperature=800)  # doctest: +SKIP
    >>> [m.energy - result.minima[0].energy for m in result.minima]  # doctest: +SKIP

    Args:
      molecules: ASE's Atoms, a SMILES, the path of a file of molecules, or a list of these. In a
        list, a list of Atoms is one molecule with several geometries and one order of atoms.
      force_field: Force field in any form that `simulation.force_fields.load_mean_force_field` accepts:
        a workdir, "IMPORTER:FILE", a `Potential` or a calculator; the mean of several. By default
        that of the package.
      num_conformers: Number of geometries that are embedded per SMILES.
      **options: Fields of `SearchOptions`.

    Returns:
      One result per molecule.

    Raises:
      ValueError: If an option is invalid, or if a molecule has no geometry.
      CheckpointError: If there is no force field at this location.
    """
    search = SearchOptions(**options)
    potential = load_mean_force_field(force_field)
    starts = _starts(molecules, num_conformers, search.seed)
    relaxer = Relaxer(
        potential,
        fmax=search.fmax,
        max_steps=search.max_steps,
        dtype=search.dtype,
        molecules_only=True,
    )
    pools = [
        _MinimumPool(geometries, search, symmetries)
        for geometries, symmetries in zip(starts, _symmetries(starts))
    ]
    _relax(
        relaxer,
        pools,
        [(m, atoms) for m, geometries in enumerate(starts) for atoms in geometries],
        0,
    )
    for number in range(1, search.rounds + 1):
        active = [m for m, pool in enumerate(pools) if pool.minima and pool.new[-1]]
        if not active:
            break
        _relax(relaxer, pools, list(_hot_frames(potential, pools, active, search, number)), number)
    _relax_tightly(potential, pools, search)
    results = [pool.result() for pool in pools]
    TrustCheck.load(force_field, potential).warn(
        [minimum.atoms for result in results for minimum in result.minima], "minima"
    )
    return results


def _starts(molecules: Any, num_conformers: int, seed: int) -> list[list[Atoms]]:
    """Return the geometries of each molecule, with its SMILES in the first one if it is known."""
    starts = []
    for records in molecule_records(molecules, num_conformers=num_conformers, seed=seed):
        geometries = [record.atoms for record in records if record.atoms is not None]
        if records and not geometries:
            usable_atoms(records[0])  # raises its reason
        if geometries and records[0].smiles:
            geometries[0] = geometries[0].copy()
            geometries[0].info["smiles"] = records[0].smiles
        starts.append(geometries)
    return starts


def _symmetries(starts: Sequence[Sequence[Atoms]]) -> Iterator[np.ndarray | None]:
    """Yield the equivalent orders of the compared atoms of each molecule, (Q, n).

    None if RDKit cannot interpret the molecule.
    """
    for geometries in starts:
        if not geometries:
            raise ValueError("each molecule needs at least one geometry to start from")
    entries = (
        SymmetryQuery(
            g[0].numbers,
            g[0].positions,
            g[0].info.get("smiles", ""),
            hydrogens=len(_compared_atoms(g[0])) == len(g[0]),
        )
        for g in starts
    )
    return (
        None if symmetry is None else symmetry.permutations
        for symmetry in symmetries_of(entries, num_processes=1)
    )


def _relax(
    relaxer: Relaxer, pools: list[_MinimumPool], geometries: list[tuple[int, Atoms]], number: int
) -> None:
    """Relax geometries of molecules and add the results to their pools."""
    for pool in pools:
        pool.relaxed.append(0)
        pool.new.append(0)
    done = dict(relaxer.stream((index, atoms) for index, (_, atoms) in enumerate(geometries)))
    # add in the order of the input: results must not depend on the order of completion
    for index, (m, _) in enumerate(geometries):
        pools[m].add(done[index], number)


def _relax_tightly(potential: Potential, pools: list[_MinimumPool], search: SearchOptions) -> None:
    """Relax the minima within the window to `final_fmax` in float64, and merge equal ones."""
    with already_warned():
        relaxer = Relaxer(
            potential, fmax=search.final_fmax, max_steps=search.max_steps, dtype="float64"
        )
    before = [minimum for pool in pools for minimum in pool.within()]
    done = dict(relaxer.stream((k, minimum.atoms) for k, minimum in enumerate(before)))
    results = iter(done[k] for k in range(len(before)))
    for pool in pools:
        pool.replace([(minimum, next(results)) for minimum in pool.within()])


def _hot_frames(
    potential: Potential,
    pools: list[_MinimumPool],
    active: list[int],
    search: SearchOptions,
    number: int,
) -> Iterator[tuple[int, Atoms]]:
    """Yield (molecule, geometry) for the frames of hot dynamics of the molecules `active`.

    The dynamics start from the lowest minima of each molecule.
    """
    begin = [(m, atoms) for m in active for atoms in pools[m].lowest(search.replicas)]
    steps = max(round(1000 * search.picoseconds / search.timestep), search.frames)
    dynamics = MolecularDynamics(
        [atoms for _, atoms in begin],
        potential,
        ensemble="langevin",
        temperature=search.temperature,
        timestep=search.timestep,
        frame_every=steps // search.frames,
        record_every=steps,
        dtype=search.dtype,
        seed=search.seed + number,
        allow_nonconservative=True,  # frames are only starting points of relaxations
    )
    for (m, _), trajectory in zip(begin, dynamics.run(steps)):
        last = trajectory.broken.step if trajectory.broken else steps + 1
        if trajectory.broken:
            pools[m].left_out["dynamics broke"] += 1
        for step, atoms in zip(trajectory.steps, trajectory.frames):
            if 0 < step < last:
                yield m, _bare(atoms)


class _MinimumPool:
    """Minima of one molecule.

    Attributes:
      minima: Minima so far, including those above the window.
      relaxed: Number of relaxed geometries per round.
      new: Number of new minima per round.
      left_out: Number of rejected geometries by reason.
    """

    def __init__(
        self, geometries: Sequence[Atoms], search: SearchOptions, permutations: np.ndarray | None
    ):
        self._first, self._search = geometries[0], search
        self._atoms, self._permutations = _compared_atoms(geometries[0]), permutations
        self.minima: list[Minimum] = []
        self.relaxed: list[int] = []
        self.new: list[int] = []
        self.left_out: collections.Counter = collections.Counter()

    def add(self, result, number: int) -> None:
        """Add the result of a relaxation of this molecule."""
        self.relaxed[-1] += 1
        if not result.converged:
            self.left_out[result.reason or result.status] += 1
        elif _has_other_bonds(result.atoms, self._first):
            self.left_out["other bonds"] += 1
        else:
            count = len(self.minima)
            self._keep(Minimum(result.atoms, result.energy, number))
            self.new[-1] += len(self.minima) - count

    def _keep(self, new: Minimum) -> None:
        """Add a minimum, or count it as a known one and keep the lower energy."""
        similar = [
            old
            for old in self.minima
            if abs(old.energy - new.energy) < self._search.energy_tolerance
        ]
        distances = self._distances(new, similar)
        if self._search.merge_mirror_images:
            distances = np.minimum(distances, self._distances(new, similar, mirror=True))
        if len(similar) and distances.min() < self._search.rmsd_tolerance:
            old = similar[int(distances.argmin())]
            old.times += new.times
            old.round = min(old.round, new.round)
            if new.energy < old.energy:
                old.atoms, old.energy = new.atoms, new.energy
        else:
            self.minima.append(new)

    def _distances(
        self, minimum: Minimum, others: Sequence[Minimum], mirror: bool = False
    ) -> np.ndarray:
        """Return the distances (Å) of a minimum, or of its mirror image, to others, (K,)."""
        if not others:
            return np.zeros(0)
        sign = -1.0 if mirror else 1.0
        return cross_rmsd(
            Conformers(
                sign * minimum.atoms.positions[None, self._atoms],
                np.array([m.atoms.positions[self._atoms] for m in others]),
                self._permutations,
            )
        )[0]

    def replace(self, relaxed: Sequence[tuple[Minimum, Relaxation]]) -> None:
        """Replace all minima by the results of further relaxations, and merge equal ones."""
        if len(relaxed) < len(self.minima):
            self.left_out["above the window"] += len(self.minima) - len(relaxed)
        self.minima = []
        for minimum, result in relaxed:
            if result.status not in ("converged", "step limit"):
                self.left_out[result.reason or result.status] += minimum.times
            elif _has_other_bonds(result.atoms, self._first):
                self.left_out["other bonds"] += minimum.times
            else:
                self._keep(dataclasses.replace(minimum, atoms=result.atoms, energy=result.energy))
        if self._search.merge_mirror_images:
            for minimum in self.minima:
                own = self._distances(minimum, [minimum], mirror=True)[0]
                minimum.mirror_images = 1 if own < self._search.rmsd_tolerance else 2

    def lowest(self, count: int) -> list[Atoms]:
        """Return `count` geometries of the lowest minima within the window, with repetition."""
        minima = self.within()
        return [_bare(minima[k % len(minima)].atoms) for k in range(count)]

    def result(self) -> MinimaResult:
        """Return the result of the search."""
        kept = self.within()
        if len(kept) < len(self.minima):
            self.left_out["above the window"] += len(self.minima) - len(kept)
        return MinimaResult(kept, self.relaxed, self.new, self.left_out)

    def within(self) -> list[Minimum]:
        """Return the minima within the window, the lowest first."""
        by_energy = sorted(self.minima, key=lambda m: m.energy)
        return [m for m in by_energy if m.energy <= by_energy[0].energy + self._search.window]


def _compared_atoms(atoms: Atoms) -> np.ndarray:
    """Return the atoms that distinguish minima: the heavy ones, or all if there are at most two."""
    heavy = np.flatnonzero(atoms.numbers > 1)
    return heavy if len(heavy) > 2 else np.arange(len(atoms))


def _has_other_bonds(atoms: Atoms, start: Atoms) -> bool:
    """Return whether a bond of the start has broken or a new one has formed.

    A distance between the two limits is neither: some bonds (H2, F2, N2O4) are about as long as
    `bond_limit`.
    """
    numbers, periodic = start.numbers, bool(start.pbc.any())
    limit = bond_limit(numbers[:, None], numbers[None])  # (n, n)
    before, after = (a.get_all_distances(mic=periodic) for a in (start, atoms))
    apart = _APART * limit
    return bool((((before < limit) & (after > apart)) | ((before > apart) & (after < limit))).any())


def _bare(atoms: Atoms) -> Atoms:
    """Return a copy without results, constraints and momenta, from which dynamics would start."""
    bare = atoms.copy()
    bare.info = electronic_state(atoms)
    bare.set_constraint()
    bare.arrays.pop("momenta", None)
    return bare

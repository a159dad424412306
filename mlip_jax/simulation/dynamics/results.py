"""Results of molecular dynamics: energies, temperatures, frames, and broken molecules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.simulation.dynamics.device import state as md_state
from mlip_jax.simulation.dynamics.device.records import Records
from mlip_jax.simulation.dynamics.device.state import RUNNING, DynamicsState
from mlip_jax.simulation.dynamics.settings import BAR, Settings
from mlip_jax.simulation.dynamics.system import System


@dataclasses.dataclass(frozen=True)
class Breakage:
    """Step at which a molecule broke, and the reason."""

    step: int
    reason: str


def breakages(
    state: DynamicsState, system: System, settings: Settings, hottest: np.ndarray
) -> dict[int, Breakage]:
    """Return the molecules that broke, by their numbers.

    Args:
      state: State of the simulation.
      system: Molecules.
      settings: Settings of the run.
      hottest: Maximum temperature of each molecule (K), (M,).
    """
    codes, steps, culprits = (np.asarray(x) for x in (state.code, state.broken_at, state.culprit))
    bonds = None
    broken = {}
    for m in np.flatnonzero(codes != RUNNING):
        code, reason = int(codes[m]), _REASONS[int(codes[m])]
        if code in (md_state.STRETCHED, md_state.COLLAPSED):
            bonds = system.bonds()[0] if bonds is None else bonds
            i, j = (int(a) for a in bonds[culprits[m]] - system.begin[m])
            symbols = system.molecules[m].get_chemical_symbols()
            limit = settings.bond_range[code == md_state.STRETCHED]
            reason = reason.format(f"{symbols[i]}{i}–{symbols[j]}{j}", limit)
        broken[int(m)] = Breakage(int(steps[m]), reason.format(f"{hottest[m]:g} K"))
    return broken


_REASONS = {
    md_state.NOT_FINITE: "energy or forces are not finite",
    md_state.TOO_FAST: "an atom moved too far in one step",
    md_state.STRETCHED: "the bond {0} is longer than {1:g} times the sum of the covalent radii",
    md_state.COLLAPSED: "the bond {0} is shorter than {1:g} times the sum of the covalent radii",
    md_state.TOO_HOT: "the temperature exceeds {0}",
}


@dataclasses.dataclass(frozen=True)
class Thermo:
    """Energies and temperatures of K steps of M molecules; NaN after a molecule broke.

    Attributes:
      step: Step numbers, (K,).
      time: Times (fs), (K,).
      potential: Potential energies (eV), (K, M), including reference energies.
      kinetic: Kinetic energies (eV), (K, M).
      temperature: Temperatures (K) of the free degrees of freedom, (K, M).
      conserved: Quantity that exact dynamics conserve (eV), (K, M): potential and kinetic energy
        minus the energy that the thermostat added. NaN for "npt", whose barostat is not included.
      volume: Volumes (Å³), (K, M); NaN for open molecules.
      pressure: Pressures (bar), (K, M); NaN except for "npt". This is the pressure that the
        barostat controls, with velocities half a step later than the rest; its mean is the target
        pressure.
    """

    step: np.ndarray
    time: np.ndarray
    potential: np.ndarray
    kinetic: np.ndarray
    temperature: np.ndarray
    conserved: np.ndarray
    volume: np.ndarray
    pressure: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Return the sum of potential and kinetic energy (eV), (K, M)."""
        return self.potential + self.kinetic

    @classmethod
    def of(
        cls,
        records: Records,
        offset: np.ndarray,
        dof: np.ndarray,
        settings: Settings,
        broken: Mapping[int, Breakage],
    ) -> Thermo:
        """Create the energies and temperatures from the records of a dispatch.

        Args:
          records: Records of the dispatch.
          offset: Initial energies (eV), (M,).
          dof: Degrees of freedom with kinetic energy, (M,).
          settings: Settings of the run.
          broken: Molecules that broke.
        """
        count = int(records.num_records)
        step = records.step[:count].astype(np.int64)
        change, kinetic, heat, volume, pressure = (
            np.asarray(x[:count], np.float64)
            for x in (
                records.energy,
                records.kinetic,
                records.heat,
                records.volume,
                records.pressure,
            )
        )
        nothing = np.full_like(kinetic, np.nan)
        is_npt = settings.ensemble == "npt"
        over = np.zeros(kinetic.shape, bool)
        for m, breakage in broken.items():
            over[:, m] = step > breakage.step
        columns = (
            offset + change,
            kinetic,
            2 * kinetic / np.where(dof > 0, dof, np.nan) / units.kB,
            nothing if is_npt else offset + (change + kinetic - heat),
            np.where(volume > 0, volume, np.nan),
            pressure / BAR if is_npt else nothing,
        )
        return cls(step, step * settings.timestep, *(np.where(over, np.nan, c) for c in columns))

    @classmethod
    def concatenate(cls, parts: Sequence[Thermo]) -> Thermo:
        """Concatenate at least one part along the steps."""
        return cls(
            *(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls))
        )

    @classmethod
    def empty(cls, num: int) -> Thermo:
        """Return no steps of `num` molecules."""
        return cls(np.zeros(0, np.int64), np.zeros(0), *[np.zeros((0, num))] * 6)

    @classmethod
    def of_batches(cls, batches: Sequence[Thermo]) -> Thermo:
        """Join the molecules of batches. A batch that broke may lack the last steps: they are NaN."""
        longest = max(batches, key=lambda batch: len(batch.step))
        num = len(longest.step)

        def join(name):
            columns = [getattr(batch, name) for batch in batches]
            missing = [((0, num - len(column)), (0, 0)) for column in columns]
            padded = [np.pad(c, m, constant_values=np.nan) for c, m in zip(columns, missing)]
            return np.concatenate(padded, axis=1)

        names = [f.name for f in dataclasses.fields(cls)][2:]
        return cls(longest.step, longest.time, *map(join, names))

    def of_molecule(self, m: int) -> Thermo:
        """Return the columns of one molecule, (K,) each."""
        return Thermo(
            *(
                v if v.ndim == 1 else v[:, m]
                for v in (getattr(self, f.name) for f in dataclasses.fields(self))
            )
        )


class DispatchFrames:
    """Frames of a dispatch, as an iterable of (step, molecule, Atoms).

    The Atoms have energy, forces and momenta. A molecule that broke has no frames after its break.
    Positions in cells are not wrapped.
    """

    def __init__(
        self, records: Records, offset: np.ndarray, system: System, broken: Mapping[int, Breakage]
    ):
        self._records, self._offset, self._system, self._broken = records, offset, system, broken

    def __len__(self) -> int:
        return int(self._records.num_frames) * len(self._system.molecules)

    def __iter__(self) -> Iterator[tuple[int, int, Atoms]]:
        r = self._records
        for k in range(int(r.num_frames)):
            parts = [
                self._system.split(np.asarray(x[k], np.float64))
                for x in (r.positions, r.velocities, r.forces)
            ]
            for m, (positions, velocities, forces) in enumerate(zip(*parts)):
                step = int(r.frame_step[k])
                if m in self._broken and step > self._broken[m].step:
                    continue
                atoms = self._system.molecules[m].copy()
                atoms.positions = positions + self._system.origin[m]
                atoms.set_velocities(velocities)
                if r.cell is not None and atoms.pbc.all():
                    atoms.set_cell(np.asarray(r.cell[k, m], np.float64))
                atoms.calc = SinglePointCalculator(
                    atoms,
                    energy=float(self._offset[m] + float(r.frame_energy[k, m])),
                    forces=forces,
                )
                yield step, m, atoms


class FramesOfBatches:
    """Frames of several batches, as an iterable of (step, molecule, Atoms)."""

    def __init__(self, parts: Sequence[tuple[int, DispatchFrames]]):
        """Join frames.

        Args:
          parts: Number of the first molecule of a batch, and frames of this batch.
        """
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(frames) for _, frames in self._parts)

    def __iter__(self) -> Iterator[tuple[int, int, Atoms]]:
        for first, frames in self._parts:
            for step, m, atoms in frames:
                yield step, first + m, atoms


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Trajectory of one molecule.

    Attributes:
      frames: Frames with energy, forces and momenta.
      steps: Step numbers of the frames.
      thermo: Energies and temperatures, (K,) each.
      broken: When and why the molecule broke, or None.
    """

    frames: list[Atoms]
    steps: list[int]
    thermo: Thermo
    broken: Breakage | None


def join_dispatches(
    segments: Sequence[tuple[Thermo, FramesOfBatches]],
    system: System,
    broken: Mapping[int, Breakage],
) -> list[Trajectory]:
    """Return the trajectories of all molecules from the results of several dispatches."""
    num = len(system.molecules)
    thermo = Thermo.concatenate([Thermo.empty(num), *(t for t, _ in segments)])
    frames: list[list[Atoms]] = [[] for _ in range(num)]
    steps: list[list[int]] = [[] for _ in range(num)]
    for _, dispatch_frames in segments:
        for step, m, atoms in dispatch_frames:
            frames[m].append(atoms)
            steps[m].append(step)
    return [
        Trajectory(frames[m], steps[m], thermo.of_molecule(m), broken.get(m)) for m in range(num)
    ]

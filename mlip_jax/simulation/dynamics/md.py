"""Molecular dynamics on the device, in one or several batches: `MolecularDynamics`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ase import Atoms

from mlip_jax.datasets.molecules.arguments import molecule_list
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.simulation.device_memory import ProgramTooLarge, largest_size
from mlip_jax.simulation.dynamics import system
from mlip_jax.simulation.dynamics.batch import DynamicsBatch
from mlip_jax.simulation.dynamics.device.state import NEW
from mlip_jax.simulation.dynamics.results import (
    Breakage,
    FramesOfBatches,
    Thermo,
    Trajectory,
    join_dispatches,
)
from mlip_jax.simulation.dynamics.settings import Settings
from mlip_jax.simulation.dynamics.start import initialize_momenta
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

# _BATCHES: name of the numbers of molecules of several batches in a snapshot.
_BATCHES = "batches"


class MolecularDynamics:
    """Molecular dynamics of molecules or cells in batches, each independent of the others.

    The molecules of a batch step together in one compiled program, which makes many steps before
    the host reads the results. All molecules of a run are one batch unless its program needs more
    memory than the device has; otherwise several batches take turns. The neighbor list has a skin
    and is rebuilt on the device. If the list exceeds its capacity, the step waits until the
    capacity has been enlarged. In cells, lists of the device require lattice planes that are more
    than twice the cutoff plus skin apart. For smaller cells, and above about 5000 atoms, the host
    builds the lists and the device waits for them.

    A molecule that breaks (a bond leaves its range, it gets too hot, values are not finite, an atom
    moves too far in one step) is frozen from then on and reported in `broken`; the other molecules
    continue.

    >>> from ase.build import molecule
    >>> settings = {"replicas": 8, "temperature": 300}
    >>> methanol = molecule("CH3OH")
    >>> dynamics = MolecularDynamics(methanol, "runs/spice", **settings)  # doctest: +SKIP
    >>> trajectories = dynamics.run(2000)  # doctest: +SKIP
    >>> trajectories[0].frames[-1].get_potential_energy()  # doctest: +SKIP
    >>> trajectories[0].thermo.temperature  # doctest: +SKIP

    Attributes:
      potential: The force field.
      settings: Settings of the run, see `Settings`.
      num_compiles: Number of programs compiled so far.
      molecules: Initial molecules, with momenta; replicas of a molecule are adjacent.
      batches: Batches of the molecules, which take turns.
    """

    def __init__(
        self,
        molecules: Any,
        force_field: Any = BUNDLED,
        *,
        replicas: int = 1,
        temperatures: Sequence[float] | None = None,
        device: jax.Device | None = None,
        **settings: Any,
    ):
        """Prepare a run.

        Args:
          molecules: Molecules or cells: ASE's Atoms, a SMILES, the path of a file, or a list of
            these.
          force_field: Force field in any form that `simulation.force_fields.load_mean_force_field`
            accepts: a workdir, "IMPORTER:FILE", a `Potential` or a calculator; the mean of several.
            By default that of the package.
          replicas: Copies of each molecule, which differ in momenta and noise.
          temperatures: Temperature of each molecule, including replicas (K); None uses that of the
            settings.
          device: Device that runs the program; None for the default device.
          **settings: Fields of `Settings`: ensemble, timestep, temperature, ...

        Raises:
          ValueError: If a setting is invalid, if a molecule cannot be simulated, or if the forces are
            not the gradient of the energy and `allow_nonconservative` is not set.
          CheckpointError: If there is no force field at this location.
        """
        self.settings = Settings(**settings)
        if int(replicas) != replicas or replicas < 1:
            raise ValueError(f"replicas must be an integer of at least 1, received {replicas}")
        self.potential, self._compiled_before = load_mean_force_field(force_field), 0
        self.settings.check_forces(self.potential)
        given = molecule_list(molecules, seed=self.settings.seed)
        self._system = system.make([a for a in given for _ in range(replicas)], self.potential)
        TrustCheck.load(force_field, self.potential).warn(given, "molecules")
        self._device = device
        self._temperatures = self._check_temperatures(temperatures)
        self._check_cells()
        self._dof = initialize_momenta(self.molecules, self.settings, self._temperatures)
        self.batches = self._divide([len(self.molecules)])

    @property
    def molecules(self) -> tuple[Atoms, ...]:
        """Return the initial molecules."""
        return self._system.molecules

    @property
    def num_compiles(self) -> int:
        """Return the number of programs compiled so far."""
        return self._compiled_before + sum(batch.num_compiles for batch in self.batches)

    @property
    def step(self) -> int:
        """Return the number of steps made."""
        return max(0, *(batch.step for batch in self.batches))

    @property
    def steps_per_second(self) -> float:
        """Return the speed over all dispatches that did not compile; NaN if there was none."""
        return 1 / sum(batch.seconds_per_step for batch in self.batches)

    @property
    def num_lists_built(self) -> int:
        """Return the number of neighbor lists built since the start."""
        return sum(batch.num_lists_built for batch in self.batches)

    @property
    def lists_built_on(self) -> str:
        """Return where neighbor lists are built: "device" or "host", or both."""
        return " and ".join(sorted({batch.lists_built_on for batch in self.batches}))

    @property
    def broken(self) -> dict[int, Breakage]:
        """Return when and why molecules broke, by their numbers."""
        return {
            first + m: breakage
            for first, batch in zip(self._first, self.batches)
            for m, breakage in batch.broken.items()
        }

    def run(self, steps: int) -> list[Trajectory]:
        """Make steps and return one trajectory per molecule, with all frames and energies.

        The first run includes the start itself; later runs begin after the last step of the
        previous run.

        Args:
          steps: Number of steps.
        """
        segments = list(self.stream(steps))
        return join_dispatches(segments, self._system, self.broken)

    def stream(self, steps: int) -> Iterator[tuple[Thermo, FramesOfBatches]]:
        """Make steps and yield energies and frames about once per second.

        Between two of them `snapshot` returns everything needed to resume from there.

        Args:
          steps: Number of steps.

        Raises:
          ValueError: If `steps` is negative or not a whole number.
        """
        if int(steps) != steps or steps < 0:
            raise ValueError(f"steps must be an integer of at least 0, received {steps}")
        until = self.step + int(steps)
        if all(batch.step == NEW for batch in self.batches):
            self._fit_memory()
        while running := [b for b in self.batches if b.is_running and b.step < max(until, 0)]:
            segments = {id(running[0]): [running[0].advance(until)]}
            for batch in running[1:]:
                segments[id(batch)] = []
                while batch.is_running and batch.step < running[0].step:
                    segments[id(batch)].append(batch.advance(running[0].step))
            yield self._join(segments)

    def _join(self, segments) -> tuple[Thermo, FramesOfBatches]:
        """Join the energies and frames of batches, which have the same steps unless they broke."""
        thermos, frames = [], []
        for first, batch in zip(self._first, self.batches):
            parts = segments.get(id(batch), [])
            nothing = Thermo.empty(len(batch.molecules))
            thermos.append(Thermo.concatenate([nothing, *(thermo for thermo, _ in parts)]))
            frames += [(first, part) for _, part in parts]
        return Thermo.of_batches(thermos), FramesOfBatches(frames)

    def _divide(self, counts: Sequence[int]) -> list[DynamicsBatch]:
        """Return batches of these numbers of molecules."""
        ends = np.cumsum(counts).tolist()
        self._first = [end - count for count, end in zip(counts, ends)]
        return [
            DynamicsBatch(
                self._system.part(first, end),
                self.potential,
                self.settings,
                self._temperatures[first:end],
                self._dof[first:end],
                self._device,
            )
            for first, end in zip(self._first, ends)
        ]

    def _fit_memory(self) -> None:
        """Divide the molecules into batches whose programs fit into the memory of the device.

        A single molecule is tried in any case.
        """
        num, too_large = len(self.molecules), []
        while (count := max(len(batch.molecules) for batch in self.batches)) > 1:
            try:
                for batch in self.batches:
                    batch.check_memory()
                return
            except ProgramTooLarge as error:
                too_large.append((count, error.needed))
                num_batches = -(-num // int(largest_size(too_large, error.available)))
                counts = [len(part) for part in np.array_split(np.arange(num), num_batches)]
                log.warning(
                    "%s for %s; continuing with %d batches of up to %d, which take turns",
                    error,
                    count_of(count, "molecule"),
                    num_batches,
                    counts[0],
                )
            self._compiled_before = self.num_compiles
            self.batches = self._divide(counts)

    def _check_temperatures(self, given) -> np.ndarray:
        """Return the temperature of each molecule (K), (M,). Raise ValueError if one is invalid."""
        num = len(self._system.molecules)
        values = (
            np.full(num, self.settings.temperature)
            if given is None
            else np.asarray(given, np.float64)
        )
        if values.shape != (num,) or not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"temperatures must be {num} numbers of at least 0, one per molecule, received "
                f"{np.asarray(given).tolist()}"
            )
        return values

    def _check_cells(self) -> None:
        """Raise ValueError if the ensemble requires cells and a molecule is not fully periodic."""
        if self.settings.ensemble != "npt":
            return
        for m, atoms in enumerate(self.molecules):
            if not atoms.pbc.all():
                raise ValueError(
                    'ensemble "npt" needs cells that are periodic in all directions; molecule '
                    f"{m} has pbc={atoms.pbc.tolist()}"
                )

    def snapshot(self) -> dict[str, np.ndarray]:
        """Return everything that the same run needs to resume bit-exactly with `restore`."""
        if len(self.batches) == 1:
            return self.batches[0].snapshot()
        arrays = {_BATCHES: np.array([len(batch.molecules) for batch in self.batches])}
        for k, batch in enumerate(self.batches):
            arrays |= {f"{k}_{name}": value for name, value in batch.snapshot().items()}
        return arrays

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Resume from a snapshot.

        Raises:
          ValueError: If the snapshot is of other molecules or of another precision.
        """
        counts = np.asarray(snapshot.get(_BATCHES, [len(self.molecules)])).tolist()
        if sum(counts) != len(self.molecules):
            raise ValueError(
                f"the snapshot belongs to other molecules: it has {sum(counts)}, this run "
                f"{len(self.molecules)}"
            )
        if counts != [len(batch.molecules) for batch in self.batches]:
            self.batches = self._divide(counts)
        for k, batch in enumerate(self.batches):
            start = f"{k}_" if _BATCHES in snapshot else ""
            batch.restore(
                {n.removeprefix(start): v for n, v in snapshot.items() if n.startswith(start)}
            )

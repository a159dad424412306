"""Molecular dynamics of many molecules at once on the device: `MolecularDynamics`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms, units

from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.simulation.dynamics import neighbors, system, velocities
from mlip_jax.simulation.dynamics.loop import CompiledDynamics, DynamicsLoop
from mlip_jax.simulation.dynamics.neighbors import Cutoffs, NeighborCapacity
from mlip_jax.simulation.dynamics.results import Breakage, DispatchFrames, Thermo, Trajectory, breakages, joined
from mlip_jax.simulation.dynamics.settings import Settings
from mlip_jax.simulation.dynamics.state import NEW, RUNNING, DynamicsState, Records, filled

# Seconds of a call to the device, after which the host looks what has come of it.
_TURN = 1.0
# Rows of a dispatch, and numbers that its frames hold.
_RECORDS, _FRAME_NUMBERS, _FRAMES = 1024, 1 << 22, 256


class MolecularDynamics:
    """Dynamics of molecules or cells side by side, each as if it were alone.

    All molecules of a run make their steps together, in one compiled program that makes many steps before the host
    looks at them. The neighbour list has a skin and is made anew on the device; where more neighbours come than there
    is capacity for, the step is not made until the capacity has grown. In cells, lists of the device need
    lattice planes that stand more than twice the cutoff and skin apart; for smaller cells, and for more than some 5000
    atoms, the host makes the lists, which the device waits for.

    A molecule that breaks (a bond leaves its range, it gets too hot, numbers are not finite, an atom moves too far in
    one step) stands still from then on and is told of in `broken`; the others go on.

    >>> from ase.build import molecule
    >>> dynamics = MolecularDynamics(molecule("CH3OH"), "runs/spice", replicas=8, temperature=300)  # doctest: +SKIP
    >>> trajectories = dynamics.run(2000)  # doctest: +SKIP
    >>> trajectories[0].frames[-1].get_potential_energy(), trajectories[0].thermo.temperature  # doctest: +SKIP

    Attributes:
      potential: The force field. settings: See `Settings`. num_compiles: Programs compiled so far.
      molecules: As they were at the start, with momenta; replicas of a molecule follow each other.
    """

    def __init__(self, molecules: Atoms | Sequence[Atoms], force_field: Potential | str | Path, *, replicas: int = 1,
                 temperatures: Sequence[float] | None = None, device: jax.Device | None = None, **settings: Any):
        """
        Args:
          force_field: Or the workdir of a training run.
          replicas: Copies of each molecule, which differ in their momenta and their noise.
          temperatures: K of each molecule (replicas counted), in place of the one for all.
          **settings: Fields of `Settings`: ensemble, timestep, temperature, ...

        Raises:
          ValueError: A setting that makes no sense, or a molecule that cannot be simulated.
          CheckpointError: No force field is in that place.
        """
        self.settings = Settings(**settings)
        if int(replicas) != replicas or replicas < 1:
            raise ValueError(f"replicas must be a whole number of at least 1, received {replicas}")
        self.potential = force_field if isinstance(force_field, Potential) else load_force_field(str(force_field))
        given = [molecules] if isinstance(molecules, Atoms) else list(molecules)
        self._system = system.make([a for a in given for _ in range(replicas)], self.potential)
        self._dtype, self._device = np.dtype(self.settings.dtype), device
        self._temperatures = self._checked_temperatures(temperatures)
        self._hottest = np.array([self.settings.broken_above(t) for t in self._temperatures])
        self._dof = self._begin_momenta()
        self._cutoffs = Cutoffs(float(self.potential.cutoff), self.potential.long_range_cutoff, self.settings.skin)
        self._check_cells()
        self._compiled_before, self._step_of_list = 0, None
        self._on_device = neighbors.suits_device(self._system, self._cutoffs)
        self._seconds_of_step, self._steps_timed, self._seconds_timed = 0.0, 0, 0.0
        with self._precision():
            self._key = jax.random.key(self.settings.seed)
            self._program = self._make_program()
            self._capacity = neighbors.enlarge_capacity(
                NeighborCapacity(PaddingBudget(self._system.nodes, 0, len(self.molecules) + 1)), self._system,
                neighbors.needed(self._system, self._positions(), self._system.cell, self._cutoffs))
            self._state = self._begin()

    @property
    def molecules(self) -> tuple[Atoms, ...]:
        return self._system.molecules

    @property
    def num_compiles(self) -> int:
        return self._compiled_before + self._program.num_compiles

    @property
    def step(self) -> int:
        """Steps made."""
        return max(int(self._state.step), 0)

    @property
    def steps_per_second(self) -> float:
        """Over all dispatches that compiled nothing; NaN if there was none."""
        return self._steps_timed / self._seconds_timed if self._steps_timed else float("nan")

    @property
    def lists_made(self) -> int:
        """Neighbour lists made since the start."""
        return int(self._state.lists)

    @property
    def lists_by(self) -> str:
        """Who makes them: "device" or "host"."""
        return "device" if self._on_device else "host"

    @property
    def broken(self) -> dict[int, Breakage]:
        """When and why molecules broke, by their numbers."""
        return breakages(self._state, self._system, self.settings, self._hottest)

    def run(self, steps: int) -> list[Trajectory]:
        """Make steps, and keep all frames and energies of them; a trajectory for each molecule.

        The first run begins with the start itself, later ones after the last step of the one before.
        """
        segments = list(self.stream(steps))
        return joined(segments, self._system, self.broken)

    def stream(self, steps: int) -> Iterator[tuple[Thermo, DispatchFrames]]:
        """Make steps; energies and frames as they come, about once in a second.

        Between two of them `snapshot` tells all that is needed to go on from there.

        Raises:
          ValueError: Less than no steps.
        """
        if int(steps) != steps or steps < 0:
            raise ValueError(f"steps must be a whole number of at least 0, received {steps}")
        until = self.step + int(steps)
        while int(self._state.step) < until or int(self._state.step) == NEW:
            if not (np.asarray(self._state.code) == RUNNING).any():
                return
            records = self._dispatch(until)
            yield self._told(records)

    def _dispatch(self, until: int) -> Records:
        """A call of the device, and what it wants of the host afterwards."""
        before, compiles, begin = int(self._state.step), self.num_compiles, time.perf_counter()
        turn = int(np.clip(_TURN / self._seconds_of_step, 1, 10 ** 6)) if self._seconds_of_step else 8
        with self._precision():
            self._state, records = self._program.run(
                self._capacity, self._key, self._state, min(until, max(before, 0) + turn))
            records = filled(jax.device_get(records))
            made = int(self._state.step) - before
            if made and compiles == self.num_compiles:
                self._seconds_of_step = (time.perf_counter() - begin) / made
                self._steps_timed, self._seconds_timed = (
                    self._steps_timed + made, self._seconds_timed + time.perf_counter() - begin)
            self._serve()
        return records

    def _serve(self) -> None:
        """Make the capacity, or the list, that a step waits for."""
        wanted = np.asarray(self._state.wanted)
        if not self._capacity.holds(wanted):
            self._capacity = neighbors.enlarge_capacity(self._capacity, self._system, wanted)
            self._state = self._state._replace(graph=self._list(*self._listed()))
        if not bool(self._state.stale):
            return
        if self._on_device:  # the cell has become too small for the nearest images
            self._on_device = False
            self._compiled_before += self._program.num_compiles
            self._program = self._make_program()
        now, step = jax.device_get((self._state.positions, self._state.cell)), int(self._state.step)
        if step == self._step_of_list:
            raise RuntimeError(f"the step after {step} asks for a neighbour list again that was just made for it; "
                               "choose a longer skin or a shorter timestep")
        self._step_of_list = step
        self._state = self._state._replace(graph=self._list(*now), stale=np.bool_(False),
                                           lists=self._state.lists + 1)

    def _list(self, positions, cell):
        """The graph of positions, with as large a capacity as it needs."""
        if self._on_device:
            return self._program.list(self._capacity, positions, cell)
        wanted = neighbors.needed(self._system, positions, cell, self._cutoffs)
        if not self._capacity.holds(wanted):
            self._capacity = neighbors.enlarge_capacity(self._capacity, self._system, wanted)
        graph = neighbors.on_host(self._system, positions, cell, self._capacity.budget, self._cutoffs)
        return jax.device_put(graph, self._device)

    def _listed(self):
        """Positions and cells that the list in use was made of."""
        graph = self._state.graph
        cell = graph.globals["cell"][:-1] if "cell" in graph.globals else None
        return jax.device_get((graph.nodes["positions"], cell))

    def _make_program(self) -> CompiledDynamics:
        s, p = self.settings, self.potential
        frames = int(np.clip(_FRAME_NUMBERS // (9 * self._system.nodes), 1, _FRAMES))
        loop = DynamicsLoop(p.model, p.energy_scale, self._cutoffs, s.integrator(), self._on_device,
                            neighbors.longest_move(self._on_device, self._cutoffs), tuple(s.bond_range), s.record_every,
                            s.frame_every, _RECORDS, frames)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, self._dtype), p.params)
        kt = units.kB * self._temperatures
        return CompiledDynamics(loop, params, self._system.particles(
            self._dtype, self._dof, kt, units.kB * self._hottest, s.watch_bonds), s.timestep * units.fs, self._device)

    def _positions(self) -> np.ndarray:
        return self._system.padded("positions", self._dtype)

    def _begin(self) -> DynamicsState:
        """The state before the first evaluation."""
        atoms, num = self._positions(), len(self.molecules)
        cell = None if self._system.cell is None else self._system.cell.astype(self._dtype)
        real, whole = np.zeros(num, self._dtype), np.zeros(num, np.int32)
        momenta = self._system.padded("momenta", np.float64)
        masses = np.asarray(self._system.particles(np.float64, *[real] * 3, False).masses)
        zeros = np.zeros_like(atoms)
        state = DynamicsState(
            np.int32(NEW), atoms, zeros, (momenta / masses[:, None]).astype(self._dtype), zeros, real, cell,
            zeros[:, 0], real, real, real, whole, whole, whole - 1, self._list(atoms, cell),
            np.zeros(3, np.int32), np.int32(1), np.bool_(False))
        return jax.device_put(state, self._device)

    def _begin_momenta(self) -> np.ndarray:
        """Draw momenta for molecules that have none; degrees of freedom of each, (M,)."""
        s, dof = self.settings, []
        for m, atoms in enumerate(self.molecules):
            has_momenta = atoms.has("momenta") and atoms.get_momenta().any()
            # a Langevin thermostat sets rotations going again, and of given momenta nobody knows
            fix_rotation = s.fix_rotation and s.ensemble != "langevin" and not has_momenta
            dof.append(velocities.degrees_of_freedom(atoms, s.fix_com, fix_rotation))
            if not has_momenta:
                start = self._temperatures[m] if s.initial_temperature is None else s.initial_temperature
                velocities.draw(atoms, start, np.random.default_rng([s.seed, m]), dof[-1], s.fix_com, fix_rotation)
            elif s.fix_com:
                velocities.stop_centre_of_mass(atoms)
        return np.array(dof, np.float64)

    def _checked_temperatures(self, given) -> np.ndarray:
        num = len(self._system.molecules)
        values = np.full(num, self.settings.temperature) if given is None else np.asarray(given, np.float64)
        if values.shape != (num,) or not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"temperatures must be {num} numbers of at least 0, one for each molecule, received "
                             f"{np.asarray(given).tolist()}")
        return values

    def _check_cells(self) -> None:
        if self.settings.ensemble != "npt":
            return
        for m, atoms in enumerate(self.molecules):
            if not atoms.pbc.all():
                raise ValueError(f'ensemble "npt" needs cells that are periodic in all directions; molecule {m} has '
                                 f"pbc={atoms.pbc.tolist()}")

    def _precision(self):
        stack = contextlib.ExitStack()
        stack.enter_context(jax.enable_x64(self._dtype == np.float64))
        # some devices else multiply float32 as bfloat16 or TF32, which no energy is conserved in
        stack.enter_context(jax.default_matmul_precision("float32"))
        return stack

    def _told(self, records: Records) -> tuple[Thermo, DispatchFrames]:
        """Records with reference energies, in the units of people."""
        start = [float(np.asarray(e, np.float64).sum()) for e in self._system.split(np.asarray(self._state.energies))]
        offset = np.array(start) + [self.potential.reference_energies[a.numbers].sum() for a in self.molecules]
        broken = self.broken
        thermo = Thermo.of(records, offset, self._dof, self.settings, broken)
        return thermo, DispatchFrames(records, offset, self._system, broken)

    def snapshot(self) -> dict[str, np.ndarray]:
        """All that a run of the same molecules and settings needs to go on to the bit, see `restore`."""
        state = jax.device_get(self._state)
        positions, cell = self._listed()
        found = {name: np.asarray(value) for name, value in state._asdict().items()
                 if name not in ("graph", "cell") and value is not None}
        found |= {"listed_positions": positions, "budget": np.array(self._capacity.budget),
                  "near": np.array(self._capacity.near), "on_device": np.array(self._on_device)}
        return found if cell is None else found | {"cell": state.cell, "listed_cell": cell}

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go on from a snapshot.

        Raises:
          ValueError: It is of other molecules or of another precision.
        """
        for name, value in self.snapshot().items():
            there = snapshot.get(name)
            if there is None or there.shape != value.shape or there.dtype != value.dtype:
                raise ValueError(f"the snapshot does not fit these molecules: {name} should be {value.dtype}"
                                 f"{value.shape}, received " + ("nothing" if there is None else
                                                                f"{there.dtype}{there.shape}"))
        self._capacity = NeighborCapacity(PaddingBudget(*map(int, snapshot["budget"])), int(snapshot["near"]))
        with self._precision():
            if bool(snapshot["on_device"]) != self._on_device:
                self._on_device = bool(snapshot["on_device"])
                self._program = self._make_program()
            graph = self._list(snapshot["listed_positions"], snapshot.get("listed_cell"))
            values = {name: snapshot[name] for name in DynamicsState._fields if name in snapshot}
            self._state = jax.device_put(DynamicsState(**{"cell": None, **values, "graph": graph}), self._device)

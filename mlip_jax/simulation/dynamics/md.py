"""Batched molecular dynamics on the device: `MolecularDynamics`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ase import Atoms, units

from mlip_jax.datasets.molecules.arguments import molecule_list
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.graphs.long_range import of_boundaries
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.matmul_precision import full_precision
from mlip_jax.simulation.dynamics import neighbors, system
from mlip_jax.simulation.dynamics.device.compiled import CompiledDynamics
from mlip_jax.simulation.dynamics.device.loop import DynamicsLoop
from mlip_jax.simulation.dynamics.device.records import DynamicsRecorder, Records, trim
from mlip_jax.simulation.dynamics.device.state import NEW, RUNNING, DynamicsState
from mlip_jax.simulation.dynamics.neighbors import Cutoffs, NeighborCapacity
from mlip_jax.simulation.dynamics.results import (
    Breakage,
    DispatchFrames,
    Thermo,
    Trajectory,
    breakages,
    join_dispatches,
)
from mlip_jax.simulation.dynamics.settings import Settings
from mlip_jax.simulation.dynamics.start import initial_state, initialize_momenta
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field

# _DISPATCH_SECONDS: duration of a dispatch in seconds, after which the host reads the results.
_DISPATCH_SECONDS = 1.0
# _MAX_RECORDS, _MAX_FRAMES: maximum number of rows and frames of a dispatch. _MAX_FRAME_VALUES:
# maximum number of values in its frames.
_MAX_RECORDS, _MAX_FRAME_VALUES, _MAX_FRAMES = 1024, 1 << 22, 256


class MolecularDynamics:
    """Molecular dynamics of molecules or cells in batches, each independent of the others.

    All molecules of a run step together in one compiled program, which makes many steps before the
    host reads the results. The neighbor list has a skin and is rebuilt on the device. If the list
    exceeds its capacity, the step waits until the capacity has been enlarged. In cells, lists of
    the device require lattice planes that are more than twice the cutoff plus skin apart. For
    smaller cells, and above about 5000 atoms, the host builds the lists and the device waits for
    them.

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
        self.potential = load_mean_force_field(force_field)
        self.settings.check_forces(self.potential)
        given = molecule_list(molecules, seed=self.settings.seed)
        self._system = system.make([a for a in given for _ in range(replicas)], self.potential)
        TrustCheck.load(force_field, self.potential).warn(given, "molecules")
        self._dtype, self._device = np.dtype(self.settings.dtype), device
        self._temperatures = self._check_temperatures(temperatures)
        self._hottest = np.array([self.settings.broken_above(t) for t in self._temperatures])
        self._dof = initialize_momenta(self.molecules, self.settings, self._temperatures)
        far = of_boundaries(self.potential.long_range_cutoff, self._system.is_periodic)
        self._cutoffs = Cutoffs(float(self.potential.cutoff), far, self.settings.skin)
        self._check_cells()
        self._compiled_before, self._step_of_list = 0, None
        self._on_device = neighbors.suits_device(self._system, self._cutoffs)
        self._seconds_of_step, self._steps_timed, self._seconds_timed = 0.0, 0, 0.0
        with self._precision():
            self._key = jax.random.key(self.settings.seed)
            self._program = self._make_program()
            self._capacity = neighbors.enlarge_capacity(
                NeighborCapacity(PaddingBudget(self._system.nodes, 0, len(self.molecules) + 1)),
                self._system,
                neighbors.count_required(
                    self._system, self._positions(), self._system.cell, self._cutoffs
                ),
            )
            graph = self._list(self._positions(), self._cell())
            self._state = jax.device_put(
                initial_state(self._system, graph, self._dtype), self._device
            )

    @property
    def molecules(self) -> tuple[Atoms, ...]:
        """Return the initial molecules."""
        return self._system.molecules

    @property
    def num_compiles(self) -> int:
        """Return the number of programs compiled so far."""
        return self._compiled_before + self._program.num_compiles

    @property
    def step(self) -> int:
        """Return the number of steps made."""
        return max(int(self._state.step), 0)

    @property
    def steps_per_second(self) -> float:
        """Return the speed over all dispatches that did not compile; NaN if there was none."""
        return self._steps_timed / self._seconds_timed if self._steps_timed else float("nan")

    @property
    def num_lists_built(self) -> int:
        """Return the number of neighbor lists built since the start."""
        return int(self._state.lists)

    @property
    def lists_built_on(self) -> str:
        """Return where neighbor lists are built: "device" or "host"."""
        return "device" if self._on_device else "host"

    @property
    def broken(self) -> dict[int, Breakage]:
        """Return when and why molecules broke, by their numbers."""
        return breakages(self._state, self._system, self.settings, self._hottest)

    def run(self, steps: int) -> list[Trajectory]:
        """Make steps and return one trajectory per molecule, with all frames and energies.

        The first run includes the start itself; later runs begin after the last step of the
        previous run.

        Args:
          steps: Number of steps.
        """
        segments = list(self.stream(steps))
        return join_dispatches(segments, self._system, self.broken)

    def stream(self, steps: int) -> Iterator[tuple[Thermo, DispatchFrames]]:
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
        while int(self._state.step) < until or int(self._state.step) == NEW:
            if not (np.asarray(self._state.code) == RUNNING).any():
                return
            records = self._dispatch(until)
            yield self._convert(records)

    def _dispatch(self, until: int) -> Records:
        """Run one dispatch on the device and then serve the request of the device."""
        before, compiles, begin = int(self._state.step), self.num_compiles, time.perf_counter()
        num_steps = 8  # until the speed is known
        if self._seconds_of_step:
            num_steps = int(np.clip(_DISPATCH_SECONDS / self._seconds_of_step, 1, 10**6))
        with self._precision():
            self._state, records = self._program.run(
                self._capacity, self._key, self._state, min(until, max(before, 0) + num_steps)
            )
            records = trim(jax.device_get(records))
            num_done = int(self._state.step) - before
            if num_done and compiles == self.num_compiles:
                self._seconds_of_step = (time.perf_counter() - begin) / num_done
                self._steps_timed, self._seconds_timed = (
                    self._steps_timed + num_done,
                    self._seconds_timed + time.perf_counter() - begin,
                )
            self._serve_request()
        return records

    def _serve_request(self) -> None:
        """Enlarge the capacity, or build the list, that the next step requires."""
        wanted = np.asarray(self._state.wanted)
        if not self._capacity.holds(wanted):
            self._capacity = neighbors.enlarge_capacity(self._capacity, self._system, wanted)
            self._state = self._state._replace(graph=self._list(*self._geometry_of_list()))
        if not bool(self._state.stale):
            return
        if self._on_device:  # the cell has become too small for nearest images
            self._replace_program(on_device=False)
        now, step = jax.device_get((self._state.positions, self._state.cell)), int(self._state.step)
        if step == self._step_of_list:  # its new list does not cover the next step
            if self._cutoffs.skin >= neighbors.LONG_STEP_SKIN:
                raise RuntimeError(
                    f"the step after step {step} moves atoms farther than its new neighbor list "
                    "covers. Use a larger skin or a shorter timestep."
                )
            self._replace_program(skin=neighbors.LONG_STEP_SKIN)
        self._step_of_list = step
        self._state = self._state._replace(
            graph=self._list(*now), stale=np.bool_(False), lists=self._state.lists + 1
        )

    def _replace_program(self, on_device: bool | None = None, skin: float | None = None) -> None:
        """Compile another program, for lists of the host or with another skin (Å)."""
        if on_device is not None:
            self._on_device = on_device
        if skin is not None:
            self._cutoffs = self._cutoffs._replace(skin=skin)
        self._compiled_before += self._program.num_compiles
        self._program = self._make_program()

    def _list(self, positions, cell):
        """Return the neighbor list of positions; a list of the host may enlarge the capacity."""
        if self._on_device:
            return self._program.list(self._capacity, positions, cell)
        wanted = neighbors.count_required(self._system, positions, cell, self._cutoffs)
        if not self._capacity.holds(wanted):
            self._capacity = neighbors.enlarge_capacity(self._capacity, self._system, wanted)
        graph = neighbors.on_host(
            self._system, positions, cell, self._capacity.budget, self._cutoffs
        )
        return jax.device_put(graph, self._device)

    def _geometry_of_list(self):
        """Return the positions and cells from which the current list was built."""
        graph = self._state.graph
        cell = graph.globals["cell"][:-1] if "cell" in graph.globals else None
        return jax.device_get((graph.nodes["positions"], cell))

    def _make_program(self) -> CompiledDynamics:
        """Create the program; it depends on where the neighbor lists are built."""
        s, p = self.settings, self.potential
        integrator = s.integrator()
        max_frames = int(np.clip(_MAX_FRAME_VALUES // (9 * self._system.nodes), 1, _MAX_FRAMES))
        loop = DynamicsLoop(
            p.model,
            p.energy_scale,
            self._cutoffs,
            integrator,
            self._on_device,
            neighbors.MAX_DISPLACEMENT,
            tuple(s.bond_range),
            DynamicsRecorder(integrator, s.record_every, s.frame_every, _MAX_RECORDS, max_frames),
        )
        params = jax.tree.map(lambda leaf: np.asarray(leaf, self._dtype), p.params)
        kt = units.kB * self._temperatures
        return CompiledDynamics(
            loop,
            params,
            self._system.particles(
                self._dtype, self._dof, kt, units.kB * self._hottest, s.stop_on_bond_break
            ),
            s.timestep * units.fs,
            self._device,
        )

    def _positions(self) -> np.ndarray:
        """Return the initial positions, (N, 3)."""
        return self._system.padded("positions", self._dtype)

    def _cell(self) -> np.ndarray | None:
        """Return the initial lattice vectors, (M, 3, 3), or None."""
        return None if self._system.cell is None else self._system.cell.astype(self._dtype)

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

    def _precision(self):
        """Return a context manager that sets the precision of the run."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.enable_x64(self._dtype == np.float64))
        stack.enter_context(full_precision())  # lower precision does not conserve the energy
        return stack

    def _convert(self, records: Records) -> tuple[Thermo, DispatchFrames]:
        """Convert records to energies and frames, with reference energies and in external units."""
        start = [
            float(np.asarray(e, np.float64).sum())
            for e in self._system.split(np.asarray(self._state.energies))
        ]
        offset = np.array(start) + [
            self.potential.reference_energies[a.numbers].sum() for a in self.molecules
        ]
        broken = self.broken
        thermo = Thermo.of(records, offset, self._dof, self.settings, broken)
        return thermo, DispatchFrames(records, offset, self._system, broken)

    def snapshot(self) -> dict[str, np.ndarray]:
        """Return everything that the same run needs to resume bit-exactly with `restore`."""
        state = jax.device_get(self._state)
        positions, cell = self._geometry_of_list()
        arrays = {
            name: np.asarray(value)
            for name, value in state._asdict().items()
            if name not in ("graph", "cell") and value is not None
        }
        arrays |= {
            "listed_positions": positions,
            "budget": np.array(self._capacity.budget),
            "near": np.array(self._capacity.near_edges),
            "on_device": np.array(self._on_device),
        }
        if self._cutoffs.skin != self.settings.skin:
            arrays["skin"] = np.array(self._cutoffs.skin)
        return arrays if cell is None else arrays | {"cell": state.cell, "listed_cell": cell}

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Resume from a snapshot.

        Raises:
          ValueError: If the snapshot is of other molecules or of another precision.
        """
        for name, value in self.snapshot().items():
            stored = snapshot.get(name)
            if stored is None or stored.shape != value.shape or stored.dtype != value.dtype:
                raise ValueError(
                    f"the snapshot belongs to other molecules: {name} must be "
                    f"{value.dtype}{value.shape}, received "
                    + ("nothing" if stored is None else f"{stored.dtype}{stored.shape}")
                )
        self._capacity = NeighborCapacity(
            PaddingBudget(*map(int, snapshot["budget"])), int(snapshot["near"])
        )
        with self._precision():
            skin = float(snapshot.get("skin", self.settings.skin))
            if bool(snapshot["on_device"]) != self._on_device or skin != self._cutoffs.skin:
                self._replace_program(bool(snapshot["on_device"]), skin)
            graph = self._list(snapshot["listed_positions"], snapshot.get("listed_cell"))
            values = {name: snapshot[name] for name in DynamicsState._fields if name in snapshot}
            self._state = jax.device_put(
                DynamicsState(**{"cell": None, **values, "graph": graph}), self._device
            )

"""A batch of molecules whose dynamics run in one compiled program on the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from ase import Atoms, units

from mlip_jax.graphs.long_range import of_boundaries
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.matmul_precision import full_precision
from mlip_jax.potential import Potential
from mlip_jax.simulation.dynamics import neighbors
from mlip_jax.simulation.dynamics.device.compiled import CompiledDynamics
from mlip_jax.simulation.dynamics.device.loop import DynamicsLoop
from mlip_jax.simulation.dynamics.device.records import DynamicsRecorder, Records, trim
from mlip_jax.simulation.dynamics.device.state import RUNNING, DynamicsState
from mlip_jax.simulation.dynamics.neighbors import Cutoffs, NeighborCapacity
from mlip_jax.simulation.dynamics.results import Breakage, DispatchFrames, Thermo, breakages
from mlip_jax.simulation.dynamics.settings import Settings
from mlip_jax.simulation.dynamics.start import initial_state
from mlip_jax.simulation.dynamics.system import System

# DISPATCH_SECONDS: duration of a dispatch in seconds, after which the host reads the results.
DISPATCH_SECONDS = 1.0
# _MAX_RECORDS, _MAX_FRAMES: maximum number of rows and frames of a dispatch. _MAX_FRAME_VALUES:
# maximum number of values in its frames.
_MAX_RECORDS, _MAX_FRAME_VALUES, _MAX_FRAMES = 1024, 1 << 22, 256


class DynamicsBatch:
    """Molecules of a run that step together in one compiled program.

    See `MolecularDynamics`, which divides a run into batches.

    Attributes:
      potential: The force field.
      settings: Settings of the run.
      num_compiles: Number of programs compiled so far.
      capacity: Sizes of the neighbor list.
    """

    def __init__(
        self,
        system: System,
        potential: Potential,
        settings: Settings,
        temperatures: np.ndarray,
        dof: np.ndarray,
        device: jax.Device | None,
    ):
        """Prepare a batch.

        Args:
          system: Molecules with momenta.
          potential: The force field.
          settings: Settings of the run.
          temperatures: Temperature of each molecule (K), (M,).
          dof: Degrees of freedom with kinetic energy, (M,).
          device: Device that runs the program; None for the default device.
        """
        self.settings, self.potential, self._system = settings, potential, system
        self._dtype, self._device = np.dtype(settings.dtype), device
        self._temperatures, self._dof = temperatures, dof
        self._hottest = np.array([settings.broken_above(t) for t in temperatures])
        far = of_boundaries(potential.long_range_cutoff, system.is_periodic)
        self._cutoffs = Cutoffs(float(potential.cutoff), far, settings.skin)
        self._compiled_before, self._step_of_list = 0, None
        self._on_device = neighbors.suits_device(system, self._cutoffs)
        self._seconds_of_step, self._steps_timed, self._seconds_timed = 0.0, 0, 0.0
        with self._precision():
            self._key = jax.random.key(settings.seed)
            self._program = self._make_program()
            self.capacity = neighbors.enlarge_capacity(
                NeighborCapacity(PaddingBudget(system.nodes, 0, len(system.molecules) + 1)),
                system,
                neighbors.count_required(system, self._positions(), system.cell, self._cutoffs),
            )
            graph = self._list(self._positions(), self._cell())
            self._state = jax.device_put(initial_state(system, graph, self._dtype), device)

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
        """Return the number of steps made; NEW before the first evaluation."""
        return int(self._state.step)

    @property
    def is_running(self) -> bool:
        """Return whether a molecule has not broken."""
        return bool((np.asarray(self._state.code) == RUNNING).any())

    @property
    def seconds_per_step(self) -> float:
        """Return the duration of a step, without dispatches that compiled; NaN if unknown."""
        return self._seconds_timed / self._steps_timed if self._steps_timed else float("nan")

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

    def check_memory(self) -> None:
        """Compile the program and compare its memory with that of the device.

        Raises:
          ProgramTooLarge: The device has less memory.
        """
        with self._precision():
            self._program.check_memory(self.capacity, self._key, self._state)

    def advance(self, until: int) -> tuple[Thermo, DispatchFrames]:
        """Make steps for about a second, at most up to step `until`; return energies and frames."""
        return self._convert(self._dispatch(until))

    def _dispatch(self, until: int) -> Records:
        """Run one dispatch on the device and then serve the request of the device."""
        before, compiles, begin = int(self._state.step), self.num_compiles, time.perf_counter()
        num_steps = 8  # until the speed is known
        if self._seconds_of_step:
            num_steps = int(np.clip(DISPATCH_SECONDS / self._seconds_of_step, 1, 10**6))
        with self._precision():
            self._state, records = self._program.run(
                self.capacity, self._key, self._state, min(until, max(before, 0) + num_steps)
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
        if not self.capacity.holds(wanted):
            self.capacity = neighbors.enlarge_capacity(self.capacity, self._system, wanted)
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
            return self._program.list(self.capacity, positions, cell)
        wanted = neighbors.count_required(self._system, positions, cell, self._cutoffs)
        if not self.capacity.holds(wanted):
            self.capacity = neighbors.enlarge_capacity(self.capacity, self._system, wanted)
        graph = neighbors.on_host(
            self._system, positions, cell, self.capacity.budget, self._cutoffs
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
            "budget": np.array(self.capacity.budget),
            "near": np.array(self.capacity.near_edges),
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
        self.capacity = NeighborCapacity(
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

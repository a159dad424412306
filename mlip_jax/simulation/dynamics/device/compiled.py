"""Batched molecular dynamics as compiled programs."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jraph
import numpy as np

from mlip_jax.simulation.device_memory import check_fits
from mlip_jax.simulation.dynamics import neighbors
from mlip_jax.simulation.dynamics.device.loop import DynamicsLoop, StepInputs
from mlip_jax.simulation.dynamics.device.records import Records
from mlip_jax.simulation.dynamics.device.state import DynamicsState
from mlip_jax.simulation.dynamics.neighbors import NeighborCapacity
from mlip_jax.simulation.dynamics.system import Particles

log = logging.getLogger(__name__)


class CompiledDynamics:
    """`DynamicsLoop.run` with parameters and particles kept on the device.

    Compiled once per capacity and number of atoms. Objects with equal `loop` share programs.

    Attributes:
      num_compiles: Number of programs compiled so far by this object.
    """

    def __init__(
        self, loop: DynamicsLoop, params: Any, particles: Particles, timestep: float, device=None
    ):
        """Copy parameters and particles to the device.

        Args:
          loop: Static configuration.
          params: Parameters of the model.
          particles: Atoms.
          timestep: Time step in ASE's unit of time.
          device: Device that runs the program; None for the default device.
        """
        self.loop, self.num_compiles = loop, 0
        step = particles.masses.dtype.type(timestep)
        self._params, self._particles, self._timestep = jax.device_put(
            (params, particles, step), device
        )

    def run(
        self, capacity: NeighborCapacity, key, state: DynamicsState, until: int
    ) -> tuple[DynamicsState, Records]:
        """Run `DynamicsLoop.run`."""
        before = _traces.count
        inputs = StepInputs(self._params, self._particles, key, self._timestep)
        out = _run(self.loop, capacity, inputs, state, np.int32(until))
        self.num_compiles += _traces.count - before
        return out

    def check_memory(self, capacity: NeighborCapacity, key, state: DynamicsState) -> None:
        """Compile the program and compare its memory with that of the device.

        Raises:
          ProgramTooLarge: The device has less memory.
        """
        before = _traces.count
        inputs = StepInputs(self._params, self._particles, key, self._timestep)
        (device,) = self._timestep.devices()
        try:
            check_fits(_run, self.loop, capacity, inputs, state, np.int32(0), device=device)
        finally:
            self.num_compiles += _traces.count - before

    def list(self, capacity: NeighborCapacity, positions, cell) -> jraph.GraphsTuple:
        """Return the device's neighbor list for positions (N, 3); it must fit the capacity."""
        graph, _ = _list(self._particles, positions, cell, capacity.budget, self.loop.cutoffs)
        return graph


class _Traces:
    """Counter of traces of the loop; JAX traces once per program."""

    count = 0


_traces = _Traces()


_list = jax.jit(neighbors.on_device, static_argnums=(3, 4))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(loop, capacity, inputs, state, until):
    """Run the loop as one compiled program and count its traces."""
    _traces.count += 1
    log.info("compiling the dynamics of %d atoms", len(inputs.particles.masses))
    return loop.run(capacity, inputs, state, until)

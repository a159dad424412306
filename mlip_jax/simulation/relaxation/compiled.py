"""Batched relaxation compiled once per padding budget."""

from __future__ import annotations

import logging

import jax
import numpy as np

from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.matmul_precision import full_precision
from mlip_jax.simulation.relaxation.loop import RelaxationLoop
from mlip_jax.simulation.relaxation.state import (
    FinishedMolecules,
    MoleculeBatch,
    Outcome,
    RelaxationState,
)
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)


class CompiledRelaxation:
    """`RelaxationLoop.run`, compiled once per padding budget, with the parameters on the device.

    Attributes:
      num_compiles: Number of programs compiled so far.
    """

    def __init__(self, loop: RelaxationLoop, params, device=None):
        self.loop, self.num_compiles = loop, 0
        self._device = device
        self._params = jax.device_put(params, device)
        self._run = jax.jit(self._trace, static_argnums=(0, 1), donate_argnums=(3,))

    def init(self) -> RelaxationState:
        """Return the state without any molecule, on the device."""
        # copies: donated buffers must not share memory
        return jax.tree.map(lambda x: jax.device_put(np.array(x), self._device), self.loop.init())

    def put(self, molecules: MoleculeBatch) -> MoleculeBatch:
        """Copy molecules to the device."""
        return jax.device_put(molecules, self._device)

    def run(
        self,
        budget: PaddingBudget,
        state: RelaxationState,
        queue: MoleculeBatch,
        *,
        queue_length: int,
        max_iterations: int,
        min_active: int,
    ) -> tuple[RelaxationState, FinishedMolecules, jax.Array, Outcome]:
        """Run `RelaxationLoop.run`. The buffers of `state` are donated."""
        return self._run(
            budget,
            queue.key.shape[0],
            self._params,
            state,
            queue,
            {
                "queue_length": np.int32(queue_length),
                "max_iterations": np.int32(max_iterations),
                "min_active": np.int32(min_active),
            },
        )

    def _trace(self, budget, capacity, params, state, queue, limits):
        self.num_compiles += 1  # runs when JAX traces, which it does once for each program
        log.info(
            "compiling the relaxation of %s of up to %d atoms in parallel",
            count_of(self.loop.num, "molecule"),
            self.loop.size,
        )
        with full_precision():
            return self.loop.run(budget, capacity, params, state, queue, **limits)

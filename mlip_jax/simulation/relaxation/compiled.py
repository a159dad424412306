"""Batched relaxation compiled once per padding budget."""

from __future__ import annotations

import functools
import logging

import jax
import numpy as np

from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.matmul_precision import full_precision
from mlip_jax.simulation.device_memory import ProgramTooLarge, check_fits
from mlip_jax.simulation.relaxation.loop import RelaxationLoop
from mlip_jax.simulation.relaxation.state import (
    FinishedMolecules,
    MoleculeBatch,
    Outcome,
    RelaxationState,
)
from mlip_jax.simulation.shared_programs import kept_for_equal_arguments
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)


class CompiledRelaxation:
    """`RelaxationLoop.run`, compiled once per padding budget, with the parameters on the device.

    Objects with equal `loop` share the compiled programs.

    Attributes:
      needed: Memory of each program in addition to its arguments (bytes), or None if the compiler
        does not report it, by padding budget.
    """

    def __init__(self, loop: RelaxationLoop, params, device):
        self.loop = loop
        self.needed: dict[PaddingBudget, int | None] = {}
        self._device = device
        self._params = jax.device_put(params, device)
        self._run, self._used = _shared_function(loop), set()

    @property
    def num_compiles(self) -> int:
        """Return the number of programs that this object has used."""
        return len(self._used)

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
        """Run `RelaxationLoop.run`. The buffers of `state` are donated.

        Raises:
          ProgramTooLarge: There are several slots, and the program needs more memory than the device
            has. Nothing has been run.
        """
        limits = {
            "queue_length": np.int32(queue_length),
            "max_iterations": np.int32(max_iterations),
            "min_active": np.int32(min_active),
        }
        args = (budget, queue.key.shape[0], self._params, state, queue, limits)
        self._used.add(args[:2])
        if budget not in self.needed:
            self._check_memory(budget, args)
        return self._run(*args)

    def _check_memory(self, budget: PaddingBudget, args) -> None:
        """Compile a program and compare its memory with that of the device."""
        try:
            self.needed[budget] = check_fits(self._run, *args, device=self._device)
        except ProgramTooLarge as error:
            if self.loop.num > 1:
                raise
            self.needed[budget] = error.needed  # a single molecule is tried in any case


@kept_for_equal_arguments
def _shared_function(loop: RelaxationLoop):
    """Return the function of `_trace`, compiled once per budget and capacity."""
    return jax.jit(functools.partial(_trace, loop), static_argnums=(0, 1), donate_argnums=(3,))


def _trace(loop, budget, capacity, params, state, queue, limits):
    log.info(
        "compiling the relaxation of %s of up to %d atoms in parallel",
        count_of(loop.num, "molecule"),
        loop.size,
    )
    with full_precision():
        return loop.run(budget, capacity, params, state, queue, **limits)

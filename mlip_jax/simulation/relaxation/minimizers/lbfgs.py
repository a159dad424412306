"""Batched L-BFGS; see `Minimizer` for the shapes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.simulation.relaxation.batch_vectors import MIN_CHANGE, dot, limit_step, where


class LBFGSState(NamedTuple):
    """State of L-BFGS.

    Attributes:
      s: Latest changes of the positions (Å), newest last, (M, memory, D).
      y: Latest changes of the gradient (eV/Å), newest last, (M, memory, D).
      over: 1 / (s y), 0 if there is no change, (M, memory).
      positions: Positions of the previous step (Å), (M, D).
      forces: Forces of the previous step (eV/Å), (M, D).
    """

    s: jax.Array
    y: jax.Array
    over: jax.Array
    positions: jax.Array
    forces: jax.Array


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """L-BFGS (Nocedal and Wright, algorithm 7.4). Memory is linear in the number of atoms.

    Unlike ASE's, it ignores steps along which the curvature is negative, which makes each step a
    descent.

    Attributes:
      maxstep: Longest step of an atom (Å).
      alpha: Initial curvature (eV/Å²).
      memory: Number of steps in the history.
    """

    maxstep: float = 0.2
    alpha: float = 70.0
    memory: int = 24

    def init(self, num: int, size: int, dtype=jnp.float32) -> LBFGSState:
        """Return the initial state of `num` molecules with `size` coordinates each."""
        zeros, history = jnp.zeros((num, size), dtype), jnp.zeros((num, self.memory, size), dtype)
        return LBFGSState(history, history, jnp.zeros((num, self.memory), dtype), zeros, zeros)

    def step(self, state, positions, forces, fresh, active):
        """Return the next positions (M, D) and state, see `Minimizer.step`."""
        s, y = positions - state.positions, state.forces - forces
        sy = dot(s, y)
        learns = active & ~fresh & (sy > 0) & (jnp.abs(s).max(1) >= MIN_CHANGE)
        over = jnp.where(learns, 1.0 / jnp.where(learns, sy, 1.0), 0.0)

        def push(history, new):
            # a molecule that starts forgets the history of its predecessor in the slot
            history = where(active & fresh, jnp.zeros_like(history), history)
            return where(learns, jnp.concatenate([history[:, 1:], new[:, None]], 1), history)

        state = LBFGSState(
            push(state.s, s),
            push(state.y, y),
            push(state.over, over),
            where(active, positions, state.positions),
            where(active, forces, state.forces),
        )
        direction = self._direction(state, forces)
        return where(active, positions + limit_step(direction, self.maxstep), positions), state

    def _direction(self, state, forces):
        """Return the inverse Hessian times the forces by the two-loop recursion, (M, D)."""
        # memory becomes axis 0 for the scans: (M, memory, ...) -> (memory, M, ...)
        history = tuple(jnp.moveaxis(x, 1, 0) for x in (state.s, state.y, state.over))

        def back(q, item):
            s, y, over = item
            a = over * dot(s, q)
            return q - a[:, None] * y, a

        def forth(q, item):
            (s, y, over), a = item
            return q + s * (a - over * dot(y, q))[:, None], None

        q, a = jax.lax.scan(back, forces, history, reverse=True)
        return jax.lax.scan(forth, q / self.alpha, (history, a))[0]

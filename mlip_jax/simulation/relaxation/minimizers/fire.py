"""Batched FIRE; see `Minimizer` for the shapes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.simulation.relaxation.batch_vectors import dot, where


class FIREState(NamedTuple):
    """State of FIRE.

    Attributes:
      velocity: Velocities, (M, D).
      dt: Time step, (M,).
      mixing: Mixing parameter, (M,).
      downhill: Number of consecutive downhill steps, (M,), int32.
    """

    velocity: jax.Array
    dt: jax.Array
    mixing: jax.Array
    downhill: jax.Array


@dataclasses.dataclass(frozen=True)
class FIRE:
    """FIRE (Bitzek et al., PRL 97, 170201, 2006) as in ase.optimize, with ASE's attributes."""

    maxstep: float = 0.2
    dt: float = 0.1
    dtmax: float = 1.0
    Nmin: int = 5
    finc: float = 1.1
    fdec: float = 0.5
    astart: float = 0.1
    fa: float = 0.99

    def init(self, num: int, size: int, dtype=jnp.float32) -> FIREState:
        """Return the initial state of `num` molecules with `size` coordinates each."""
        return FIREState(
            jnp.zeros((num, size), dtype),
            jnp.full(num, self.dt, dtype),
            jnp.full(num, self.astart, dtype),
            jnp.zeros(num, jnp.int32),
        )

    def step(self, state, positions, forces, fresh, active):
        """Return the next positions (M, D) and state, see `Minimizer.step`."""
        old = FIREState(
            *(
                where(fresh, new, kept)
                for new, kept in zip(self.init(*forces.shape, forces.dtype), state)
            )
        )
        v, power = old.velocity, dot(forces, old.velocity)
        good = power > 0
        size_f, size_v = jnp.sqrt(dot(forces, forces)), jnp.sqrt(dot(v, v))
        pull = old.mixing * size_v / jnp.where(size_f > 0, size_f, 1.0)
        mixed = (1.0 - old.mixing)[:, None] * v + pull[:, None] * forces
        faster = good & (old.downhill > self.Nmin)
        slower = ~good & ~fresh
        dt = jnp.where(
            faster,
            jnp.minimum(old.dt * self.finc, self.dtmax),
            jnp.where(slower, old.dt * self.fdec, old.dt),
        )
        mixing = jnp.where(faster, old.mixing * self.fa, jnp.where(slower, self.astart, old.mixing))
        velocity = jnp.where(good[:, None], mixed, 0.0) + dt[:, None] * forces
        change = dt[:, None] * velocity
        length = jnp.sqrt(dot(change, change))  # over all atoms, as in ASE
        change *= jnp.where(
            length > self.maxstep, self.maxstep / jnp.where(length > 0, length, 1.0), 1.0
        )[:, None]
        new = FIREState(velocity, dt, mixing, jnp.where(good, old.downhill + 1, 0))
        return where(active, positions + change, positions), FIREState(
            *(where(active, a, b) for a, b in zip(new, state))
        )

"""Operations on vectors of many molecules.

M   molecules        D   3 times the atoms of the largest one
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# MIN_CHANGE: a smaller step (Å) carries no information about the curvature, as in ASE.
MIN_CHANGE = 1e-7


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the dot product of each molecule, (M, D) and (M, D) -> (M,)."""
    return (a * b).sum(-1)


def where(which: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Return `new` (M, ...) for the molecules `which` (M,), `old` for the others."""
    return jnp.where(which.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def limit_step(direction: jax.Array, maxstep: float) -> jax.Array:
    """Scale steps (M, D) down so that no atom moves further than `maxstep` (Å)."""
    longest = jnp.sqrt((direction.reshape(len(direction), -1, 3) ** 2).sum(-1).max(1))
    return (
        direction
        * jnp.where(longest >= maxstep, maxstep / jnp.where(longest > 0, longest, 1.0), 1.0)[
            :, None
        ]
    )

"""Batched BFGS; see `Minimizer` for the shapes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.simulation.relaxation.batch_vectors import MIN_CHANGE, dot, limit_step, where


class BFGSState(NamedTuple):
    """State of BFGS.

    Attributes:
      inverse: Approximate inverse of the Hessian (Å²/eV), (M, D, D).
      product: inverse @ forces of the previous step, with the inverse before its update, (M, D).
      positions: Positions of the previous step (Å), (M, D).
      forces: Forces of the previous step (eV/Å), (M, D).
      negative: Number of negative eigenvalues of the inverse, (M,), int32.
    """

    inverse: jax.Array
    product: jax.Array
    positions: jax.Array
    forces: jax.Array
    negative: jax.Array


@dataclasses.dataclass(frozen=True)
class BFGS:
    """BFGS with the same steps as in ase.optimize, except for rounding.

    ASE stores the Hessian H and diagonalizes it at each step, V |w|^-1 V^T F. This class stores and
    updates the inverse instead (Nocedal and Wright, eq. 6.17), so a step is a matrix-vector
    product. ASE takes the absolute values of negative eigenvalues; if a molecule has any, its
    inverse is diagonalized. The number of negative eigenvalues follows from the update, which
    removes the direction s of the last step and inserts another one: the number decreases by one if
    s H s < 0 and increases by one if s y < 0 (s: change of the positions, y: change of the
    gradient). s H s has the sign of F H^-1 F of the previous step.

    Attributes:
      maxstep: Longest step of an atom (Å).
      alpha: Initial curvature (eV/Å²).
    """

    maxstep: float = 0.2
    alpha: float = 70.0

    def init(self, num: int, size: int, dtype=jnp.float32) -> BFGSState:
        """Return the initial state of `num` molecules with `size` coordinates each."""
        zeros = jnp.zeros((num, size), dtype)
        return BFGSState(
            jnp.zeros((num, size, size), dtype), zeros, zeros, zeros, jnp.zeros(num, jnp.int32)
        )

    def step(self, state, positions, forces, fresh, active):
        """Return the next positions (M, D) and state, see `Minimizer.step`."""
        s, y = positions - state.positions, state.forces - forces
        sy = dot(s, y)
        learns = active & ~fresh & (jnp.abs(s).max(1) >= MIN_CHANGE) & (sy != 0)
        # product of the inverse before its update with the new forces; the initial inverse is 1 /
        # alpha
        before = jnp.where(fresh[:, None], forces / self.alpha, _matvec(state.inverse, forces))
        u = state.product - before  # inverse @ y
        s, u = (jnp.where(learns[:, None], x, 0.0) for x in (s, u))
        over = jnp.where(learns, 1.0 / jnp.where(learns, sy, 1.0), 0.0)
        both = over * (1.0 + over * dot(y, u))
        inverse = self._update_inverse(state.inverse, s, u, over, both, fresh & active)
        product = (
            before
            + s * (both * dot(s, forces) - over * dot(u, forces))[:, None]
            - u * (over * dot(s, forces))[:, None]
        )
        gone = dot(state.forces, state.product) < 0
        negative = jnp.where(
            learns, state.negative - gone + (sy < 0), jnp.where(fresh, 0, state.negative)
        )
        # rounding can hide a negative eigenvalue from the count, but not from the sign of the step
        odd = active & ((negative != 0) | (dot(product, forces) < 0))
        direction, negative = jax.lax.cond(
            odd.any(),
            lambda: _diagonalize(inverse, forces, product, negative, odd),
            lambda: (product, negative),
        )
        moved = where(active, positions + limit_step(direction, self.maxstep), positions)
        kept = BFGSState(
            inverse,
            *(
                where(active, new, old)
                for new, old in zip((product, positions, forces, negative), state[1:])
            ),
        )
        return moved, kept

    def _update_inverse(self, inverse, s, u, over, both, starts):
        """Return the updated inverse Hessians, (M, D, D); reset those of molecules that start."""
        eye = jnp.eye(inverse.shape[-1], dtype=inverse.dtype) / self.alpha
        start = jnp.where(starts[:, None, None], eye, inverse)
        half = 0.5 * both[:, None] * s - over[:, None] * u
        return start + s[:, :, None] * half[:, None, :] + half[:, :, None] * s[:, None, :]


def _diagonalize(inverse, forces, product, negative, which):
    """Return directions |inverse| @ forces and numbers of negative eigenvalues.

    Only the molecules `which` are diagonalized, one after another.
    """

    def one(carry):
        left, direction, negative = carry
        m = jnp.argmax(left)
        values, vectors = jnp.linalg.eigh(inverse[m])
        along = vectors @ (jnp.abs(values) * (vectors.T @ forces[m]))
        return (
            left.at[m].set(False),
            direction.at[m].set(along),
            negative.at[m].set((values < 0).sum().astype(negative.dtype)),
        )

    _, direction, negative = jax.lax.while_loop(
        lambda carry: carry[0].any(), one, (which, product, negative)
    )
    return direction, negative


def _matvec(matrix, vector):
    """Return the product of a matrix and a vector per molecule, (M, D, D) and (M, D) -> (M, D)."""
    return jnp.einsum("mij,mj->mi", matrix, vector, precision=jax.lax.Precision.HIGHEST)

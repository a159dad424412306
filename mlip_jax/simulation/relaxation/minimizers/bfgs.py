"""BFGS of many molecules at once; see `Minimizer` for the shapes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.simulation.relaxation.batch_vectors import MIN_CHANGE, dot, limit_step, where


class BFGSState(NamedTuple):
    """State of BFGS.

    Attributes:
      inverse: Approximate inverse of the Hessian, (M, D, D), Å²/eV.
      product: inverse @ forces of the step before, before the inverse was made better, (M, D).
      positions, forces: Of the step before, (M, D).
      negative: Negative eigenvalues of the inverse, (M,), int32.
    """

    inverse: jax.Array
    product: jax.Array
    positions: jax.Array
    forces: jax.Array
    negative: jax.Array


@dataclasses.dataclass(frozen=True)
class BFGS:
    """BFGS of ase.optimize: the same steps, but for rounding.

    ASE keeps the Hessian H and diagonalises it for each step, V |w|^-1 V^T F. Here its inverse is kept and updated
    (Nocedal and Wright, eq. 6.17), so that a step is a product. Where H has negative eigenvalues, whose absolute
    values ASE takes, the inverse of that one molecule is diagonalised. How many it has needs no look: the update takes
    out the direction s of the last step and puts another in, so that their number falls by one if s H s < 0 and grows
    by one if s y < 0 (s: change of the positions, y: of the gradient). s H s has the sign of F H^-1 F of the step
    before.

    Attributes:
      maxstep: Longest step of an atom, Å. alpha: First guess of the curvature, eV/Å².
    """

    maxstep: float = 0.2
    alpha: float = 70.0

    def init(self, num: int, size: int, dtype=jnp.float32) -> BFGSState:
        zeros = jnp.zeros((num, size), dtype)
        return BFGSState(jnp.zeros((num, size, size), dtype), zeros, zeros, zeros, jnp.zeros(num, jnp.int32))

    def step(self, state, positions, forces, fresh, active):
        s, y = positions - state.positions, state.forces - forces
        sy = dot(s, y)
        learns = active & ~fresh & (jnp.abs(s).max(1) >= MIN_CHANGE) & (sy != 0)
        # first the inverse as it was, times the new forces; a fresh one is 1 / alpha
        before = jnp.where(fresh[:, None], forces / self.alpha, _matvec(state.inverse, forces))
        u = state.product - before  # inverse @ y
        s, u = (jnp.where(learns[:, None], x, 0.0) for x in (s, u))
        over = jnp.where(learns, 1.0 / jnp.where(learns, sy, 1.0), 0.0)
        both = over * (1.0 + over * dot(y, u))
        inverse = self._updated(state.inverse, s, u, over, both, fresh & active)
        product = before + s * (both * dot(s, forces) - over * dot(u, forces))[:, None] - u * (
            over * dot(s, forces))[:, None]
        gone = dot(state.forces, state.product) < 0
        negative = jnp.where(learns, state.negative - gone + (sy < 0), jnp.where(fresh, 0, state.negative))
        # rounding can hide a negative eigenvalue from the count, but not from the step
        odd = active & ((negative != 0) | (dot(product, forces) < 0))
        direction, negative = jax.lax.cond(
            odd.any(), lambda: _by_eigenvectors(inverse, forces, product, negative, odd), lambda: (product, negative))
        moved = where(active, positions + limit_step(direction, self.maxstep), positions)
        kept = BFGSState(inverse, *(where(active, new, old) for new, old in zip(
            (product, positions, forces, negative), state[1:])))
        return moved, kept

    def _updated(self, inverse, s, u, over, both, anew):
        eye = jnp.eye(inverse.shape[-1], dtype=inverse.dtype) / self.alpha
        start = jnp.where(anew[:, None, None], eye, inverse)
        half = 0.5 * both[:, None] * s - over[:, None] * u
        return start + s[:, :, None] * half[:, None, :] + half[:, :, None] * s[:, None, :]


def _by_eigenvectors(inverse, forces, product, negative, which):
    """Directions |inverse| @ forces of the molecules `which`, one after another, and their negative eigenvalues."""

    def one(carry):
        left, direction, negative = carry
        m = jnp.argmax(left)
        values, vectors = jnp.linalg.eigh(inverse[m])
        along = vectors @ (jnp.abs(values) * (vectors.T @ forces[m]))
        return (left.at[m].set(False), direction.at[m].set(along),
                negative.at[m].set((values < 0).sum().astype(negative.dtype)))

    _, direction, negative = jax.lax.while_loop(lambda carry: carry[0].any(), one, (which, product, negative))
    return direction, negative


def _matvec(matrix, vector):
    return jnp.einsum("mij,mj->mi", matrix, vector, precision=jax.lax.Precision.HIGHEST)

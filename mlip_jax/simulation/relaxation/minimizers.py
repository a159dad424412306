"""Minimisers of many molecules at once: BFGS, L-BFGS and FIRE, as `init` and `step` on an explicit state. Pure.

    M   molecules        D   3 times the atoms of the largest one

Positions and forces are (M, D); what belongs to padding or fixed atoms has no force, and so it never moves. Molecules
that are not `active` in a step keep positions and state to the last bit. A molecule that is `fresh` begins anew,
whatever its state holds.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.config import unknown_name

# A step smaller than this (Å) teaches nothing about the curvature, as in ASE.
_SAME_PLACE = 1e-7


class Minimizer(Protocol):
    """What relaxation asks of a minimiser."""

    def init(self, num: int, size: int, dtype) -> NamedTuple:
        """State of `num` molecules with `size` coordinates each."""

    def step(self, state, positions: jax.Array, forces: jax.Array, fresh: jax.Array, active: jax.Array
             ) -> tuple[jax.Array, NamedTuple]:
        """Next positions (M, D) and state, from positions (M, D) in Å, forces (M, D) in eV/Å, and who is fresh and
        who is active (M,)."""


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
        sy = _dot(s, y)
        learns = active & ~fresh & (jnp.abs(s).max(1) >= _SAME_PLACE) & (sy != 0)
        # first the inverse as it was, times the new forces; a fresh one is 1 / alpha
        before = jnp.where(fresh[:, None], forces / self.alpha, _matvec(state.inverse, forces))
        u = state.product - before  # inverse @ y
        s, u = (jnp.where(learns[:, None], x, 0.0) for x in (s, u))
        over = jnp.where(learns, 1.0 / jnp.where(learns, sy, 1.0), 0.0)
        both = over * (1.0 + over * _dot(y, u))
        inverse = self._updated(state.inverse, s, u, over, both, fresh & active)
        product = before + s * (both * _dot(s, forces) - over * _dot(u, forces))[:, None] - u * (
            over * _dot(s, forces))[:, None]
        gone = _dot(state.forces, state.product) < 0
        negative = jnp.where(learns, state.negative - gone + (sy < 0), jnp.where(fresh, 0, state.negative))
        # rounding can hide a negative eigenvalue from the count, but not from the step
        odd = active & ((negative != 0) | (_dot(product, forces) < 0))
        direction, negative = jax.lax.cond(
            odd.any(), lambda: _by_eigenvectors(inverse, forces, product, negative, odd), lambda: (product, negative))
        moved = _where(active, positions + _limited(direction, self.maxstep), positions)
        kept = BFGSState(inverse, *(_where(active, new, old) for new, old in zip(
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


class LBFGSState(NamedTuple):
    """State of L-BFGS.

    Attributes:
      s, y: Latest changes of positions and gradient, newest last, (M, memory, D). over: 1 / (s y), 0 where there is
        none, (M, memory).
      positions, forces: Of the step before, (M, D).
    """

    s: jax.Array
    y: jax.Array
    over: jax.Array
    positions: jax.Array
    forces: jax.Array


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """L-BFGS (Nocedal and Wright, algorithm 7.4): memory linear in the atoms.

    As ASE's, but that steps along which the curvature is negative are forgotten, which keeps each step a descent.

    Attributes:
      maxstep: Longest step of an atom, Å. alpha: First guess of the curvature, eV/Å². memory: Steps remembered.
    """

    maxstep: float = 0.2
    alpha: float = 70.0
    memory: int = 24

    def init(self, num: int, size: int, dtype=jnp.float32) -> LBFGSState:
        zeros, history = jnp.zeros((num, size), dtype), jnp.zeros((num, self.memory, size), dtype)
        return LBFGSState(history, history, jnp.zeros((num, self.memory), dtype), zeros, zeros)

    def step(self, state, positions, forces, fresh, active):
        s, y = positions - state.positions, state.forces - forces
        sy = _dot(s, y)
        learns = active & ~fresh & (sy > 0) & (jnp.abs(s).max(1) >= _SAME_PLACE)
        over = jnp.where(learns, 1.0 / jnp.where(learns, sy, 1.0), 0.0)

        def pushed(history, new):
            history = _where(active & fresh, jnp.zeros_like(history), history)
            return _where(learns, jnp.concatenate([history[:, 1:], new[:, None]], 1), history)

        state = LBFGSState(pushed(state.s, s), pushed(state.y, y), pushed(state.over, over),
                           _where(active, positions, state.positions), _where(active, forces, state.forces))
        direction = self._direction(state, forces)
        return _where(active, positions + _limited(direction, self.maxstep), positions), state

    def _direction(self, state, forces):
        """Inverse Hessian times forces, by the two loops."""
        history = tuple(jnp.moveaxis(x, 1, 0) for x in (state.s, state.y, state.over))

        def back(q, item):
            s, y, over = item
            a = over * _dot(s, q)
            return q - a[:, None] * y, a

        def forth(q, item):
            (s, y, over), a = item
            return q + s * (a - over * _dot(y, q))[:, None], None

        q, a = jax.lax.scan(back, forces, history, reverse=True)
        return jax.lax.scan(forth, q / self.alpha, (history, a))[0]


class FIREState(NamedTuple):
    """State of FIRE: velocity (M, D), time step, mixing and steps downhill (M,)."""

    velocity: jax.Array
    dt: jax.Array
    mixing: jax.Array
    downhill: jax.Array


@dataclasses.dataclass(frozen=True)
class FIRE:
    """FIRE (Bitzek et al., PRL 97, 170201, 2006) as in ase.optimize; attributes are those of ASE."""

    maxstep: float = 0.2
    dt: float = 0.1
    dtmax: float = 1.0
    Nmin: int = 5
    finc: float = 1.1
    fdec: float = 0.5
    astart: float = 0.1
    fa: float = 0.99

    def init(self, num: int, size: int, dtype=jnp.float32) -> FIREState:
        return FIREState(jnp.zeros((num, size), dtype), jnp.full(num, self.dt, dtype),
                         jnp.full(num, self.astart, dtype), jnp.zeros(num, jnp.int32))

    def step(self, state, positions, forces, fresh, active):
        old = FIREState(*(_where(fresh, new, kept) for new, kept in zip(
            self.init(*forces.shape, forces.dtype), state)))
        v, power = old.velocity, _dot(forces, old.velocity)
        good = power > 0
        size_f, size_v = jnp.sqrt(_dot(forces, forces)), jnp.sqrt(_dot(v, v))
        pull = old.mixing * size_v / jnp.where(size_f > 0, size_f, 1.0)
        mixed = (1.0 - old.mixing)[:, None] * v + pull[:, None] * forces
        faster = good & (old.downhill > self.Nmin)
        slower = ~good & ~fresh
        dt = jnp.where(faster, jnp.minimum(old.dt * self.finc, self.dtmax),
                       jnp.where(slower, old.dt * self.fdec, old.dt))
        mixing = jnp.where(faster, old.mixing * self.fa, jnp.where(slower, self.astart, old.mixing))
        velocity = jnp.where(good[:, None], mixed, 0.0) + dt[:, None] * forces
        change = dt[:, None] * velocity
        length = jnp.sqrt(_dot(change, change))  # of all atoms together, as in ASE
        change *= jnp.where(length > self.maxstep, self.maxstep / jnp.where(length > 0, length, 1.0), 1.0)[:, None]
        new = FIREState(velocity, dt, mixing, jnp.where(good, old.downhill + 1, 0))
        return _where(active, positions + change, positions), FIREState(
            *(_where(active, a, b) for a, b in zip(new, state)))


MINIMIZERS = {"bfgs": BFGS, "lbfgs": LBFGS, "fire": FIRE}


def create(name: str, maxstep: float = 0.2) -> Minimizer:
    """The minimiser of a name ("bfgs", "lbfgs", "fire") with ASE's parameters.

    Args:
      maxstep: Longest step, Å.

    Raises:
      ValueError: No such name, or a step that is not positive.
    """
    if name not in MINIMIZERS:
        raise ValueError(unknown_name("optimizer", name, MINIMIZERS))
    if not (np.isfinite(maxstep) and maxstep > 0):
        raise ValueError(f"maxstep must be positive (Å), received {maxstep}")
    return MINIMIZERS[name](maxstep=maxstep)


def _dot(a, b):
    return (a * b).sum(-1)


def _matvec(matrix, vector):
    return jnp.einsum("mij,mj->mi", matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _where(which, new, old):
    return jnp.where(which.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _limited(direction, maxstep):
    """The whole step made shorter, so that no atom moves further than `maxstep`."""
    longest = jnp.sqrt((direction.reshape(len(direction), -1, 3) ** 2).sum(-1).max(1))
    return direction * jnp.where(longest >= maxstep, maxstep / jnp.where(longest > 0, longest, 1.0), 1.0)[:, None]

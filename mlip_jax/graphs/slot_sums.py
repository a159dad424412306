"""Sums over neighbors in slots that are differentiable without scatter operations.

    N   atoms      K   slots per atom      P   pairs      F   features

The transpose of reading the rows of neighbors adds a row of every edge to its atom. With the slots
of graphs/neighbor_slots.py that is a sum over the slots of the atom.

- `take` and `total` are for arbitrary values of pairs; each is the transpose of the other.
- `symmetric_sum` is for coefficients that are equal for both directions of a pair, or change their
  sign. Its transpose is the same sum, since the list of neighbors has the reverse of each edge.

All derivatives, of any order and in both modes, consist of these operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# _MAX_TERMS: largest number of slots that are summed in one loop.
_MAX_TERMS = 16


class SlotIndex(NamedTuple):
    """Index of an atom of each pair, with the pairs of each atom.

    Attributes:
      atoms: Index of the atom of each pair, shape (P,).
      rows: Pair in each slot of an atom, shape (N, K); any pair in empty slots.
      used: Whether the slot has a pair, shape (N, K). Pairs in no slot are padding.
    """

    atoms: jax.Array
    rows: jax.Array
    used: jax.Array


def take(x: jax.Array, index: SlotIndex) -> jax.Array:
    """Return the rows of the atoms of each pair: (N, ...) -> (P, ...)."""
    return _TAKE.bind(x, *index)


def total(y: jax.Array, index: SlotIndex) -> jax.Array:
    """Sum the rows of the pairs of each atom: (P, ...) -> (N, ...)."""
    return _TOTAL.bind(y, *index)


def symmetric_sum(
    x: jax.Array, coefficients: jax.Array, senders: jax.Array, antisymmetric: bool = False
) -> jax.Array:
    """Compute sum_k c[i, k] x[senders[i, k]]: (N, F), (N, K, F) -> (N, F).

    The coefficients must be a symmetric function of both atoms, and zero in empty slots. Derivatives
    with respect to them are correct for the sum over both directions of each pair.

    Args:
      x: Values of the atoms.
      coefficients: Coefficients c.
      senders: `NeighborSlots.senders`.
      antisymmetric: Whether c changes its sign with the direction.
    """
    return _SUMS[antisymmetric].bind(x, coefficients, senders)


def rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return x[index] without checks of bounds."""
    return x.at[index].get(mode="promise_in_bounds")


def sum_slots(values: list[jax.Array]) -> list[jax.Array]:
    """Sum arrays over the slots: (N, K, ...) -> (N, ...) each, in one loop.

    XLA computes values inside of the loop of a short sum. Before a long sum it would store them.
    """
    capacity = values[0].shape[1]
    length = next(d for d in range(min(capacity, _MAX_TERMS), 0, -1) if capacity % d == 0)
    parts = [x.reshape(x.shape[0], -1, length, *x.shape[2:]) for x in values]
    zeros = tuple(jnp.zeros((), x.dtype) for x in values)

    def add(a, b):
        return tuple(x + y for x, y in zip(a, b))

    sums = jax.lax.reduce(tuple(parts), zeros, add, (2,))  # (N, K / length, ...)
    return [functools.reduce(jnp.add, (x[:, n] for n in range(x.shape[1]))) for x in sums]


def define_primitive(name: str, function: Callable, *, several: bool = False) -> Primitive:
    """Define a primitive that is evaluated, compiled and batched as a function of arrays.

    Args:
      name: Name.
      function: Function of arrays and static keyword arguments. It returns an array or, if
        `several`, a list of arrays.
      several: Whether it returns a list.
    """
    primitive = Primitive(name)
    primitive.multiple_results = several

    def shapes(*avals, **static):
        out = jax.eval_shape(
            functools.partial(function, **static),
            *[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals],
        )
        return jax.tree.map(lambda o: jax.core.ShapedArray(o.shape, o.dtype), out)

    def batch(args, dims, **static):
        out = jax.vmap(functools.partial(function, **static), in_axes=tuple(dims))(*args)
        return out, [0] * len(out) if several else 0

    def evaluate(*args, **static):
        return jax.jit(functools.partial(function, **static))(*args)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=several))
    batching.primitive_batchers[primitive] = batch
    return primitive


def is_zero(tangent) -> bool:
    """Return whether a tangent is a symbolic zero."""
    return type(tangent) is ad.Zero


def multilinear_jvp(primitive: Primitive, num: int) -> Callable:
    """Return the differentiation rule of a primitive that is linear in each of `num` arguments."""

    def rule(primals, tangents):
        out, tangent_out = primitive.bind(*primals), None
        for n, tangent in enumerate(tangents[:num]):
            if not is_zero(tangent):
                part = primitive.bind(*primals[:n], tangent, *primals[n + 1 :])
                tangent_out = part if tangent_out is None else ad.add_tangents(tangent_out, part)
        return out, ad.Zero.from_primal_value(out) if tangent_out is None else tangent_out

    return rule


def _take(x, atoms, index, used):
    return rows(x, atoms)


def _total(y, atoms, index, used):
    used = used.reshape(*used.shape, *[1] * (y.ndim - 1))
    return sum_slots([jnp.where(used, rows(y, index), jnp.zeros((), y.dtype))])[0]


def _sum(x, coefficients, senders):
    return sum_slots([coefficients * rows(x, senders)])[0]


def _outer(x, y, senders):
    return y[:, None] * rows(x, senders)


_TAKE, _TOTAL = define_primitive("take_rows", _take), define_primitive("total_rows", _total)


def _linear_transpose(primitive: Primitive) -> Callable:
    """Return the rule of transposition of a primitive that is linear in its first argument."""

    def rule(cotangent, values, *index):
        found = None if is_zero(cotangent) else primitive.bind(cotangent, *index)
        return [found, *[None] * len(index)]

    return rule


for _primitive, _transposed in ((_TAKE, _TOTAL), (_TOTAL, _TAKE)):
    ad.primitive_jvps[_primitive] = multilinear_jvp(_primitive, 1)
    ad.primitive_transposes[_primitive] = _linear_transpose(_transposed)


def _define_sum(sign: float) -> Primitive:
    """Define the sum with coefficients that get a factor `sign` with the direction.

    Its derivative with respect to the coefficients is an outer product, a second primitive.
    """
    name = "symmetric" if sign > 0 else "antisymmetric"
    summed = define_primitive(f"{name}_sum", _sum)
    outer = define_primitive(f"{name}_outer", _outer)

    def signed(values):
        return values if sign > 0 else -values

    def transpose_sum(cotangent, x, coefficients, senders):
        if is_zero(cotangent):
            return [None, None, None]
        if ad.is_undefined_primal(x):
            return [signed(summed.bind(cotangent, coefficients, senders)), None, None]
        return [None, outer.bind(x, cotangent, senders), None]

    def transpose_outer(cotangent, x, y, senders):
        if is_zero(cotangent):
            return [None, None, None]
        if ad.is_undefined_primal(x):
            return [signed(summed.bind(y, cotangent, senders)), None, None]
        return [None, summed.bind(x, cotangent, senders), None]

    ad.primitive_jvps[summed] = multilinear_jvp(summed, 2)
    ad.primitive_jvps[outer] = multilinear_jvp(outer, 2)
    ad.primitive_transposes[summed], ad.primitive_transposes[outer] = transpose_sum, transpose_outer
    return summed


_SUMS = {False: _define_sum(1.0), True: _define_sum(-1.0)}

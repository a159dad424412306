"""Contractions of edges with moments of atoms, with derivatives of any order.

    E   edges      N   atoms      M   components of harmonics      C   features

All three are derivatives of one trilinear form, sum over e, m and c of y[e, m] a[e, c] x[i(e), m, c]:

    moments   (N, M, C)   sum over the edges of an atom of y[e, m] a[e, c]
    project   (E, C)      sum over m of y[e, m] x[i(e), m, c]
    overlap   (E, M)      sum over c of a[e, c] x[i(e), m, c]

XLA would store products (E, M, C), which exceed the caches of CPUs. There, sums over m and over the
edges of an atom are computed in one loop, so only arrays of the sizes above are written. On other
devices, whose loops wait for the host, moments are sums over edges. Derivatives of each contraction
are the other two, in both modes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mlip_jax.target_device import target_platform

_BLOCK = 8  # edges of an atom that are added in one step of the loop
_EXACT = jax.lax.Precision.HIGHEST


class AtomEdges(NamedTuple):
    """Atom i(e) of each edge, and the edges of each atom.

    Attributes:
      atoms: Index of the atom of each edge, (E,).
      order: Indices of the edges, sorted by atom, (E,).
      first: Position in `order` of the first edge of each atom, (N,).
      count: Number of edges of each atom, (N,). Other edges must have y = 0.
    """

    atoms: jax.Array
    order: jax.Array
    first: jax.Array
    count: jax.Array


def moments(y: jax.Array, a: jax.Array, edges: AtomEdges) -> jax.Array:
    """Sum y[e, m] a[e, c] over the edges of each atom: (E, M), (E, C) -> (N, M, C)."""
    return _MOMENTS.bind(y, a, *edges)


def project(y: jax.Array, x: jax.Array, edges: AtomEdges) -> jax.Array:
    """Sum y[e, m] x[i(e), m, c] over m: (E, M), (N, M, C) -> (E, C)."""
    return _PROJECT.bind(y, x, *edges)


def _overlap(a, x, edges):
    """Sum a[e, c] x[i(e), m, c] over c: (E, C), (N, M, C) -> (E, M)."""
    return _OVERLAP.bind(a, x, *edges)


def _compute_moments(y, a, atoms, order, first, count):
    if target_platform() != "cpu":
        return jax.ops.segment_sum(y[:, :, None] * a[:, None, :], atoms, len(first))
    zeros = jnp.zeros((len(first), y.shape[1], a.shape[1]), y.dtype)
    if not len(order):
        return zeros
    num_steps = (jnp.max(count, initial=0) + _BLOCK - 1) // _BLOCK
    last = jnp.maximum(count - 1, 0)

    def step(state):
        n, total = state
        for slot in range(_BLOCK):
            slot = n * _BLOCK + slot
            # beyond the last edge: that edge, because values of other atoms may be NaN
            place = first + jnp.minimum(slot, last)
            edge = _rows(order, jnp.minimum(place, len(order) - 1))
            factor = jnp.where((slot < count)[:, None], _rows(y, edge), 0.0)
            total = total + factor[:, :, None] * _rows(a, edge)[:, None, :]
        return n + 1, total

    start = (jnp.zeros_like(num_steps), zeros)
    _, total = jax.lax.while_loop(lambda s: s[0] < num_steps, step, start)
    return jnp.where((count > 0)[:, None, None], total, 0.0)


def _compute_project(y, x, atoms, order, first, count):
    return sum(y[:, m, None] * _rows(x[:, m], atoms) for m in range(y.shape[1]))


def _compute_overlap(a, x, atoms, order, first, count):
    return jnp.einsum("ec,emc->em", a, _rows(x, atoms), precision=_EXACT)


def _rows(values, index):
    return jnp.asarray(values).at[index].get(mode="promise_in_bounds")


def _primitive(name, compute):
    """Return the primitive of a contraction, bilinear in its first two operands."""
    primitive = Primitive(f"edge_{name}")

    def abstract(p, q, *indices):
        shape = jax.eval_shape(
            compute, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (p, q, *indices))
        )
        return jax.core.ShapedArray(shape.shape, shape.dtype)

    def jvp(primals, tangents):
        p, q, *indices = primals
        dp, dq = tangents[:2]
        out = primitive.bind(p, q, *indices)
        terms = []
        if not isinstance(dp, ad.Zero):
            terms.append(primitive.bind(dp, q, *indices))
        if not isinstance(dq, ad.Zero):
            terms.append(primitive.bind(p, dq, *indices))
        return out, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(out)

    def batch(arguments, axes):
        return jax.vmap(compute, in_axes=axes)(*arguments), 0

    primitive.def_impl(jax.jit(compute))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


def _transpose(first, second):
    """Return the rule of transposition with functions for the cotangents of both operands."""

    def rule(cotangent, p, q, *indices):
        edges, rest = AtomEdges(*indices), (None,) * len(indices)
        if ad.is_undefined_primal(p):
            return (first(cotangent, q, edges), None, *rest)
        return (None, second(cotangent, p, edges), *rest)

    return rule


_MOMENTS = _primitive("moments", _compute_moments)
_PROJECT = _primitive("project", _compute_project)
_OVERLAP = _primitive("overlap", _compute_overlap)
# cotangents of y and a
ad.primitive_transposes[_MOMENTS] = _transpose(
    lambda x, a, edges: _overlap(a, x, edges), lambda x, y, edges: project(y, x, edges)
)
# cotangents of y and x
ad.primitive_transposes[_PROJECT] = _transpose(_overlap, lambda a, y, edges: moments(y, a, edges))
# cotangents of a and x
ad.primitive_transposes[_OVERLAP] = _transpose(project, moments)

"""Sums whose number of terms is only known at run time, with derivatives of any order.

Reverse-mode differentiation of a loop needs a fixed number of steps, and stores the intermediate
values of all steps. The derivative of a sum is the sum of the derivatives of its terms, so a
primitive for sums is sufficient:

    derivative along a tangent      sum of the derivatives of the terms
    its transpose (reverse mode)    sum of the transposed derivatives

Both are sums of the same kind. No intermediate values of the terms are stored; they are computed
again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def slot_sum(term: Callable, num: jax.Array, indices: Any, values: Any) -> Any:
    """Sum term(slot, indices, values) over slot = 0, ..., num - 1.

    Args:
      term: Function, without arrays in its closure, that returns arrays.
      num: Number of terms, int32.
      indices: Pytree of integer arrays.
      values: Pytree of floating-point arrays; the sum can be differentiated with respect to them.
    """
    indices, values = jax.tree.map(jnp.asarray, (indices, values))
    num = jnp.asarray(num, jnp.int32)
    return _bind(_general(term), num, indices, (values, ()))


@functools.cache
def _general(term):
    """Return `term` as a function of (values, ())."""
    return lambda slot, indices, values: term(slot, indices, values[0])


# Values are pairs (x, y) of pytrees. Terms are linear in y, and only y can be transposed.
_SUM = Primitive("slot_sum")
_SUM.multiple_results = True


def _bind(term, num, indices, values):
    leaves, tree = jax.tree.flatten((num, indices, values))
    shapes = _shapes(term, indices, values)
    return jax.tree.unflatten(jax.tree.structure(shapes), _SUM.bind(*leaves, term=term, tree=tree))


def _shapes(term, indices, values):
    return jax.eval_shape(term, jax.ShapeDtypeStruct((), jnp.int32), indices, values)


def _loop(*leaves, term, tree):
    """Compute the sum."""
    num, indices, values = jax.tree.unflatten(tree, leaves)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _shapes(term, indices, values))

    def step(state):
        slot, total = state
        return slot + 1, jax.tree.map(jnp.add, total, term(slot, indices, values))

    start = (jnp.zeros((), jnp.int32), zeros)
    return jax.tree.leaves(jax.lax.while_loop(lambda state: state[0] < num, step, start)[1])


def _abstract(*avals, term, tree):
    _, indices, values = jax.tree.unflatten(tree, avals)
    shapes = jax.tree.leaves(_shapes(term, indices, values))
    return [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]


def _batch(leaves, dims, term, tree):
    out = jax.vmap(functools.partial(_loop, term=term, tree=tree), in_axes=tuple(dims))(*leaves)
    return out, [0] * len(out)


def _jvp(primals, tangents, term, tree):
    out = _SUM.bind(*primals, term=term, tree=tree)
    num, indices, values = jax.tree.unflatten(tree, primals)
    values, structure = jax.tree.flatten(values)
    tangents = tangents[len(primals) - len(values) :]
    moved = tuple(type(t) is not ad.Zero for t in tangents)
    along = [t for t, m in zip(tangents, moved) if m]
    derivative = _tangent_term(term, structure, moved)
    return out, jax.tree.leaves(_bind(derivative, num, indices, (values, along)))


@functools.cache
def _tangent_term(term, structure, moved):
    """Return the derivative of a term along tangents of the leaves that are `moved`."""

    def derivative(slot, indices, values):
        leaves, along = values

        def of_moved(*new):
            new = iter(new)
            replaced = [next(new) if m else x for x, m in zip(leaves, moved)]
            return term(slot, indices, jax.tree.unflatten(structure, replaced))

        at = tuple(x for x, m in zip(leaves, moved) if m)
        return jax.jvp(of_moved, at, tuple(along))[1]

    return derivative


def _transpose(cotangents, *leaves, term, tree):
    num, indices, (x, y) = jax.tree.unflatten(tree, leaves)
    y, structure = jax.tree.flatten(y, is_leaf=ad.is_undefined_primal)
    unknown = tuple(ad.is_undefined_primal(leaf) for leaf in y)
    avals = tuple(
        (leaf.aval.shape, leaf.aval.dtype) for leaf, is_unknown in zip(y, unknown) if is_unknown
    )
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    adjoint = _adjoint_term(term, structure, unknown, avals)
    known = [leaf for leaf, is_unknown in zip(y, unknown) if not is_unknown]
    results = iter(_bind(adjoint, num, indices, ((x, known, cotangents), ())))
    others = [None] * (len(leaves) - len(y))
    return [*others, *(next(results) if is_unknown else None for is_unknown in unknown)]


@functools.cache
def _adjoint_term(term, structure, unknown, avals):
    """Return the transpose of a term with respect to the leaves of y that are `unknown`."""

    def adjoint(slot, indices, values):
        x, known, cotangents = values[0]

        def of_unknown(*new):
            new, old = iter(new), iter(known)
            y = [next(new) if is_unknown else jnp.zeros_like(next(old)) for is_unknown in unknown]
            return jax.tree.leaves(term(slot, indices, (x, jax.tree.unflatten(structure, y))))

        zeros = [jnp.zeros(shape, dtype) for shape, dtype in avals]
        return list(jax.vjp(of_unknown, *zeros)[1](cotangents))

    return adjoint


_SUM.def_impl(jax.jit(_loop, static_argnames=("term", "tree")))
_SUM.def_abstract_eval(_abstract)
mlir.register_lowering(_SUM, mlir.lower_fun(_loop, multiple_results=True))
batching.primitive_batchers[_SUM] = _batch
ad.primitive_jvps[_SUM] = _jvp
ad.primitive_transposes[_SUM] = _transpose

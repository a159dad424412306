"""Rows of trainable tables, such as the vector of each atom's element.

The derivative of a table adds the rows of all atoms of an element. On devices that add with atomic
operations, it is a product with the one-hot encoding of the elements, whose result is the same in
every run.

    Z   rows of the table      N   atoms
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from mlip_jax.graphs.slot_sums import define_primitive, is_zero, rows
from mlip_jax.target_device import target_platform


def element_rows(table: jax.Array, index: jax.Array, dtype) -> jax.Array:
    """Return the row of the element of each atom: (Z, ...), (N,) -> (N, ...).

    Args:
      table: Table with a row for each element.
      index: Atomic numbers, or other indices of rows.
      dtype: Floating-point type of the result.
    """
    table = jnp.asarray(table, dtype)
    if target_platform() == "cpu":
        return table[index]
    return _ROWS.bind(table, jnp.asarray(index))


def _sums(values, index, *, num):
    """Sum the rows of the atoms of each element: (N, ...) -> (num, ...)."""
    one_hot = jax.nn.one_hot(index, num, dtype=values.dtype)
    return jnp.tensordot(one_hot, values, ((0,), (0,)), precision=jax.lax.Precision.HIGHEST)


_ROWS, _SUMS = define_primitive("element_rows", rows), define_primitive("element_sums", _sums)


def _define_derivatives(primitive, transpose):
    """Define derivatives of a primitive that is linear in its first argument."""

    def jvp(primals, tangents, **static):
        values, index = primals
        out = primitive.bind(values, index, **static)
        if is_zero(tangents[0]):
            return out, ad.Zero.from_primal_value(out)
        return out, primitive.bind(tangents[0], index, **static)

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


def _transpose_rows(cotangent, table, index):
    if is_zero(cotangent):
        return None, None
    return _SUMS.bind(cotangent, index, num=table.aval.shape[0]), None


def _transpose_sums(cotangent, values, index, *, num):
    return None if is_zero(cotangent) else _ROWS.bind(cotangent, index), None


_define_derivatives(_ROWS, _transpose_rows)
_define_derivatives(_SUMS, _transpose_sums)

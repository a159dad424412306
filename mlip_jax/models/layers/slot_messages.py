"""PaiNN's messages on neighbor slots: one kernel per sum, and no array of edges times features.

    ds[i]    = sum_k w0[i, k] a[j]                                 j = senders[i, k]
    dv_x[i]  = sum_k w1[i, k] u_x[i, k] b[j] + w2[i, k] v_x[j]     x = 1, 2, 3

The filters w depend linearly on functions of the distance: w[i, k] = basis(d[i, k]) @ table. They are
written as a sum over the basis functions, which the compiler computes inside of the kernel that
needs a filter. An array of filters (N, K, F) would be written and read again from memory.

A filter is the same for both directions of a pair and the unit vector u changes its sign. So the
transpose of the messages is a sum over the same slots (graphs/slot_sums.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from mlip_jax.graphs.graph import SlotGeometry
from mlip_jax.graphs.slot_sums import define_primitive, is_zero, rows, sum_slots, symmetric_sum

# _MAX_TERMS: number of basis functions above which filters are products of matrices.
_MAX_TERMS = 40
# _MANY: number of slots of all atoms from which bytes matter more than the number of kernels.
_MANY = 2**15
# _SCALES: powers of two for the fields of a `Filter`. Factors that cancel without rounding, so that
# the compiler does not recognize the fields as equal.
_SCALES = (1.0, 2.0, 4.0)


class Filter(NamedTuple):
    """A filter, shape (N, K, F), computed in three ways.

    The values are equal up to rounding. With a single array, the compiler would store it for the
    kernels that need it.

    Attributes:
      forward: Filter for the messages.
      backward: Filter for their transpose.
      turning: Filter for their derivative by the unit vectors.
    """

    forward: jax.Array
    backward: jax.Array
    turning: jax.Array


class SlotFilters:
    """Filters basis(d) @ table with derivatives up to the second by the distance d."""

    def __init__(self, basis: Callable[[jax.Array], jax.Array], distances: jax.Array):
        """Evaluate the basis.

        Args:
          basis: Function of distances, (P,) -> (P, B); zero beyond the cutoff.
          distances: Distances of the slots (Å), shape (N, K).

        The attribute `bases` has the values and their first two derivatives, shape (N, K, B) each.
        """
        self._distances = distances
        flat = jax.lax.stop_gradient(distances.ravel())
        values = []
        for order in range(3):
            derivative = _derivative(basis, order)
            values.append(derivative(flat).reshape(*distances.shape, -1))
        # stored: the kernels of the filters would evaluate the basis again for each feature
        self.bases = [jax.lax.optimization_barrier(jax.lax.stop_gradient(x)) for x in values]

    def __call__(self, table: jax.Array) -> Filter:
        """Return the filter of a table (B, F)."""
        return Filter(*_filter(0, self._distances, table, tuple(self.bases)))

    def of_layer(self, tables: list[jax.Array]) -> list[Filter]:
        """Return the filters of several tables of equal shapes.

        For few slots, their derivatives by the distances are summed in one kernel.
        """
        if self._distances.size >= _MANY or len(tables[0]) > _MAX_TERMS:
            return [self(table) for table in tables]
        fields = _filters(0, self._distances, tuple(tables), tuple(self.bases))
        return [Filter(*fields[k : k + 3]) for k in range(0, len(fields), 3)]


def _derivative(function, order):
    """Return the derivative of a function of distances, (P,) -> (P, B)."""
    for _ in range(order):
        function = functools.partial(_tangent, function)
    return function


def _tangent(function, d):
    return jax.jvp(function, (d,), (jnp.ones_like(d),))[1]


def _filter(order: int, distances, table, bases):
    """Return the fields of a `Filter`, or their derivative of an order by the distance."""
    return _filters(order, distances, (table,), bases)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _filters(order: int, distances, tables, bases):
    """Return the fields of several filters, or their derivatives of an order by the distance."""
    basis, fields = bases[order], []
    for table in tables:
        if len(table) > _MAX_TERMS:
            fields += [basis @ table] * 3
        else:
            fields += [_combine(basis, table, scale) for scale in _SCALES]
    return tuple(fields)


@_filters.defjvp
def _filters_jvp(order, primals, tangents):
    distances, tables, bases = primals
    by_distance, by_tables, _ = tangents
    if order + 1 == len(bases):
        raise NotImplementedError(
            f"filters on neighbor slots have {order} derivatives by the distance. Use graphs without "
            "slots for higher ones."
        )
    # products of matrices, whose transpose is one, too, and not many sums
    changes = [change for t in by_tables for change in [bases[order] @ t] * 3]
    slopes = _filters(order + 1, *primals)
    if len(tables) == 1:
        turned = [slope * by_distance[..., None] for slope in slopes]
    else:
        turned = _SCALED.bind(by_distance, *slopes)
    return _filters(order, *primals), tuple(a + b for a, b in zip(turned, changes))


def _scale_arrays(factor, *arrays):
    return [factor[..., None] * array for array in arrays]


# _SCALED: (N, K), several (N, K, F) -> products. The derivative by the factor is one sum.
_SCALED = define_primitive("scaled_arrays", _scale_arrays, several=True)


def _scale_arrays_jvp(primals, tangents):
    out, tangent = _SCALED.bind(*primals), None
    factor, *arrays = tangents
    if not is_zero(factor):
        tangent = _SCALED.bind(factor, *primals[1:])
    if not all(map(is_zero, arrays)):
        part = _SCALED.bind(primals[0], *map(ad.instantiate_zeros, arrays))
        tangent = part if tangent is None else [a + b for a, b in zip(tangent, part)]
    return out, [ad.Zero.from_primal_value(x) for x in out] if tangent is None else tangent


def _scale_arrays_transpose(cotangents, factor, *arrays):
    if ad.is_undefined_primal(factor):
        products = [c * x for c, x in zip(cotangents, arrays) if not is_zero(c)]
        return [sum(products).sum(-1) if products else None, *[None] * len(arrays)]
    return [None, *(None if is_zero(c) else c * factor[..., None] for c in cotangents)]


ad.primitive_jvps[_SCALED], ad.primitive_transposes[_SCALED] = (
    _scale_arrays_jvp,
    _scale_arrays_transpose,
)


def _combine(basis, table, scale):
    """Return basis @ table as a sum that the compiler can compute inside of other kernels."""
    table = table * scale
    if math.prod(basis.shape[:2]) >= _MANY:
        out = functools.reduce(jnp.add, (basis[..., b, None] * table[b] for b in range(len(table))))
    else:  # fewer kernels, which read more
        out = (basis[..., None] * table).sum(-2)
    return out * (1 / scale)


def slot_messages(phi, v, filters: list[Filter], geometry: SlotGeometry):
    """Sum the messages of the neighbors, as painn.messages does for pairs.

    Args:
      phi: Features for messages, shape (N, 3F).
      v: Vectors, shape (N, 3, F), or None for zero.
      filters: Filters of the scalars, of the radial vectors and of the neighbors' vectors.
      geometry: Slots.

    Returns:
      Changes of s, shape (N, F), and of v, shape (N, 3, F).
    """
    to_scalar, to_radial, to_vector = jnp.split(phi, 3, axis=-1)
    x, used = [to_scalar, to_radial], filters[:2]
    if v is not None:
        x, used = [*x, *(to_vector * v[:, k] for k in range(3))], filters
    weights = [w.forward for w in used] + [w.backward for w in used] + [filters[1].turning]
    ds, *dv = _SEND.bind(*x, *weights, geometry.directions, geometry.senders, num=len(x))
    return ds, jnp.stack(dv, axis=1)


def _parts(num, args):
    """Return values, filters of both directions, the turning one, unit vectors and senders."""
    *arrays, turning, units, senders = args
    weights = arrays[num:]
    half = len(weights) // 2
    return arrays[:num], weights[:half], weights[half:], turning, units, senders


def _send(*args, num):
    """Compute the messages to the receivers: a, b and v, or a and b -> ds, dv_1, dv_2, dv_3."""
    x, w, _, _, units, senders = _parts(num, args)
    radial = w[1] * rows(x[1], senders)
    out = [w[0] * rows(x[0], senders)]
    for k in range(3):
        message = radial * units[..., k, None]
        out.append(message if num == 2 else message + w[2] * rows(x[2 + k], senders))
    return sum_slots(out)


def _return(*args, num):
    """Compute the transpose of `_send`; `num` is the number of its arguments x."""
    y, _, w, _, units, senders = _parts(4, args)
    found = [rows(values, senders) for values in y]
    radial = sum(units[..., k, None] * found[1 + k] for k in range(3))
    out = [w[0] * found[0], -(w[1] * radial)]
    if num > 2:
        out += [w[2] * found[1 + k] for k in range(3)]
    return sum_slots(out)


def _send_by_parts(x, w, units, senders):
    """Compute `_send` in terms of sums that are differentiable by filters and unit vectors."""
    out = [symmetric_sum(x[0], w[0], senders)]
    for k in range(3):
        total = symmetric_sum(x[1], w[1] * units[..., k, None], senders, antisymmetric=True)
        if len(x) > 2:
            total += symmetric_sum(x[2 + k], w[2], senders)
        out.append(total)
    return out


def _return_by_parts(y, w, units, senders):
    """Compute `_return` likewise."""
    radial = sum(
        symmetric_sum(y[1 + k], w[1] * units[..., k, None], senders, antisymmetric=True)
        for k in range(3)
    )
    out = [symmetric_sum(y[0], w[0], senders), -radial]
    if len(w) > 2:
        out += [symmetric_sum(y[1 + k], w[2], senders) for k in range(3)]
    return out


_SEND = define_primitive("send_in_slots", _send, several=True)
_RETURN = define_primitive("return_in_slots", _return, several=True)


def _define_derivatives(primitive, transposed, by_parts, num_values, choose):
    """Define the differentiation and the transpose of `_SEND` or `_RETURN`.

    Args:
      primitive: Primitive.
      transposed: Primitive that is its transpose in the values of the atoms.
      by_parts: Function that computes it in terms of `symmetric_sum`.
      num_values: Function from `num` to the number of these values.
      choose: Index of the form of the filters that it reads.
    """

    def jvp(primals, tangents, num):
        count = num_values(num)
        x, *weights, turning, units, senders = _parts(count, primals)
        dx, *changes, _, turn, _ = _parts(count, tangents)
        dw, parts = changes[choose], []
        if not all(map(is_zero, dx)):
            filled = map(ad.instantiate_zeros, dx)
            parts.append(primitive.bind(*filled, *primals[count:], num=num))
        if not all(map(is_zero, dw)):
            parts.append(by_parts(x, [ad.instantiate_zeros(t) for t in dw], units, senders))
        if not is_zero(turn):
            # only w1 multiplies the unit vectors
            zeros = [jnp.zeros_like(w) for w in weights[0]]
            parts.append(by_parts(x, [zeros[0], turning, *zeros[2:]], turn, senders))
        out = primitive.bind(*primals, num=num)
        if not parts:
            return out, [ad.Zero.from_primal_value(o) for o in out]
        return out, [functools.reduce(jnp.add, values) for values in zip(*parts)]

    def transpose(cotangents, *args, num):
        count = num_values(num)
        filled = map(ad.instantiate_zeros, cotangents)
        found = transposed.bind(*filled, *args[count:], num=num)
        return [*found, *[None] * (len(args) - count)]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


_define_derivatives(_SEND, _RETURN, _send_by_parts, lambda num: num, 0)
_define_derivatives(_RETURN, _SEND, _return_by_parts, lambda num: 4, 1)

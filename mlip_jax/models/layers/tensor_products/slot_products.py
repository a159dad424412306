"""The products of chunks.py on neighbor slots: no scatter operation and no array of messages.

All edges are in slots, N atoms times K slots, in the order of `NeighborSlots.slot_senders`. A sum
over the neighbors of an atom is a sum over its slots, which the compiler computes in the kernel of the
products. The sum over the receivers of an atom's messages is one over its neighbors, too: slot s of
an atom has its reverse edge in slot reverse[s], where the harmonics and weights of the message are.

With Q of chunks.py, the derivatives with respect to g, x, Y and w are four functions of the other
three arguments. `forward`, `backward` and `second` consist of them. Shapes are those of chunks.py
with P = N K.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mlip_jax.graphs.slot_sums import SlotIndex, rows, sum_slots
from mlip_jax.models.layers.tensor_products.chunks import PathGroup, Spec, contract, couple


def forward(spec: Spec, x, y, w, index: SlotIndex):
    """Compute the convolution, an array (N, c, U) per group and path."""
    return [
        _by_g(index, x[k], couple(spec, group, y), _mask_empty(w[k], index))
        for k, group in enumerate(spec.groups)
    ]


def backward(spec: Spec, wanted, g, x, y, w, index: SlotIndex):
    """Compute the derivatives with respect to x, y and w, None for those that are not wanted.

    Args:
      spec: Structure of the convolution.
      wanted: Whether to compute the derivative with respect to x, y and w.
      g: Derivatives of the loss with respect to the convolution.
      x, y, w: Arguments of `forward`.
      index: Senders of the slots.
    """
    need_x, need_y, need_w = wanted
    dx, dy, dw = [], None, []
    for k, group in enumerate(spec.groups):
        weights = _mask_empty(w[k], index)
        if need_x:
            dx.append(_by_x(index, spec, group, g[k], y, weights))
        if need_y:
            dy = _sum(dy, _by_y(index, spec, group, g[k], x[k], weights))
        if need_w:
            dw.append(_by_w(index, g[k], x[k], couple(spec, group, y)))
    return dx if need_x else None, dy, dw if need_w else None


def second(spec: Spec, wanted, cotangents, g, x, y, w, index: SlotIndex):
    """Compute the derivatives of <cotangents, backward> with respect to g, x, y and w.

    This is the derivative of Q(g, cx, Y, w) + Q(g, x, cY, w) + Q(g, x, Y, cw).

    Args:
      spec: Structure of the convolution.
      wanted: Whether to compute the derivative with respect to g, x, y and w.
      cotangents: Cotangents of the outputs of `backward`, None for zero.
      g, x, y, w: Arguments of `backward`.
      index: Senders of the slots.
    """
    need_g, need_x, need_y, need_w = wanted
    cx, cy, cw = cotangents
    dg, dx, dy, dw = [], [], None, []
    for k, group in enumerate(spec.groups):
        weights = _mask_empty(w[k], index)
        c_weights = None if cw is None else _mask_empty(cw[k], index)
        c_x = None if cx is None else cx[k]
        m = couple(spec, group, y)
        c_m = None if cy is None else couple(spec, group, cy)
        if need_g:
            terms = ((c_x, m, weights), (x[k], c_m, weights), (x[k], m, c_weights))
            dg.append(_total(functools.partial(_by_g, index), terms))
        if need_x:
            terms = ((cy, weights), (y, c_weights))
            dx.append(_total(functools.partial(_by_x, index, spec, group, g[k]), terms))
        if need_y:
            terms = ((c_x, weights), (x[k], c_weights))
            found = _total(functools.partial(_by_y, index, spec, group, g[k]), terms)
            dy = _sum(dy, found)
        if need_w:
            terms = ((c_x, m), (x[k], c_m))
            dw.append(_total(functools.partial(_by_w, index, g[k]), terms))
    found = zip(wanted, (dg, dx, dy, dw), (g, x, y, w))
    return tuple(_or_zeros(values, like) if need else None for need, values, like in found)


def _or_zeros(values, like):
    """Replace None, the sum of no terms, by zeros."""
    if values is None:
        return jnp.zeros_like(like)
    if not isinstance(values, list):
        return values
    return [jax.tree.map(jnp.zeros_like, b) if a is None else a for a, b in zip(values, like)]


def _by_g(index, x, m, w):
    """Differentiate by g: (N, a, U), (P, c, a) and (P, U) each -> (N, c, U) each."""
    messages = [
        weight[:, None] * values for weight, values in zip(w, _apply(m, rows(x, index.atoms)))
    ]
    return [_over_slots(values, index) for values in messages]


def _by_x(index, spec: Spec, group: PathGroup, g, y, w):
    """Differentiate by x: sum the messages of an atom over its receivers, (N, a, U)."""
    back = index.rows.ravel()
    m = couple(spec, group, rows(y, back))
    values = [
        rows(weight, back)[:, None] * rows(gradient, index.atoms) for weight, gradient in zip(w, g)
    ]
    terms = (
        matrix[:, c, :, None] * value[:, c, None]
        for matrix, value in zip(m, values)
        for c in range(value.shape[1])
    )
    return _over_slots(functools.reduce(jnp.add, terms), index)


def _by_y(index, spec: Spec, group: PathGroup, g, x, w):
    """Differentiate by the harmonics, (P, B)."""
    x = rows(x, index.atoms)
    outer = [
        ((weight[:, None] * gradient)[:, :, None] * x[:, None]).sum(-1)
        for weight, gradient in zip(w, _of_receivers(g, index))
    ]
    return contract(spec, group, jnp.concatenate(outer, axis=1))


def _by_w(index, g, x, m):
    """Differentiate by the weights, (P, U) each."""
    coupled = _apply(m, rows(x, index.atoms))
    products = [(a * b).sum(1) for a, b in zip(_of_receivers(g, index), coupled)]
    return _mask_empty(products, index)


def _apply(m, x):
    """Multiply by the matrix of each path: (P, c, a) each, (P, a, U) -> (P, c, U) each."""
    return [
        functools.reduce(jnp.add, (n[:, :, a, None] * x[:, None, a] for a in range(x.shape[1])))
        for n in m
    ]


def _mask_empty(w, index):
    """Set the rows of empty slots to zero."""
    used = index.used.reshape(-1, 1)
    return [jnp.where(used, weight, jnp.zeros((), weight.dtype)) for weight in w]


def _of_receivers(g, index):
    """Return the rows of the receiver of each slot: (N, c, U) -> (P, c, U) each."""
    num, slots = index.rows.shape
    return [
        jnp.broadcast_to(v[:, None], (num, slots, *v.shape[1:])).reshape(-1, *v.shape[1:])
        for v in g
    ]


def _over_slots(values, index):
    """Sum the rows of the slots of each atom: (P, ...) -> (N, ...)."""
    return sum_slots([values.reshape(*index.rows.shape, *values.shape[1:])])[0]


def _total(function, terms):
    """Add the values of a function; terms with None are zero. Return None without terms."""
    values = [function(*term) for term in terms if all(t is not None for t in term)]
    return functools.reduce(_sum, values, None)


def _sum(a, b):
    """Add arrays or lists of them; None is zero."""
    return b if a is None else a if b is None else jax.tree.map(jnp.add, a, b)

"""Products of features, harmonics and weights on blocks of edges, with their derivatives.

The convolution is linear in each of its arguments, and so are its derivatives:

    Q(g, x, Y, w) = sum over edges and paths of w[u] g_i[c, u] sum_ab C_abc x_j[a, u] Y_b

`forward` is dQ/dg, the convolution. `backward` returns dQ/dx, dQ/dY and dQ/dw, the derivatives of a
loss with the gradient g. `second` returns the derivatives of `backward`. Each of them loops over
blocks of edges and recomputes what it needs, so nothing of the size of all edges times components
times channels is stored, and on a CPU a block stays in the cache.

Shapes: x[k] (N, a, U) per group k; w[k][p] (P, U) and g[k][p] (N, c, U) per path p of a group;
Y (P, B) of all degrees; senders and receivers (P,). If P exceeds the size of a block, it is a
multiple of it. q counts the components c of all paths of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.models.layers.basic import gather
from mlip_jax.models.layers.tensor_products.couplings import coupling

_EXACT = jax.lax.Precision.HIGHEST  # no rounding to TF32 or bfloat16


class PathGroup(NamedTuple):
    """Paths from one input array.

    Attributes:
      degree: Degree of the input.
      paths: Degrees of the harmonics and of the output of each path.
    """

    degree: int
    paths: tuple[tuple[int, int], ...]


class Spec(NamedTuple):
    """Structure of a convolution.

    Attributes:
      groups: Groups of paths.
      undirected: Whether each edge sends messages both ways.
      old_signs: Take the couplings of e3nn 0.4.4.
      block: Number of edges of a block.
      compact: Whether to multiply by matrices with one operation for all paths. This compiles in
        less time, and runs up to twice as long.
      stored: Whether to store the factors of sums over paths, and to write out the sums. This is
        faster on a CPU.
    """

    groups: tuple[PathGroup, ...]
    undirected: bool
    old_signs: bool
    block: int
    compact: bool = False
    stored: bool = False


def forward(spec: Spec, x, y, w, senders, receivers):
    """Compute the convolution, an array (N, c, U) per group and path."""

    def block(total, part):
        y, w, senders, receivers = part
        matrices = [couple(spec, group, y) for group in spec.groups]

        def direction(total, way):
            for k, group in enumerate(spec.groups):
                coupled = _apply(spec, matrices[k], gather(x[k], way.source))
                for p, (degree, _) in enumerate(group.paths):
                    messages = _wide(way.signs[degree] * w[k][p]) * coupled[p]
                    total[k][p] = _add(total[k][p], way.target, messages)
            return total

        return _both_ways(spec, direction, total, senders, receivers), None

    num = len(x[0])
    total = [
        [jnp.zeros((num, 2 * c + 1, x[k].shape[-1]), x[k].dtype) for _, c in group.paths]
        for k, group in enumerate(spec.groups)
    ]
    return _scan(spec, block, total, (y, w, senders, receivers))[0]


def backward(spec: Spec, wanted, g, x, y, w, senders, receivers):
    """Compute the derivatives with respect to x, y and w, None for those that are not wanted.

    Args:
      wanted: Whether to compute the derivative with respect to x, y and w.
    """
    need_x, need_y, need_w = wanted

    def block(dx, part):
        y, w, senders, receivers = part
        matrices = [couple(spec, group, y) for group in spec.groups]

        def direction(carry, way):
            dx, dy, dw = carry
            for k, group in enumerate(spec.groups):
                x_source = gather(x[k], way.source)
                g_target = [
                    way.signs[degree] * gather(values, way.target)
                    for (degree, _), values in zip(group.paths, g[k])
                ]
                if need_w:
                    _accumulate(dw[k], g_target, _apply(spec, matrices[k], x_source))
                weighted = [_wide(weight) * values for weight, values in zip(w[k], g_target)]
                by_x, outer = _derivatives(
                    spec,
                    way,
                    matrices[k] if need_x else None,
                    weighted,
                    x_source if need_y else None,
                )
                if need_x:
                    dx[k] = _add(dx[k], way.source, by_x)
                if need_y:
                    dy += contract(spec, group, outer)
            return dx, dy, dw

        dy = jnp.zeros_like(y) if need_y else None
        dw = jax.tree.map(jnp.zeros_like, w) if need_w else None
        dx, dy, dw = _both_ways(spec, direction, (dx, dy, dw), senders, receivers)
        return dx, (dy, dw)

    dx = [jnp.zeros_like(values) for values in x] if need_x else None
    dx, (dy, dw) = _scan(spec, block, dx, (y, w, senders, receivers))
    return dx, dy, dw


def second(spec: Spec, wanted, cotangents, g, x, y, w, senders, receivers):
    """Compute the derivatives of <cotangents, backward> with respect to g, x, y and w.

    Args:
      wanted: Whether to compute the derivative with respect to g, x, y and w.
      cotangents: Cotangents of the outputs of `backward`, None for zero.
    """
    need_g, need_x, need_y, need_w = wanted
    cx, cy, cw = cotangents

    def block(carry, part):
        y, w, cy, cw, senders, receivers = part
        matrices = [couple(spec, group, y) for group in spec.groups]
        changes = None if cy is None else [couple(spec, group, cy) for group in spec.groups]

        def direction(carry, way):
            dg, dx, dy, dw = carry
            for k, group in enumerate(spec.groups):
                x_source, signs = gather(x[k], way.source), [way.signs[l] for l, _ in group.paths]
                g_target = [s * gather(values, way.target) for s, values in zip(signs, g[k])]
                cx_source = None if cx is None else gather(cx[k], way.source)
                weighted = [_wide(weight) * values for weight, values in zip(w[k], g_target)]
                changed = (
                    None
                    if cw is None
                    else [_wide(c) * values for c, values in zip(cw[k], g_target)]
                )
                varied = _sum(
                    None if cx is None else _apply(spec, matrices[k], cx_source),
                    None if cy is None else _apply(spec, changes[k], x_source),
                )
                if need_g:
                    plain = None if cw is None else _apply(spec, matrices[k], x_source)
                    for p, s in enumerate(signs):
                        terms = (
                            None if varied is None else (s * w[k][p], varied[p]),
                            None if cw is None else (s * cw[k][p], plain[p]),
                        )
                        dg[k][p] = _add(dg[k][p], way.target, _combine(*terms))
                if need_w and varied is not None:
                    _accumulate(dw[k], g_target, varied)
                of_changes = None if cy is None else changes[k]
                for values, matrix, factor in (
                    (weighted, of_changes, cx_source),
                    (changed, matrices[k], x_source),
                ):
                    matrix, factor = matrix if need_x else None, factor if need_y else None
                    if values is None or (matrix is None and factor is None):
                        continue
                    by_x, outer = _derivatives(spec, way, matrix, values, factor)
                    if by_x is not None:
                        dx[k] = _add(dx[k], way.source, by_x)
                    if outer is not None:
                        dy += contract(spec, group, outer)
            return dg, dx, dy, dw

        dy = jnp.zeros_like(y) if need_y else None
        dw = jax.tree.map(jnp.zeros_like, w) if need_w else None
        *carry, dy, dw = _both_ways(spec, direction, (*carry, dy, dw), senders, receivers)
        return tuple(carry), (dy, dw)

    dg = jax.tree.map(jnp.zeros_like, g) if need_g else None
    dx = jax.tree.map(jnp.zeros_like, x) if need_x else None
    (dg, dx), (dy, dw) = _scan(spec, block, (dg, dx), (y, w, cy, cw, senders, receivers))
    return dg, dx, dy, dw


def _scan(spec, block, carry, parts):
    """Loop over blocks of edges; the results of blocks are joined."""
    num = len(parts[-1])
    if num <= spec.block:
        return block(carry, parts)
    split = jax.tree.map(lambda a: a.reshape(num // spec.block, spec.block, *a.shape[1:]), parts)
    carry, results = jax.lax.scan(block, carry, split)
    return carry, jax.tree.map(lambda a: a.reshape(num, *a.shape[2:]), results)


class _Way(NamedTuple):
    """Messages of a block of edges in one direction.

    Attributes:
      signs: Factors of the harmonics of each degree, those of the opposite vector or ones.
      source: Senders of the messages.
      target: Receivers of the messages.
    """

    signs: jax.Array
    source: jax.Array
    target: jax.Array


def _both_ways(spec, direction, carry, senders, receivers):
    """Call `direction` for the messages of each edge, one way or both; return the last carry."""
    degrees = np.arange(max(degree for group in spec.groups for degree, _ in group.paths) + 1)
    dtype = jax.tree.leaves(carry)[0].dtype
    there = _Way(np.ones(len(degrees), dtype), senders, receivers)
    if not spec.undirected:
        return direction(carry, there)
    # the opposite vector has the opposite odd harmonics; a loop compiles in half of the time
    back = _Way((-1.0) ** degrees, receivers, senders)
    ways = _Way(
        *(jnp.stack([jnp.asarray(a), jnp.asarray(b, a.dtype)]) for a, b in zip(there, back))
    )
    return jax.lax.scan(lambda c, way: (direction(c, way), None), carry, ways)[0]


def _tables(spec, group):
    """Return the couplings of each path, shape (B, c * a)."""
    size = max(degree for other in spec.groups for degree, _ in other.paths) + 1
    tables = []
    for degree, target in group.paths:
        values = coupling(group.degree, degree, target, spec.old_signs).transpose(1, 2, 0)
        table = np.zeros((size**2, *values.shape[1:]))
        table[degree**2 : (degree + 1) ** 2] = values
        tables.append(table.reshape(size**2, -1))
    return tables


def couple(spec, group, y):
    """Couple the harmonics: (P, B) -> matrices (P, c, a) of each path."""
    tables = _tables(spec, group)
    joined = _multiply(y, np.concatenate(tables, axis=1))
    ends = np.cumsum([table.shape[1] for table in tables])
    return [
        joined[:, end - table.shape[1] : end].reshape(len(y), 2 * target + 1, -1)
        for end, table, (_, target) in zip(ends, tables, group.paths)
    ]


def contract(spec, group, outer):
    """Contract derivatives with respect to the matrices of all paths: (P, q, a) -> (P, B)."""
    return _multiply(outer.reshape(len(outer), -1), np.concatenate(_tables(spec, group), axis=1).T)


def _multiply(a, table):
    return jnp.dot(a, jnp.asarray(table, a.dtype), precision=_EXACT)


def _apply(spec, matrices, x):
    """Multiply by the matrix of each path: (P, c, a) each, (P, a, U) -> (P, c, U) each."""
    if spec.compact:
        joined = jnp.einsum("pqa,pau->pqu", jnp.concatenate(matrices, axis=1), x, precision=_EXACT)
        return jnp.split(joined, np.cumsum([m.shape[1] for m in matrices])[:-1], axis=1)
    return [sum(m[:, :, a, None] * x[:, None, a] for a in range(x.shape[1])) for m in matrices]


def _derivatives(spec, way, matrices, values, x):
    """Compute the derivatives of <values, matrices @ x> with respect to x and to the matrices.

    Args:
      spec: Structure of the convolution.
      way: Messages.
      matrices: Matrix of each path, shape (P, c, a); None if its derivative is not wanted.
      values: Values of each path, shape (P, c, U).
      x: Factors, shape (P, a, U); None if the derivative is not wanted.

    Returns:
      Sums over the paths and c, shape (P, a, U), and over the channels, shape (P, q, a); or None.
    """

    def compute(matrices, values, x):
        joined = jnp.concatenate(values, axis=1)
        by_x = None if matrices is None else _apply_transposed(spec, matrices, values)
        outer = None if x is None else jnp.einsum("pqu,pau->pqa", joined, x, precision=_EXACT)
        return by_x, outer

    if not spec.stored or spec.compact:
        return compute(matrices, values, x)
    # The condition always holds. The arguments of a branch are stored; without it, XLA would
    # repeat gathers and products with weights for each term of a sum.
    shapes = jax.eval_shape(compute, matrices, values, x)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.cond(way.source[0] >= 0, compute, lambda *_: zeros, matrices, values, x)


def _apply_transposed(spec, matrices, values):
    """Multiply by the transposed matrices and sum: (P, c, a) each, (P, c, U) each -> (P, a, U)."""
    if spec.stored and not spec.compact:
        return sum(
            m[:, c, :, None] * v[:, c, None]
            for m, v in zip(matrices, values)
            for c in range(v.shape[1])
        )
    joined = jnp.concatenate(matrices, axis=1), jnp.concatenate(values, axis=1)
    return jnp.einsum("pqa,pqu->pau", *joined, precision=_EXACT)


def _accumulate(total, a, b):
    """Add sums of products over the components: (P, c, U) each -> (P, U) each."""
    for p, (left, right) in enumerate(zip(a, b)):
        total[p] += sum(left[:, c] * right[:, c] for c in range(left.shape[1]))


def _wide(weight):
    """(P, U) -> (P, 1, U)"""
    return weight[:, None]


def _combine(*terms):
    """Sum products of weights (P, U) and values (P, c, U), None for zero."""
    products = [_wide(weight) * values for weight, values in filter(None, terms)]
    return sum(products[1:], products[0]) if products else None


def _sum(a, b):
    """Add lists of arrays, None for zero."""
    return b if a is None else a if b is None else [x + y for x, y in zip(a, b)]


def _add(total, index, values):
    """Add rows to `total`; None is zero."""
    return total if values is None else total.at[index].add(values, mode="promise_in_bounds")

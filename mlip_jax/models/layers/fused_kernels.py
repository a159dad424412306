"""Pallas kernels of PaiNN's messages on neighbor slots: filters, gather, product and sum in one.

    N   atoms      K   slots per atom      B   basis functions      F   features

All kernels are derivatives of one form, which is linear in x, y, T and C:

    sum_ik  C_0 (h T_0) a[j] s[i] + sum_d [C_d (h T_1) b[j] + C_4 (h T_2) c_d[j]] v_d[i]

    x = (a, b, c_1, c_2, c_3)  values of the senders j, shape (N, 5F); (a, b) without vectors
    y = (s, v_1, v_2, v_3)     dual values of the receivers i, shape (N, 4F)
    T = (T_0, T_1, T_2)        tables of the filters, shape (B, 3F); (B, 2F) without vectors
    C = (C_0, ..., C_4)        coefficients of the slots, shape (5, N, K)
    h                          values of the basis functions, shape (N, K, B)

`send` is the derivative by y, `back` that by x, `edge` that by C and `table` that by T. There may be
several pairs (C, h), whose forms are added: derivatives by the distance need those of the basis.
No array of slots times features is stored, and the order of every sum is fixed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# _SLOTS: slots of an atom that are processed at once.
_SLOTS = 8
# _ATOMS: atoms of a program, so that its matrix products have 32 rows.
_ATOMS = 4
# _ROWS: slots that are processed at once.
_ROWS = _ATOMS * _SLOTS
# _PROGRAMS: largest number of programs of `table`; each stores sums over its atoms.
_PROGRAMS = 264
_FACES = ("send", "back", "edge", "table")


class FormSizes(NamedTuple):
    """FormSizes of the arrays of a form, and how to evaluate it.

    Attributes:
      atoms, slots, basis, features: N, K, B, F.
      vectors: Whether x and T have the parts that multiply vectors.
      exact: Whether matrix products are in float32; False allows TF32.
      interpret: Whether kernels are interpreted, for tests on a CPU.
    """

    atoms: int
    slots: int
    basis: int
    features: int
    vectors: bool
    exact: bool
    interpret: bool

    @property
    def padded_basis(self) -> int:
        """Number of basis functions in a matrix product."""
        return max(16, pl.next_power_of_2(self.basis))

    @property
    def blocks(self) -> int:
        """Number of blocks of atoms."""
        return pl.cdiv(self.atoms, _ATOMS)


def evaluate(face: str, sizes: FormSizes, arrays: dict, bases, senders):
    """Evaluate a derivative of the form.

    Args:
      face: "send", "back", "edge" or "table".
      sizes: FormSizes of the arrays.
      arrays: "x", "y", "tables" and "coefficients" except the one that `face` differentiates by.
        Coefficients are a list, one for each of the bases.
      bases: Arrays h.
      senders: Neighbors j, shape (N, K), int32.

    Returns:
      List with y, x or T, or of C for each of the bases.
    """
    num, slots = sizes.atoms, sizes.slots
    names = [name for name in ("x", "y", "tables") if name in arrays]
    coefficients = [c.reshape(5, num * slots) for c in arrays.get("coefficients", [])]
    flat = [h.reshape(num * slots, sizes.basis) for h in bases]
    inputs = [*(arrays[name] for name in names), *coefficients, *flat, senders.ravel()]
    dtype, features, parts = inputs[0].dtype, sizes.features, 2 + sizes.vectors
    grid = min(sizes.blocks, _PROGRAMS) if face == "table" else sizes.blocks
    shapes = {
        "send": [(num, 4 * features)],
        "back": [(num, (5 if sizes.vectors else 2) * features)],
        "edge": [(5, num * slots)] * len(bases),
        "table": [(grid, parts, sizes.padded_basis, features)],
    }[face]

    def kernel(*refs):
        read = dict(zip(names, refs))
        rest = list(refs[len(names) : len(inputs) - 1])
        read["coefficients"], read["bases"] = rest[: len(coefficients)], rest[len(coefficients) :]
        read["senders"] = refs[len(inputs) - 1]
        _KERNELS[face](sizes, read, refs[len(inputs) :], grid)

    out = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape in shapes],
        grid=(grid,),
        interpret=sizes.interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name=f"slots_{face}",
    )(*inputs)
    if face == "table":
        total = out[0].sum(0)[:, : sizes.basis]  # (parts, B, F)
        return [jnp.moveaxis(total, 0, 1).reshape(sizes.basis, parts * features)]
    return [x.reshape(5, num, slots) for x in out] if face == "edge" else list(out)


class _Tile:
    """Rows of a block of atoms with some of their slots, in a kernel."""

    def __init__(self, sizes: FormSizes, read: dict, block, part):
        self.sizes, self.read = sizes, read
        row = jax.lax.iota(jnp.int32, _ROWS)
        atom = block * _ATOMS + jax.lax.div(row, jnp.int32(_SLOTS))
        slot = part * _SLOTS + jax.lax.rem(row, jnp.int32(_SLOTS))
        self.valid = (atom < sizes.atoms) & (slot < sizes.slots)
        self.atom = jnp.where(self.valid, atom, 0)
        self.row = jnp.where(self.valid, atom * sizes.slots + slot, 0)
        self.sender = triton.load(read["senders"].at[self.row])
        self.bases = [self._basis(h) for h in read["bases"]]
        self.coefficients = [
            [triton.load(c.at[q, self.row], mask=self.valid, other=0.0)[:, None] for q in range(5)]
            for c in read["coefficients"]
        ]

    def _basis(self, ref):
        shape = (_ROWS, self.sizes.padded_basis)
        column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        row = jnp.broadcast_to(self.row[:, None], shape)
        mask = jnp.broadcast_to(self.valid[:, None], shape) & (column < self.sizes.basis)
        return triton.load(ref.at[row, column], mask=mask, other=0.0)

    def weighted(self, q: int):
        """Return the sum of coefficient q times the basis, (rows, B)."""
        return functools.reduce(jnp.add, [c[q] * h for c, h in zip(self.coefficients, self.bases)])

    def filters(self, tables: list):
        """Return the filters with their coefficients: for C_0, [C_1, C_2, C_3] and C_4 (or None)."""
        dot = functools.partial(_dot, self.sizes)
        if len(self.bases) == 1:
            radial = dot(self.bases[0], tables[1])
            along = [self.coefficients[0][q] * radial for q in (1, 2, 3)]
        else:
            along = [dot(self.weighted(q), tables[1]) for q in (1, 2, 3)]
        vector = dot(self.weighted(4), tables[2]) if self.sizes.vectors else None
        return dot(self.weighted(0), tables[0]), along, vector

    def sent(self, name: str, part: int):
        """Return a part of "x" or "y" of the senders, (rows, F)."""
        return _rows(self.sizes, self.read[name], self.sender, part, self.valid)

    def own(self, name: str, part: int):
        """Return a part of "x" or "y" of the atoms of the slots, (rows, F)."""
        return _rows(self.sizes, self.read[name], self.atom, part, self.valid)


def _dot(sizes, a, b):
    if sizes.interpret:
        return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
    presets = jax.lax.DotAlgorithmPreset
    # three products in TF32 have the accuracy of float32
    preset = presets.TF32_TF32_F32_X3 if sizes.exact else presets.TF32_TF32_F32
    return jax.lax.dot(a, b, precision=preset, preferred_element_type=a.dtype)


def _rows(sizes, ref, index, part, valid):
    """Load a part of rows of an array, (len(index), F); zero if not valid.

    Zero coefficients are not enough: a molecule with NaN would change the others of its batch.
    """
    shape = (index.shape[0], sizes.features)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + part * sizes.features
    row, mask = (jnp.broadcast_to(values[:, None], shape) for values in (index, valid))
    return triton.load(ref.at[row, column], mask=mask, other=0.0)


def _load_tables(sizes, ref):
    """Load the tables, padded with zeros, (B, F) each."""
    shape = (sizes.padded_basis, sizes.features)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    mask = row < sizes.basis
    row = jnp.where(mask, row, 0)
    return [
        triton.load(ref.at[row, column + n * sizes.features], mask=mask, other=0.0)
        for n in range(2 + sizes.vectors)
    ]


def _sum_slots(x):
    """Sum over the slots of each atom: (rows, F) -> (atoms, F)."""
    return x.reshape(_ATOMS, _SLOTS, x.shape[-1]).sum(1)


def _loop(count, body, start):
    """Loop with an index that is int32 also if JAX's x64 mode is on."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, start)


def _over_slots(sizes, read, products, out):
    """Store the sums over slots of `products(tile, tables)`, a list of arrays (rows, F)."""
    block, tables = pl.program_id(0), _load_tables(sizes, read["tables"])

    def add(part, sums):
        found = products(_Tile(sizes, read, block, part), tables)
        return tuple(total + _sum_slots(x) for total, x in zip(sums, found, strict=True))

    count = out.shape[1] // sizes.features
    zero = jnp.zeros((_ATOMS, sizes.features), out.dtype)
    sums = _loop(pl.cdiv(sizes.slots, _SLOTS), add, (zero,) * count)
    shape = (_ATOMS, sizes.features)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    row = row + block * _ATOMS
    for n, total in enumerate(sums):
        place = out.at[row, column + n * sizes.features]
        triton.store(place, total, mask=row < sizes.atoms)


def _send(sizes, read, outs, grid):
    def products(tile, tables):
        scalar, along, vector = tile.filters(tables)
        out, radial = [scalar * tile.sent("x", 0)], tile.sent("x", 1)
        for d in range(3):
            message = along[d] * radial
            out.append(message + vector * tile.sent("x", 2 + d) if sizes.vectors else message)
        return out

    _over_slots(sizes, read, products, outs[0])


def _back(sizes, read, outs, grid):
    # the reverse of a slot has the same filter, and a direction of the opposite sign
    def products(tile, tables):
        scalar, along, vector = tile.filters(tables)
        y = [tile.sent("y", n) for n in range(4)]
        radial = along[0] * y[1] + along[1] * y[2] + along[2] * y[3]
        out = [scalar * y[0], -radial]
        return [*out, *(vector * y[1 + d] for d in range(3))] if sizes.vectors else out

    _over_slots(sizes, read, products, outs[0])


def _pairs(tile):
    """Return products of x and y: a s, [b v_1, b v_2, b v_3], sum_d c_d v_d (or None)."""
    y, radial = [tile.own("y", n) for n in range(4)], tile.sent("x", 1)
    vector = None
    if tile.sizes.vectors:
        vector = sum(tile.sent("x", 2 + d) * y[1 + d] for d in range(3))
    return tile.sent("x", 0) * y[0], [radial * y[1 + d] for d in range(3)], vector


def _edge(sizes, read, outs, grid):
    block, tables = pl.program_id(0), _load_tables(sizes, read["tables"])
    transposed = [table.T for table in tables]

    def store(part, nothing):
        tile = _Tile(sizes, read, block, part)
        scalar, along, vector = _pairs(tile)
        products = [_dot(sizes, scalar, transposed[0])]
        products += [_dot(sizes, x, transposed[1]) for x in along]
        if sizes.vectors:
            products.append(_dot(sizes, vector, transposed[2]))
        for h, out in zip(tile.bases, outs, strict=True):
            sums = [(h * x).sum(1) for x in products]
            for q in range(5):
                value = sums[q] if q < len(sums) else jnp.zeros_like(sums[0])
                triton.store(out.at[q, tile.row], value, mask=tile.valid)
        return nothing

    _loop(pl.cdiv(sizes.slots, _SLOTS), store, ())


def _table(sizes, read, outs, grid):
    parts = pl.cdiv(sizes.slots, _SLOTS)
    program, rounds = pl.program_id(0), pl.cdiv(sizes.blocks, grid)

    def add(step, sums):
        # blocks beyond the last have no valid row
        block = program + grid * jax.lax.div(step, jnp.int32(parts))
        tile = _Tile(sizes, read, block, jax.lax.rem(step, jnp.int32(parts)))
        scalar, along, vector = _pairs(tile)
        found = [_dot(sizes, tile.weighted(0).T, scalar)]
        if len(tile.bases) == 1:
            c = tile.coefficients[0]
            radial = sum(c[1 + d] * along[d] for d in range(3))
            found.append(_dot(sizes, tile.bases[0].T, radial))
        else:
            found.append(sum(_dot(sizes, tile.weighted(1 + d).T, along[d]) for d in range(3)))
        if sizes.vectors:
            found.append(_dot(sizes, tile.weighted(4).T, vector))
        return tuple(total + x for total, x in zip(sums, found, strict=True))

    shape = (sizes.padded_basis, sizes.features)
    zeros = (jnp.zeros(shape, outs[0].dtype),) * (2 + sizes.vectors)
    sums = _loop(rounds * parts, add, zeros)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    for n, total in enumerate(sums):
        triton.store(outs[0].at[program, n, row, column], total)


_KERNELS = dict(zip(_FACES, (_send, _back, _edge, _table)))

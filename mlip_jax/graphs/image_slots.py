"""Padded graphs of periodic structures in slots, with all images of the atoms within the cutoffs.

    M   number of slots            n   atoms per slot           K   images per slot

Cells may be smaller than the cutoff and may change between two evaluations. Each pair of atoms
is taken at its nearest image; the images around it are numbered by K, as many as the cutoffs
reach across the lattice planes of the slot. A slot that needs more images than the budget has
does not take part, so no neighbor is ever omitted.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.slots import (
    Box,
    SlotBatch,
    Slots,
    append_zero,
    heights,
    slot_nodes,
    true_indices,
    with_rest,
)

# MAX_IMAGES: a cell that needs more images has collapsed or is extremely skewed. Primitive cells of
# metals need 36,000 within the cutoff of D3 (31.75 Å).
MAX_IMAGES = 64_000
# _MARGIN: fraction of a lattice vector by which rounding can change the nearest image.
_MARGIN = 1e-3


class ImageBudget(NamedTuple):
    """Static shape of a graph of periodic slots.

    Attributes:
      n_node, n_edge, n_graph, n_pair: See `PaddingBudget`.
      n_image: Number of images per slot (K).
    """

    n_node: int
    n_edge: int
    n_graph: int
    n_pair: int
    n_image: int


def count_images(cell: np.ndarray, periodic: np.ndarray, reach: float) -> int:
    """Return the number of images that `build_with_images` needs for a cell, on the host.

    Args:
      cell: Lattice vectors as rows (Å), shape (3, 3).
      periodic: Whether each direction is periodic, shape (3,).
      reach: Longest cutoff (Å).
    """
    shells = np.floor(reach / heights(cell, periodic) + 0.5 + _MARGIN)
    return int(min(np.prod(2 * shells + 1), 2.0**30))


def build_with_images(
    slots: Slots,
    positions: jax.Array,
    box: Box,
    budget: ImageBudget,
    cutoff: float,
    long_range_cutoff: float | None = None,
) -> tuple[SlotBatch, jax.Array]:
    """Build the padded graph of the slots, with all pairs and images closer than the cutoffs.

    The function is pure; call it under jit.

    Args:
      slots: Atoms in the cells.
      positions: Positions (Å), shape (M, n, 3).
      box: Cells. Unlike in `slots.build`, they may be small.
      budget: Static shape of the graph: more than n atoms and an even number of edges.
      cutoff: Cutoff radius (Å).
      long_range_cutoff: Cutoff of long-range pairs (Å), finite; None for no list of them.

    Returns:
      The batch, and the number of images that each slot needs, shape (M,), float. A slot that
      needs more than `budget.n_image` does not take part.
    """
    images = _images(box, budget.n_image, max(cutoff, long_range_cutoff or 0.0))
    squared, translations = _squared_distances(slots, positions, box, images)
    close = squared < cutoff * cutoff  # (M, n, n, K)
    n_edge, n_pair = close.sum((1, 2, 3)), jnp.zeros_like(slots.count)
    fits = (jnp.cumsum(slots.count) < budget.n_node) & (jnp.cumsum(n_edge) <= budget.n_edge)
    if long_range_cutoff is not None:
        far = (squared < long_range_cutoff * long_range_cutoff) & _first_of_pair(images, squared)
        n_pair = far.sum((1, 2, 3))
        fits &= jnp.cumsum(n_pair) <= budget.n_pair
    takes_part = fits & (slots.count > 0) & (images.needed <= budget.n_image)
    count = jnp.where(takes_part, slots.count, 0)
    begin = jnp.cumsum(count) - count
    chosen = takes_part[:, None, None, None]
    receivers, senders, edges = _edges(
        close & chosen, images, translations, begin, count.sum(), budget.n_edge
    )
    if long_range_cutoff is not None:
        ends = _pairs(far & chosen, images, translations, begin, count.sum(), budget.n_pair)
        edges["long_range"] = dict(zip(("receivers", "senders", "shifts"), ends))
    graph = jraph.GraphsTuple(
        nodes=slot_nodes(slots, positions, count, begin, budget.n_node),
        edges=edges,
        receivers=receivers,
        senders=senders,
        globals={
            "charge": append_zero(slots.charge),
            "spin": append_zero(slots.spin),
            "cell": jnp.concatenate([box.cell, jnp.zeros((1, 3, 3), box.cell.dtype)]),
        },
        n_node=jnp.append(count, budget.n_node - count.sum()).astype(jnp.int32),
        n_edge=with_rest(jnp.where(takes_part, n_edge, 0), budget.n_edge),
    )
    nearest = squared.min((2, 3))  # of each atom, (M, n)
    largest = jnp.where(jnp.isfinite(nearest), nearest, 0.0).max(1)
    return SlotBatch(
        graph, takes_part, jnp.sqrt(nearest.min(1)), jnp.sqrt(largest), begin, n_edge, n_pair
    ), images.needed


class _Images(NamedTuple):
    """Images of each slot. The image with the opposite translation of k is last - k.

    Attributes:
      shifts: Translations in lattice vectors, (M, K, 3), int32.
      used: Whether the slot needs the image, (M, K), bool.
      last: Index of the last image, (M,), int32; that without translation is last / 2.
      needed: Number of images, (M,), float.
    """

    shifts: jax.Array
    used: jax.Array
    last: jax.Array
    needed: jax.Array


def _images(box: Box, number: int, reach: float) -> _Images:
    """Return the images within `reach` (Å); a slot that needs more than `number` has only one."""
    per_height = jnp.linalg.norm(jnp.linalg.inv(box.cell), axis=-2)  # 1 / height, (M, 3)
    shells = jnp.where(box.periodic, jnp.floor(reach * per_height + 0.5 + _MARGIN), 0.0)
    needed = jnp.prod(2 * shells + 1, axis=-1)
    shells = jnp.where((needed <= number)[:, None], shells, 0).astype(jnp.int32)
    sides = 2 * shells + 1  # (M, 3)
    last = sides.prod(-1) - 1
    k = jnp.arange(number)
    digits = jnp.stack(
        [
            k // (sides[:, 1] * sides[:, 2])[:, None],
            k // sides[:, 2, None] % sides[:, 1, None],
            k % sides[:, 2, None],
        ],
        axis=-1,
    )
    return _Images(digits - shells[:, None], k <= last[:, None], last, needed)


def _squared_distances(slots, positions, box, images):
    """Return squared distances (M, n, n, K), inf for no pair, and nearest images (M, n, n, 3)."""
    size = slots.numbers.shape[1]
    exact = jax.lax.Precision.HIGHEST
    vectors = positions[:, None] - positions[:, :, None]  # senders minus receivers, (M, n, n, 3)
    slot = jnp.arange(len(positions))[:, None, None]
    translations = box.translations(vectors, slot)
    vectors += jnp.einsum("mijc,mcx->mijx", translations, box.cell, precision=exact)
    moves = jnp.einsum(
        "mkc,mcx->mkx", images.shifts.astype(box.cell.dtype), box.cell, precision=exact
    )
    d = [vectors[..., None, x] + moves[:, None, None, :, x] for x in range(3)]
    is_atom = jnp.arange(size) < slots.count[:, None]  # (M, n)
    are_atoms = (is_atom[:, :, None] & is_atom[:, None])[..., None] & images.used[:, None, None]
    middle = jnp.arange(images.used.shape[1]) == images.last[:, None] // 2  # (M, K)
    itself = jnp.eye(size, dtype=bool)[..., None] & middle[:, None, None]
    squared = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    return jnp.where(are_atoms & ~itself, squared, jnp.inf), translations.astype(jnp.int32)


def _first_of_pair(images, squared):
    """Return which of the two directions of a pair is the first, (M, n, n, K), bool."""
    size, number = squared.shape[2:]
    i, j, k = jnp.arange(size)[:, None, None], jnp.arange(size)[:, None], jnp.arange(number)
    half = k < images.last[:, None] // 2  # (M, K)
    return (i < j) | ((i == j) & half[:, None, None])


def _ends(mask, images, translations, begin, num_atoms, length):
    """Return receivers, senders and shifts of the first `length` pairs of a mask, and indices.

    The indices are those of the pairs and of their reverse in the flat mask, and whether a pair is
    real. Padding joins the first padding atom to itself.
    """
    _, size, _, number = mask.shape
    flat, total = true_indices(mask, length)
    used = jnp.arange(length) < total
    k, column, row = flat % number, flat // number % size, flat // (number * size)
    slot, local = row // size, row % size
    reverse = ((slot * size + column) * size + local) * number + images.last[slot] - k
    shifts = translations[slot, local, column] + images.shifts[slot, k]
    receivers = jnp.where(used, begin[slot] + local, num_atoms).astype(jnp.int32)
    senders = jnp.where(used, begin[slot] + column, num_atoms).astype(jnp.int32)
    return receivers, senders, jnp.where(used[:, None], shifts, 0), flat, reverse, used


def _edges(close, images, translations, begin, num_atoms, length):
    """Return receivers, senders, and shifts and pair order of the edges."""
    receivers, senders, shifts, flat, reverse, used = _ends(
        close, images, translations, begin, num_atoms, length
    )
    # the index of an edge is its rank among the true values of `close`, which finds its reverse
    rank = jnp.cumsum(close.ravel()) - 1
    forward, _ = true_indices(used & (flat < reverse), length // 2)
    pad = 2 * jnp.arange(length // 2)  # padding edges form pairs, since the number of edges is even
    real = pad < used.sum()
    order = jnp.concatenate(
        [jnp.where(real, forward, pad), jnp.where(real, rank[reverse[forward]], pad + 1)]
    )
    return receivers, senders, {"pair_order": order.astype(jnp.int32), "shifts": shifts}


def _pairs(far, images, translations, begin, num_atoms, length):
    """Return receivers, senders and shifts of long-range pairs, padded like edges."""
    return _ends(far, images, translations, begin, num_atoms, length)[:3]

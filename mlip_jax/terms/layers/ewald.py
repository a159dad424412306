"""Ewald sums: the smooth part of the Coulomb interaction in crystals, over reciprocal vectors.

With the splitting parameter a, the potential of a unit charge, 1/r in units of the Coulomb
constant, is erfc(a r) / r, a sum over pairs within a cutoff, plus erf(a r) / r. The lattice sum of
the latter is one over reciprocal vectors k, with weights 4 pi exp(-k² / 4 a²) / (k² V). The vector
k = 0 is omitted: a neutralizing background compensates the total charge of a cell, and the cell is
surrounded by a conductor.

    N   atoms      G   graphs      C   reciprocal vectors of a chunk, one of k and -k
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.graphs.graph import node_graph_index
from mlip_jax.models.layers.basic import segment_sum

# _CHUNK: reciprocal vectors that are summed at once; more would take memory for phases (N, C).
_CHUNK = 256
_EXACT = jax.lax.Precision.HIGHEST


class Splitting(NamedTuple):
    """Division of the Coulomb interaction into two sums.

    Attributes:
      alpha: Splitting parameter a (1/Å).
      k_max: Length of the longest reciprocal vectors (1/Å).
    """

    alpha: float
    k_max: float

    @classmethod
    def of(cls, cutoff: float, accuracy: float, damping: float) -> Splitting:
        """Return the splitting for which both sums neglect terms below `accuracy`.

        Charges that are smeared out more than the splitting requires have no pair sum.

        Args:
          cutoff: Cutoff radius of the pair sum (Å).
          accuracy: Largest neglected term relative to the first one.
          damping: Damping length of the interaction (Å); 0 for point charges.
        """
        digits = math.sqrt(-math.log(accuracy))
        alpha = digits / cutoff
        if damping > 0:
            alpha = min(alpha, 1 / damping)
        return cls(alpha, 2 * alpha * digits)


def is_crystal(graph) -> jax.Array:
    """Return which graphs have a cell, (G,) bool."""
    if "cell" not in graph.globals:
        return jnp.zeros(graph.n_node.shape, bool)
    return jnp.linalg.det(graph.globals["cell"]) != 0


def reciprocal_energies(
    graph, charges: jax.Array, splitting: Splitting, num_vectors: int, damping: float
) -> jax.Array:
    """Compute the energy of each atom by the smooth part, over the Coulomb constant (e²/Å), (N,).

    It is zero in molecules and NaN in crystals that need more than `num_vectors` reciprocal
    vectors. Interactions of charges with themselves are removed.

    Args:
      graph: Graph with cells.
      charges: Charges (e), (N,).
      splitting: Splitting of the interaction.
      num_vectors: Largest number of reciprocal vectors of a cell, one of k and -k. The time follows
        the number that is needed.
      damping: Damping length (Å); 0 for point charges.
    """
    crystal, node_graph = is_crystal(graph), node_graph_index(graph)
    if "cell" not in graph.globals:
        return jnp.zeros_like(charges)
    one = jnp.eye(3, dtype=charges.dtype)
    cell = jnp.where(crystal[:, None, None], graph.globals["cell"], one)
    inverse, volume = jnp.linalg.inv(cell), jnp.abs(jnp.linalg.det(cell))
    # fractional coordinates, (N, 3)
    scaled = jnp.einsum(
        "nx,nxc->nc", graph.nodes["positions"], inverse[node_graph], precision=_EXACT
    )
    shells, needed = _shells(cell, splitting.k_max, num_vectors)

    def add_chunk(energies, start):
        vectors, used = _vectors(shells, start + jnp.arange(size))
        used = used & crystal[:, None]
        weights = _weights(vectors, used, inverse, splitting.alpha) / volume[:, None]
        phases = 2 * math.pi * (scaled[:, None] * vectors[node_graph]).sum(-1)  # (N, C)
        cosine, sine = jnp.cos(phases), jnp.sin(phases)
        q = charges[:, None]
        total_cosine, total_sine = (
            (weights * segment_sum(q * wave, node_graph, len(crystal)))[node_graph]
            for wave in (cosine, sine)
        )
        return energies + charges * (cosine * total_cosine + sine * total_sine).sum(-1)

    size = min(num_vectors, _CHUNK)
    most = jnp.where(crystal & (needed <= num_vectors), needed, 0).max(initial=0)
    energies = _sum_needed(add_chunk, jnp.zeros_like(charges), size, num_vectors, most)
    itself = splitting.alpha / math.sqrt(math.pi) * charges * charges
    # The average of the pair sum, over the volume, is that of the missing k = 0.
    average = math.pi * (splitting.alpha**-2 - damping**2) / (2 * volume)
    total = segment_sum(charges, node_graph, len(crystal))
    background = (average * total)[node_graph] * charges
    energies = jnp.where(crystal[node_graph], energies - itself - background, 0.0)
    return jnp.where((crystal & (needed > num_vectors))[node_graph], jnp.nan, energies)


def _sum_needed(add_chunk, energies, size: int, num_vectors: int, most) -> jax.Array:
    """Add the chunks that contain one of the first `most` of at most `num_vectors` vectors.

    Loops of fixed length are differentiable. They skip chunks singly and in blocks, so that the time
    follows `most`, and the memory is that of one chunk.
    """
    num_chunks = -(-num_vectors // size)
    per_block = math.isqrt(num_chunks - 1) + 1
    block = size * per_block

    def skip_or_add(add):
        def step(energies, start):
            return jax.lax.cond(start < most, add, lambda e, _: e, energies, start), None

        return jax.checkpoint(step)

    def add_block(energies, start):
        starts = start + size * jnp.arange(per_block)
        return jax.lax.scan(skip_or_add(add_chunk), energies, starts)[0]

    starts = jnp.arange(0, num_vectors, block)
    return jax.lax.scan(skip_or_add(add_block), energies, starts)[0]


def _shells(cell, k_max, num_vectors):
    """Return the largest index of the vectors along each direction, (G, 3), and their numbers."""
    lengths = jnp.sqrt((cell * cell).sum(-1))
    shells = jax.lax.stop_gradient(jnp.floor(k_max * lengths / (2 * math.pi)))
    needed = (jnp.prod(2 * shells + 1, axis=-1) - 1) / 2
    return jnp.where((needed <= num_vectors)[:, None], shells, 0).astype(jnp.int32), needed


def _vectors(shells, k):
    """Return the vectors with the numbers k in units of the reciprocal lattice vectors, (G, C, 3).

    Also returns whether they exist, (G, C). Of all vectors in the box, those after the middle one,
    zero, are numbered.
    """
    sides = 2 * shells + 1
    half = sides.prod(-1) // 2
    used = k < half[:, None]
    number = jnp.where(used, half[:, None] + 1 + k, 0)
    digits = jnp.stack(
        [
            number // (sides[:, 1] * sides[:, 2])[:, None],
            number // sides[:, 2, None] % sides[:, 1, None],
            number % sides[:, 2, None],
        ],
        axis=-1,
    )
    return digits - shells[:, None], used


def _weights(vectors, used, inverse, alpha):
    """Return 4 pi exp(-k² / 4 a²) / k² of the vectors (G, C); they count for k and -k."""
    k = (
        2
        * math.pi
        * jnp.einsum("gki,gxi->gkx", vectors.astype(inverse.dtype), inverse, precision=_EXACT)
    )
    squared = jnp.where(used, (k * k).sum(-1), 1.0)
    return jnp.where(used, 4 * math.pi * jnp.exp(-squared / (4 * alpha**2)) / squared, 0.0)


def pair_potential(
    r: jax.Array, crystal: jax.Array, splitting: Splitting, cutoff: float, damping: float
) -> jax.Array:
    """Compute the potential of unit charges at distances r (1/Å), (P,) -> (P,).

    In molecules it is the whole potential, erf(r / damping) / r. In crystals it is the short-ranged
    part of it.

    Args:
      r: Distances (Å), positive.
      crystal: Whether the pairs are those of crystals, (P,) bool.
      splitting: Splitting of the interaction.
      cutoff: Cutoff radius of crystals (Å).
      damping: Damping length (Å); 0 for point charges.
    """
    smeared = jax.lax.erfc(r / damping) if damping > 0 else jnp.zeros_like(r)
    short = jnp.where(r < cutoff, jax.lax.erfc(splitting.alpha * r) - smeared, 0.0)
    return jnp.where(crystal, short, 1.0 - smeared) / r

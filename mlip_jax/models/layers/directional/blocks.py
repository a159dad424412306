"""Interactions and energies of models whose features belong to directed edges.

Every directed edge j -> i has features m_ji. An interaction adds a sum over the neighbors k of j,
which each model computes in its own way. The skeleton is that of DimeNet++ (Gasteiger et al.,
arXiv:2011.14115).
"""

from __future__ import annotations

from math import pi

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.models.layers.basic import (
    Dense,
    activation,
    gather,
    polynomial_cutoff,
    safe_norm,
    segment_sum,
)
from mlip_jax.models.layers.directional.edges import DirectedEdges, directed_edges
from mlip_jax.models.layers.heads import AtomOutputs, embed_elements, scale_and_shift

_silu = activation("silu")


def glorot_orthogonal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Initialize a kernel as an orthogonal matrix with the variance of Glorot's initializer."""
    kernel = nn.initializers.orthogonal()(key, shape, dtype)
    return kernel * jnp.sqrt(2.0 / (sum(shape) * jnp.var(kernel)))


def dense_of_block(n: int):
    """Return a constructor of the dense layers of interaction block `n`."""

    def dense(width, name, use_bias=True):
        return Dense(width, use_bias, kernel_init=glorot_orthogonal, name=f"{name}_{n}")

    return dense


def _residual(x, dense, name):
    """Add two layers with an activation after each."""
    width = x.shape[-1]
    hidden = _silu(dense(width, f"{name}_layer_1")(x))
    return x + _silu(dense(width, f"{name}_layer_2")(hidden))


class _EdgeEmbedding(nn.Module):
    """Dense layer on features of both atoms and of the distance, without concatenating them.

    Attributes:
      width: Width of the layer.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, distance: jax.Array, edge: DirectedEdges) -> jax.Array:
        """Compute features of edges: atoms (N, F), pairs (P, F) -> (E, width)."""
        shape = (2 * x.shape[-1] + distance.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(x.dtype)
        receivers, senders, pairs = jnp.split(kernel, (x.shape[-1], 2 * x.shape[-1]))
        of_atoms = gather(x @ receivers + bias, edge.receivers) + gather(x @ senders, edge.senders)
        return edge.plus(of_atoms, distance @ pairs)


class DirectionalMessages(nn.Module):
    """Model with features of directed edges; subclasses define the sums over triplets.

    Attributes:
      num_features: Number of features of an edge, F.
      num_layers: Number of interaction blocks.
      cutoff: Cutoff radius (Å).
      num_radial: Number of radial functions.
      max_degree: Largest degree l of the angular functions.
      num_triplet_features: Number of features of the sums over triplets, C.
      num_basis_features: Width between the two linear layers of each basis.
      energy_width: Width of the hidden layers of the energy blocks.
      num_energy_layers: Number of hidden layers of each energy block.
      num_before_skip: Number of residual layers before the skip connection of an interaction.
      num_after_skip: Number of residual layers after it.
      envelope_exponent: Exponent p - 1 of the envelope (arXiv:2003.03123, eq. 8).
      energy_bias: Whether the first layer of an energy block has a bias, as in DIG.
      rounded_bessel: Whether constants of the spherical Bessel functions are rounded to single
        precision, as in published implementations.
      zero_init: Whether the last kernels of the energy blocks start at zero.
      learned_shift: Whether the energy has a trainable shift per element.
    """

    num_features: int = 128
    num_layers: int = 4
    cutoff: float = 5.0
    num_radial: int = 6
    max_degree: int = 6
    num_triplet_features: int = 64
    num_basis_features: int = 8
    energy_width: int = 256
    num_energy_layers: int = 3
    num_before_skip: int = 1
    num_after_skip: int = 2
    envelope_exponent: int = 5
    energy_bias: bool = False
    rounded_bessel: bool = False
    zero_init: bool = True
    learned_shift: bool = True

    def bases(self, edge: DirectedEdges, distances: jax.Array, envelope: jax.Array, num_atoms: int):
        """Return what the sums over triplets of all blocks have in common.

        Args:
          edge: Edges.
          distances: Lengths of the undirected pairs (Å), (P,); see `DirectedEdges.undirected`.
          envelope: Envelope of each pair, (P, 1).
          num_atoms: Number of atoms.
        """
        raise NotImplementedError

    def sum_triplets(self, n: int, b: jax.Array, bases, edge: DirectedEdges) -> jax.Array:
        """Sum over the edges into the sender of each edge, without the reversed edge: (E, C).

        Args:
          n: Index of the interaction block.
          b: Features of the edges, (E, C).
          bases: Result of `bases`.
          edge: Edges.
        """
        raise NotImplementedError

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        numbers = graph.nodes["numbers"]
        edge = directed_edges(graph)
        distances = safe_norm(edge.undirected(edge.vectors))
        rbf, envelope = self._radial_functions(distances)  # of undirected pairs, as all filters
        bases = self.bases(edge, distances, envelope, len(numbers))
        # features of edges, (E, F)
        x = embed_elements(self, numbers, self.num_features, edge.vectors.dtype)
        distance_features = _silu(Dense(self.num_features, name="embedding_rbf")(rbf))
        m = _silu(
            _EdgeEmbedding(self.num_features, name="embedding_edges")(x, distance_features, edge)
        )
        total, features = self._energies(0, m, rbf, edge, len(numbers))
        for n in range(self.num_layers):
            m = self._interaction(n, m, rbf, bases, edge)
            energies, features = self._energies(n + 1, m, rbf, edge, len(numbers))
            total = total + energies
        total = scale_and_shift(self, total, numbers, False, self.learned_shift)
        return AtomOutputs(total, features[:, None, None, :])

    def _radial_functions(self, distances):
        """Compute radial functions (P, num_radial) and the envelope (P, 1)."""
        x = distances / self.cutoff
        power = self.envelope_exponent + 1
        inverse = jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)
        envelope = (polynomial_cutoff(distances, self.cutoff, power) * inverse)[:, None]
        frequencies = self.param(
            "frequencies", lambda _: pi * jnp.arange(1.0, self.num_radial + 1.0)
        ).astype(x.dtype)
        return envelope * jnp.sin(frequencies * x[:, None]), envelope

    def _interaction(self, n, m, rbf, bases, edge):
        """Update the features of edges, (E, F)."""
        dense = dense_of_block(n)
        width, narrow = self.num_features, self.num_basis_features
        direct = _silu(dense(width, "own")(m))
        filters = dense(width, "rbf_2", False)(dense(narrow, "rbf_1", False)(rbf))
        b = edge.times(_silu(dense(width, "neighbors")(m)), filters)
        b = _silu(dense(self.num_triplet_features, "down", False)(b))
        sums = self.sum_triplets(n, b, bases, edge)
        h = direct + _silu(dense(width, "up", False)(sums))
        for k in range(self.num_before_skip):
            h = _residual(h, dense, f"before_{k}")
        h = _silu(dense(width, "skip")(h)) + m
        for k in range(self.num_after_skip):
            h = _residual(h, dense, f"after_{k}")
        return h

    def _energies(self, n, m, rbf, edge, num_atoms):
        """Compute the atomic energies of a block, (N,), and its last hidden layer."""
        name, width = f"energy_{n}", self.energy_width
        filters = Dense(
            self.num_features, False, kernel_init=glorot_orthogonal, name=f"{name}_rbf"
        )(rbf)
        y = segment_sum(edge.times(m, filters), edge.receivers, num_atoms)
        y = Dense(width, self.energy_bias, kernel_init=glorot_orthogonal, name=f"{name}_up")(y)
        for k in range(self.num_energy_layers):
            y = _silu(Dense(width, kernel_init=glorot_orthogonal, name=f"{name}_layer_{k}")(y))
        init = nn.initializers.zeros if self.zero_init else glorot_orthogonal
        return Dense(1, False, kernel_init=init, name=f"{name}_final")(y)[:, 0], y

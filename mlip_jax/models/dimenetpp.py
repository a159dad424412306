"""DimeNet++: directional message passing (Gasteiger et al., arXiv:2003.03123 and 2011.14115).

Every directed edge j -> i has features m_ji. An interaction sums over the neighbors k of j,

    x_ji = sum_k b_kj * W sbf(d_kj, angle_kji),  k != i,

where b_kj are features of the edge k -> j and sbf is a product of spherical Bessel functions of the
distance and Legendre polynomials P_l of the angle. The published implementations list all triplets
(k, j, i). Here, the sum needs no triplets: with P_l(u . v) = 4 pi / (2l + 1) Y_l(u) . Y_l(v), it is
a product of Y_l of edge j -> i with moments of atom j, sums over its edges that are computed once
per atom. The term k = i is subtracted. The results are the same.

The model agrees with PyTorch Geometric 2.8.1 (angle="turning") and with the implementation in DIG
(angle="bond", energy_bias=True) for the same weights. These have at most 32 neighbors per atom by
default; here, an atom has all neighbors within the cutoff.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import pairs
from mlip_jax.models.layers.basic import (
    Dense,
    activation,
    gather,
    polynomial_cutoff,
    safe_norm,
    segment_sum,
    unit_vectors,
)
from mlip_jax.models.layers.heads import AtomOutputs, embed_elements, scale_and_shift
from mlip_jax.models.layers.spherical_bessel import spherical_bessel
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics

_silu = activation("silu")


def glorot_orthogonal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Initialize a kernel as an orthogonal matrix with the variance of Glorot's initializer."""
    kernel = nn.initializers.orthogonal()(key, shape, dtype)
    return kernel * jnp.sqrt(2.0 / (sum(shape) * jnp.var(kernel)))


class _Edges(NamedTuple):
    """Directed edges.

    Attributes:
      receivers: Index of atom i, (E,).
      senders: Index of atom j, (E,).
      vectors: r_i - r_j (Å), (E, 3).
      reverse: Index of the reverse of each edge, (E,). None: the second half reverses the first.
    """

    receivers: jax.Array
    senders: jax.Array
    vectors: jax.Array
    reverse: jax.Array | None

    def reversed(self, values: jax.Array) -> jax.Array:
        """Return the values of the reversed edges."""
        if self.reverse is None:
            return jnp.roll(values, len(values) // 2, axis=0)
        return gather(values, self.reverse)


def _directed_edges(graph: jraph.GraphsTuple) -> _Edges:
    """Return both directions of all pairs."""
    edge = pairs(graph)
    i, j, d = edge.receivers, edge.senders, edge.displacements
    if edge.undirected:
        return _Edges(
            jnp.concatenate([i, j]), jnp.concatenate([j, i]), jnp.concatenate([-d, d]), None
        )
    # Edges, sorted by their atoms and cells, and their reverses, sorted likewise, correspond.
    shifts = graph.edges.get("shifts")
    cells = [] if shifts is None else list(shifts.T)
    order = jnp.lexsort([*cells, j, i])
    reverse_order = jnp.lexsort([*(-n for n in cells), i, j])
    return _Edges(i, j, -d, jnp.zeros_like(order).at[order].set(reverse_order))


def _residual(x, dense, name):
    """Add two layers with an activation after each."""
    width = x.shape[-1]
    hidden = _silu(dense(width, f"{name}_layer_1")(x))
    return x + _silu(dense(width, f"{name}_layer_2")(hidden))


class Model(nn.Module):
    """DimeNet++ with the published defaults.

    Attributes:
      num_features: Number of features of an edge, F.
      num_layers: Number of interaction blocks.
      cutoff: Cutoff radius (Å).
      num_radial: Number of radial functions.
      max_degree: Largest degree l of the Legendre polynomials.
      num_triplet_features: Number of features of the sums over triplets, C.
      num_basis_features: Width between the two linear layers of each basis.
      energy_width: Width of the hidden layers of the energy blocks.
      num_energy_layers: Number of hidden layers of each energy block.
      num_before_skip: Number of residual layers before the skip connection of an interaction.
      num_after_skip: Number of residual layers after it.
      envelope_exponent: Exponent p - 1 of the envelope (arXiv:2003.03123, eq. 8).
      angle: "turning": angle between the edges k -> j and j -> i, as in PyTorch Geometric; "bond":
        the bond angle, as in the paper and in DIG. Weights for one give other energies with the
        other.
      energy_bias: Whether the first layer of an energy block has a bias, as in DIG.
      rounded_bessel: Whether constants of the spherical Bessel functions are rounded to single
        precision, as in both implementations.
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
    angle: str = "turning"
    energy_bias: bool = False
    rounded_bessel: bool = False
    zero_init: bool = True
    learned_shift: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.angle not in ("turning", "bond"):
            raise ValueError(f'angle: expected "turning" or "bond", received {self.angle!r}')

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        numbers = graph.nodes["numbers"]
        edge = _directed_edges(graph)
        rbf, bessel, harmonics = self._bases(edge.vectors)
        # features of edges, (E, F)
        x = embed_elements(self, numbers, self.num_features, edge.vectors.dtype)
        distance_features = _silu(Dense(self.num_features, name="embedding_rbf")(rbf))
        atoms = (gather(x, edge.receivers), gather(x, edge.senders), distance_features)
        m = _silu(Dense(self.num_features, name="embedding_edges")(jnp.concatenate(atoms, axis=-1)))
        total, features = self._energies(0, m, rbf, edge, len(numbers))
        for n in range(self.num_layers):
            m = self._interaction(n, m, rbf, bessel, harmonics, edge, len(numbers))
            energies, features = self._energies(n + 1, m, rbf, edge, len(numbers))
            total = total + energies
        total = scale_and_shift(self, total, numbers, False, self.learned_shift)
        return AtomOutputs(total, features[:, None, None, :])

    def _bases(self, vectors):
        """Compute radial functions (E, num_radial), R_ln (E, L, num_radial) and 4 pi Y_l."""
        distances = safe_norm(vectors)
        x = distances / self.cutoff
        power = self.envelope_exponent + 1
        inverse = jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)
        envelope = (polynomial_cutoff(distances, self.cutoff, power) * inverse)[:, None]
        frequencies = self.param(
            "frequencies", lambda _: pi * jnp.arange(1.0, self.num_radial + 1.0)
        ).astype(x.dtype)
        rbf = envelope * jnp.sin(frequencies * x[:, None])
        bessel = envelope[..., None] * spherical_bessel(
            x, self.max_degree + 1, self.num_radial, self.rounded_bessel
        )
        return rbf, bessel, spherical_harmonics(unit_vectors(vectors, distances), self.max_degree)

    def _interaction(self, n, m, rbf, bessel, harmonics, edge, num_atoms):
        """Update the features of edges, (E, F)."""

        def dense(width, name, use_bias=True):
            return Dense(width, use_bias, kernel_init=glorot_orthogonal, name=f"{name}_{n}")

        width, narrow = self.num_features, self.num_basis_features
        direct = _silu(dense(width, "own")(m))
        filters = dense(width, "rbf_2", False)(dense(narrow, "rbf_1", False)(rbf))
        b = _silu(dense(width, "neighbors")(m)) * filters
        b = _silu(dense(self.num_triplet_features, "down", False)(b))
        # the two layers act on all l and n together; without activation, they can act on each l
        inner = self.param(
            f"sbf_1_{n}", glorot_orthogonal, ((self.max_degree + 1) * self.num_radial, narrow)
        ).reshape(self.max_degree + 1, self.num_radial, narrow)
        basis = jnp.einsum("pln,lnq->plq", bessel, inner.astype(bessel.dtype))
        angular = dense(self.num_triplet_features, "sbf_2", False)(basis)
        sums = self._sum_triplets(b, angular, harmonics, edge, num_atoms)
        h = direct + _silu(dense(width, "up", False)(sums))
        for k in range(self.num_before_skip):
            h = _residual(h, dense, f"before_{k}")
        h = _silu(dense(width, "skip")(h)) + m
        for k in range(self.num_after_skip):
            h = _residual(h, dense, f"after_{k}")
        return h

    def _sum_triplets(self, b, angular, harmonics, edge, num_atoms):
        """Sum over the edges into the sender of each edge, without the reversed edge: (E, C)."""
        total = jnp.zeros_like(b)
        for l, y in enumerate(harmonics):
            a = b * angular[:, l]
            moments = segment_sum(y[:, :, None] * a[:, None, :], edge.receivers, num_atoms)
            product = jnp.sum(y[:, :, None] * gather(moments, edge.senders), axis=1)
            # Y_l . Y_l of opposite unit vectors, with squared norm 2 l + 1
            product = product - (2 * l + 1) * (-1) ** l * edge.reversed(a)
            # P_l changes its sign between the angle and its supplement for odd l
            sign = (-1) ** l if self.angle == "bond" else 1
            total = total + sign / sqrt(4.0 * pi * (2 * l + 1)) * product
        return total

    def _energies(self, n, m, rbf, edge, num_atoms):
        """Compute the atomic energies of a block, (N,), and its last hidden layer."""
        name, width = f"energy_{n}", self.energy_width
        filters = Dense(
            self.num_features, False, kernel_init=glorot_orthogonal, name=f"{name}_rbf"
        )(rbf)
        y = segment_sum(filters * m, edge.receivers, num_atoms)
        y = Dense(width, self.energy_bias, kernel_init=glorot_orthogonal, name=f"{name}_up")(y)
        for k in range(self.num_energy_layers):
            y = _silu(Dense(width, kernel_init=glorot_orthogonal, name=f"{name}_layer_{k}")(y))
        init = nn.initializers.zeros if self.zero_init else glorot_orthogonal
        return Dense(1, False, kernel_init=init, name=f"{name}_final")(y)[:, 0], y

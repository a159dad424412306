"""Allegro: strictly local equivariant networks (Musaelian et al., Nature Communications 14, 579, 2023).

Every directed edge i -> j has scalars and a tensor T, which is multiplied with the environment of
its center i in each layer:

    T_0 = c Y(r_ij),   T_k+1 = T_k x Gamma_i,k,   Gamma_i,k = sum_j w_ij,k Y(r_ij) / sqrt(num)

with weights c and w_k per channel and degree from the scalars. Networks of the scalars and of the
invariant part of T_k+1 give the scalars and the weights of the next layer. The model agrees with
nequip-allegro 0.8.3 if the options are the same.

No tensor of an edge is ever formed. T_k is a linear function of T_0, which depends only on the
center. Its invariant part is therefore the product of c Y(r_ij) with a tensor D_i,k of the center,

    D_i,k = A_i,0 A_i,1 ... A_i,k-1 a_i,k,

where A_i,k is the matrix of the product with Gamma_i,k and a_i,k its column for the invariant. All
couplings are thus products on atoms, which are 20 times fewer than edges. Linear layers that follow
each other without an activation act on kernels (layers/factored.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.graph import Pairs, pairs
from mlip_jax.models.layers.allegro_paths import coupling_tensor, layer_irreps
from mlip_jax.models.layers.basic import (
    gather,
    safe_norm,
    segment_sum,
    spherical_harmonics,
    unit_vectors,
)
from mlip_jax.models.layers.factored import Factored, FactoredMLP, uniform_root_3
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER, AtomOutputs

EMBEDDINGS = ("bessel", "spline")


class Model(nn.Module):
    """Allegro; the defaults are the published ones.

    Attributes:
      num_features: Number of scalars of an edge.
      num_tensor_features: Number of channels of the tensors.
      num_layers: Number of tensor products.
      max_degree: Largest degree l of the harmonics and tensors.
      parity: Whether tensors include pseudotensors. They reach the energy with three layers or more.
      cutoff: Cutoff radius (Å).
      elements: Atomic numbers of the rows of all tables, at most 118 of them; the energy of a
        structure with another element is NaN. None: all elements.
      pair_cutoffs: Cutoff (Å) for each pair of `elements`, center by center, all neighbors for each;
        none exceeds `cutoff`. None: `cutoff`.
      avg_num_neighbors: Average number of neighbors within the cutoff, or one number for each of
        `elements`. The default is that of molecules and 5 Å.
      embedding: Scalars of pairs: "bessel" times vectors of both elements, or "spline", one spline
        for each pair of `elements` and channel.
      embedding_width: Number of functions of "bessel" embeddings; None: num_features. "spline" has
        num_features.
      num_radial: Number of Bessel functions.
      trainable_radial: Whether the wave numbers of the Bessel functions are trained.
      cutoff_power: Power p of the polynomial cutoff of "bessel".
      num_splines: Number of splines.
      spline_span: Number of neighboring splines that overlap.
      embedding_hidden: Hidden widths of the network of pair scalars.
      latent_hidden: Hidden widths of the networks of the layers.
      readout_hidden: Hidden widths of the network of edge energies.
      path_channel_coupling: Whether each channel weights the paths of the tensor products by itself.
      zero_init: Whether the last kernel of the network of edge energies starts at zero.
      learned_scale: Whether the energy has a trainable scale per element, initially 1.
      learned_shift: Whether the energy has a trainable shift per element, initially 0.
    """

    num_features: int = 64
    num_tensor_features: int = 16
    num_layers: int = 2
    max_degree: int = 2
    parity: bool = True
    cutoff: float = 5.0
    elements: Sequence[int] | None = None
    pair_cutoffs: Sequence[float] | None = None
    avg_num_neighbors: float | Sequence[float] = 20.0
    embedding: str = "bessel"
    embedding_width: int | None = None
    num_radial: int = 8
    trainable_radial: bool = False
    cutoff_power: int = 6
    num_splines: int = 16
    spline_span: int = 12
    embedding_hidden: Sequence[int] = (64,)
    latent_hidden: Sequence[int] = (64,)
    readout_hidden: Sequence[int] = (32,)
    path_channel_coupling: bool = True
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        self._check_options()
        # geometry: distances (E,), harmonics (E, M)
        edge = pairs(graph, undirected=False)
        distances = safe_norm(edge.displacements)
        unit = unit_vectors(edge.displacements, distances)
        harmonics = spherical_harmonics(unit, tuple(range(self.max_degree + 1)))
        harmonics = harmonics * float(np.sqrt(4 * np.pi))
        types, known = self._types(graph.nodes["numbers"])
        norm = self._average(types, distances.dtype) ** -0.5
        # scalars, and weights of the tensors and of the first environments
        scalars = self._pair_scalars(distances, types, edge)
        sizes = [self.num_tensor_features] * (self.max_degree + 1)
        tensors = split(FactoredMLP((), sum(sizes), name="tensors")([scalars]), sizes)
        tensors = [part.value() for part in tensors]  # (E, U) for each degree
        sizes = [self.num_features, *sizes]
        latent, *weights = split(FactoredMLP((), sum(sizes), name="environments")([scalars]), sizes)
        latents, matrices = [latent], []
        irreps = layer_irreps(self.max_degree, self.parity, self.num_layers)
        for n in range(self.num_layers):
            # tensor product of the layer, by atom
            weights = [part.value() for part in weights]  # (E, U) for each degree
            gamma = environments(weights, harmonics, edge, len(types)) * norm[:, None, None]
            matrices.append(self._product_matrix(n, irreps, gamma))
            # invariants of the edges (E, U), new scalars, weights of the next environments
            invariants = edge_invariants(tensors, harmonics, center_tensor(matrices), edge)
            outputs = sizes if n < self.num_layers - 1 else sizes[:1]
            network = FactoredMLP(tuple(self.latent_hidden), sum(outputs), name=f"latent_{n}")
            latent, *weights = split(network([*latents, Factored(invariants)]), outputs)
            latents.append(latent)
        # energies (N,), features (N, M, F)
        readout = FactoredMLP(tuple(self.readout_hidden), 1, self.zero_init, name="readout")
        energies = segment_sum(readout(latents).value()[:, 0], edge.receivers, len(types))
        energies = self._scaled(energies * norm * float(np.sqrt(0.5)), types)
        every_degree = [latents[-1].value()] * (self.max_degree + 1)
        features = environments(every_degree, harmonics, edge, len(types)) * norm[:, None, None]
        return AtomOutputs(jnp.where(known, energies, jnp.nan), features[:, None])

    def _check_options(self):
        if self.embedding not in EMBEDDINGS:
            raise ValueError(f"embedding must be one of {EMBEDDINGS}, received {self.embedding!r}")
        if self.elements is None and (self.embedding == "spline" or self.pair_cutoffs is not None):
            raise ValueError(
                "elements must be given with embedding='spline' and with pair_cutoffs, which have a "
                "row for each pair of elements"
            )
        num = len(self.elements or ())
        for field, size in (("avg_num_neighbors", num), ("pair_cutoffs", num * num)):
            value = getattr(self, field)
            if isinstance(value, Sequence) and len(value) != size:
                raise ValueError(
                    f"{field} must have {size} numbers for {num} elements, received {len(value)}"
                )
        if self.pair_cutoffs is not None and max(self.pair_cutoffs) > self.cutoff:
            raise ValueError(
                f"pair_cutoffs must not exceed the cutoff of {self.cutoff} Å, received "
                f"{max(self.pair_cutoffs)} Å"
            )

    @property
    def _num_types(self) -> int:
        return MAX_ATOMIC_NUMBER + 1 if self.elements is None else len(self.elements)

    def _types(self, numbers):
        """Return the row of each atom in the tables and whether it has one, shape (N,) each."""
        if self.elements is None:
            return numbers, jnp.ones(numbers.shape, bool)
        rows = np.full(MAX_ATOMIC_NUMBER + 1, -1, np.int32)
        rows[list(self.elements)] = np.arange(len(self.elements))
        rows[0] = 0  # padding atoms
        types = jnp.asarray(rows)[numbers]
        return jnp.maximum(types, 0), types >= 0

    def _average(self, types, dtype):
        """Return the average number of neighbors of each atom, shape (N,)."""
        return jnp.broadcast_to(jnp.asarray(self.avg_num_neighbors, dtype), self._num_types)[types]

    def _pair_scalars(self, distances, types, edge: Pairs) -> Factored:
        """Compute the scalars of the edges from distances and elements, shape (E, num_features)."""
        of_center, of_neighbor = gather(types, edge.receivers), gather(types, edge.senders)
        pair = of_center * self._num_types + of_neighbor
        if self.pair_cutoffs is None:
            x = distances / self.cutoff
        else:
            x = distances / jnp.asarray(self.pair_cutoffs, distances.dtype)[pair]
        if self.embedding == "spline":
            parts = [self._splines(x, pair)]
        else:
            parts = self._bessel_embedding(x, of_center, of_neighbor)
        hidden = tuple(self.embedding_hidden)
        return FactoredMLP(hidden, self.num_features, name="embedding")(parts)

    def _bessel_embedding(self, x, of_center, of_neighbor):
        """Return the functions of center and distance, and those of neighbor and distance."""
        roots = np.arange(1.0, self.num_radial + 1)
        if self.trainable_radial:
            roots = self.param("radial_roots", lambda _: jnp.asarray(roots, jnp.float32))
        roots = jnp.asarray(roots, x.dtype)
        envelope = polynomial_cutoff(x, self.cutoff_power)
        radial = roots * jnp.sinc(roots * x[:, None]) * envelope[:, None]
        width, parts = (self.embedding_width or self.num_features) // 2, []
        for name, index in (("center", of_center), ("neighbor", of_neighbor)):
            kernel = self.param(f"{name}_radial", uniform_root_3, (self.num_radial, width))
            table = self.param(name, nn.initializers.normal(1.0), (self._num_types, width))
            kernel = kernel.astype(x.dtype) * float(self.num_radial**-0.5)
            parts.append(Factored(gather(table.astype(x.dtype), index) * (radial @ kernel)))
        return parts

    def _splines(self, x, pair) -> Factored:
        """Return one spline of the distance for each pair of elements and channel."""
        num, span = self.num_splines, self.spline_span
        low, width = (np.arange(num) - span) / num, (span + 1) / num
        x = jnp.clip(x[:, None], jnp.asarray(low, x.dtype), jnp.asarray(low + width, x.dtype))
        bump = 0.5 * (1.0 - jnp.cos((x - jnp.asarray(low, x.dtype)) * (2 * np.pi / width)))
        basis = bump * bump  # (E, num_splines), zero at the cutoff with three derivatives
        bound = float(np.sqrt(3.0 / span))
        init = lambda key, shape: uniform_root_3(key, shape) * (bound / np.sqrt(3.0))  # noqa: E731
        shape = (num, self._num_types**2, self.num_features)
        table = self.param("splines", init, shape).astype(x.dtype)
        return Factored(sum(gather(table[k], pair) * basis[:, k, None] for k in range(num)))

    def _product_matrix(self, n, irreps, gamma):
        """Return the matrices of the tensor product of layer n with the environments.

        Args:
          n: Layer.
          irreps: Irreps of the tensors before and after each layer.
          gamma: Environments, shape (N, M, U).

        Returns:
          Matrices, shape (N, U, components of irreps[n], components of irreps[n + 1]).
        """
        couplings = coupling_tensor(irreps[n], irreps[n + 1], self.max_degree)
        shape = (len(couplings), self.num_tensor_features if self.path_channel_coupling else 1)
        weights = self.param(f"paths_{n}", uniform_root_3, shape).astype(gamma.dtype)
        weights = jnp.broadcast_to(weights, (len(couplings), gamma.shape[2]))
        products = jnp.einsum("pabc,pu->ubac", jnp.asarray(couplings, gamma.dtype), weights)
        return jnp.einsum("nbu,ubac->nuac", gamma, products)

    def _scaled(self, energies, types):
        """Apply scale and shift of the elements."""
        shape = (self._num_types,)
        if self.learned_scale:
            scale = self.param("scale", nn.initializers.ones, shape)
            energies = energies * scale.astype(energies.dtype)[types]
        if self.learned_shift:
            shift = self.param("shift", nn.initializers.zeros, shape)
            energies = energies + shift.astype(energies.dtype)[types]
        return energies


def polynomial_cutoff(x, power: int):
    """Compute the polynomial of degree power + 2 that falls from 1 to 0 for x from 0 to 1."""
    x, p = jnp.minimum(x, 1.0), float(power)
    outer = (p + 1) * (p + 2) / 2 - x * (p * (p + 2) - x * (p * (p + 1) / 2))
    return 1.0 - x**power * outer


def split(factored: Factored, sizes: Sequence[int]) -> list[Factored]:
    """Split the columns into parts of the given sizes."""
    stops = np.cumsum(sizes)
    return [factored.columns(stop - size, stop) for size, stop in zip(sizes, stops.tolist())]


def by_degree(num_components: int):
    """Yield each component with its degree."""
    for m in range(num_components):
        yield m, int(np.sqrt(m))


def environments(weights, harmonics, edge: Pairs, num: int) -> jax.Array:
    """Sum weights times harmonics over the neighbors of each atom.

    Args:
      weights: For each degree, weights, shape (E, U).
      harmonics: Harmonics, shape (E, M).
      edge: Directed pairs.
      num: Number of atoms N.

    Returns:
      Sums, shape (N, M, U).
    """
    sums = [
        segment_sum(weights[l] * harmonics[:, m, None], edge.receivers, num)
        for m, l in by_degree(harmonics.shape[1])
    ]
    return jnp.stack(sums, axis=1)


def center_tensor(matrices) -> jax.Array:
    """Return the tensor of each atom whose product with those of its edges is the invariant.

    Args:
      matrices: Matrices of the layers so far, shape (N, U, A, C) each.

    Returns:
      Tensors, shape (N, U, M).
    """
    tensor = matrices[-1][..., 0]  # the first irrep of the products is the invariant
    for matrix in reversed(matrices[:-1]):
        tensor = jnp.einsum("nuac,nuc->nua", matrix, tensor)
    return tensor


def edge_invariants(tensors, harmonics, centers, edge: Pairs) -> jax.Array:
    """Compute the invariants of the edges.

    Args:
      tensors: For each degree, weights of the harmonics in the tensors of the edges, shape (E, U).
      harmonics: Harmonics, shape (E, M).
      centers: Tensors of the atoms from `center_tensor`, shape (N, U, M).
      edge: Directed pairs.

    Returns:
      Invariants, shape (E, U).
    """
    projections = [0.0] * len(tensors)
    for m, l in by_degree(harmonics.shape[1]):
        projections[l] += harmonics[:, m, None] * gather(centers[..., m], edge.receivers)
    return sum(t * p for t, p in zip(tensors, projections))

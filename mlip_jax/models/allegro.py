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

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.element_rows import element_rows
from mlip_jax.graphs.graph import Pairs, pairs
from mlip_jax.graphs.slot_sums import SlotIndex
from mlip_jax.models.layers.allegro_paths import layer_irreps, product_tensor
from mlip_jax.models.layers.basic import (
    gather,
    polynomial_cutoff,
    safe_norm,
    segment_sum,
    unit_vectors,
)
from mlip_jax.models.layers.factored import Factored, FactoredMLP, uniform
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER, AtomOutputs
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics
from mlip_jax.models.layers.tensor_products.linear import element_index

EMBEDDINGS = ("bessel", "spline")
PARITIES = ("full", "natural")


class Model(nn.Module):
    """Allegro; the defaults are the published ones.

    Attributes:
      num_features: Number of scalars of an edge.
      num_tensor_features: Number of channels of the tensors.
      num_layers: Number of tensor products.
      max_degree: Largest degree l of the harmonics and tensors.
      parity: Irreps of the tensors: both parities of each degree ("full"), or those of the harmonics
        ("natural"). The others reach the energy only with three layers or more.
      cutoff: Cutoff radius (Å).
      pair_cutoffs: Cutoff of each pair of elements (Å), row by row: elements of the receiver, then
        of the sender. Requires `elements`; None: `cutoff` for all.
      elements: Atomic numbers with weights; None for all. Few elements save memory.
      avg_num_neighbors: Average number of neighbors, or that of each of `elements`. The root
        divides sums over neighbors. Training runs set it from their data.
      embedding: First scalars of the edges: Bessel functions times vectors of both elements
        ("bessel"), or splines for each pair of elements ("spline", requires `elements`).
      embedding_width: Number of functions of "bessel"; None: num_features.
      num_radial: Number of Bessel functions.
      radial_roots: Roots n of the Bessel functions sin(n pi d / cutoff), num_radial of them; None:
        1, 2, ....
      learned_roots: Whether the roots are trained.
      cutoff_power: Power p of the envelope of "bessel" (layers.basic.polynomial_cutoff).
      num_splines: Number of splines.
      spline_span: Number of neighboring splines that overlap.
      embedding_widths: Widths of the hidden layers of the network of the first scalars.
      latent_widths: Widths of the hidden layers of the networks of later scalars.
      energy_widths: Widths of the hidden layers of the network of edge energies.
      path_channel_coupling: Whether each channel weights the paths of the tensor products by itself.
      zero_init: Whether the last kernel of the network of edge energies starts at zero.
      learned_scale: Whether the energy has a trainable scale per element, initially 1.
      learned_shift: Whether the energy has a trainable shift per element, initially 0.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int = 64
    num_tensor_features: int = 16
    num_layers: int = 2
    max_degree: int = 2
    parity: str = "full"
    cutoff: float = 5.0
    pair_cutoffs: Sequence[float] | None = None
    elements: Sequence[int] | None = None
    avg_num_neighbors: float | Sequence[float] = 16.0
    embedding: str = "bessel"
    embedding_width: int | None = None
    num_radial: int = 8
    radial_roots: Sequence[float] | None = None
    learned_roots: bool = False
    cutoff_power: int = 6
    num_splines: int = 16
    spline_span: int = 12
    embedding_widths: Sequence[int] = (64,)
    latent_widths: Sequence[int] = (64,)
    energy_widths: Sequence[int] = (32,)
    path_channel_coupling: bool = True
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True

    @property
    def local(self) -> bool:
        """Whether an atomic energy depends only on atoms within the cutoff, with any layers."""
        return True

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        self._check_options()
        # edge geometry: distances (E,), harmonics (E, 2l + 1) of each degree
        edge = pairs(graph, undirected=False, slots=True)
        distances = safe_norm(edge.displacements)
        unit = unit_vectors(edge.displacements, distances)
        harmonics = spherical_harmonics(unit, self.max_degree)
        numbers = jnp.asarray(graph.nodes["numbers"])
        types, num_types = element_index(numbers, self.elements)
        norm = self._norm(types, num_types, distances.dtype)
        # scalars, and weights of the tensors and of the first environments
        scalars = self._pair_scalars(distances, types, num_types, edge)
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
            network = FactoredMLP(tuple(self.latent_widths), sum(outputs), name=f"latent_{n}")
            latent, *weights = split(network([*latents, Factored(invariants)]), outputs)
            latents.append(latent)
        # energies (N,), features (N, M, F)
        readout = FactoredMLP(tuple(self.energy_widths), 1, self.zero_init, name="readout")
        energies = segment_sum(readout(latents).value()[:, 0], edge.receivers, len(types))
        energies = energies * norm * float(np.sqrt(0.5))
        energies = self._apply_scale(energies, numbers)
        every_degree = [latents[-1].value()] * (self.max_degree + 1)
        features = environments(every_degree, harmonics, edge, len(types)) * norm[:, None, None]
        return AtomOutputs(energies, features[:, None])

    def _check_options(self):
        for field, allowed in (("embedding", EMBEDDINGS), ("parity", PARITIES)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {allowed}, received {getattr(self, field)!r}"
                )
        num = len(self.elements or ())
        if not num and self.embedding == "spline":
            raise ValueError("embedding='spline' requires elements, received None")
        for field, size in (("avg_num_neighbors", num), ("pair_cutoffs", num * num)):
            value = getattr(self, field)
            if isinstance(value, Sequence) and len(value) != size:
                raise ValueError(
                    f"{field} must have {size} numbers for elements={self.elements}, received "
                    f"{len(value)}"
                )

    def _apply_scale(self, energies, numbers):
        """Apply scale and shift of the elements."""
        size = (MAX_ATOMIC_NUMBER + 1,)
        if self.learned_scale:
            scale = self.param("scale", nn.initializers.ones, size)
            energies = energies * element_rows(scale, numbers, energies.dtype)
        if self.learned_shift:
            shift = self.param("shift", nn.initializers.zeros, size)
            energies = energies + element_rows(shift, numbers, energies.dtype)
        return energies

    def _norm(self, types, num_types, dtype):
        """Return the factor of sums over the neighbors of each atom, shape (N,)."""
        factors = jnp.asarray(np.broadcast_to(self.avg_num_neighbors, num_types) ** -0.5, dtype)
        return factors[types]

    def _pair_scalars(self, distances, types, num_types, edge: Pairs) -> Factored:
        """Compute the first scalars of the edges, shape (E, num_features)."""
        of_center, of_neighbor = gather(types, edge.receivers), gather(types, edge.senders)
        pair, cutoff = of_center * num_types + of_neighbor, self.cutoff
        if self.pair_cutoffs is not None:
            cutoff = gather(jnp.asarray(self.pair_cutoffs, distances.dtype), pair)
        if self.embedding == "spline":
            parts = [Factored(self._splines(distances / cutoff, pair, num_types))]
        else:
            radial = self._bessel_functions(distances, cutoff)
            parts = [
                self._times_element("center", radial, of_center, types, edge.receivers, num_types),
                self._times_element(
                    "neighbor", radial, of_neighbor, types, edge.senders, num_types
                ),
            ]
        widths = tuple(self.embedding_widths)
        return FactoredMLP(widths, self.num_features, name="embedding")(parts)

    def _bessel_functions(self, distances, cutoff):
        """Compute Bessel functions times envelope, shape (E, num_radial)."""
        roots = (
            np.arange(1.0, self.num_radial + 1) if self.radial_roots is None else self.radial_roots
        )
        if len(roots) != self.num_radial:
            raise ValueError(
                f"radial_roots must have {self.num_radial} numbers (num_radial), received {len(roots)}"
            )
        roots = jnp.asarray(roots, distances.dtype)
        if self.learned_roots:
            start = roots
            roots = self.param("radial_roots", lambda _: start.astype(jnp.float32))
            roots = roots.astype(distances.dtype)
        envelope = polynomial_cutoff(distances, cutoff, self.cutoff_power)
        return roots * jnp.sinc(roots * (distances / cutoff)[:, None]) * envelope[:, None]

    def _times_element(self, name, radial, index, types, atoms, num_types) -> Factored:
        """Return functions of the distance times those of one element, shape (E, half the width)."""
        width = (self.embedding_width or self.num_features) // 2
        kernel = self.param(f"{name}_radial", uniform, (self.num_radial, width))
        table = self.param(name, nn.initializers.normal(1.0), (num_types, width))
        kernel = kernel.astype(radial.dtype) * float(self.num_radial**-0.5)
        if isinstance(atoms, SlotIndex):  # without scatter operations in derivatives
            of_element = gather(element_rows(table, types, radial.dtype), atoms)
        else:
            of_element = gather(table.astype(radial.dtype), index)
        return Factored(of_element * (radial @ kernel))

    def _splines(self, x, pair, num_types):
        """Compute a spline for each pair of elements and channel, shape (E, num_features).

        Args:
          x: Distances over cutoffs, shape (E,).
          pair: Rows of the pairs of elements, shape (E,).
          num_types: Number of elements.
        """
        num, span = self.num_splines, self.spline_span
        low, width = (np.arange(num) - span) / num, (span + 1) / num
        start = jnp.asarray(low, x.dtype)
        # each function is a bump on an interval; the last one ends at the cutoff
        inside = jnp.clip(x[:, None], start, jnp.asarray(low + width, x.dtype)) - start
        basis = 0.25 * jnp.square(1.0 - jnp.cos(inside * (2 * np.pi / width)))
        shape = (num, num_types**2, self.num_features)
        init = functools.partial(uniform, variance=1.0 / span)
        table = self.param("splines", init, shape).astype(x.dtype)
        return sum(gather(table[k], pair) * basis[:, k, None] for k in range(num))

    def _product_matrix(self, n, irreps, gamma):
        """Return the matrices of the tensor product of layer n with the environments.

        Args:
          n: Layer.
          irreps: Irreps of the tensors before and after each layer.
          gamma: Environments, shape (N, M, U).

        Returns:
          Matrices, shape (N, U, components of irreps[n], components of irreps[n + 1]).
        """
        couplings = product_tensor(irreps[n], irreps[n + 1], self.max_degree)
        shape = (len(couplings), self.num_tensor_features if self.path_channel_coupling else 1)
        weights = self.param(f"paths_{n}", uniform, shape).astype(gamma.dtype)
        weights = jnp.broadcast_to(weights, (len(couplings), gamma.shape[2]))
        products = jnp.einsum("pabc,pu->ubac", jnp.asarray(couplings, gamma.dtype), weights)
        return jnp.einsum("nbu,ubac->nuac", gamma, products)


def split(factored: Factored, sizes: Sequence[int]) -> list[Factored]:
    """Split the columns into parts of the given sizes."""
    stops = np.cumsum(sizes)
    return [factored.columns(stop - size, stop) for size, stop in zip(sizes, stops.tolist())]


def environments(weights, harmonics, edge: Pairs, num: int) -> jax.Array:
    """Sum weights times harmonics over the neighbors of each atom.

    Args:
      weights: For each degree, weights, shape (E, U).
      harmonics: Harmonics of each degree, shape (E, 2l + 1).
      edge: Directed pairs.
      num: Number of atoms N.

    Returns:
      Sums, shape (N, M, U).
    """
    sums = [
        segment_sum(w[:, None] * y[..., None], edge.receivers, num)
        for w, y in zip(weights, harmonics)
    ]
    return jnp.concatenate(sums, axis=1)


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
      harmonics: Harmonics of each degree, shape (E, 2l + 1).
      centers: Tensors of the atoms from `center_tensor`, shape (N, U, M).
      edge: Directed pairs.

    Returns:
      Invariants, shape (E, U).
    """
    start, invariants = 0, 0.0
    for tensor, y in zip(tensors, harmonics):
        center = jnp.swapaxes(centers[..., start : start + y.shape[1]], 1, 2)  # (N, 2l + 1, U)
        invariants += tensor * jnp.sum(y[..., None] * gather(center, edge.receivers), axis=1)
        start += y.shape[1]
    return invariants

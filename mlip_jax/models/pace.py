"""PACE: many-body products of boosted edges (Xu et al., NeurIPS 2024).

Edges have equivariant features of their own, from the distance, the direction and both elements
(edge_booster.py). A layer sums products of these and the neighbors' features (A), maps A linearly
in three ways, and forms products of the three (B) with the couplings of MACE. The model agrees with
the published program, on e3nn 0.6.0, if the options are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.models.layers.basic import (
    bernstein_basis,
    exponential_cutoff,
    polynomial_cutoff,
    radial_basis,
    safe_norm,
    unit_vectors,
)
from mlip_jax.models.layers.heads import AtomOutputs
from mlip_jax.models.layers.tensor_products.convolution import convolution_pairs
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics
from mlip_jax.models.layers.tensor_products.edge_booster import (
    EdgeBooster,
    ElementPairNetwork,
    directions,
    sum_edges,
    sum_messages,
    summed_paths,
)
from mlip_jax.models.layers.tensor_products.element_features import (
    ScalarReadout,
    embed,
    features_of_heads,
)
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, Features, natural
from mlip_jax.models.layers.tensor_products.linear import (
    ElementLinear,
    IrrepsLinear,
    ScalarNetwork,
    element_index,
    scalars,
)
from mlip_jax.models.layers.tensor_products.symmetric_contraction import SymmetricContraction

RADIAL_BASES = ("bessel", "bernstein")
_EXPONENT = 0.9448630629184640  # initial exponent of the Bernstein polynomials (1/Å), 0.5 / bohr


class Model(nn.Module):
    """PACE; the defaults are the published ones.

    Attributes:
      num_features: Number of channels F of each degree, even.
      num_layers: Number of layers.
      max_degree: Largest degree of the edges and of the sums over the neighbors; published: 3.
      feature_degree: Largest degree of the features between layers; None: max_degree. The last layer
        has scalars.
      correlation: Number of factors of the largest products, 2 or 3.
      cutoff: Cutoff radius (Å).
      cutoff_power: Power p of the envelope of "bessel" (layers.polynomial_cutoff).
      radial_basis: Functions of the distance: "bessel", or "bernstein", Bernstein polynomials of an
        exponential with trainable exponent and a smooth envelope.
      num_radial: Number of radial functions.
      radial_centers: Wave numbers of "bessel" (1/Å), num_radial of them; None: n pi over the
        cutoff.
      radial_network: Widths of the hidden layers of the networks of edges.
      avg_num_neighbors: Average number of neighbors. Training runs set it from their data; the
        default is that of organic molecules within 5 Å.
      readout_width: Width of the hidden layer of the readouts.
      elements: Atomic numbers that the model has weights for; None for all.
      old_signs: Take the signs of products of e3nn before 0.5.1.
      learned_scale: Whether atomic energies are multiplied by a trainable scale per element.
      zero_init: Whether the last kernels of the readouts start at zero.
      undirected: False computes radial networks for both directions of each pair; this plain form
        is for tests.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int = 256
    num_layers: int = 2
    max_degree: int = 3
    feature_degree: int | None = None
    correlation: int = 3
    cutoff: float = 5.0
    cutoff_power: int = 5
    radial_basis: str = "bessel"
    num_radial: int = 8
    radial_centers: Sequence[float] | None = None
    radial_network: Sequence[int] = (64, 64, 64)
    avg_num_neighbors: float = 20.0
    readout_width: int = 16
    elements: Sequence[int] | None = None
    old_signs: bool = False
    learned_scale: bool = False
    zero_init: bool = True
    undirected: bool = True

    def _check_options(self):
        if self.radial_basis not in RADIAL_BASES:
            raise ValueError(
                f"radial_basis must be one of {RADIAL_BASES}, received {self.radial_basis!r}"
            )
        if self.correlation not in (2, 3):
            raise ValueError(f"correlation must be 2 or 3, received {self.correlation}")
        if self.num_features % 2 or not 0 <= (self.feature_degree or 0) <= self.max_degree:
            raise ValueError(
                f"num_features={self.num_features} must be even, and feature_degree="
                f"{self.feature_degree} between 0 and max_degree={self.max_degree}"
            )

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        self._check_options()
        numbers = graph.nodes["numbers"]
        elements = None if self.elements is None else tuple(self.elements)
        # edge geometry: distances (P,), harmonics (P, 2l + 1) in both directions
        edge = convolution_pairs(graph, self.undirected)
        distances = safe_norm(edge.displacements)
        unit = unit_vectors(edge.displacements, distances)
        ways = directions(edge, spherical_harmonics(unit, self.max_degree))
        radial = self._radial(distances)
        network = tuple(self.radial_network)
        degree = self.max_degree if self.feature_degree is None else self.feature_degree
        edges = EdgeBooster(self.max_degree, self.num_features, network, elements, name="edges")(
            ways, radial, numbers
        )
        # message passing
        layers: list[Features] = []
        features = embed(self, numbers, elements, self.num_features, distances.dtype)
        energies = jnp.zeros(len(numbers), distances.dtype)
        for n in range(self.num_layers):
            last = n == self.num_layers - 1
            features = PaceLayer(
                self.max_degree,
                0 if last else degree,
                self.correlation,
                network,
                self.avg_num_neighbors,
                elements,
                self.old_signs,
                name=f"layer_{n}",
            )(features, numbers, ways, edges, None if n == 0 else radial)
            readout = ScalarReadout(self.readout_width, self.zero_init, name=f"readout_{n}")
            energies += readout(scalars(features))
            layers.append(features)
        if self.learned_scale:
            index, num = element_index(numbers, elements)
            scale = self.param("scale", nn.initializers.ones, (num,)).astype(energies.dtype)
            energies *= scale[index]
        return AtomOutputs(energies, features_of_heads(layers))

    def _radial(self, d):
        """Compute the radial functions of the pairs with the envelope, shape (P, num_radial)."""
        if self.radial_basis == "bessel":
            rbf = radial_basis("bessel", self.radial_centers)(d, self.num_radial, self.cutoff)
            return rbf * polynomial_cutoff(d, self.cutoff, self.cutoff_power)[:, None]
        start = np.log(np.expm1(_EXPONENT))
        exponent = jax.nn.softplus(
            self.param("exponent", lambda _: jnp.asarray(start, jnp.float32))
        )
        rbf = bernstein_basis(d, self.num_radial, self.cutoff, exponent.astype(d.dtype))
        return rbf[:, ::-1] * exponential_cutoff(d, self.cutoff)[:, None]


class PaceLayer(nn.Module):
    """Sum over the neighbors, products of three linear maps of the sums, and a linear map.

    Attributes:
      max_degree: Option of `Model`.
      feature_degree: Largest degree of the output.
      correlation: Option of `Model`.
      radial_network: Option of `Model`.
      avg_num_neighbors: Option of `Model`.
      elements: Option of `Model`.
      old_signs: Option of `Model`.
    """

    max_degree: int
    feature_degree: int
    correlation: int
    radial_network: tuple[int, ...]
    avg_num_neighbors: float
    elements: tuple[int, ...] | None
    old_signs: bool

    @nn.compact
    def __call__(self, features: Features, numbers, ways, edges, radial) -> Features:
        """Compute the features of the next layer.

        Args:
          features: Features of the atoms.
          numbers: Atomic numbers, shape (N,).
          ways: Directions of the pairs.
          edges: Output of `EdgeBooster`.
          radial: Radial functions of the pairs, shape (P, num_radial); None in the first layer,
            where the features of the edges are the messages.
        """
        width, irreps = features[SCALAR].shape[-1], natural(self.max_degree)
        if radial is None:
            sums = sum_edges(ways, edges, len(numbers))
        else:
            sums = self._messages(features, numbers, ways, edges, radial)
        sums = {irrep: values / self.avg_num_neighbors for irrep, values in sums.items()}
        # products
        blocks = tuple((width, irrep) for irrep in irreps)
        names = (
            ("linear_2", "linear_1", "linear_3")
            if self.correlation == 3
            else ("linear_1", "linear_3")
        )
        factors = [IrrepsLinear(blocks, name=name)(sums) for name in names]
        products = SymmetricContraction(
            self.max_degree,
            tuple(range(self.feature_degree + 1)),
            self.correlation,
            self.elements,
            self.old_signs,
            name="contraction",
        )(factors, numbers)
        out = blocks[: self.feature_degree + 1]
        new = IrrepsLinear(out, name="product")(products)
        own = ElementLinear(out, self.elements, name="skip")(features, numbers)
        return {irrep: x + own[irrep] if irrep in own else x for irrep, x in new.items()}

    def _messages(self, features: Features, numbers, ways, edges, radial) -> Features:
        """Sum the products of the neighbors' features and the features of the edges."""
        width, degree = features[SCALAR].shape[-1], max(irrep.degree for irrep in features)
        paths = summed_paths(degree, self.max_degree)
        widths = (*self.radial_network, width * len(paths))
        by_radius = ScalarNetwork(widths, name="radial").path_weights(radial)
        by_elements = ElementPairNetwork(widths, self.elements, name="elements")

        def weights(way):
            pair = by_elements.path_weights(way, numbers, radial.dtype)
            hidden = jnp.concatenate([by_radius.hidden, pair.hidden], axis=1)
            kernels = jnp.split(
                jnp.concatenate([by_radius.kernel, pair.kernel]), len(paths), axis=1
            )
            return lambda k: hidden @ kernels[k]

        return sum_messages(features, ways, edges, [weights(way) for way in ways], paths)

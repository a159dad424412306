"""MACE: higher-order equivariant message passing (Batatia et al., NeurIPS 2022, arXiv:2206.07697).

Every atom has scalars and, between layers, features of higher degrees, each (N, 2l + 1, F). A layer
sums products of the neighbors' features and spherical harmonics (A), forms products of up to
`correlation` of these sums (B) and reads an energy from the scalars of the result. Radial networks
are evaluated once for each pair. The model agrees with mace-torch 0.3.16 if the options are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from ase.data import covalent_radii

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.basic import (
    gather,
    polynomial_cutoff,
    radial_basis,
    safe_norm,
    segment_sum,
    unit_vectors,
)
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER, AtomOutputs
from mlip_jax.models.layers.tensor_products.convolution import (
    convolution_pairs,
    convolution_paths,
    convolve,
    num_weights,
)
from mlip_jax.models.layers.tensor_products.couplings import opposite, spherical_harmonics
from mlip_jax.models.layers.tensor_products.element_features import (
    ScalarReadout,
    embed,
    features_of_heads,
)
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, Features, irreps_of, natural
from mlip_jax.models.layers.tensor_products.linear import (
    ElementLinear,
    IrrepsLinear,
    ScalarNetwork,
    scalars,
)
from mlip_jax.models.layers.tensor_products.symmetric_contraction import SymmetricContraction

# names of the interaction blocks of mace-torch: RealAgnosticInteractionBlock, ...
INTERACTIONS = ("agnostic", "residual", "agnostic_density", "residual_density")
DISTANCE_TRANSFORMS = ("none", "agnesi")
ZBL_CONSTANTS = (0.1818, 0.5099, 0.2802, 0.02817, 0.3, 0.4543)


class Model(nn.Module):
    """MACE; the defaults are those of its training program, with vectors between the layers.

    Attributes:
      num_features: Number of channels F of each degree.
      num_layers: Number of layers.
      max_degree: Largest degree of the spherical harmonics and of the sums over the neighbors.
      feature_degree: Largest degree of the features between layers. The last layer has scalars.
      correlation: Largest number of factors of a product.
      cutoff: Cutoff radius (Å).
      cutoff_power: Power p of the envelope (layers.polynomial_cutoff).
      num_radial: Number of Bessel functions.
      radial_centers: Wave numbers of the Bessel functions (1/Å), num_radial of them; None: n pi
        over the cutoff.
      radial_network: Widths of the hidden layers of the radial networks.
      first_interaction: Block of the first layer (INTERACTIONS). "residual" blocks add a map of the
        previous features of the atom. The others weight the sum over the neighbors by the element
        instead. "density" blocks divide the sum by one plus a learned function of the neighbors'
        distances, the others by `avg_num_neighbors`.
      interaction: Block of the other layers.
      avg_num_neighbors: Average number of neighbors. Training runs set it from their data; the
        default is that of organic molecules within 5 Å.
      distance_transform: Distance in the Bessel functions: "none", or "agnesi", which depends on
        the covalent radii of both elements.
      agnesi: Constants q, p and a of "agnesi".
      covalent_radii: Covalent radius of each element from 0 on (Å); None for those of ASE.
      zbl: Whether there is a screened nuclear repulsion up to the sum of the covalent radii. It is
        in units of the energy scale, too.
      zbl_constants: Constants of that repulsion: four coefficients, the exponent of the atomic numbers
        and the prefactor of the screening length.
      readout_width: Width of the hidden layer of the last readout; None for a linear readout, as in
        models of one layer of mace-torch.
      elements: Atomic numbers that the model has weights for; None for all.
      zero_init: Whether the last kernels of the readouts start at zero.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int = 128
    num_layers: int = 2
    max_degree: int = 3
    feature_degree: int = 1
    correlation: int = 3
    cutoff: float = 5.0
    cutoff_power: int = 5
    num_radial: int = 8
    radial_centers: Sequence[float] | None = None
    radial_network: Sequence[int] = (64, 64, 64)
    first_interaction: str = "residual"
    interaction: str = "residual"
    avg_num_neighbors: float = 20.0
    distance_transform: str = "none"
    agnesi: Sequence[float] = (0.9183, 4.5791, 1.0805)
    covalent_radii: Sequence[float] | None = None
    zbl: bool = False
    zbl_constants: Sequence[float] = ZBL_CONSTANTS
    readout_width: int | None = 16
    elements: Sequence[int] | None = None
    zero_init: bool = True
    undirected: bool = True

    def _check_options(self):
        for field, allowed in (
            ("first_interaction", INTERACTIONS),
            ("interaction", INTERACTIONS),
            ("distance_transform", DISTANCE_TRANSFORMS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {allowed}, received {getattr(self, field)!r}"
                )
        if not 0 <= self.feature_degree <= self.max_degree:
            raise ValueError(
                f"feature_degree={self.feature_degree} must be between 0 and "
                f"max_degree={self.max_degree}"
            )

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        self._check_options()
        numbers = graph.nodes["numbers"]
        elements = None if self.elements is None else tuple(self.elements)
        # edge geometry: distances (P,), harmonics (P, 2l + 1) of the vectors to the receivers
        edge = convolution_pairs(graph, self.undirected)
        distances = safe_norm(edge.displacements)
        unit = unit_vectors(edge.displacements, distances)
        harmonics = opposite(spherical_harmonics(unit, self.max_degree))
        radial = self._radial(edge, distances, numbers)
        # message passing
        features = embed(self, numbers, elements, self.num_features, distances.dtype)
        energies, layers = jnp.zeros(len(numbers), distances.dtype), []
        for n in range(self.num_layers):
            last = n == self.num_layers - 1
            features = MaceLayer(
                self.max_degree,
                0 if last else self.feature_degree,
                self.correlation,
                tuple(self.radial_network),
                self.first_interaction if n == 0 else self.interaction,
                self.avg_num_neighbors,
                elements,
                name=f"layer_{n}",
            )(features, numbers, edge, harmonics, radial)
            width = self.readout_width if last else None
            energies += ScalarReadout(width, self.zero_init, name=f"readout_{n}")(scalars(features))
            layers.append(features)
        if self.zbl:
            energies += self._repulsion(edge, distances, numbers)
        return AtomOutputs(energies, features_of_heads(layers))

    def _radii(self, edge, numbers, dtype):
        """Return the covalent radii of the receivers and senders, shape (P,) each."""
        radii = covalent_radii if self.covalent_radii is None else np.asarray(self.covalent_radii)
        of_atoms = jnp.asarray(radii[: MAX_ATOMIC_NUMBER + 1], dtype)[numbers]
        return gather(of_atoms, edge.receivers), gather(of_atoms, edge.senders)

    def _radial(self, edge, distances, numbers):
        """Compute the radial functions of the pairs with the envelope, shape (P, num_radial)."""
        d = distances
        if self.distance_transform == "agnesi":
            q, p, a = self.agnesi
            u = distances / (0.5 * sum(self._radii(edge, numbers, distances.dtype)))
            d = 1.0 / (1.0 + a * u**p / (1.0 + u ** (p - q)))
        rbf = radial_basis("bessel", self.radial_centers)(d, self.num_radial, self.cutoff)
        return rbf * polynomial_cutoff(distances, self.cutoff, self.cutoff_power)[:, None]

    def _repulsion(self, edge, distances, numbers):
        """Compute the screened nuclear repulsion of each atom, shape (N,)."""
        first, second = self._radii(edge, numbers, distances.dtype)
        reach = polynomial_cutoff(distances / (first + second), 1.0, self.cutoff_power)
        charges = jnp.asarray(numbers, distances.dtype)
        z = [gather(charges, index) for index in (edge.receivers, edge.senders)]
        energies = 0.5 * screened_repulsion(distances, *z, tuple(self.zbl_constants)) * reach
        total = segment_sum(energies, edge.receivers, len(numbers))
        if edge.undirected:
            total += segment_sum(energies, edge.senders, len(numbers))
        return total


class MaceLayer(nn.Module):
    """Sum over the neighbors, products of the sums, and a linear map.

    Attributes:
      max_degree: Option of `Model`.
      feature_degree: Largest degree of the output.
      correlation: Option of `Model`.
      radial_network: Option of `Model`.
      block: One of INTERACTIONS.
      avg_num_neighbors: Option of `Model`.
      elements: Option of `Model`.
    """

    max_degree: int
    feature_degree: int
    correlation: int
    radial_network: tuple[int, ...]
    block: str
    avg_num_neighbors: float
    elements: tuple[int, ...] | None

    @nn.compact
    def __call__(self, features: Features, numbers, edge: Pairs, harmonics, radial) -> Features:
        """Compute the features of the next layer.

        Args:
          features: Features of the atoms.
          numbers: Atomic numbers, shape (N,).
          edge: Pairs.
          harmonics: Spherical harmonics of the pairs, one array for each degree.
          radial: Radial functions of the pairs, shape (P, num_radial).
        """
        width, degrees = features[SCALAR].shape[-1], natural(self.max_degree)
        # sum over the neighbors: (N, 2l + 1, F) for l up to max_degree
        paths = convolution_paths(irreps_of(features), degrees, degrees, sort_weights=True)
        network = ScalarNetwork((*self.radial_network, num_weights(paths)), name="radial")
        up = IrrepsLinear(irreps_of(features), name="up")(features)
        sums = convolve(up, harmonics, network.path_weights(radial), edge, paths, old_signs=True)
        irreps = tuple((width, irrep) for irrep in degrees)
        sums = IrrepsLinear(irreps, name="linear")(sums)
        scale = self._normalization(edge, radial, len(numbers))
        sums = {irrep: values * scale for irrep, values in sums.items()}
        if "residual" not in self.block:
            sums = ElementLinear(irreps, self.elements, name="skip")(sums, numbers)
        # products
        out = irreps[: self.feature_degree + 1]
        targets = tuple(range(self.feature_degree + 1))
        products = SymmetricContraction(
            self.max_degree,
            targets,
            self.correlation,
            self.elements,
            old_signs=True,
            name="contraction",
        )(sums, numbers)
        new = IrrepsLinear(out, name="product")(products)
        if "residual" in self.block:
            own = ElementLinear(out, self.elements, name="skip")(features, numbers)
            new = {irrep: x + own[irrep] if irrep in own else x for irrep, x in new.items()}
        return new

    def _normalization(self, edge: Pairs, radial, num):
        """Return the factor of the sums, a number or shape (N, 1, 1)."""
        if "density" not in self.block:
            return 1.0 / self.avg_num_neighbors
        density = jnp.tanh(ScalarNetwork((1,), name="density")(radial)[:, 0] ** 2)
        total = segment_sum(density, edge.receivers, num)
        if edge.undirected:
            total += segment_sum(density, edge.senders, num)
        return (1.0 / (1.0 + total))[:, None, None]


def screened_repulsion(
    d: jax.Array, z1: jax.Array, z2: jax.Array, constants: Sequence[float] = ZBL_CONSTANTS
) -> jax.Array:
    """Compute the repulsion of nuclei of Ziegler, Biersack and Littmark with MACE's constants (eV).

    Args:
      d: Distances (Å).
      z1, z2: Atomic numbers, in the dtype of d.
      constants: Four coefficients, the exponent of the atomic numbers and the prefactor of the
        screening length.
    """
    *coefficients, power, prefactor = constants
    zero = d == 0
    d = jnp.where(zero, 1.0, d)
    x = d * (z1**power + z2**power) / (prefactor * 0.529)
    exponents = (3.2, 0.9423, 0.4028, 0.2016)
    screening = sum(c * jnp.exp(-a * x) for c, a in zip(coefficients, exponents))
    return jnp.where(zero, 0.0, 14.3996 * z1 * z2 / d * screening)

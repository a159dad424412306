"""SevenNet (Park et al., J. Chem. Theory Comput. 20, 4857, 2024): a variant of NequIP.

It differs from NequIP in its first features, in the self-connection of every layer, in the radial
network, the normalization of messages and the energy head. The model agrees with sevenn 0.13.0 if
the options are the same, and reads its pretrained force fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.models.layers.basic import polynomial_cutoff, safe_norm, unit_vectors, xplor_cutoff
from mlip_jax.models.layers.heads import AtomOutputs, scale_and_shift
from mlip_jax.models.layers.tensor_products.convolution import convolution_pairs
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics
from mlip_jax.models.layers.tensor_products.gates import layout
from mlip_jax.models.layers.tensor_products.interaction import Interaction
from mlip_jax.models.layers.tensor_products.irreps import EVEN, ODD, SCALAR, Irrep, Irreps
from mlip_jax.models.layers.tensor_products.linear import (
    IrrepsLinear,
    ScalarNetwork,
    element_index,
    scalars,
    table_rows,
)

PARITIES = ("full", "even")


class Model(nn.Module):
    """SevenNet; the defaults are those of sevenn 0.13.

    Attributes:
      num_features: Number of channels of each irrep, or of the irreps of each degree.
      num_layers: Number of interaction blocks.
      max_degree: Largest degree of the features.
      harmonics_degree: Largest degree of the harmonics; None: max_degree.
      parity: Irreps of the features: both parities of each degree ("full"), or all even ("even").
        With "even" also the harmonics count as even, so the energy of a mirror image differs.
      cutoff: Cutoff radius (Å).
      cutoff_onset: Distance (Å) from which the XPLOR switch decreases, with a continuous first
        derivative; None: polynomial cutoff.
      cutoff_power: Power of the polynomial cutoff (layers.basic.polynomial_cutoff).
      num_radial: Number of Bessel functions.
      radial_centers: Wave numbers of the Bessel functions (1/Å); None: n pi / cutoff.
      learned_centers: Whether the wave numbers are trained.
      normalize_harmonics: Whether harmonics are of unit vectors. Otherwise those of degree l grow
        with the distance to the power of l.
      radial_widths: Widths of the hidden layers of the radial networks.
      self_connection: Map of an atom's own features in each layer: "elements", with weights for
        each element, or "linear"; one for all layers or one per layer.
      elements: Atomic numbers with weights; None for all. With elements, their one-hot vectors are
        normalized as in sevenn.
      avg_num_neighbors: Divisor of the summed messages, for all layers or one per layer. Training
        runs set it to the average number of neighbors in their data.
      energy_widths: Widths of the hidden layers of a network with ReLU as energy head; None: two
        linear layers.
      use_bias: Whether linear layers in blocks and head have a bias on scalars, as force fields
        with several reference methods have.
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_scale: Whether the energy head learns a scale per element.
      learned_shift: Whether the energy head learns a shift per element.
      remat: Whether to recompute layers in the backward pass, to save memory.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int | Sequence[int] = 32
    num_layers: int = 3
    max_degree: int = 1
    harmonics_degree: int | None = None
    parity: str = "full"
    cutoff: float = 4.5
    cutoff_onset: float | None = None
    cutoff_power: int = 6
    num_radial: int = 8
    radial_centers: Sequence[float] | None = None
    learned_centers: bool = True
    normalize_harmonics: bool = True
    radial_widths: Sequence[int] = (64, 64)
    self_connection: str | Sequence[str] = "elements"
    elements: Sequence[int] | None = None
    avg_num_neighbors: float | Sequence[float] = 16.0
    energy_widths: Sequence[int] | None = None
    use_bias: bool = False
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True
    remat: bool = False
    undirected: bool = True

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        numbers = graph.nodes["numbers"]
        elements = None if self.elements is None else tuple(self.elements)
        rows, num_rows = element_index(numbers, elements)
        hidden = self.hidden_irreps()
        # edge geometry: distances (P,), harmonics (P, 2l + 1), radial functions (P, num_radial)
        edge = convolution_pairs(graph, self.undirected)
        distances = safe_norm(edge.displacements)
        vectors = (
            unit_vectors(edge.displacements, distances)
            if self.normalize_harmonics
            else edge.displacements
        )
        harmonics = spherical_harmonics(vectors, len(self.harmonic_irreps()) - 1)
        radial = self._radial(distances)
        one_hot = 1.0 if elements is None else 1 / sqrt(num_rows)
        table = self.param("embedding", nn.initializers.normal(1.0), (num_rows, self.num_scalars()))
        table = (table * one_hot).astype(distances.dtype)
        features = {SCALAR: table_rows(table, rows)[:, None]}
        block = nn.remat(Interaction) if self.remat else Interaction
        for n in range(self.num_layers):
            wanted = hidden if n < self.num_layers - 1 else ((self.num_scalars(), SCALAR),)
            features = block(
                wanted,
                self.harmonic_irreps(),
                tuple(self.radial_widths),
                "e3nn",
                self.of_layer("self_connection", n),
                elements,
                one_hot,
                self.use_bias,
                edge.undirected,
                name=f"layer_{n}",
            )(
                features,
                numbers,
                None,
                edge.receivers,
                edge.senders,
                harmonics,
                radial,
                1 / self.of_layer("avg_num_neighbors", n),
            )
        energies = scale_and_shift(
            self, self._energies(features), numbers, self.learned_scale, self.learned_shift
        )
        return AtomOutputs(energies, layout(features, 0, False))

    def num_scalars(self) -> int:
        """Return the number of even scalars."""
        return self.num_features if np.ndim(self.num_features) == 0 else self.num_features[0]

    def hidden_irreps(self) -> Irreps:
        """Return the irreps of the features, sorted as in sevenn."""
        if self.parity not in PARITIES:
            raise ValueError(f"parity must be one of {PARITIES}, received {self.parity!r}")
        counts = self.num_features
        counts = [counts] * (self.max_degree + 1) if np.ndim(counts) == 0 else list(counts)
        if len(counts) != self.max_degree + 1:
            raise ValueError(
                f"num_features must be a number or one per degree from 0 to {self.max_degree}, received "
                f"{counts}"
            )
        parities = (ODD, EVEN) if self.parity == "full" else (EVEN,)
        return tuple((counts[l], Irrep(l, p)) for l in range(self.max_degree + 1) for p in parities)

    def harmonic_irreps(self) -> tuple[Irrep, ...]:
        """Return the irreps of the harmonics."""
        max_degree = self.max_degree if self.harmonics_degree is None else self.harmonics_degree
        return tuple(
            Irrep(l, EVEN if self.parity == "even" else (-1) ** l) for l in range(max_degree + 1)
        )

    def of_layer(self, option: str, n: int):
        """Return an option of layer n that is given for all layers or for each.

        Raises:
          ValueError: The option has another number of values than there are layers.
        """
        value = getattr(self, option)
        if isinstance(value, str) or np.ndim(value) == 0:
            return value
        if len(value) != self.num_layers:
            raise ValueError(
                f"{option} must have one value or one per layer ({self.num_layers}), received {value}"
            )
        return value[n]

    def _radial(self, distances) -> jax.Array:
        """Compute Bessel functions times envelope, shape (P, num_radial)."""
        centers = np.arange(1, self.num_radial + 1) * np.pi / self.cutoff
        if self.radial_centers is not None:
            centers = np.asarray(self.radial_centers, np.float64)
        if len(centers) != self.num_radial:
            raise ValueError(
                f"radial_centers must have {self.num_radial} numbers (num_radial), received "
                f"{len(centers)}"
            )
        if self.learned_centers:
            centers = self.param("radial_centers", lambda key: jnp.asarray(centers, jnp.float32))
        k = jnp.asarray(centers, distances.dtype)
        if self.cutoff_onset is None:
            envelope = polynomial_cutoff(distances, self.cutoff, self.cutoff_power)
        else:
            envelope = xplor_cutoff(distances, self.cutoff, self.cutoff_onset)
        return (2 / self.cutoff) * k * jnp.sinc(k / np.pi * distances[:, None]) * envelope[:, None]

    def _energies(self, features) -> jax.Array:
        """Compute atomic energies from scalars, (N,)."""
        if self.energy_widths is not None:
            return ScalarNetwork(
                (*self.energy_widths, 1), "relu", zero_init=self.zero_init, name="energy"
            )(scalars(features))[:, 0]
        width = self.num_scalars() // 2
        hidden = IrrepsLinear(((width, SCALAR),), self.use_bias, name="energy_hidden")(features)
        return ScalarNetwork((1,), zero_init=self.zero_init, name="energy")(scalars(hidden))[:, 0]

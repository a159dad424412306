"""Nequix: a small NequIP with normalized features (Koker et al., arXiv:2508.16067, 2025).

Features start as one-hot vectors of the elements. A layer mixes the channels, multiplies the
features of the neighbors by spherical harmonics with weights from a network of the distance, adds a
linear map of the atom's own features, divides by the root mean square, and applies a gate. All
irreps have the parity of the harmonics. The model agrees with nequix 0.4.5 if the options are the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.models.layers.basic import polynomial_cutoff, safe_norm, unit_vectors
from mlip_jax.models.layers.heads import AtomOutputs, scale_and_shift
from mlip_jax.models.layers.tensor_products.convolution import convolution_pairs
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics
from mlip_jax.models.layers.tensor_products.gates import layout
from mlip_jax.models.layers.tensor_products.interaction import Interaction
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, Irreps, natural
from mlip_jax.models.layers.tensor_products.linear import ScalarNetwork, element_index, scalars


class Model(nn.Module):
    """Nequix; the defaults are those of nequix-mp-1.

    Attributes:
      num_features: Number of channels of each degree, or one number per degree.
      num_layers: Number of interaction blocks.
      max_degree: Largest degree of the features.
      harmonics_degree: Largest degree of the harmonics, at least max_degree; None: max_degree.
      cutoff: Cutoff radius (Å).
      cutoff_power: Power of the polynomial cutoff (layers.basic.polynomial_cutoff).
      num_radial: Number of Bessel functions.
      radial_widths: Widths of the hidden layers of the radial networks.
      self_connection: Map of an atom's own features in each layer: "linear", or "elements" with
        weights for each element.
      rms_norm: Whether features are normalized before each gate.
      elements: Atomic numbers with weights; None for all. Few elements save memory.
      avg_num_neighbors: Average number of neighbors. Its root divides messages. Training runs set
        it from their data.
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_scale: Whether the energy head learns a scale per element.
      learned_shift: Whether the energy head learns a shift per element.
      remat: Whether to recompute layers in the backward pass, to save memory.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int | Sequence[int] = (128, 64, 32, 32)
    num_layers: int = 4
    max_degree: int = 3
    harmonics_degree: int | None = None
    cutoff: float = 6.0
    cutoff_power: int = 6
    num_radial: int = 8
    radial_widths: Sequence[int] = (64, 64)
    self_connection: str = "linear"
    rms_norm: bool = True
    elements: Sequence[int] | None = None
    avg_num_neighbors: float = 16.0
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
        directions = unit_vectors(edge.displacements, distances)
        harmonics = spherical_harmonics(directions, self.num_harmonics() - 1)
        radial = self._radial(distances)
        features = {SCALAR: jax.nn.one_hot(rows, num_rows, dtype=distances.dtype)[:, None]}
        block = nn.remat(Interaction) if self.remat else Interaction
        for n in range(self.num_layers):
            features = block(
                hidden if n < self.num_layers - 1 else hidden[:1],
                tuple(natural(self.num_harmonics() - 1)),
                tuple(self.radial_widths),
                "nequix",
                self.self_connection,
                elements,
                undirected=edge.undirected,
                rms_norm=self.rms_norm,
                name=f"layer_{n}",
            )(
                features,
                numbers,
                None,
                edge.receivers,
                edge.senders,
                harmonics,
                radial,
                1 / sqrt(self.avg_num_neighbors),
            )
        energies = ScalarNetwork((1,), zero_init=self.zero_init, name="energy")(scalars(features))
        energies = scale_and_shift(
            self, energies[:, 0], numbers, self.learned_scale, self.learned_shift
        )
        return AtomOutputs(energies, layout(features, 0, False))

    def hidden_irreps(self) -> Irreps:
        """Return the irreps of the features."""
        counts = self.num_features
        counts = [counts] * (self.max_degree + 1) if np.ndim(counts) == 0 else list(counts)
        if len(counts) != self.max_degree + 1:
            raise ValueError(
                f"num_features must be a number or one per degree from 0 to {self.max_degree}, received "
                f"{counts}"
            )
        return tuple(zip(counts, natural(self.max_degree)))

    def num_harmonics(self) -> int:
        """Return the number of degrees of the harmonics."""
        degree = self.max_degree if self.harmonics_degree is None else self.harmonics_degree
        if degree < self.max_degree:
            raise ValueError(
                f"harmonics_degree must be at least max_degree={self.max_degree}, received {degree}"
            )
        return degree + 1

    def _radial(self, distances) -> jax.Array:
        """Compute Bessel functions times envelope, shape (P, num_radial)."""
        k = jnp.arange(1, self.num_radial + 1, dtype=distances.dtype)
        u = distances[:, None] / self.cutoff
        envelope = polynomial_cutoff(distances, self.cutoff, self.cutoff_power)[:, None]
        return (2 * np.pi / self.cutoff**2) * k * jnp.sinc(k * u) * envelope

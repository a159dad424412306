"""Interaction block of NequIP, SevenNet and Nequix: convolution, self-connection, gate."""

from __future__ import annotations

import flax.linen as nn
import jax

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.tensor_products.convolution import (
    convolution_paths,
    convolve,
    num_weights,
)
from mlip_jax.models.layers.tensor_products.gates import gate_for
from mlip_jax.models.layers.tensor_products.irreps import Features, Irrep, Irreps, irreps_of
from mlip_jax.models.layers.tensor_products.linear import (
    NORMALIZATION,
    QUANTILE_NORMALIZATION,
    ElementLinear,
    IrrepsLinear,
    ScalarNetwork,
)
from mlip_jax.models.layers.tensor_products.rms_norm import RMSNorm

SELF_CONNECTIONS = ("none", "linear", "elements")


class Interaction(nn.Module):
    """Gate of the neighbors' convolved features plus a linear map of the atom's own features.

    Attributes:
      hidden: Irreps of the output. Those that products of features and harmonics do not reach are
        left out.
      harmonics: Irreps of the harmonics, one for each degree from 0 on.
      radial_widths: Widths of the hidden layers of the radial network.
      form: Normalization of the radial network (linear.ScalarNetwork) and of the gate.
      self_connection: Map of the atom's own features: "none", "linear", or "elements" for weights
        that depend on the element.
      elements: Atomic numbers with weights; None for all.
      element_scale: Factor of the self-connection "elements".
      use_bias: Whether linear layers after the embedding have a bias on even scalars.
      undirected: Whether pairs send messages both ways (graph.Pairs).
      rms_norm: Whether features are normalized before the gate.
    """

    hidden: Irreps
    harmonics: tuple[Irrep, ...]
    radial_widths: tuple[int, ...]
    form: str = "e3nn"
    self_connection: str = "elements"
    elements: tuple[int, ...] | None = None
    element_scale: float = 1.0
    use_bias: bool = False
    undirected: bool = False
    rms_norm: bool = False

    @nn.compact
    def __call__(
        self,
        features: Features,
        numbers: jax.Array,
        attributes: jax.Array | None,
        receivers: jax.Array,
        senders: jax.Array,
        harmonics: list[jax.Array],
        radial: jax.Array,
        scale,
    ) -> Features:
        """Compute the features of the next layer.

        Args:
          features: Features of the atoms.
          numbers: Atomic numbers, shape (N,).
          attributes: Table of attributes for the self-connection "elements"; None for one-hot.
          receivers: Index of the receiver of each pair, shape (P,).
          senders: Index of the sender of each pair, shape (P,).
          harmonics: Spherical harmonics of the pairs, one array for each degree.
          radial: Radial functions of the pairs, including the envelope, shape (P, K).
          scale: Factor of the neighbors' features, a number or shape (N, 1, 1).
        """
        sources = irreps_of(features)
        factors = QUANTILE_NORMALIZATION if self.form == "nequix" else NORMALIZATION
        gate = gate_for(self.hidden, features, self.harmonics, factors)
        paths = convolution_paths(
            sources, list(self.harmonics), {irrep for _, irrep in gate.inputs}
        )
        weights = ScalarNetwork(
            (*self.radial_widths, num_weights(paths)), form=self.form, name="radial"
        ).path_weights(radial)
        mixed = IrrepsLinear(sources, self.use_bias, name="linear_1")(features)
        mixed = {irrep: values * scale for irrep, values in mixed.items()}
        edge = Pairs(receivers, senders, None, self.undirected)
        summed = convolve(mixed, harmonics, weights, edge, paths)
        out = IrrepsLinear(gate.inputs, self.use_bias, name="linear_2")(summed)
        own = self._self_connection(gate.inputs, features, numbers, attributes)
        out = {
            irrep: values + own[irrep] if irrep in own else values for irrep, values in out.items()
        }
        return gate(RMSNorm(name="norm")(out) if self.rms_norm else out)

    def _self_connection(self, irreps, features, numbers, attributes):
        if self.self_connection not in SELF_CONNECTIONS:
            raise ValueError(
                f"self_connection must be one of {SELF_CONNECTIONS}, received {self.self_connection!r}"
            )
        if self.self_connection == "none":
            return {}
        matching = tuple(block for block in irreps if block[1] in features)
        if self.self_connection == "linear":
            return IrrepsLinear(matching, name="self_connection")(features)
        return ElementLinear(matching, self.elements, self.element_scale, name="self_connection")(
            features, numbers, attributes
        )

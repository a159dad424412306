"""SchNet: continuous-filter convolutions (Schütt et al., J. Chem. Phys. 148, 241722, 2018).

Every atom carries features x (N, F). An interaction multiplies the features of the neighbours, brought to the width of
the filters, with a filter that a network makes of the distance alone; filters are computed once for each pair. Agrees
with SchNetPack 2.1.1 where the options say the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jraph

from mlip_jax.graphs.graph import Pairs, pairs
from mlip_jax.models.layers.basic import (
    Dense,
    TwoLayers,
    cutoff_function,
    gather,
    radial_basis,
    safe_norm,
    segment_sum,
)
from mlip_jax.models.layers.heads import AtomicEnergy, AtomOutputs, embed_elements


class Model(nn.Module):
    """SchNet; the defaults are SchNetPack's, with the paper's activation in the energy head.

    Attributes:
      num_features: F. num_layers: Interaction blocks.
      num_filters: Width of the filters; None: num_features.
      cutoff: Å.
      radial_basis, num_radial: Basis of the distance (layers.RADIAL_BASES) and its size.
      radial_centers, radial_widths: Its constants, where they are not to be computed (layers.radial_basis).
      cutoff_fn: Envelope of the filters (layers.CUTOFFS); the paper has none.
      activation: In the filter networks and after the convolutions (layers.ACTIVATIONS).
      energy_width, energy_act, zero_init, learned_scale, learned_shift: Of the energy head (heads.AtomicEnergy).
      undirected: False computes filters for both directions of each pair; the plain form, for tests.
    """

    num_features: int = 128
    num_layers: int = 6
    num_filters: int | None = None
    cutoff: float = 5.0
    radial_basis: str = "gaussian"
    num_radial: int = 20
    radial_centers: Sequence[float] | None = None
    radial_widths: Sequence[float] | None = None
    cutoff_fn: str = "cosine"
    activation: str = "shifted_softplus"
    energy_width: int | None = None
    energy_act: str = "shifted_softplus"
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True
    undirected: bool = True

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        width, numbers = self.num_features, graph.nodes["numbers"]
        edge = pairs(graph, self.undirected)
        distances = safe_norm(edge.displacements)
        envelope = cutoff_function(self.cutoff_fn)(distances, self.cutoff)[:, None]
        rbf = radial_basis(self.radial_basis, self.radial_centers, self.radial_widths)(
            distances, self.num_radial, self.cutoff)
        x = embed_elements(self, numbers, width, distances.dtype)
        for n in range(self.num_layers):
            filters = TwoLayers((self.num_filters or width,) * 2, self.activation, name=f"filter_{n}")(rbf) * envelope
            y = Dense(filters.shape[-1], use_bias=False, name=f"in_{n}")(x)
            x = x + TwoLayers((width, width), self.activation, name=f"out_{n}")(convolution(y, filters, edge))
        energies = AtomicEnergy(
            self.energy_width or width // 2, self.energy_act, self.zero_init, self.learned_scale, self.learned_shift,
            name="energy")(x, numbers)
        return AtomOutputs(energies, x[:, None, None, :])


def convolution(values, filters, edge: Pairs):
    """Sum over the neighbours of values times filter: (N, W), (P, W) -> (N, W)."""
    total = segment_sum(gather(values, edge.senders) * filters, edge.receivers, len(values))
    if edge.undirected:
        total = total + segment_sum(gather(values, edge.receivers) * filters, edge.senders, len(values))
    return total

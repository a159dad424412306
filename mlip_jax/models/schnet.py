"""SchNet: continuous-filter convolutions (Schütt et al., J. Chem. Phys. 148, 241722, 2018).

Every atom has features x (N, F). An interaction projects the features of the neighbors to the width
of the filters and multiplies them with a filter, the output of a network of the distance. Filters
are computed once for each pair. The model agrees with SchNetPack 2.1.1 if the options are the same.
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
    """SchNet; the defaults are those of SchNetPack, with the paper's activation in the energy head.

    Attributes:
      num_features: Number of features F.
      num_layers: Number of interaction blocks.
      num_filters: Width of the filters; None: num_features.
      cutoff: Cutoff radius (Å).
      radial_basis: Name of the radial basis (layers.RADIAL_BASES).
      num_radial: Number of radial basis functions.
      radial_centers: Centers of "gaussian" (Å) or wave numbers of "bessel" (1/Å), num_radial of
        them; None: computed (layers.radial_basis).
      radial_widths: Widths of "gaussian" (Å), num_radial of them; None: computed
        (layers.radial_basis).
      cutoff_fn: Envelope of the filters (layers.CUTOFFS); the paper has none.
      activation: Activation in the filter networks and after the convolutions (layers.ACTIVATIONS).
      energy_width: Hidden width of the energy head (heads.AtomicEnergy); None: half of
        num_features.
      energy_act: Activation of the energy head (layers.ACTIVATIONS).
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_scale: Whether the energy head learns a scale per element.
      learned_shift: Whether the energy head learns a shift per element.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

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
        # edge geometry: distances (P,), radial basis (P, num_radial)
        edge = pairs(graph, self.undirected, slots=True)
        distances = safe_norm(edge.displacements)
        envelope = cutoff_function(self.cutoff_fn)(distances, self.cutoff)[:, None]
        rbf = radial_basis(self.radial_basis, self.radial_centers, self.radial_widths)(
            distances, self.num_radial, self.cutoff
        )
        # interactions: x (N, F)
        x = embed_elements(self, numbers, width, distances.dtype)
        for n in range(self.num_layers):
            filters = (
                TwoLayers((self.num_filters or width,) * 2, self.activation, name=f"filter_{n}")(
                    rbf
                )
                * envelope
            )
            y = Dense(filters.shape[-1], use_bias=False, name=f"in_{n}")(x)
            x = x + TwoLayers((width, width), self.activation, name=f"out_{n}")(
                convolution(y, filters, edge)
            )
        energies = AtomicEnergy(
            self.energy_width or width // 2,
            self.energy_act,
            self.zero_init,
            self.learned_scale,
            self.learned_shift,
            name="energy",
        )(x, numbers)
        return AtomOutputs(energies, x[:, None, None, :])


def convolution(values, filters, edge: Pairs):
    """Sum values times filter over the neighbors: (N, W), (P, W) -> (N, W)."""
    total = segment_sum(gather(values, edge.senders) * filters, edge.receivers, len(values))
    if edge.undirected:
        total = total + segment_sum(
            gather(values, edge.receivers) * filters, edge.senders, len(values)
        )
    return total

"""Graph isomorphism network with a virtual node: GIN-virtual of OGB-LSC (Hu et al., 2021).

It is the baseline for PCQM4Mv2 (arXiv:2103.09430) in the example code of OGB-LSC, and agrees with
it for the same weights. Its molecular graph has no positions. In each layer n,

    x_i = h_i + v                                       v: virtual node of the molecule
    h_i = norm(MLP_n((1 + eps_n) x_i + sum_j relu(x_j + bond_ij)))
    v   = MLP'_n(v + sum_i x_i)

The differences are outside of this network: the readouts are those of all models, no output is
limited to the interval from 0 to 20 (eV), and there is no dropout, as in the published settings.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.datasets.smiles.bond_graph import ATOM_SIZES, BOND_SIZES
from mlip_jax.graphs.graph import node_graph_index
from mlip_jax.models.layers.basic import Dense, activation, gather, segment_sum
from mlip_jax.models.layers.batch_norm import BatchNorm
from mlip_jax.models.layers.gated_energy import xavier
from mlip_jax.models.layers.heads import BondOutputs

_relu = activation("relu")


class BondModel(nn.Module):
    """GIN-virtual with the published defaults.

    Attributes:
      num_features: Number of features of an atom, F.
      num_layers: Number of layers.
      residual: Whether the input of a layer is added to its output.
      sum_layers: Whether the output is the sum over all layers, not that of the last one.
    """

    num_features: int = 600
    num_layers: int = 5
    residual: bool = False
    sum_layers: bool = False

    bonds_only = True
    cutoff = 0.0  # there are no neighbor lists

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> BondOutputs:
        dtype, of_node = graph.globals["charge"].dtype, node_graph_index(graph)
        num_graphs = graph.n_node.shape[0]
        node_mask = jraph.get_node_padding_mask(graph)
        graph_mask = jraph.get_graph_padding_mask(graph)
        h = self._embed("atom", graph.nodes["atom_features"], ATOM_SIZES, dtype)
        virtual = self.param("virtual", nn.initializers.zeros, (1, self.num_features))
        v = jnp.tile(virtual.astype(dtype), (num_graphs, 1))  # (G, F)
        inputs = []
        for n in range(self.num_layers):
            last = n == self.num_layers - 1
            x = h + gather(v, of_node)
            inputs.append(x)
            h = self._convolution(n, x, graph, node_mask)
            h = h if last else _relu(h)
            h = h + x if self.residual else h
            if not last:
                t = jnp.where(node_mask[:, None], x, 0.0)
                t = segment_sum(t, of_node, num_graphs) + v
                for k in (1, 2):
                    t = Dense(self.num_features, name=f"virtual_{k}_{n}")(t)
                    t = _relu(BatchNorm(name=f"virtual_norm_{k}_{n}")(t, graph_mask))
                v = v + t if self.residual else t
        if self.sum_layers:
            h = sum(inputs) + h
        return BondOutputs(h[:, None, None, :])

    def _convolution(self, n: int, x: jax.Array, graph: jraph.GraphsTuple, mask: jax.Array):
        """Return the normalized sums over the neighbors, (N, F)."""
        bonds = self._embed(f"bond_{n}", graph.edges["bond_features"], BOND_SIZES, x.dtype)
        messages = _relu(gather(x, graph.senders) + bonds)
        epsilon = self.param(f"epsilon_{n}", nn.initializers.zeros, ()).astype(x.dtype)
        h = (1.0 + epsilon) * x + segment_sum(messages, graph.receivers, len(x))
        h = Dense(self.num_features, name=f"layer_1_{n}")(h)
        h = _relu(BatchNorm(name=f"layer_norm_{n}")(h, mask))
        h = Dense(self.num_features, name=f"layer_2_{n}")(h)
        return BatchNorm(name=f"norm_{n}")(h, mask)

    def _embed(self, name: str, features: jax.Array, sizes: tuple[int, ...], dtype):
        """Return the sum of one trainable vector per feature: (N, K) -> (N, F)."""
        total = 0.0
        for k, size in enumerate(sizes):
            table = self.param(f"{name}_{k}", xavier, (size, self.num_features))
            total = total + gather(table.astype(dtype), features[:, k])
        return total

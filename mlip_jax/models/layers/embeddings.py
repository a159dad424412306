"""Embeddings of properties of a whole structure: its total charge or its unpaired electrons."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.element_rows import element_rows
from mlip_jax.graphs.graph import node_graph_index, spread_by_graph, sum_by_graph
from mlip_jax.models.layers.basic import ResidualMLP
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER


class StateEmbedding(nn.Module):
    """Attention of the atoms to one number of the structure (SpookyNet, eqs. 10 to 13).

    The number psi is distributed over the atoms in proportion to the softplus of query times key.
    The share of an atom scales a value vector that passes through a residual MLP. There is one key
    and one value for psi >= 0 and another one for psi < 0; psi = 0 gives zero. The embedding
    depends on the elements but not on the positions.

    Attributes:
      width: Number of features F.
    """

    width: int

    @nn.compact
    def __call__(
        self, psi: jax.Array, numbers: jax.Array, node_graph: jax.Array, dtype
    ) -> jax.Array:
        """Compute the embedding of each atom, shape (N, F).

        Args:
          psi: Number of each structure, shape (G,).
          numbers: Atomic numbers, shape (N,).
          node_graph: Index of the graph of each atom, shape (N,).
          dtype: Floating-point type of the result.
        """
        normal = nn.initializers.normal(1.0)
        queries = self.param("queries", normal, (MAX_ATOMIC_NUMBER + 1, self.width))
        queries = element_rows(queries, numbers, dtype)
        psi = jnp.asarray(psi, dtype)
        sign = (psi < 0).astype(jnp.int32)[node_graph]  # row of the tables of two rows
        keys, values = (
            element_rows(self.param(name, normal, (2, self.width)), sign, dtype)
            for name in ("keys", "values")
        )
        weights = jax.nn.softplus((queries * keys).sum(-1) / float(np.sqrt(self.width)))
        total = spread_by_graph(sum_by_graph(weights, node_graph, len(psi)), node_graph)
        shares = spread_by_graph(psi, node_graph) * weights / total
        return ResidualMLP(use_bias=False, name="residual")(shares[:, None] * values)


def embed_state(graph: jraph.GraphsTuple, name: str, width: int, dtype) -> jax.Array:
    """Embed a number of each structure, 0 if the graph has none; shape (N, width).

    Call it in a compact method; the parameters are those of the module "charge_embedding" or
    "spin_embedding" of the caller.

    Args:
      graph: Padded batch.
      name: "charge" or "spin", a key of graph.globals.
      width: Number of features.
      dtype: Floating-point type of the result.
    """
    psi = graph.globals.get(name, jnp.zeros(graph.n_node.shape, dtype))
    embedding = StateEmbedding(width, name=f"{name}_embedding")
    return embedding(psi, graph.nodes["numbers"], node_graph_index(graph), dtype)

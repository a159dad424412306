"""Embeddings of what belongs to a whole structure: its total charge, its unpaired electrons."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.models.layers.basic import ResidualMLP, segment_sum
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER


class StateEmbedding(nn.Module):
    """Attention of the atoms to one number of the structure (SpookyNet, eqs. 10 to 13).

    The number psi is shared out among the atoms by the softplus of query times key, and what an atom gets scales a
    value vector that goes through a residual MLP. There is one key and one value for psi >= 0 and another for psi < 0;
    psi = 0 gives zero. It is a smooth function of the elements alone.

    Attributes:
      width: Features F.
    """

    width: int

    @nn.compact
    def __call__(self, psi: jax.Array, numbers: jax.Array, node_graph: jax.Array, dtype) -> jax.Array:
        """psi (G,), numbers (N,), graph of each atom (N,) -> (N, F)."""
        normal = nn.initializers.normal(1.0)
        queries = self.param("queries", normal, (MAX_ATOMIC_NUMBER + 1, self.width)).astype(dtype)[numbers]
        keys = self.param("keys", normal, (2, self.width)).astype(dtype)
        values = self.param("values", normal, (2, self.width)).astype(dtype)
        psi = jnp.asarray(psi, dtype)
        sign = (psi < 0).astype(jnp.int32)[node_graph]
        weights = jax.nn.softplus((queries * keys[sign]).sum(-1) / float(np.sqrt(self.width)))
        total = segment_sum(weights, node_graph, len(psi))[node_graph]
        shares = psi[node_graph] * weights / total
        return ResidualMLP(use_bias=False, name="residual")(shares[:, None] * values[sign])

"""Frames of frame averaging: the principal axes of a structure with all choices of their signs.

A function of coordinates in a frame is invariant under rotation if it is averaged over the frames
(Puny et al., ICLR 2022). The axes are a jump where two principal moments are equal, and arbitrary
for linear and highly symmetric structures.
"""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.graph import node_graph_index, spread_by_graph, sum_by_graph

# FRAMES: signs of the axes, shape (K, 3). "all" includes reflections, "proper" only rotations. The
# order of "all" is such that frame 7 - k is the inverse of frame k.
FRAMES = {
    "all": np.array(list(itertools.product((1, -1), repeat=3))),
    "proper": np.array(
        [signs for signs in itertools.product((1, -1), repeat=3) if np.prod(signs) > 0]
    ),
}


def principal_axes(graph: jraph.GraphsTuple) -> jax.Array:
    """Return right-handed principal axes of each structure as columns, shape (G, 3, 3).

    They are eigenvectors of the covariance of the positions, by descending eigenvalue. They are
    constants for all derivatives.
    """
    positions, of = jax.lax.stop_gradient(graph.nodes["positions"]), node_graph_index(graph)
    centered = positions - spread_by_graph(mean_over_atoms(positions, graph), of)
    products = centered[:, :, None] * centered[:, None, :]
    covariance = sum_by_graph(products, of, graph.n_node.shape[0])
    axes = jnp.linalg.eigh(covariance)[1][:, :, ::-1]
    # the signs of eigenvectors are arbitrary
    return axes * jnp.sign(jnp.linalg.det(axes))[:, None, None]


def mean_over_atoms(values: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
    """Return the mean over the atoms of each graph: (N, ...) -> (G, ...)."""
    num = graph.n_node.shape[0]
    total = sum_by_graph(values, node_graph_index(graph), num)
    return total / jnp.maximum(graph.n_node, 1).astype(values.dtype).reshape(
        num, *[1] * (values.ndim - 1)
    )


class GraphNorm(nn.Module):
    """Normalization of features over the atoms of each graph (Cai et al., ICML 2021).

    Attributes:
      epsilon: Constant added under the square root.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """Normalize features, shape (N, ..., F)."""
        of, ones = node_graph_index(graph), nn.initializers.ones
        scale, mean_scale, bias = (
            self.param(name, init, x.shape[-1:]).astype(x.dtype)
            for name, init in (
                ("scale", ones),
                ("mean_scale", ones),
                ("bias", nn.initializers.zeros),
            )
        )
        x = x - mean_scale * spread_by_graph(mean_over_atoms(x, graph), of)
        square = spread_by_graph(mean_over_atoms(x * x, graph), of)
        return scale * x / jnp.sqrt(square + self.epsilon) + bias

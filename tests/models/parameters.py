"""Parameters of models for tests, which compile faster than those of `init`."""

import jax
import numpy as np

# Their layers divide by the root of the number of inputs, and their weights have unit variance.
UNIT_VARIANCE = ("allegro", "mace", "nequip", "nequix", "pace", "sevennet")


def quick_parameters(model, graph, seed=0, unit_variance=False):
    """Return parameters like those of `model.init`, with weights drawn by NumPy.

    Vectors and scalars, such as biases and radial constants, are the initial ones. The weights have
    the variance of the initialization: 1 over the size of the input, or 1 for embeddings and with
    `unit_variance`.
    """
    rng = np.random.default_rng(seed)
    shapes = []

    @jax.jit
    def initial(key, graph):
        params = model.init(key, graph)
        shapes.append(jax.tree.map(jax.typeof, params))  # by the same trace
        # XLA removes the random numbers, which take longest to compile
        return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim < 2]

    kept = iter(initial(jax.random.key(seed), graph))

    def draw(leaf):
        if len(leaf.shape) < 2:
            return np.asarray(next(kept))
        scale = 1.0 if unit_variance or leaf.shape[0] == 119 else leaf.shape[-2] ** -0.5
        return rng.normal(0.0, scale, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, shapes[0])

"""Low-rank adapters (LoRA, arXiv:2106.09685) as a rule of the optimizer.

A linear map keeps its initial weight W0 and gets the product of two thin matrices, W = W0 + A B,
with A (inputs, rank) random and B (rank, outputs) zero at the start. By the chain rule, the
gradients with respect to A and B follow from that of W: G Bᵀ and Aᵀ G. The optimizer therefore holds
A and B in its state, updates them with its rule, and returns the change of A B as the update of W.

The parameters of the model are thus the merged weights at every step. Checkpoints, averages of the
parameters, validation and all users of a force field need no knowledge of adapters. The cost of a
step is that of full training: adapters restrict what changes, and save the moments of the full
matrices.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlip_jax.training.parameters.paths import is_linear_map, parameter_path


class LowRankState(NamedTuple):
    """State of `low_rank`.

    Attributes:
      factors: Tree of the parameters with {"a", "b"} in place of an adapted weight, the weight if
        it is trained as it is, and optax.MaskedNode if it is not trained.
      rule: State of the rule that updates the factors.
    """

    factors: Any
    rule: Any


def low_rank(rule: optax.GradientTransformation, rank: int) -> optax.GradientTransformation:
    """Train linear maps by updates of a given rank, and no other parameters.

    A linear map whose number of inputs or outputs is at most `rank` is trained without factors,
    because they would not restrict it. A has rows of mean square length 1, so that a first step of
    Adam changes the entries of W by about the learning rate, as in full training.

    Args:
      rule: Rule that updates the factors, with its clipping.
      rank: Rank of the updates.

    Raises:
      ValueError: `init` raises it if the parameters contain no linear map.
    """

    def factorize(path, weight):
        if not is_linear_map(path, weight):
            return optax.MaskedNode()
        *heads, inputs, outputs = weight.shape
        if min(inputs, outputs) <= rank:
            return weight
        # the same factors in every process and after every restart
        rng = np.random.default_rng(zlib.crc32(parameter_path(path).encode()))
        a = rng.normal(0.0, rank**-0.5, (*heads, inputs, rank))
        return {
            "a": jnp.asarray(a, weight.dtype),
            "b": jnp.zeros((*heads, rank, outputs), weight.dtype),
        }

    def init(params):
        factors = jax.tree_util.tree_map_with_path(factorize, params)
        if not jax.tree.leaves(factors):
            raise ValueError(
                "optimizer.low_rank: this model has no linear layers that are trained. Set it to 0."
            )
        return LowRankState(factors, rule.init(factors))

    def update(gradients, state, params=None):
        leaves, structure = jax.tree.flatten(gradients)
        old = structure.flatten_up_to(state.factors)
        factor_gradients = jax.tree.unflatten(
            structure, [_factor_gradient(g, f) for g, f in zip(leaves, old, strict=True)]
        )
        updates, rule_state = rule.update(factor_gradients, state.rule, state.factors)
        factors = optax.apply_updates(state.factors, updates)
        new = structure.flatten_up_to(factors)
        changes = structure.flatten_up_to(updates)
        merged = [
            _weight_update(g, *items) for g, *items in zip(leaves, old, new, changes, strict=True)
        ]
        return jax.tree.unflatten(structure, merged), LowRankState(factors, rule_state)

    return optax.GradientTransformation(init, update)


def weight_path(path: Sequence[Any], leaf: Any) -> Sequence[Any]:
    """Return the path of the weight of a factor, or the path of another parameter as it is.

    Args:
      path: Path of jax.tree_util in the parameters, or in `LowRankState.factors`.
      leaf: Array at this path.
    """
    is_factor = parameter_path(path[-1:]) in ("a", "b") and is_linear_map(path[:-1], leaf)
    return path[:-1] if is_factor else path


def _factor_gradient(gradient, factors):
    """Return the gradient with respect to the factors of a weight, from that of the weight."""
    if isinstance(factors, optax.MaskedNode):
        return factors
    if not isinstance(factors, dict):
        return gradient
    a, b = factors["a"], factors["b"]
    return {"a": gradient @ jnp.swapaxes(b, -1, -2), "b": jnp.swapaxes(a, -1, -2) @ gradient}


def _weight_update(gradient, old, new, change):
    """Return the update of a weight: the change of the product of its factors."""
    if isinstance(old, optax.MaskedNode):
        return jnp.zeros_like(gradient)
    if not isinstance(old, dict):
        return change
    return new["a"] @ new["b"] - old["a"] @ old["b"]

"""Properties of structures and atoms, read from the features of any model.

A readout is a small network on the features of a backbone. Its outputs are in units of the data's own spread: what
scales and shifts them to physical units is known to predictor.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.config import unknown_name
from mlip_jax.graphs.graph import node_graph_index
from mlip_jax.models.layers.basic import Dense, activation
from mlip_jax.models.layers.heads import AtomOutputs

# One number for a structure; a vector for it (about the mean of its positions); one number, or one vector, an atom.
KINDS = ("scalar", "vector", "atom", "atom_vector")
POOLINGS = ("mean", "sum", "attention")
BACKBONE = "backbone"


class Readout(nn.Module):
    """One property.

    Attributes:
      kind: One of KINDS. A "vector" is that of charges at the atoms, as a dipole is, and with the vectors of atoms
        where the backbone has such features (PaiNN's dipole, arXiv:2102.03150 eq. 12). An "atom_vector" needs them.
      pooling: How atoms make up a "scalar": "mean" and "attention" for what does not grow with the size (an orbital
        energy), "sum" for what does.
      width: Of the hidden layer; None: half of the features. act: Its activation.
    """

    kind: str = "scalar"
    pooling: str = "mean"
    width: int | None = None
    act: str = "silu"

    @nn.compact
    def __call__(self, features: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """Features (N, 1 or 2, (max_degree + 1)**2, F) -> (G,), (G, 3), (N,) or (N, 3); zero in padding.

        Raises:
          ValueError: Vectors of atoms are asked for, and the features have none.
        """
        scalars, mask = features[:, 0, 0, :], jraph.get_node_padding_mask(graph)
        if self.kind == "scalar":
            return self._pooled(scalars, mask, graph)
        if self.kind == "atom":
            return jnp.where(mask, self._of_atoms(scalars), 0.0)
        if self.kind == "vector":
            return self._vector(features, mask, graph)
        vectors = vectors_of(features)
        if vectors is None:
            raise ValueError("this model has no features of degree 1, which vectors of atoms are made of; use one that "
                             "has, as painn or equivariant_transformer")
        return jnp.where(mask[:, None], GatedVectors(self.act, name="vectors")(scalars, vectors), 0.0)

    def _of_atoms(self, scalars):
        hidden = activation(self.act)(Dense(self.width or scalars.shape[-1] // 2, name="hidden")(scalars))
        return Dense(1, kernel_init=nn.initializers.zeros, name="final")(hidden)[:, 0]

    def _pooled(self, scalars, mask, graph):
        values = self._of_atoms(scalars)
        if self.pooling == "attention":
            hidden = activation(self.act)(Dense(self.width or scalars.shape[-1] // 2, name="attention_hidden")(scalars))
            logits = Dense(1, kernel_init=nn.initializers.zeros, name="attention")(hidden)[:, 0]
            values = values * _softmax(logits, mask, graph)
        return _sum(jnp.where(mask, values, 0.0), graph, mean=self.pooling == "mean")

    def _vector(self, features, mask, graph):
        scalars, positions, of = features[:, 0, 0, :], graph.nodes["positions"], node_graph_index(graph)
        charges = jnp.where(mask, self._of_atoms(scalars), 0.0)
        # no charge is left, so that the vector is the same about any point
        charges = jnp.where(mask, charges - _sum(charges, graph, mean=True)[of], 0.0)
        total = charges[:, None] * (positions - _sum(positions, graph, mean=True)[of])
        vectors = vectors_of(features)
        if vectors is not None:
            total = total + GatedVectors(self.act, name="vectors")(scalars, vectors)
        return _sum(jnp.where(mask[:, None], total, 0.0), graph)


class GatedVectors(nn.Module):
    """One vector an atom by a gated equivariant block (Schütt et al. 2021, fig. 3): (N, F), (N, 3, F) -> (N, 3)."""

    act: str = "silu"
    epsilon: float = 1e-8

    @nn.compact
    def __call__(self, scalars, vectors):
        width = scalars.shape[-1]
        mixed, kept = jnp.split(Dense(2 * width, use_bias=False, name="mix")(vectors), 2, axis=-1)
        norms = jnp.sqrt(jnp.sum(mixed * mixed, axis=1) + self.epsilon)
        hidden = activation(self.act)(Dense(width, name="hidden")(jnp.concatenate([scalars, norms], axis=-1)))
        gate = Dense(width, name="gate")(hidden)
        return Dense(1, use_bias=False, name="final")(gate[:, None, :] * kept)[..., 0]


class PropertyModel(nn.Module):
    """A backbone and readouts. Parameters: "backbone", as a force field of that model has them, and "head_NAME".

    Attributes:
      backbone: On the contract of mlip_jax.models; its energy goes nowhere.
      heads: ((name, ((option, value), ...)), ...): options of Readout. See `with_heads`.
      frozen: No derivative by the backbone's parameters is computed.
    """

    backbone: nn.Module
    heads: tuple
    frozen: bool = False

    @property
    def cutoff(self) -> float:
        """The backbone's, Å."""
        return self.backbone.cutoff

    @property
    def long_range_cutoff(self) -> float | None:
        """The backbone's, see potential.long_range_cutoff."""
        return getattr(self.backbone, "long_range_cutoff", None)

    def setup(self):
        for name, options in self.heads:
            setattr(self, f"head_{name}", Readout(**dict(options)))

    def __call__(self, graph: jraph.GraphsTuple) -> dict[str, jax.Array]:
        """Each property by name; shapes as `Readout` gives them."""
        features = self.backbone(graph).features
        if self.frozen:
            features = jax.lax.stop_gradient(features)
        return self._of(features, graph)

    def _of(self, features, graph):
        return {name: getattr(self, f"head_{name}")(features, graph) for name, _ in self.heads}

    def with_energies(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        """What the backbone gives as a force field, with the heads as its properties."""
        outputs = self.backbone(graph)
        return outputs._replace(properties=self._of(outputs.features, graph))

    def embed(self, graph: jraph.GraphsTuple) -> jax.Array:
        """Mean over the atoms of the invariant features, (G, F): where a structure lies in what the model knows."""
        features = self.backbone(graph).features[:, 0, 0, :]
        return _sum(jnp.where(jraph.get_node_padding_mask(graph)[:, None], features, 0.0), graph, mean=True)


def with_heads(backbone: nn.Module, heads: Mapping[str, Mapping[str, Any]], frozen: bool = False) -> PropertyModel:
    """The backbone with readouts {name: options of Readout}.

    Raises:
      ValueError: An option that does not exist, or a kind or pooling that does not; the message says which there are.
    """
    known = [f for f in Readout.__dataclass_fields__ if f not in ("parent", "name")]
    for name, options in heads.items():
        for option in options:
            if option not in known:
                raise ValueError(unknown_name(f"option of head {name!r}", option, known))
        for field, values in (("kind", KINDS), ("pooling", POOLINGS)):
            if options.get(field, values[0]) not in values:
                raise ValueError(unknown_name(f"{field} of head {name!r}", options[field], values))
    return PropertyModel(backbone, tuple((name, tuple(sorted(o.items()))) for name, o in sorted(heads.items())), frozen)


def vectors_of(features: jax.Array) -> jax.Array | None:
    """Features of degree 1, (N, 3, F), x, y, z; None where there are none."""
    return features[:, 0, 1:4, :] if features.shape[2] >= 4 else None


def _sum(values, graph, mean: bool = False):
    num = graph.n_node.shape[0]
    total = jax.ops.segment_sum(values, node_graph_index(graph), num, indices_are_sorted=True)
    if not mean:
        return total
    return total / jnp.maximum(graph.n_node, 1).astype(values.dtype).reshape(num, *[1] * (values.ndim - 1))


def _softmax(logits, mask, graph):
    """Weights of the atoms of each structure, which add up to one; of padding too, so that nothing is NaN."""
    of, num = node_graph_index(graph), graph.n_node.shape[0]
    logits = jnp.where(mask, logits, 0.0)
    highest = jax.ops.segment_max(jax.lax.stop_gradient(logits), of, num, indices_are_sorted=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0.0)[of])
    total = jax.ops.segment_sum(weights, of, num, indices_are_sorted=True)
    return weights / jnp.maximum(total, 1e-30)[of]

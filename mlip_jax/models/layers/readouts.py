"""Properties of structures and atoms, read from the features of any model.

A readout is a small network on the features of a backbone. Its outputs are in units of the spread
of the data; predictor.py converts them to physical units.
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
from mlip_jax.models.layers.forces import has_direct_forces, is_conservative
from mlip_jax.models.layers.heads import AtomOutputs

# KINDS: a number or a vector per structure, and a number or a vector per atom.
KINDS = ("scalar", "vector", "atom", "atom_vector")
POOLINGS = ("mean", "sum", "attention")
BACKBONE = "backbone"
DISPLACEMENT = "displacement"


class Readout(nn.Module):
    """Readout of one property.

    Attributes:
      kind: One of KINDS. A "vector" is the dipole of charges at the atoms, plus vectors of the
        atoms if the backbone has features of degree 1 (PaiNN's dipole, arXiv:2102.03150 eq. 12). An
        "atom_vector" requires such features.
      pooling: Reduction of atoms to a "scalar": "mean" or "attention" for intensive properties
        (an orbital energy), "sum" for extensive ones.
      width: Width of the hidden layer; None: half of the number of features; 0: no hidden layer.
      act: Activation of the hidden layer (layers.ACTIVATIONS).
    """

    kind: str = "scalar"
    pooling: str = "mean"
    width: int | None = None
    act: str = "silu"

    @nn.compact
    def __call__(self, features: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """Compute the property; it is zero in padding.

        Args:
          features: Features, shape (N, 1 or 2, (max_degree + 1)**2, F).
          graph: Graph with positions.

        Returns:
          Property, shape (G,), (G, 3), (N,) or (N, 3).

        Raises:
          ValueError: The kind is "atom_vector" and the features have no degree 1.
        """
        scalars, mask = features[:, 0, 0, :], jraph.get_node_padding_mask(graph)
        if self.kind == "scalar":
            return self._pool(scalars, mask, graph)
        if self.kind == "atom":
            return jnp.where(mask, self._per_atom(scalars), 0.0)
        if self.kind == "vector":
            return self._vector(features, mask, graph)
        vectors = vectors_of(features)
        if vectors is None:
            raise ValueError(
                "this model has no features of degree 1, from which vectors of atoms are "
                "computed. Use a model that has them, such as painn or equivariant_transformer."
            )
        return jnp.where(
            mask[:, None], GatedVectors(self.act, name="vectors")(scalars, vectors), 0.0
        )

    def _per_atom(self, scalars):
        """Return one number per atom: (N, F) -> (N,)."""
        hidden = scalars
        if self.width != 0:
            width = self.width or scalars.shape[-1] // 2
            hidden = activation(self.act)(Dense(width, name="hidden")(scalars))
        return Dense(1, kernel_init=nn.initializers.zeros, name="final")(hidden)[:, 0]

    def _pool(self, scalars, mask, graph):
        """Return one number per structure: (N, F) -> (G,)."""
        values = self._per_atom(scalars)
        if self.pooling == "attention":
            hidden = activation(self.act)(
                Dense(self.width or scalars.shape[-1] // 2, name="attention_hidden")(scalars)
            )
            logits = Dense(1, kernel_init=nn.initializers.zeros, name="attention")(hidden)[:, 0]
            values = values * _softmax(logits, mask, graph)
        return _sum(jnp.where(mask, values, 0.0), graph, mean=self.pooling == "mean")

    def _vector(self, features, mask, graph):
        """Return one vector per structure about the mean of its positions, shape (G, 3)."""
        scalars, positions, graph_index = (
            features[:, 0, 0, :],
            graph.nodes["positions"],
            node_graph_index(graph),
        )
        charges = jnp.where(mask, self._per_atom(scalars), 0.0)
        # the total charge is zero, so the vector does not depend on the origin
        charges = jnp.where(mask, charges - _sum(charges, graph, mean=True)[graph_index], 0.0)
        total = charges[:, None] * (positions - _sum(positions, graph, mean=True)[graph_index])
        vectors = vectors_of(features)
        if vectors is not None:
            total = total + GatedVectors(self.act, name="vectors")(scalars, vectors)
        return _sum(jnp.where(mask[:, None], total, 0.0), graph)


class GatedVectors(nn.Module):
    """One vector per atom from a gated equivariant block (Schütt et al. 2021, fig. 3).

    It maps scalars (N, F) and vectors (N, 3, F) to (N, 3).

    Attributes:
      act: Activation.
      epsilon: Constant added under the square root of the vectors' norms.
    """

    act: str = "silu"
    epsilon: float = 1e-8

    @nn.compact
    def __call__(self, scalars, vectors):
        width = scalars.shape[-1]
        mixed, vectors_2 = jnp.split(
            Dense(2 * width, use_bias=False, name="mix")(vectors), 2, axis=-1
        )
        norms = jnp.sqrt(jnp.sum(mixed * mixed, axis=1) + self.epsilon)
        hidden = activation(self.act)(
            Dense(width, name="hidden")(jnp.concatenate([scalars, norms], axis=-1))
        )
        gate = Dense(width, name="gate")(hidden)
        return Dense(1, use_bias=False, name="final")(gate[:, None, :] * vectors_2)[..., 0]


class PropertyModel(nn.Module):
    """Backbone with readouts.

    The parameters are "backbone", as in a force field with that model, and "head_NAME" per readout.

    Attributes:
      backbone: Model that follows the contract of mlip_jax.models; its energy is not used.
      heads: ((name, ((option, value), ...)), ...) with options of Readout. See `with_heads`.
      frozen: Whether the backbone is not differentiated with respect to its parameters.
    """

    backbone: nn.Module
    heads: tuple
    frozen: bool = False

    @property
    def cutoff(self) -> float:
        """Cutoff radius of the backbone (Å)."""
        return self.backbone.cutoff

    @property
    def long_range_cutoff(self) -> float | None:
        """Cutoff of long-range pairs of the backbone (Å); see potential.long_range_cutoff."""
        return getattr(self.backbone, "long_range_cutoff", None)

    @property
    def direct_forces(self) -> bool:
        """Whether the backbone predicts forces; see layers.forces."""
        return has_direct_forces(self.backbone)

    @property
    def conservative(self) -> bool:
        """Whether forces are minus the gradient of the energy; see layers.forces."""
        return is_conservative(self.backbone)

    def setup(self):
        """Create the readouts."""
        for name, options in self.heads:
            setattr(self, f"head_{name}", Readout(**dict(options)))

    def __call__(self, graph: jraph.GraphsTuple) -> dict[str, jax.Array]:
        """Compute each property by name; for shapes see `Readout`."""
        features = self.backbone(graph).features
        if self.frozen:
            features = jax.lax.stop_gradient(features)
        return self._predict(features, graph)

    def _predict(self, features, graph):
        return {name: getattr(self, f"head_{name}")(features, graph) for name, _ in self.heads}

    def with_energies(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        """Return the backbone's outputs as a force field, with the properties of the heads."""
        outputs = self.backbone(graph)
        return outputs._replace(properties=self._predict(outputs.features, graph))

    def attributions(self, graph: jraph.GraphsTuple) -> dict[str, jax.Array]:
        """Compute the gradient times the input of each scalar readout, summed over features: (N,).

        The input is the features of the nodes. The attributions of a linear readout with a sum or a
        mean add up to the property of the structure minus that of features of zero.
        """
        features = jax.lax.stop_gradient(self.backbone(graph).features)
        result = {}
        for name, options in self.heads:
            if dict(options).get("kind", "scalar") != "scalar":
                continue
            head = getattr(self, f"head_{name}")
            # the property of a structure only depends on the features of its own atoms
            _, pull_back = jax.vjp(lambda x, head=head: head(x, graph), features)
            (gradient,) = pull_back(jnp.ones(graph.n_node.shape[0], features.dtype))
            result[name] = (gradient * features).sum((1, 2, 3))
        return result

    def refine(self, graph: jraph.GraphsTuple) -> jax.Array:
        """Compute the refined positions (Å) of a model of bonds that refines them, (N, 3).

        Raises:
          ValueError: The backbone does not refine positions.
        """
        positions = getattr(self.backbone(graph), "positions", None)
        if positions is None:
            raise ValueError("this model does not refine positions; unimol_plus does")
        return positions

    def with_refinement(self, graph: jraph.GraphsTuple) -> dict[str, jax.Array]:
        """Compute each property, and "displacement", refined minus input positions (Å), (N, 3).

        Both are relative to the center of the heavy atoms. Only a model of bonds that refines
        positions has them.
        """
        outputs = self.backbone(graph)
        mask = jraph.get_node_padding_mask(graph)[:, None]
        start = jnp.where(mask, graph.nodes["positions"], 0.0)
        center = _sum(start, graph, mean=True)[node_graph_index(graph)]
        displacement = jnp.where(mask, outputs.positions - (start - center), 0.0)
        return {**self._predict(outputs.features, graph), DISPLACEMENT: displacement}

    def embed(self, graph: jraph.GraphsTuple) -> jax.Array:
        """Compute the mean over the atoms of the invariant features, shape (G, F).

        It is the position of a structure in the feature space of the backbone.
        """
        features = self.backbone(graph).features[:, 0, 0, :]
        return _sum(
            jnp.where(jraph.get_node_padding_mask(graph)[:, None], features, 0.0), graph, mean=True
        )


def with_heads(
    backbone: nn.Module, heads: Mapping[str, Mapping[str, Any]], frozen: bool = False
) -> PropertyModel:
    """Add readouts to a backbone.

    Args:
      backbone: Model that follows the contract of mlip_jax.models.
      heads: {name: options of Readout}.
      frozen: See `PropertyModel`.

    Raises:
      ValueError: Unknown option, kind or pooling; the message lists the known ones.
    """
    known = [f for f in Readout.__dataclass_fields__ if f not in ("parent", "name")]
    for name, options in heads.items():
        for option in options:
            if option not in known:
                raise ValueError(unknown_name(f"option of head {name!r}", option, known))
        for field, values in (("kind", KINDS), ("pooling", POOLINGS)):
            if options.get(field, values[0]) not in values:
                raise ValueError(unknown_name(f"{field} of head {name!r}", options[field], values))
    return PropertyModel(
        backbone,
        tuple((name, tuple(sorted(o.items()))) for name, o in sorted(heads.items())),
        frozen,
    )


def vectors_of(features: jax.Array) -> jax.Array | None:
    """Return the features of degree 1 (x, y, z), shape (N, 3, F), or None if there are none."""
    return features[:, 0, 1:4, :] if features.shape[2] >= 4 else None


def _sum(values, graph, mean: bool = False):
    """Sum, or average, the values of atoms per structure: (N, ...) -> (G, ...)."""
    num = graph.n_node.shape[0]
    total = jax.ops.segment_sum(values, node_graph_index(graph), num, indices_are_sorted=True)
    if not mean:
        return total
    return total / jnp.maximum(graph.n_node, 1).astype(values.dtype).reshape(
        num, *[1] * (values.ndim - 1)
    )


def _softmax(logits, mask, graph):
    """Compute weights of the atoms that add up to one in each structure, shape (N,).

    Padding atoms get weights so that nothing is NaN.
    """
    graph_index, num = node_graph_index(graph), graph.n_node.shape[0]
    logits = jnp.where(mask, logits, 0.0)
    highest = jax.ops.segment_max(
        jax.lax.stop_gradient(logits), graph_index, num, indices_are_sorted=True
    )
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0.0)[graph_index])
    total = jax.ops.segment_sum(weights, graph_index, num, indices_are_sorted=True)
    return weights / jnp.maximum(total, 1e-30)[graph_index]

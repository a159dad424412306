"""Equiformer: an equivariant graph attention transformer (Liao and Smidt, ICLR 2023).

Atoms have features of each degree l, shape (N, 2l + 1, channels), which all have even parity. In a
block, messages are products of the features of both atoms with spherical harmonics, weighted by a
network of the distance; attention with softmax sums them over the neighbors, and a feed-forward
network follows. The model agrees with the published code (Open Catalyst and MD17 forms) if the
options are the same.

The published form has no cutoff function: energies and forces jump when a pair crosses the cutoff
(cutoff_fn "step"; the property `smooth` is False). By default the softmax is over envelope times
exponential, and each message is multiplied by the envelope again, so that a single neighbor leaves
smoothly too.

The energy of a mirror image differs, because features include the cross product of two vectors
(see the property `mirror_symmetric`). Dropout is not implemented.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.element_rows import element_rows
from mlip_jax.graphs.graph import pairs
from mlip_jax.models.layers.basic import STEP, cutoff_function, safe_norm, unit_vectors
from mlip_jax.models.layers.graph_attention import (
    DegreeEmbedding,
    DegreeNorm,
    EdgeInputs,
    EquiformerBlock,
    GraphAttention,
)
from mlip_jax.models.layers.heads import AtomicEnergy, AtomOutputs, embed_elements
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics
from mlip_jax.models.layers.tensor_products.gates import layout
from mlip_jax.models.layers.tensor_products.irreps import EVEN, Irrep

RADIAL_BASES = ("gaussian", "expnorm")


class Model(nn.Module):
    """Equiformer; the defaults are those of the Open Catalyst form, except the cutoff function.

    A number of channels is a number for each degree from 0 on, or that of scalars; degree l then
    has its 2^l-th part.

    Attributes:
      num_features: Number of channels of the features.
      num_layers: Number of blocks.
      max_degree: Largest degree of features and harmonics.
      num_heads: Number of heads.
      head_features: Number of channels of a head; None: num_features over num_heads.
      hidden_features: Number of channels of the feed-forward networks; None: three times
        num_features.
      final_features: Number of channels after the last block; None: twice num_features.
      cutoff: Cutoff radius (Å).
      cutoff_fn: Envelope of the messages (layers.CUTOFFS); "step" is the published form.
      radial_basis: "gaussian" with learned centers and widths (Open Catalyst), or "expnorm"
        (MD17), see docs/models.md.
      num_radial: Number of radial functions.
      radial_widths: Widths of the hidden layers of the radial networks.
      avg_num_neighbors: Average number of neighbors; its root divides the first sum over them.
        Training runs set it from their data.
      rescale_degree: Whether attention is multiplied by the number of neighbors (MD17).
      num_tags: Number of kinds of atoms that nodes["tags"] distinguishes in addition to elements
        (Open Catalyst), 0 if a graph has no tags. Without kinds there is no embedding of them.
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_shift: Whether the energy head learns a shift per element.
      direct_forces: Whether another attention layer predicts forces. They are not the gradient of
        the energy.
      remat: Whether to recompute blocks in the backward pass, to save memory.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int | Sequence[int] = 256
    num_layers: int = 6
    max_degree: int = 1
    num_heads: int = 8
    head_features: int | Sequence[int] | None = None
    hidden_features: int | Sequence[int] | None = None
    final_features: int | Sequence[int] | None = None
    cutoff: float = 5.0
    cutoff_fn: str = "phys"
    radial_basis: str = "gaussian"
    num_radial: int = 128
    radial_widths: Sequence[int] = (64, 64)
    avg_num_neighbors: float = 23.395238876342773
    rescale_degree: bool = False
    num_tags: int = 0
    zero_init: bool = True
    learned_shift: bool = True
    direct_forces: bool = False
    remat: bool = False

    @property
    def smooth(self) -> bool:
        """Whether energies and forces are continuous at the cutoff."""
        return self.cutoff_fn != STEP

    @property
    def mirror_symmetric(self) -> bool:
        """Whether mirror images have the same energy and mirrored forces.

        One block with vectors makes no number from a cross product, except in the force head.
        """
        return self.num_layers == 1 and self.max_degree == 1 and not self.direct_forces

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        numbers = graph.nodes["numbers"]
        widths = self._widths(self.num_features)
        final = self._widths(self.final_features or scaled(widths, 2))
        edge = self._edge_inputs(graph)
        # first features: harmonics of the neighbors, plus embeddings of elements and tags
        radial_widths = tuple(self.radial_widths)
        embedding = DegreeEmbedding(widths, radial_widths, self.avg_num_neighbors, name="degree")
        features = embedding(edge, len(numbers))
        x = embed_elements(self, numbers, widths[0], edge.radial.dtype)
        if self.num_tags:
            init = nn.initializers.normal(1.0)
            table = self.param("tags", init, (self.num_tags, widths[0]))
            x = x + element_rows(table, graph.nodes.get("tags", jnp.zeros_like(numbers)), x.dtype)
        features[0] = features[0] + x[:, None]
        # blocks
        head = self.head_features or [width // self.num_heads for width in widths]
        attention = {
            "head_widths": self._widths(head),
            "num_heads": self.num_heads,
            "radial_widths": radial_widths,
            "rescale_degree": self.rescale_degree,
        }
        hidden = self._widths(self.hidden_features or scaled(widths, 3))
        block = nn.remat(EquiformerBlock) if self.remat else EquiformerBlock
        for n in range(self.num_layers):
            out = final if n == self.num_layers - 1 else widths
            features = block(attention, widths, hidden, out, name=f"block_{n}")(features, edge)
        features = DegreeNorm(name="norm")(features)
        # heads
        head = AtomicEnergy(
            final[0], "silu", self.zero_init, False, self.learned_shift, name="energy"
        )
        energies, forces = head(features[0][:, 0], numbers), None
        if self.direct_forces:
            vectors = GraphAttention(widths=widths, out_widths=(0, 1), **attention, name="forces")
            forces = vectors(features, edge)[1][..., 0]
        irreps = {Irrep(l, EVEN): x for l, x in features.items()}
        return AtomOutputs(energies, layout(irreps, max(features), False), forces=forces)

    def _widths(self, widths: int | Sequence[int]) -> tuple[int, ...]:
        """Return the number of channels of each degree."""
        if isinstance(widths, int):
            widths = [max(widths // 2**l, 1) for l in range(self.max_degree + 1)]
        if len(widths) > self.max_degree + 1:
            raise ValueError(
                f"expected at most {self.max_degree + 1} numbers of channels for "
                f"max_degree={self.max_degree}, received {tuple(widths)}"
            )
        return tuple(widths)

    def _edge_inputs(self, graph) -> EdgeInputs:
        """Compute geometry, radial functions and envelope of the edges."""
        if self.radial_basis not in RADIAL_BASES:
            raise ValueError(
                f"radial_basis must be one of {RADIAL_BASES}, received {self.radial_basis!r}"
            )
        edge = pairs(graph, undirected=False, slots=True)
        distances = safe_norm(edge.displacements)
        unit = unit_vectors(edge.displacements, distances)
        harmonics = jnp.concatenate(spherical_harmonics(unit, self.max_degree), axis=1)
        if self.radial_basis == "gaussian":
            radial = LearnedGaussians(self.num_radial, name="radial_basis")(distances / self.cutoff)
        else:
            radial = expnorm_basis(distances, self.num_radial, self.cutoff)
        envelope = cutoff_function(self.cutoff_fn)(distances, self.cutoff)
        return EdgeInputs(edge, harmonics, radial, envelope)


def scaled(widths: Sequence[int], factor: int) -> tuple[int, ...]:
    """Return `factor` times each width."""
    return tuple(factor * width for width in widths)


class LearnedGaussians(nn.Module):
    """Normal distributions of a linear function of the distance, all learned: (E,) -> (E, num).

    Attributes:
      num: Number of functions.
    """

    num: int

    @nn.compact
    def __call__(self, x):
        def parameter(name, low, high, shape):
            init = lambda key: nn.initializers.uniform(high - low)(key, shape) + low  # noqa: E731
            return self.param(name, init).astype(x.dtype)

        mean = parameter("mean", 0.0, 1.0, (self.num,))
        width = jnp.abs(parameter("width", 1.0 / self.num, 1.0, (self.num,))) + 1e-5
        weight = self.param("weight", nn.initializers.ones, ()).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, ()).astype(x.dtype)
        u = ((weight * x + bias)[:, None] - mean) / width
        # 3.14159 as in the published code
        return jnp.exp(-0.5 * u * u) / (float(np.sqrt(2 * 3.14159)) * width)


def expnorm_basis(d, num: int, cutoff: float):
    """Compute cosine cutoff times exp(-b (exp(-5 d / cutoff) - c_k)²): (E,) -> (E, num).

    The centers c_k are evenly spaced from exp(-cutoff) to 1.
    """
    low = float(np.exp(-cutoff))
    centers = jnp.asarray(np.linspace(low, 1.0, num), d.dtype)
    steepness = (2.0 / num * (1.0 - low)) ** -2
    values = jnp.exp(-steepness * (jnp.exp(-5.0 / cutoff * d)[:, None] - centers) ** 2)
    return cutoff_function("cosine")(d, cutoff)[:, None] * values

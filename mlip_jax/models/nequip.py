"""NequIP: equivariant convolutions (Batzner et al., Nature Communications 13, 2453, 2022).

Features of the atoms are irreps of O(3). A layer mixes the channels, multiplies the features of the
neighbors by spherical harmonics with weights from a network of the distance, adds a map of the
atom's own features that depends on its element, and applies a gate. The last layer has only
scalars, which an energy head reads. The model agrees with nequip 0.19.1 if the options are the
same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.basic import gather, polynomial_cutoff, safe_norm, unit_vectors
from mlip_jax.models.layers.heads import AtomOutputs, scale_and_shift
from mlip_jax.models.layers.tensor_products.convolution import convolution_pairs
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics
from mlip_jax.models.layers.tensor_products.gates import layout
from mlip_jax.models.layers.tensor_products.interaction import Interaction
from mlip_jax.models.layers.tensor_products.irreps import EVEN, ODD, SCALAR, Irrep, Irreps, parse
from mlip_jax.models.layers.tensor_products.linear import (
    ScalarNetwork,
    element_index,
    scalars,
    table_rows,
)

PARITIES = ("full", "natural", "even")


class Model(nn.Module):
    """NequIP; the defaults are those of the builder of nequip 0.19.

    Attributes:
      num_features: Number of channels of each irrep, or of the irreps of each degree.
      num_layers: Number of interaction blocks.
      max_degree: Largest degree of features and harmonics.
      parity: Irreps of the features: both parities of each degree ("full"), that of the harmonics
        ("natural"), or all even ("even"). With "even" also the harmonics count as even, so
        the energy of a mirror image differs.
      irreps: Irreps of the features after each layer in place of those of `num_features` and
        `parity`, as in ("32x0e+16x0o+16x1o", "32x0e"). The last layer has only even scalars.
      cutoff: Cutoff radius (Å).
      pair_cutoffs: Cutoff of each pair of elements (Å), row by row: elements of the receiver, then
        of the sender. Requires `elements`; None: `cutoff` for all.
      num_radial: Number of Bessel functions.
      radial_roots: Roots n of the Bessel functions sin(n pi d / cutoff), num_radial of them; None:
        1, 2, ....
      learned_roots: Whether the roots are trained.
      cutoff_power: Power p of the polynomial cutoff (layers.basic.polynomial_cutoff).
      radial_widths: Widths of the hidden layers of the radial networks.
      embedding_width: Number of features of the embedding of elements; None: that of the scalars.
      elements: Atomic numbers with weights; None for all. Few elements save memory.
      avg_num_neighbors: Average number of neighbors, or that of each of `elements`. The root
        divides messages. Training runs set it from their data.
      energy_widths: Widths of the hidden layers of the energy head.
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_scale: Whether the energy head learns a scale per element.
      learned_shift: Whether the energy head learns a shift per element.
      remat: Whether to recompute layers in the backward pass, to save memory.
      undirected: False computes filters for both directions of each pair, as `pair_cutoffs`
        requires; this plain form is otherwise for tests.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int | Sequence[int] = 32
    num_layers: int = 4
    max_degree: int = 1
    parity: str = "full"
    cutoff: float = 5.0
    pair_cutoffs: Sequence[float] | None = None
    num_radial: int = 8
    radial_roots: Sequence[float] | None = None
    learned_roots: bool = False
    cutoff_power: int = 6
    radial_widths: Sequence[int] = (128,)
    embedding_width: int | None = None
    elements: Sequence[int] | None = None
    avg_num_neighbors: float | Sequence[float] = 16.0
    energy_widths: Sequence[int] = ()
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True
    remat: bool = False
    undirected: bool = True
    # not in the digest: force fields from before this field keep theirs
    irreps: Sequence[str] | None = dataclasses.field(default=None, repr=False)

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        numbers = graph.nodes["numbers"]
        elements = None if self.elements is None else tuple(self.elements)
        rows, num_rows = element_index(numbers, elements)
        layers = self.layer_irreps()
        # edge geometry: distances (P,), harmonics (P, 2l + 1), radial functions (P, num_radial)
        edge = convolution_pairs(graph, self.undirected and self.pair_cutoffs is None)
        distances = safe_norm(edge.displacements)
        harmonics = spherical_harmonics(
            unit_vectors(edge.displacements, distances), self.max_degree
        )
        radial = self._radial(distances, edge, rows, num_rows)
        # the embedding of elements is both the first feature and the attribute of self-connections
        width = self.embedding_width or layers[-1][0][0]
        table = self.param("embedding", nn.initializers.normal(1.0), (num_rows, width)).astype(
            distances.dtype
        )
        features = {SCALAR: table_rows(table, rows)[:, None]}
        scale = self._scale(rows, num_rows, distances.dtype)
        block = nn.remat(Interaction) if self.remat else Interaction
        for n, wanted in enumerate(layers):
            features = block(
                wanted,
                self.harmonic_irreps(),
                tuple(self.radial_widths),
                "nequip",
                "elements" if n > 0 else "none",
                elements,
                undirected=edge.undirected,
                name=f"layer_{n}",
            )(features, numbers, table, edge.receivers, edge.senders, harmonics, radial, scale)
        energies = ScalarNetwork(
            (*self.energy_widths, 1), form="nequip", zero_init=self.zero_init, name="energy"
        )(scalars(features))[:, 0]
        energies = scale_and_shift(self, energies, numbers, self.learned_scale, self.learned_shift)
        return AtomOutputs(energies, layout(features, 0, False))

    def layer_irreps(self) -> list[Irreps]:
        """Return the irreps of the features after each layer, in the order of nequip."""
        if self.irreps is None:
            hidden = self.hidden_irreps()
            return [hidden] * (self.num_layers - 1) + [((hidden[0][0], SCALAR),)]
        layers = [parse(text) for text in self.irreps]
        if len(layers) != self.num_layers or any(irrep != SCALAR for _, irrep in layers[-1]):
            raise ValueError(
                f"irreps must be those of {self.num_layers} layers, the last one with scalars (0e) "
                f"only, received {list(self.irreps)}"
            )
        return layers

    def hidden_irreps(self) -> Irreps:
        """Return the irreps of the features of `num_features` and `parity`."""
        if self.parity not in PARITIES:
            raise ValueError(f"parity must be one of {PARITIES}, received {self.parity!r}")
        counts = self.num_features
        counts = [counts] * (self.max_degree + 1) if np.ndim(counts) == 0 else list(counts)
        if len(counts) != self.max_degree + 1:
            raise ValueError(
                f"num_features must be a number or one per degree from 0 to {self.max_degree}, received "
                f"{counts}"
            )
        parities = {
            "full": lambda l: (EVEN, ODD),
            "natural": lambda l: ((-1) ** l,),
            "even": lambda l: (EVEN,),
        }
        return tuple(
            (counts[l], Irrep(l, p))
            for l in range(self.max_degree + 1)
            for p in parities[self.parity](l)
        )

    def harmonic_irreps(self) -> tuple[Irrep, ...]:
        """Return the irreps of the harmonics."""
        return tuple(
            Irrep(l, EVEN if self.parity == "even" else (-1) ** l)
            for l in range(self.max_degree + 1)
        )

    def _radial(self, distances, edge: Pairs, rows, num_rows) -> jax.Array:
        """Compute Bessel functions times envelope, shape (P, num_radial)."""
        cutoff = self.cutoff
        if self.pair_cutoffs is not None:
            if self.elements is None or len(self.pair_cutoffs) != num_rows**2:
                raise ValueError(
                    "pair_cutoffs must have a number for each pair of elements, received "
                    f"{len(self.pair_cutoffs)} for elements={self.elements}"
                )
            table = jnp.asarray(self.pair_cutoffs, distances.dtype)
            cutoff = gather(
                table, gather(rows, edge.receivers) * num_rows + gather(rows, edge.senders)
            )
        roots = _roots(self, self.num_radial, self.radial_roots, self.learned_roots).astype(
            distances.dtype
        )
        u = (distances / cutoff)[:, None]
        envelope = polynomial_cutoff(distances, cutoff, self.cutoff_power)[:, None]
        return roots * jnp.sinc(roots * u) * envelope * (2 * np.pi / self.cutoff**2)

    def _scale(self, rows, num_rows, dtype):
        """Return the factor of the neighbors' features."""
        if np.ndim(self.avg_num_neighbors) == 0:
            return float(1 / np.sqrt(self.avg_num_neighbors))
        if self.elements is None or len(self.avg_num_neighbors) != num_rows:
            raise ValueError(
                "avg_num_neighbors must be a number or one for each of elements, received "
                f"{len(self.avg_num_neighbors)} for elements={self.elements}"
            )
        return jnp.asarray(1 / np.sqrt(self.avg_num_neighbors), dtype)[rows][:, None, None]


def _roots(module: nn.Module, num: int, given: Sequence[float] | None, learned: bool) -> jax.Array:
    """Return the roots of the Bessel functions, the parameter "radial_roots" if they are trained."""
    values = np.arange(1.0, num + 1) if given is None else np.asarray(given, np.float64)
    if len(values) != num:
        raise ValueError(
            f"radial_roots must have {num} numbers (num_radial), received {len(values)}"
        )
    if not learned:
        return jnp.asarray(values)
    return module.param("radial_roots", lambda key: jnp.asarray(values, jnp.float32))

"""DeNS: denoising of structures that are no minima, beside the training of a force field (Liao et al.,
arXiv:2403.09549).

Some structures of a batch are displaced by noise. Of a geometry that is no minimum, many others can be the origin; so
the model is told the forces of the original, which single it out, and learns the noise and the energy of the original.
The others are learned from as ever, their energies and forces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models.layers.readouts import PropertyModel
from mlip_jax.potential import Evaluation
from mlip_jax.training import losses
from mlip_jax.training.noise import DISPLACEMENT, CoordinateNoise
from mlip_jax.training.objectives import ForceField, figure

ENCODED = "encoded_forces"


class ForceFieldAdapter(NamedTuple):
    """A PropertyModel in the place of a model of energies: its heads are the properties of the atoms."""

    model: PropertyModel

    def apply(self, params: Any, graph: jraph.GraphsTuple):
        return self.model.apply(params, graph, method="with_energies")


@dataclasses.dataclass(frozen=True)
class BatchNoise:
    """Displaces some structures of a batch; see `CoordinateNoise`, whose noise it draws.

    Attributes:
      displaced: With noise alone. share: Of the structures.
    """

    displaced: CoordinateNoise
    share: float

    def __call__(self, columns: Columns, samples: np.ndarray, epoch: int, budget: PaddingBudget | None = None
                 ) -> Columns:
        """The structures, of which some have other positions, no known forces, and two properties of their atoms:
        "displacement" (A, 3) to the original in Å, NaN for those that are as they were, and "encoded_forces" (A, 3) of
        the original in eV/Å, zero for these. A structure without all of its forces stays as it is."""
        made = self.displaced(columns, samples, epoch, budget)
        seed = self.displaced.seed
        chosen = np.array([np.random.default_rng([seed, epoch + 1, sample, 10**6]).random() < self.share
                           for sample in samples.tolist()])
        atoms = np.repeat(chosen, columns.n_atoms)
        known = np.logical_and.reduceat(np.isfinite(columns.forces).all(1), columns.offsets[:-1])
        atoms &= np.repeat(known, columns.n_atoms)
        atoms = atoms[:, None]
        return dataclasses.replace(
            made, positions=np.where(atoms, made.positions, columns.positions),
            forces=np.where(atoms, np.nan, columns.forces),
            atom_properties={**columns.atom_properties,
                             DISPLACEMENT: np.where(atoms, made.atom_properties[DISPLACEMENT], np.nan),
                             ENCODED: np.where(atoms, columns.forces, 0.0)})


class DenoisingSums(NamedTuple):
    """Sums over a batch.

    Attributes:
      force_field: Of energies and forces. denoising: Of |predicted - displacement / noise|² / 3. atoms: In the latter.
    """

    force_field: losses.LossSums
    denoising: jax.Array
    atoms: jax.Array


@dataclasses.dataclass(frozen=True)
class DeNS:
    """The loss of a force field plus weight times the mean denoising error.

    Attributes:
      force_field: Its model is `ForceFieldAdapter` of one with the head "displacement". weight: Of denoising.
      noise: Å. scale: eV/Å, by which forces are divided before they are encoded.
    """

    force_field: ForceField
    weight: float
    noise: float
    scale: float

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.force_field.columns, "denoising")

    def sums(self, params: Any, graph: jraph.GraphsTuple) -> DenoisingSums:
        return self.evaluate(params, graph)[1]

    def counts(self, graph: jraph.GraphsTuple) -> DenoisingSums:
        return DenoisingSums(self.force_field.counts(graph), *self._denoising(None, graph))

    def evaluate(self, params: Any, graph: jraph.GraphsTuple) -> tuple[Evaluation, DenoisingSums]:
        encoded = graph.nodes.get("properties", {}).get(ENCODED)
        if encoded is not None:
            graph = graph._replace(nodes={**graph.nodes, ENCODED: encoded / self.scale})
        evaluation, sums = self.force_field.evaluate(params, graph)
        return evaluation, DenoisingSums(sums, *self._denoising(evaluation.properties[DISPLACEMENT], graph))

    def combine(self, local: DenoisingSums, total: DenoisingSums, step: Any) -> jax.Array:
        denoising = local.denoising / jnp.maximum(total.atoms, 1.0)
        return self.force_field.combine(local.force_field, total.force_field, step) + self.weight * denoising

    def averages(self, sums: DenoisingSums, prefix: str, step: int | None = None) -> dict[str, float]:
        row = self.force_field.averages(sums.force_field, prefix, step)
        denoising = sums.denoising / sums.atoms if sums.atoms else float("nan")
        if sums.atoms:
            row[f"{prefix}_loss"] += self.weight * denoising
        return row | {f"{prefix}_denoising": denoising}

    def line(self, row: Mapping[str, float], prefix: str) -> str:
        return f"{self.force_field.line(row, prefix)}  denoising {figure(row[f'{prefix}_denoising'], 3)}"

    def _denoising(self, predicted, graph):
        labels = graph.nodes.get("properties", {}).get(DISPLACEMENT)
        zero = jnp.zeros((), graph.nodes["positions"].dtype)
        if labels is None:
            return zero, zero
        known = jraph.get_node_padding_mask(graph) & jnp.isfinite(labels).all(-1)
        labels = jnp.where(known[:, None], labels, 0.0) / self.noise
        predicted = labels if predicted is None else predicted
        penalty = jnp.where(known[:, None], jnp.square(predicted - labels), 0.0).sum() / 3.0
        return penalty, known.sum().astype(penalty.dtype)

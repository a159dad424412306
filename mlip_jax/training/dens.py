"""DeNS: denoising of non-equilibrium structures as an auxiliary task of force field training.

The method is that of Liao et al., arXiv:2403.09549. Some structures of a batch are displaced by
noise. If the original is not a minimum, the displaced geometry does not determine it. The model
therefore receives the forces of the original as an input. It learns the noise and the energy of the
original. From the other structures it learns energies and forces as usual.
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
    """Adapter that lets a PropertyModel replace an energy model. Its heads are atom properties."""

    model: PropertyModel

    @property
    def direct_forces(self) -> bool:
        """Whether the model predicts forces; see layers.forces."""
        return self.model.direct_forces

    @property
    def conservative(self) -> bool:
        """Whether forces are minus the gradient of the energy; see layers.forces."""
        return self.model.conservative

    def apply(self, params: Any, graph: jraph.GraphsTuple):
        """Compute the energies and the outputs of the heads."""
        return self.model.apply(params, graph, method="with_energies")


@dataclasses.dataclass(frozen=True)
class BatchNoise:
    """Displacement of a random subset of the structures of a batch.

    Attributes:
      noise: Generator of the displacements. It has no frames.
      share: Fraction of the structures that are displaced.
    """

    noise: CoordinateNoise
    share: float

    def __call__(
        self, columns: Columns, samples: np.ndarray, epoch: int, budget: PaddingBudget | None = None
    ) -> Columns:
        """Return the structures, some of them displaced and without force labels.

        All atoms get two properties. "displacement" (A, 3) is the vector to the original position
        (Å), NaN in the structures that are unchanged. "encoded_forces" (A, 3) are the forces of the
        original (eV/Å), zero in the structures that are unchanged. A structure whose force labels
        are incomplete is never displaced.
        """
        # displace all structures, then reset those that are not chosen
        displaced = self.noise(columns, samples, epoch, budget)
        seed = self.noise.seed
        chosen = np.array(
            [
                np.random.default_rng([seed, epoch + 1, sample, 10**6]).random() < self.share
                for sample in samples.tolist()
            ]
        )
        atoms = np.repeat(chosen, columns.n_atoms)
        known = np.logical_and.reduceat(np.isfinite(columns.forces).all(1), columns.offsets[:-1])
        atoms &= np.repeat(known, columns.n_atoms)
        atoms = atoms[:, None]  # (A, 1)
        return dataclasses.replace(
            displaced,
            positions=np.where(atoms, displaced.positions, columns.positions),
            forces=np.where(atoms, np.nan, columns.forces),
            atom_properties={
                **columns.atom_properties,
                DISPLACEMENT: np.where(atoms, displaced.atom_properties[DISPLACEMENT], np.nan),
                ENCODED: np.where(atoms, columns.forces, 0.0),
            },
        )


class DenoisingSums(NamedTuple):
    """Loss sums over a batch.

    Attributes:
      force_field: Sums of the energy and force losses.
      denoising: Sum of |predicted - displacement / noise|² / 3 over the displaced atoms.
      atoms: Number of displaced atoms.
    """

    force_field: losses.LossSums
    denoising: jax.Array
    atoms: jax.Array


@dataclasses.dataclass(frozen=True)
class DeNS:
    """Objective: the loss of a force field plus `weight` times the mean denoising error.

    Attributes:
      force_field: Objective of the force field. Its model is a `ForceFieldAdapter` of a model with
        the head "displacement".
      weight: Weight of the denoising error.
      noise: Standard deviation of the noise (Å).
      scale: Forces are divided by this value (eV/Å) before they are encoded.
    """

    force_field: ForceField
    weight: float
    noise: float
    scale: float

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metrics of `averages`, without the prefix."""
        return (*self.force_field.columns, "denoising")

    def sums(self, params: Any, graph: jraph.GraphsTuple) -> DenoisingSums:
        """Compute the loss sums of a batch."""
        return self.evaluate(params, graph)[1]

    def counts(self, graph: jraph.GraphsTuple) -> DenoisingSums:
        """Return sums with meaningful counts only, without evaluating the model."""
        return DenoisingSums(self.force_field.counts(graph), *self._denoising(None, graph))

    def evaluate(self, params: Any, graph: jraph.GraphsTuple) -> tuple[Evaluation, DenoisingSums]:
        """Evaluate the model on a batch and compute the loss sums."""
        encoded = graph.nodes.get("properties", {}).get(ENCODED)
        if encoded is not None:
            graph = graph._replace(nodes={**graph.nodes, ENCODED: encoded / self.scale})
        evaluation, sums = self.force_field.evaluate(params, graph)
        return evaluation, DenoisingSums(
            sums, *self._denoising(evaluation.properties[DISPLACEMENT], graph)
        )

    def combine(self, local: DenoisingSums, total: DenoisingSums, step: Any) -> jax.Array:
        """Compute this device's share of the loss from its sums and the counts of all devices."""
        denoising = local.denoising / jnp.maximum(total.atoms, 1.0)
        return (
            self.force_field.combine(local.force_field, total.force_field, step)
            + self.weight * denoising
        )

    def averages(
        self, sums: DenoisingSums, prefix: str, step: int | None = None
    ) -> dict[str, float]:
        """Compute the loss and the mean errors from sums on the host; NaN without labels."""
        row = self.force_field.averages(sums.force_field, prefix, step)
        denoising = sums.denoising / sums.atoms if sums.atoms else float("nan")
        if sums.atoms:
            row[f"{prefix}_loss"] += self.weight * denoising
        return row | {f"{prefix}_denoising": denoising}

    def line(self, row: Mapping[str, float], prefix: str) -> str:
        """Format the errors in `row` for the log."""
        denoising = figure(row[f"{prefix}_denoising"], 3)
        return f"{self.force_field.line(row, prefix)}  denoising {denoising}"

    def _denoising(self, predicted, graph):
        """Return the sum of penalties and the number of displaced atoms.

        Without predictions (None) only the number is meaningful.
        """
        labels = graph.nodes.get("properties", {}).get(DISPLACEMENT)
        zero = jnp.zeros((), graph.nodes["positions"].dtype)
        if labels is None:
            return zero, zero
        known = jraph.get_node_padding_mask(graph) & jnp.isfinite(labels).all(-1)
        labels = jnp.where(known[:, None], labels, 0.0) / self.noise
        predicted = labels if predicted is None else predicted  # (N, 3)
        penalty = jnp.where(known[:, None], jnp.square(predicted - labels), 0.0).sum() / 3.0
        return penalty, known.sum().astype(penalty.dtype)

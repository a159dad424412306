"""Training objectives: the loss that the training step minimizes, and the metrics that are logged.

An objective returns sums and counts, which add up exactly over devices and micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.potential import Evaluation, evaluate
from mlip_jax.training import losses


class Objective(Protocol):
    """Interface of a model and its loss to the training step and the loop.

    The sums are a pytree of scalars of any structure. An objective can have a further method,
    absorb(params, old, total) -> (params, total). It takes from the sums of a training step what is
    not a scalar, and updates the parameters that are not trained by gradients: the running
    statistics of batch normalization. `old` are the parameters before the step.

    Attributes:
      columns: Names of the metrics of `averages`, without the prefix: columns of metrics.csv.
    """

    columns: tuple[str, ...]

    def sums(self, params: Any, graph: jraph.GraphsTuple) -> Any:
        """Compute sums over a padded batch. Pure and differentiable with respect to `params`."""

    def counts(self, graph: jraph.GraphsTuple) -> Any:
        """Return sums with meaningful counts only, without evaluating the model."""

    def combine(self, local: Any, total: Any, step: Any) -> jax.Array:
        """Compute this device's share of the loss at a step; the shares add up to the loss.

        Args:
          local: Sums of this device.
          total: Sums of all devices, whose counts are the denominators.
          step: Number of the step, for schedules of the loss.
        """

    def evaluate(self, params: Any, graph: jraph.GraphsTuple) -> tuple[Any, Any]:
        """Return the predictions for a batch, and its sums."""

    def averages(self, sums: Any, prefix: str, step: int | None = None) -> dict[str, float]:
        """Compute the metrics {prefix_loss: ..., prefix_column: ...} on the host. NaN: no labels.

        Args:
          sums: Sums over devices and steps, as numbers.
          prefix: "train" or "valid".
          step: Number of the step. None: a validation, whose loss must not depend on the step.
        """

    def line(self, row: Mapping[str, float], prefix: str) -> str:
        """Format the most important metrics of `averages` for the log."""


@dataclasses.dataclass(frozen=True)
class ForceField:
    """Objective of a force field: (1 - beta) * energy + beta * force + weight * stress.

    Attributes:
      model: Model of the energy.
      energy_scale: Scale of its output; see `potential.evaluate`.
      beta: Schedule of the weight of the forces, step -> beta.
      beta_valid: Weight of the forces in validations.
      loss_options: Keyword arguments of `losses.sums`.
      energy_only: Whether beta is zero in every step. Training then computes no forces, which
        makes a step about three times as fast. Validations still report force errors.
      stress_weight: Weight of the stress. If zero, no stress is computed.
    """

    model: nn.Module
    energy_scale: float
    beta: Callable[[Any], Any]
    beta_valid: float
    loss_options: Mapping[str, Any]
    energy_only: bool = False
    stress_weight: float = 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metrics of `averages`, without the prefix."""
        names = ("loss", "energy_mae_mev_per_atom", "energy_mae_mev", "force_mae_mev_per_ang")
        return (*names, losses.STRESS_COLUMN) if self.stress_weight else names

    def sums(self, params: Any, graph: jraph.GraphsTuple) -> losses.LossSums:
        """Compute the loss sums of a batch."""
        if not self.energy_only:
            return self.evaluate(params, graph)[1]
        evaluation = evaluate(
            self.model,
            params,
            graph,
            self.energy_scale,
            with_stress=self._with_stress(graph),
            with_forces=False,
        )
        return losses.sums(evaluation, self._training_labels(graph), **self.loss_options)

    def counts(self, graph: jraph.GraphsTuple) -> losses.LossSums:
        """Return sums with meaningful counts only, without evaluating the model."""
        stress = jnp.zeros_like(graph.globals["cell"]) if self._with_stress(graph) else None
        zeros = Evaluation(
            jnp.zeros_like(graph.globals["energy"]),
            jnp.zeros_like(graph.nodes["forces"]),
            None,
            stress,
        )
        return losses.sums(zeros, self._training_labels(graph), **self.loss_options)

    def _training_labels(self, graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
        """Return the batch, without force labels if training computes no forces."""
        if not self.energy_only:
            return graph
        return graph._replace(
            nodes={**graph.nodes, "forces": jnp.full_like(graph.nodes["forces"], jnp.nan)}
        )

    def combine(self, local: losses.LossSums, total: losses.LossSums, step: Any) -> jax.Array:
        """Compute this device's share of the loss from its sums and the counts of all devices."""
        return losses.combine(local, total, self.beta(step), self.stress_weight)

    def evaluate(self, params: Any, graph: jraph.GraphsTuple) -> tuple[Evaluation, losses.LossSums]:
        """Compute energies, forces and loss sums of a batch; with a weight also the stress."""
        evaluation = evaluate(
            self.model, params, graph, self.energy_scale, with_stress=self._with_stress(graph)
        )
        return evaluation, losses.sums(evaluation, graph, **self.loss_options)

    def averages(
        self, sums: losses.LossSums, prefix: str, step: int | None = None
    ) -> dict[str, float]:
        """Compute the loss and the mean absolute errors on the host; NaN without labels."""
        beta = self.beta_valid if step is None else float(self.beta(step))
        return losses.averages(sums, beta, prefix, self.stress_weight)

    def _with_stress(self, graph: jraph.GraphsTuple) -> bool:
        return bool(self.stress_weight) and "cell" in graph.globals

    def line(self, row: Mapping[str, float], prefix: str) -> str:
        """Format the energy and force errors for the log."""
        stress = row.get(f"{prefix}_{losses.STRESS_COLUMN}")
        return (
            f"E {figure(row[f'{prefix}_energy_mae_mev_per_atom'], 2)} meV/atom  "
            f"F {figure(row[f'{prefix}_force_mae_mev_per_ang'], 1)} meV/Å"
            + ("" if stress is None else f"  S {figure(stress, 2)} meV/Å³")
        )


def figure(value: float, digits: int) -> str:
    """Format an error with `digits` decimals, or return "-" if it is not finite."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"

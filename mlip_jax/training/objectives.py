"""What is trained: an objective tells the compiled step what to minimise, and the loop how it went.

Losses are sums and counts, so that those of several devices and micro-batches add up to the loss of all of them.
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
    """All that a training step and its loop ask of a model and its loss. Sums are any tree of scalars.

    Attributes:
      columns: Names of what `averages` gives, without the prefix: columns of the metrics of a run.
    """

    columns: tuple[str, ...]

    def sums(self, params: Any, graph: jraph.GraphsTuple) -> Any:
        """Sums over a padded batch. Pure, differentiable by `params`."""

    def counts(self, graph: jraph.GraphsTuple) -> Any:
        """Sums whose counts are those of the batch; they need no model."""

    def combine(self, local: Any, total: Any, step: Any) -> jax.Array:
        """This device's part of the loss at a step: its sums over the counts of all. The parts add up to the loss."""

    def evaluate(self, params: Any, graph: jraph.GraphsTuple) -> tuple[Any, Any]:
        """What is predicted of a batch, and its sums."""

    def averages(self, sums: Any, prefix: str, step: int | None = None) -> dict[str, float]:
        """On the host: {prefix_loss: ..., prefix_column: ...}; NaN where there was no label. step None: a validation,
        whose loss must mean the same all through a run."""

    def line(self, row: Mapping[str, float], prefix: str) -> str:
        """What a person wants to see of `averages`, in short."""


@dataclasses.dataclass(frozen=True)
class ForceField:
    """Energies and forces: (1 - beta) * energy + beta * force.

    Attributes:
      model, energy_scale: See potential.evaluate.
      beta: Function of the step. beta_valid: Of validations.
      loss_options: Of losses.sums.
      energies_alone: beta is zero all through: training computes no forces, which makes an update about three times as
        fast; validations tell their errors all the same.
    """

    model: nn.Module
    energy_scale: float
    beta: Callable[[Any], Any]
    beta_valid: float
    loss_options: Mapping[str, Any]
    energies_alone: bool = False
    columns = ("loss", "energy_mae_mev_per_atom", "energy_mae_mev", "force_mae_mev_per_ang")

    def sums(self, params: Any, graph: jraph.GraphsTuple) -> losses.LossSums:
        if not self.energies_alone:
            return self.evaluate(params, graph)[1]
        evaluation = evaluate(self.model, params, graph, self.energy_scale, with_forces=False)
        return losses.sums(evaluation, self._trained_on(graph), **self.loss_options)

    def counts(self, graph: jraph.GraphsTuple) -> losses.LossSums:
        nothing = Evaluation(jnp.zeros_like(graph.globals["energy"]), jnp.zeros_like(graph.nodes["forces"]), None)
        return losses.sums(nothing, self._trained_on(graph), **self.loss_options)

    def _trained_on(self, graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
        """The graph, of which no force is known where there are none to compare with."""
        if not self.energies_alone:
            return graph
        return graph._replace(nodes={**graph.nodes, "forces": jnp.full_like(graph.nodes["forces"], jnp.nan)})

    def combine(self, local: losses.LossSums, total: losses.LossSums, step: Any) -> jax.Array:
        return losses.combine(local, total, self.beta(step))

    def evaluate(self, params: Any, graph: jraph.GraphsTuple) -> tuple[Evaluation, losses.LossSums]:
        evaluation = evaluate(self.model, params, graph, self.energy_scale)
        return evaluation, losses.sums(evaluation, graph, **self.loss_options)

    def averages(self, sums: losses.LossSums, prefix: str, step: int | None = None) -> dict[str, float]:
        return losses.averages(sums, self.beta_valid if step is None else float(self.beta(step)), prefix)

    def line(self, row: Mapping[str, float], prefix: str) -> str:
        return (f"E {figure(row[f'{prefix}_energy_mae_mev_per_atom'], 2)} meV/atom  "
                f"F {figure(row[f'{prefix}_force_mae_mev_per_ang'], 1)} meV/Å")


def figure(value: float, digits: int) -> str:
    """A dash where the data have no such label."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"

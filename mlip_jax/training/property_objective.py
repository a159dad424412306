"""Training objective of property predictors, with optional alignment to the reference geometry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph

from mlip_jax.config import ConfigError
from mlip_jax.datasets.property_data import Target
from mlip_jax.matmul_precision import full_precision
from mlip_jax.models.layers.basic import safe_norm
from mlip_jax.models.layers.batch_norm import MOMENTUM, STATISTICS
from mlip_jax.models.layers.readouts import PropertyModel
from mlip_jax.training.losses import PENALTIES
from mlip_jax.training.noise import DISPLACEMENT
from mlip_jax.training.objectives import figure

# Value of align.loss for the positions that a model of bonds refines.
REFINEMENT = "mae"
# Displacement (Å) at or below which an atom is at its reference position and has no direction.
_NO_DISPLACEMENT = 1e-4
# Length of a predicted direction below which its penalty is linear. The derivative of the cosine is
# the inverse of the length, so predictions near zero would decide the whole step.
_SHORT = 1e-2


class PropertySums(NamedTuple):
    """Sums over a batch; all scalars, the first three by property.

    Attributes:
      penalty: Sum of the penalties of errors in training units.
      absolute: Sum of |error| in the unit of the property.
      count: Number of values in these sums.
      alignment: Sum of the alignment penalties.
      aligned: Number of atoms in this sum.
      statistics: Sums over batches of the statistics of batch normalization; only in training, and
        only for a model that has it.
      batches: Number of batches in these sums.
    """

    penalty: dict[str, jax.Array]
    absolute: dict[str, jax.Array]
    count: dict[str, jax.Array]
    alignment: jax.Array
    aligned: jax.Array
    statistics: Any = ()
    batches: Any = ()


@dataclasses.dataclass(frozen=True)
class Properties:
    """Objective: the sum over properties of weight * mean penalty, plus an alignment penalty.

    The alignment (Fu et al., arXiv:2507.00407, section 2.4) compares the head "displacement", a
    vector per atom, to the displacement label. Its penalty is one of:

        cosine   1 - cos(predicted, displacement)
        mse      |predicted - displacement / noise|² / 3: denoising of coordinates
                 (Zaidi et al., arXiv:2206.00133)
        mae      |predicted - displacement|_1 of the positions that a model of bonds refines
                 (Lu et al., arXiv:2303.16982), without its loss of distances

    Attributes:
      model: Property predictor.
      targets: Properties to learn.
      penalty: Name of a penalty in losses.PENALTIES.
      huber_delta: Error at which "huber" becomes linear, in training units.
      align_weight: Weight of the mean alignment penalty; 0 for no alignment.
      alignment: "cosine", "mse" or "mae".
      noise: Standard deviation of the noise (Å), for "mse".
    """

    model: PropertyModel
    targets: tuple[Target, ...]
    penalty: str = "mae"
    huber_delta: float = 1.0
    align_weight: float = 0.0
    alignment: str = "cosine"
    noise: float = 1.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metrics of `averages`, without the prefix."""
        return (
            "loss",
            *(f"{t.name}_mae" for t in self.targets),
            *(("alignment",) if self.align_weight else ()),
        )

    def sums(self, params: Any, graph: jraph.GraphsTuple) -> PropertySums:
        """Compute the loss sums of a batch, and the statistics of its batch normalization."""
        if STATISTICS not in params or self.model.frozen:
            return self.evaluate(params, graph)[1]
        with full_precision():  # except in training steps
            predicted, variables = self.model.apply(params, graph, mutable=[STATISTICS])
        filled = jraph.get_graph_padding_mask(graph).any()
        filled = filled.astype(graph.nodes["positions"].dtype)
        statistics = jax.tree.map(lambda x: filled * x, variables[STATISTICS])
        return self._sums(predicted, graph)._replace(statistics=statistics, batches=filled)

    def counts(self, graph: jraph.GraphsTuple) -> PropertySums:
        """Return sums with meaningful counts only, without evaluating the model."""
        return self._sums(None, graph)

    def evaluate(
        self, params: Any, graph: jraph.GraphsTuple
    ) -> tuple[dict[str, jax.Array], PropertySums]:
        """Predict the properties of a batch and compute its loss sums."""
        refines = self.align_weight and self.alignment == REFINEMENT
        options = {"method": "with_refinement"} if refines else {}
        with full_precision():  # except in training steps
            predicted = self.model.apply(params, graph, **options)
        return predicted, self._sums(predicted, graph)

    def absorb(self, params: Any, old: Any, total: PropertySums) -> tuple[Any, PropertySums]:
        """Update the running statistics of batch normalization; see `Objective.absorb`."""
        if not total.statistics:
            return params, total
        share = jnp.where(total.batches > 0, MOMENTUM / jnp.maximum(total.batches, 1.0), 0.0)
        running = jax.tree.map(
            lambda mean, batch: mean + share * (batch - total.batches * mean),
            old[STATISTICS],
            total.statistics,
        )
        return {**params, STATISTICS: running}, total._replace(statistics=(), batches=())

    def combine(self, local: PropertySums, total: PropertySums, step: Any) -> jax.Array:
        """Compute this device's share of the loss from its sums and the counts of all devices."""
        loss = self.align_weight * local.alignment / jnp.maximum(total.aligned, 1.0)
        for t in self.targets:
            loss = loss + t.weight * local.penalty[t.name] / jnp.maximum(total.count[t.name], 1.0)
        return loss

    def averages(
        self, sums: PropertySums, prefix: str, step: int | None = None
    ) -> dict[str, float]:
        """Compute the loss and the mean errors from sums on the host; NaN without labels."""
        # a validation loss includes the alignment only if there are no properties
        with_alignment = step is not None or not self.targets
        loss = (
            self.align_weight * _mean(sums.alignment, sums.aligned)
            if with_alignment and sums.aligned
            else 0.0
        )
        row = {
            f"{prefix}_{t.name}_mae": _mean(sums.absolute[t.name], sums.count[t.name])
            for t in self.targets
        }
        loss += sum(
            t.weight * _mean(sums.penalty[t.name], sums.count[t.name])
            for t in self.targets
            if sums.count[t.name]
        )
        if self.align_weight:
            row[f"{prefix}_alignment"] = _mean(sums.alignment, sums.aligned)
        return {f"{prefix}_loss": float(loss), **row}

    def line(self, row: Mapping[str, float], prefix: str) -> str:
        """Format the errors of the properties, with their units, for the log."""
        parts = [
            f"{t.name} {figure(row[f'{prefix}_{t.name}_mae'], 4)} {t.unit}".strip()
            for t in self.targets
        ]
        if self.align_weight:
            parts.append(f"alignment {figure(row[f'{prefix}_alignment'], 3)}")
        return "  ".join(parts)

    def _sums(
        self, predicted: Mapping[str, jax.Array] | None, graph: jraph.GraphsTuple
    ) -> PropertySums:
        """Return the sums of a batch. Without predictions (None) only the counts are meaningful."""
        penalty, absolute, count = {}, {}, {}
        for t in self.targets:
            labels, mask = _labels(t, graph)
            known = mask & jnp.isfinite(labels)
            output = labels if predicted is None else predicted[t.name]
            error = jnp.where(known, output - jnp.where(known, labels, 0.0), 0.0)
            penalty[t.name] = PENALTIES[self.penalty](error, self.huber_delta).sum()
            absolute[t.name] = t.scale * jnp.abs(error).sum()
            count[t.name] = known.sum().astype(error.dtype)
        return PropertySums(penalty, absolute, count, *self._align(predicted, graph))

    def _align(self, predicted, graph):
        """Return the sum of the alignment penalties and the number of atoms in it."""
        labels = graph.nodes.get("properties", {}).get(DISPLACEMENT)
        zero = jnp.zeros((), graph.nodes["positions"].dtype)
        if not self.align_weight or labels is None:
            return zero, zero
        known = jraph.get_node_padding_mask(graph) & jnp.isfinite(labels).all(-1)
        labels = jnp.where(known[:, None], labels, 0.0)
        output = (
            labels if predicted is None else jnp.where(known[:, None], predicted[DISPLACEMENT], 0.0)
        )
        if self.alignment == "mse":
            penalty = jnp.square(output - labels / self.noise).sum(-1) / 3.0
        elif self.alignment == REFINEMENT:
            penalty = jnp.abs(output - labels).sum(-1)
        else:
            length = safe_norm(labels)
            known = known & (length > _NO_DISPLACEMENT)
            direction = labels / jnp.maximum(length, _NO_DISPLACEMENT)[:, None]
            penalty = 1.0 - (output * direction).sum(-1) / jnp.maximum(safe_norm(output), _SHORT)
        return jnp.where(known, penalty, 0.0).sum(), known.sum().astype(penalty.dtype)


def _labels(target: Target, graph: jraph.GraphsTuple):
    """Return the labels of a target, and a mask that is False for padding graphs or atoms."""
    if target.kind == "atom":
        return graph.nodes["properties"][target.name], jraph.get_node_padding_mask(graph)
    labels = graph.globals["properties"][target.name]
    mask = jraph.get_graph_padding_mask(graph)
    return labels, mask.reshape(-1, *[1] * (labels.ndim - 1))  # (G, 1, ...), broadcast to labels


def _mean(total: float, count: float) -> float:
    """Return total / count, or NaN if there are no labels."""
    return total / count if count else float("nan")


def check(property_: Mapping[str, Any], align: Mapping[str, Any], dens: Mapping[str, Any]) -> None:
    """Raise ConfigError if fields of "property", "align" and "dens" are inconsistent.

    The values of single fields are checked by their declarations (mlip_jax/defaults).
    """
    if dens["weight"] and (
        property_["targets"] or align["weight"] or align["frames"] or not align["noise"]
    ):
        raise ConfigError(
            "dens.weight is set: a force field is trained with denoising. Then property.targets "
            "and align.frames must be empty, align.weight 0 and align.noise above 0 (Å)."
        )
    if dens["weight"] and not dens["share"]:
        raise ConfigError("dens.share must be above 0 if dens.weight is set, received 0.0")
    if not property_["targets"] and not align["weight"] and not dens["weight"]:
        raise ConfigError(
            "nothing to learn: property.targets is empty and align.weight is 0. Set one of them."
        )
    problems = []
    if align["weight"] and not align["noise"] and not align["frames"]:
        problems.append(
            "align.weight is set, but no input is displaced; set align.noise (Å) or align.frames "
            "(stages)"
        )
    if align["loss"] == "mse" and align["weight"] and not align["noise"]:
        problems.append("align.loss='mse' learns noise; set align.noise (Å)")
    if problems:
        raise ConfigError("; ".join(problems))

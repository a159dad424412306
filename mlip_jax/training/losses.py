"""Loss of a force field: (1 - beta) * energy + beta * force + weight * stress.

It is computed from sums and counts, which can be added up exactly over devices and micro-batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph

from mlip_jax.config import unknown_name
from mlip_jax.graphs.graph import node_graph_index, sum_by_graph
from mlip_jax.potential import Evaluation

# STRESS_COLUMN: metric of the stress in metrics.csv, without the prefix.
STRESS_COLUMN = "stress_mae_mev_per_ang3"


class LossSums(NamedTuple):
    """Sums over a batch and the number of values in each; all scalars.

    Attributes:
      energy_loss: Sum of the energy penalties of the graphs.
      force_loss: Sum of the terms of the force penalty.
      energy_abs: Sum of |energy error| per atom (eV) over the graphs.
      force_abs: Sum of |error| over the force components (eV/Å).
      energies: Number of graphs with an energy label.
      forces: Number of force components with a label.
      energy_total_abs: Sum of |error| of the total energies (eV).
      force_terms: Number of terms of force_loss: components, atoms ("norm", "relative") or graphs
        ("rmse").
      stress_loss: Sum of the stress penalties over the components.
      stress_abs: Sum of |error| over the stress components (eV/Å³).
      stresses: Number of stress components with a label.
    """

    energy_loss: jax.Array
    force_loss: jax.Array
    energy_abs: jax.Array
    force_abs: jax.Array
    energies: jax.Array
    forces: jax.Array
    energy_total_abs: jax.Array
    force_terms: jax.Array
    stress_loss: jax.Array | float = 0.0
    stress_abs: jax.Array | float = 0.0
    stresses: jax.Array | float = 0.0


def _absolute(error, delta):
    """Compute |error|, with a gradient of zero at zero."""
    return jnp.where(error == 0, 0.0, jnp.abs(error))  # the gradient of jnp.abs at zero is one


# PENALTIES: name -> function (error, delta) -> penalty of each number, zero for an error of zero.
PENALTIES = {
    "mse": lambda error, delta: error * error,
    "mae": _absolute,
    "huber": lambda error, delta: jnp.where(
        jnp.abs(error) < delta, 0.5 * error * error, delta * (jnp.abs(error) - 0.5 * delta)
    ),
    "rmse": _absolute,  # a structure has one energy, so the root mean square is the absolute error
}


class Forces(NamedTuple):
    """Input of a force penalty.

    Attributes:
      error: Force errors (eV/Å), (N, 3), zero for unknown components.
      known: Whether a component has a label, (N, 3) bool.
      label: Force labels (eV/Å), (N, 3), zero for unknown components.
      graph: Batch of graphs.
      delta: Error at which "huber" becomes linear (eV/Å).
      floor: Force below which "relative" becomes a plain square (eV/Å).
    """

    error: jax.Array
    known: jax.Array
    label: jax.Array
    graph: jraph.GraphsTuple
    delta: float
    floor: float


def _components(penalize, f: Forces):
    """Return the sum of the penalties of the force components, and the number of components."""
    return penalize(f.error, f.delta).sum(), f.known.sum()


def _norm(f: Forces):
    """Return the sum of the lengths of the error vectors, and the number of atoms.

    An atom with an unknown component is not counted.
    """
    whole = f.known.all(-1)  # (N,)
    return _root(jnp.where(whole, (f.error * f.error).sum(-1), 0.0)).sum(), whole.sum()


def _relative(f: Forces):
    """Return the sum of |error|² / (|force|² + floor²), and the number of atoms.

    The direction of a small force counts as much as that of a large one. An atom with an unknown
    component is not counted.
    """
    whole = f.known.all(-1)  # (N,)
    share = (f.error * f.error).sum(-1) / ((f.label * f.label).sum(-1) + f.floor * f.floor)
    return jnp.where(whole, share, 0.0).sum(), whole.sum()


def _rmse(f: Forces):
    """Return the sum of the root mean square errors of the graphs, and the number of graphs.

    The mean is over the known components of a graph. A graph without any is not counted.
    """
    node_graph, num = node_graph_index(f.graph), f.graph.n_node.shape[0]
    squares = sum_by_graph((f.error * f.error).sum(-1), node_graph, num)  # (G,)
    counts = sum_by_graph(f.known.sum(-1).astype(f.error.dtype), node_graph, num)  # (G,)
    return _root(squares / jnp.maximum(counts, 1.0)).sum(), (counts > 0).sum()


def _root(squares):
    """Compute the square root, with a gradient of zero at zero instead of infinity."""
    zero = squares == 0  # the negation of squares > 0 would turn NaN into zero
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


# FORCE_PENALTIES: name -> function Forces -> (sum of the terms, number of terms).
FORCE_PENALTIES = {
    **{name: functools.partial(_components, PENALTIES[name]) for name in ("mse", "mae", "huber")},
    "rmse": _rmse,
    "norm": _norm,
    "relative": _relative,
}


def sums(
    evaluation: Evaluation,
    graph: jraph.GraphsTuple,
    *,
    penalty: str = "mse",
    force_penalty: str | None = None,
    energy_per_atom: bool = True,
    huber_delta: float = 0.05,
    force_floor: float = 0.1,
) -> LossSums:
    """Compute loss and error sums of a padded batch. Padding and NaN labels are ignored.

    The mean of an energy penalty is over the graphs with an energy label. The terms of the force
    penalties are:

        mse, mae, huber   penalty of each known component
        rmse              per structure: root mean square error of the known components; for
                          energies the absolute error
        norm              only for forces; per atom with three known components: length of the error
                          vector (the L2 mean absolute error of arXiv:2010.09990)
        relative          only for forces; per atom with three known components:
                          |error|² / (|force|² + force_floor²)

    The gradient of each penalty is zero if the error is zero. The penalty of the stress is that of
    the energies, for each component; its sums are zero if the stress is not predicted.

    Args:
      evaluation: Predicted energies (G,), forces (N, 3) and stress (G, 3, 3) or None.
      graph: Batch with the labels globals["energy"], nodes["forces"] and, for the stress, the
        property "stress" of its globals.
      penalty: Penalty of the energies.
      force_penalty: Penalty of the forces. None: the same as that of the energies.
      energy_per_atom: Whether to divide the energy error by the number of atoms before the penalty.
      huber_delta: Error at which "huber" changes from quadratic to linear (eV and eV/Å).
      force_floor: Force below which "relative" becomes a plain square (eV/Å).

    Raises:
      ValueError: A penalty is unknown, or huber_delta or force_floor is not a positive number.
    """
    check_penalties(penalty, force_penalty, huber_delta, force_floor)
    label_e, label_f = graph.globals["energy"], graph.nodes["forces"]
    known_e = jraph.get_graph_padding_mask(graph) & jnp.isfinite(label_e)
    known_f = jraph.get_node_padding_mask(graph)[:, None] & jnp.isfinite(label_f)
    # masked before the difference as well: NaN times zero is NaN in the gradient
    error_e = jnp.where(known_e, evaluation.energy - jnp.where(known_e, label_e, 0.0), 0.0)
    label_f = jnp.where(known_f, label_f, 0.0)
    error_f = jnp.where(known_f, evaluation.forces - label_f, 0.0)  # (N, 3)
    per_atom = error_e / jnp.maximum(graph.n_node, 1).astype(error_e.dtype)  # (G,)
    energy_loss = PENALTIES[penalty](per_atom if energy_per_atom else error_e, huber_delta).sum()
    force_loss, force_terms = FORCE_PENALTIES[force_penalty or penalty](
        Forces(error_f, known_f, label_f, graph, huber_delta, force_floor)
    )
    return LossSums(
        energy_loss=energy_loss,
        force_loss=force_loss,
        energy_abs=jnp.abs(per_atom).sum(),
        force_abs=jnp.abs(error_f).sum(),
        energies=known_e.sum().astype(error_e.dtype),
        forces=known_f.sum().astype(error_e.dtype),
        energy_total_abs=jnp.abs(error_e).sum(),
        force_terms=force_terms.astype(error_e.dtype),
        **_stress_sums(evaluation.stress, graph, PENALTIES[penalty], huber_delta),
    )


def _stress_sums(stress, graph, penalize, delta) -> dict[str, jax.Array]:
    """Return the stress sums of a batch; zero without predictions or labels."""
    label = graph.globals.get("properties", {}).get("stress")
    if stress is None or label is None:
        zero = jnp.zeros((), graph.nodes["positions"].dtype)
        return {"stress_loss": zero, "stress_abs": zero, "stresses": zero}
    known = jraph.get_graph_padding_mask(graph)[:, None, None] & jnp.isfinite(label)
    error = jnp.where(known, stress - jnp.where(known, label, 0.0), 0.0)  # (G, 3, 3)
    return {
        "stress_loss": penalize(error, delta).sum(),
        "stress_abs": jnp.abs(error).sum(),
        "stresses": known.sum().astype(error.dtype),
    }


def check_penalties(
    penalty: str, force_penalty: str | None, huber_delta: float, force_floor: float = 0.1
) -> None:
    """Raise ValueError if options of `sums` are invalid.

    `sums` checks them as well, but only when a step is compiled.
    """
    if penalty in ("norm", "relative"):
        raise ValueError(
            f"loss.penalty: {penalty!r} applies only to vectors, not to energies. Set "
            f"loss.force_penalty to {penalty!r} and loss.penalty to one of "
            f"{', '.join(sorted(PENALTIES))}."
        )
    if penalty not in PENALTIES:
        raise ValueError(unknown_name("loss.penalty", penalty, PENALTIES))
    if force_penalty is not None and force_penalty not in FORCE_PENALTIES:
        raise ValueError(unknown_name("loss.force_penalty", force_penalty, FORCE_PENALTIES))
    if "huber" in (penalty, force_penalty) and not 0 < huber_delta < math.inf:
        raise ValueError(
            f"loss.huber_delta must be a positive number (eV and eV/Å), received {huber_delta}"
        )
    if force_penalty == "relative" and not 0 < force_floor < math.inf:
        raise ValueError(
            f"loss.force_floor must be a positive number (eV/Å), received {force_floor}"
        )


def combine(
    local: LossSums, total: LossSums, beta: jax.Array | float, stress_weight: float = 0.0
) -> jax.Array:
    """Compute this device's share of the loss: its sums over the counts of all devices.

    The shares of all devices add up to the loss.
    """
    energy = local.energy_loss / jnp.maximum(total.energies, 1.0)
    force = local.force_loss / jnp.maximum(total.force_terms, 1.0)
    loss = (1.0 - beta) * energy + beta * force
    if not stress_weight:
        return loss
    return loss + stress_weight * local.stress_loss / jnp.maximum(total.stresses, 1.0)


def averages(
    sums: LossSums, beta: float, prefix: str, stress_weight: float = 0.0
) -> dict[str, float]:
    """Compute the loss and the mean absolute errors by name. An error is NaN without labels.

    Those of the stress are only computed if it has a weight.
    """

    def mean(total, count):
        return total / count if count else float("nan")

    # Skip a term without labels by its count: a non-finite term must make the loss non-finite.
    terms = (
        (1 - beta, sums.energy_loss, sums.energies),
        (beta, sums.force_loss, sums.force_terms),
        (stress_weight, sums.stress_loss, sums.stresses),
    )
    stress = {STRESS_COLUMN: 1e3 * mean(sums.stress_abs, sums.stresses)} if stress_weight else {}
    return {
        f"{prefix}_loss": float(
            sum(weight * total / count for weight, total, count in terms if count)
        ),
        f"{prefix}_energy_mae_mev_per_atom": 1e3 * mean(sums.energy_abs, sums.energies),
        f"{prefix}_energy_mae_mev": 1e3 * mean(sums.energy_total_abs, sums.energies),
        f"{prefix}_force_mae_mev_per_ang": 1e3 * mean(sums.force_abs, sums.forces),
        **{f"{prefix}_{name}": value for name, value in stress.items()},
    }


BETA_SCHEDULES = ("geometric", "linear", "step")


def beta_schedule(
    start: float, end: float, begin: float, num_steps: int, kind: str = "geometric"
) -> Callable[[jax.Array | int], jax.Array | float]:
    """Return the schedule `step -> beta`.

    Beta is `start` for the fraction `begin` of the steps, and then changes to `end`:

        geometric   geometric in 1 - beta (linear if either end is 1), `end` at the last step
        linear      linear, `end` at the last step
        step        at once

    Typically, energies get more weight late in training: forces determine the shape of the energy
    surface, energies its level.

    Raises:
      ValueError: The kind is unknown, or a number is outside of 0 to 1.
    """
    if kind not in BETA_SCHEDULES:
        raise ValueError(unknown_name("loss.beta_schedule", kind, BETA_SCHEDULES))
    if not 0.0 <= start <= 1.0 or not 0.0 <= end <= 1.0:
        raise ValueError(
            f"loss.beta and loss.beta_end must be from 0 to 1, received {start} and {end}"
        )
    if not 0.0 <= begin <= 1.0:
        raise ValueError(
            f"loss.beta_begin is a fraction of the steps and must be from 0 to 1, received {begin}"
        )
    jump = math.ceil(begin * num_steps - 1e-6)  # in floating point 0.07 * 100 is slightly above 7

    def beta(step):
        if start == end:
            return start
        if kind == "step":
            return jnp.where(step >= jump, end, start)
        progress = jnp.clip((step / num_steps - begin) / max(1.0 - begin, 1e-9), 0.0, 1.0)
        if kind == "linear" or max(start, end) == 1.0:  # the ratio of 1 - beta is zero or infinite
            return start + (end - start) * progress
        return 1.0 - (1.0 - start) * ((1.0 - end) / (1.0 - start)) ** progress

    return beta

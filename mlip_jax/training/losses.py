"""The loss (1 - beta) * energy + beta * force, as sums and counts so that devices can be added up exactly."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph

from mlip_jax.config import unknown_name
from mlip_jax.potential import Evaluation


class Sums(NamedTuple):
    """Sums over a batch and how many values went into each; all scalars.

    Attributes:
      energy_loss, force_loss: Sums of the penalties of graphs and of force components.
      energy_abs, force_abs: Sums of |error| per atom in eV and per force component in eV/Å.
      energies, forces: Graphs with a known energy; force components that are known.
    """

    energy_loss: jax.Array
    force_loss: jax.Array
    energy_abs: jax.Array
    force_abs: jax.Array
    energies: jax.Array
    forces: jax.Array


PENALTIES = {
    "mse": lambda error, delta: error * error,
    "mae": lambda error, delta: jnp.abs(error),
    "huber": lambda error, delta: jnp.where(
        jnp.abs(error) < delta, 0.5 * error * error, delta * (jnp.abs(error) - 0.5 * delta)),
}


def sums(evaluation: Evaluation, graph: jraph.GraphsTuple, *, penalty: str = "mse", energy_per_atom: bool = True,
         huber_delta: float = 0.05) -> Sums:
    """Loss and error sums of a padded batch; NaN labels and padding count nowhere.

    Args:
      evaluation: Predicted energies (G,) and forces (N, 3).
      graph: With the labels globals["energy"] and nodes["forces"].
      penalty: "mse", "mae" or "huber" (with `huber_delta`, in eV and eV/Å).
      energy_per_atom: Penalise the energy error divided by the number of atoms (else the total).
    """
    if penalty not in PENALTIES:
        raise ValueError(unknown_name("loss.penalty", penalty, PENALTIES))
    label_e, label_f = graph.globals["energy"], graph.nodes["forces"]
    known_e = jraph.get_graph_padding_mask(graph) & jnp.isfinite(label_e)
    known_f = jraph.get_node_padding_mask(graph)[:, None] & jnp.isfinite(label_f)
    # masked before the difference as well: NaN times zero is NaN in the gradient
    error_e = jnp.where(known_e, evaluation.energy - jnp.where(known_e, label_e, 0.0), 0.0)
    error_f = jnp.where(known_f, evaluation.forces - jnp.where(known_f, label_f, 0.0), 0.0)
    per_atom = error_e / jnp.maximum(graph.n_node, 1).astype(error_e.dtype)
    penalise = PENALTIES[penalty]
    return Sums(
        energy_loss=penalise(per_atom if energy_per_atom else error_e, huber_delta).sum(),
        force_loss=penalise(error_f, huber_delta).sum(),
        energy_abs=jnp.abs(per_atom).sum(), force_abs=jnp.abs(error_f).sum(),
        energies=known_e.sum().astype(error_e.dtype), forces=known_f.sum().astype(error_e.dtype))


def combine(local: Sums, total: Sums, beta: jax.Array | float) -> jax.Array:
    """This device's part of the loss: its sums over the counts of all devices. The parts add up to the loss."""
    energy = local.energy_loss / jnp.maximum(total.energies, 1.0)
    force = local.force_loss / jnp.maximum(total.forces, 1.0)
    return (1.0 - beta) * energy + beta * force


def beta_schedule(start: float, end: float, begin: float, num_steps: int):
    """`step -> beta`: `start` until the fraction `begin` of the steps, then geometrically to `end` in 1 - beta
    (linearly where either is 1).

    Late in training the energies get more weight: forces settle the shape of the surface, energies its level.
    """
    if not 0.0 <= start <= 1.0 or not 0.0 <= end <= 1.0:
        raise ValueError(f"loss.beta and loss.beta_end must lie between 0 and 1, received {start} and {end}")

    def beta(step):
        if start == end:
            return start
        progress = jnp.clip((step / num_steps - begin) / max(1.0 - begin, 1e-9), 0.0, 1.0)
        if max(start, end) == 1.0:  # 1 - beta is zero there
            return start + (end - start) * progress
        return 1.0 - (1.0 - start) * ((1.0 - end) / (1.0 - start)) ** progress

    return beta

"""Energies of many structures at once, without their forces: a forward pass alone, a third of the work."""

from __future__ import annotations

import functools

import jax
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.datasets.store import Store
from mlip_jax.graphs.batching import build_batch, choose_budget, measure, plan_window
from mlip_jax.potential import Potential, evaluate

_PIECE = 4096  # structures that are read and planned at a time


def energies(potential: Potential, rows: Store | Columns, indices: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
    """Total energies (S,) in eV, float64, reference energies included, of the structures `indices` of `rows`.

    Compiled once for each few thousand structures whose sizes call for another shape of batches.

    Args:
      batch_size: Structures of a batch, about.

    Raises:
      ValueError: There are elements that the force field was not trained on.
    """
    p = potential
    found, budget = np.empty(len(indices)), None
    for start in range(0, len(indices), _PIECE):
        columns = rows.take(indices[start:start + _PIECE], labels_only=True)
        p.check_elements(columns.numbers)
        sizes = measure(columns, p.cutoff, p.long_range_cutoff)
        needed = choose_budget(sizes, batch_size)
        if budget is None or any(n > b for n, b in zip(needed, budget)):
            budget = type(needed)(*map(max, zip(needed, budget or needed)))
        reference = sum_reference(p.reference_energies, columns)
        for places in plan_window(np.arange(len(columns)), sizes, budget):
            graph = build_batch(columns.take(places), budget, p.cutoff, p.reference_energies,
                                long_range_cutoff=p.long_range_cutoff)
            remainder = np.asarray(_energy(p.model, p.energy_scale, p.params, graph), np.float64)
            found[start + places] = remainder[:len(places)] + reference[places]
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _energy(model, energy_scale, params, graph):
    return evaluate(model, params, graph, energy_scale).energy  # what nobody asks for, the forces, is not computed

"""Energies, forces and features of many structures, in batches.

Energies and features take only a forward pass, about a third of the work of energies with forces.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.datasets.store.store import Store
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.packing import plan_batches
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.graphs.shapes import GrowingBudget
from mlip_jax.matmul_precision import at_full_precision
from mlip_jax.potential import Potential, evaluate

_PIECE_SIZE = 4096  # structures that are read and planned at a time, before they are batched


def energies(
    potential: Potential, rows: Store | Columns, indices: np.ndarray, *, batch_size: int = 64
) -> np.ndarray:
    """Compute the total energies (eV) of structures, (S,), float64, including reference energies.

    Compiled once per few thousand structures, and only if their sizes require another batch shape.

    Args:
      potential: The force field.
      rows: Structures.
      indices: Indices of the S structures in `rows`.
      batch_size: Approximate number of structures per batch.

    Raises:
      ValueError: If there are elements that the force field was not trained on.
    """
    p, totals = potential, np.empty(len(indices))
    params = jax.device_put(p.params)  # once for all batches
    for batch_indices, columns, graph in _batches(p, rows, indices, batch_size):
        remainder = np.asarray(batch_energies(p.model, p.energy_scale, params, graph), np.float64)
        totals[batch_indices] = remainder[: len(batch_indices)] + sum_reference(
            p.reference_energies, columns
        )
    return totals


def energies_and_forces(
    potential: Potential, rows: Store | Columns, indices: np.ndarray, *, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Compute total energies (S,) as `energies`, and forces (eV/Å), (A, 3), concatenated; float64.

    Raises:
      ValueError: As for `energies`.
    """
    p, totals = potential, np.empty(len(indices))
    params = jax.device_put(p.params)
    offsets = np.concatenate([[0], np.cumsum(_n_atoms(rows)[indices], dtype=np.int64)])
    forces = np.empty((offsets[-1], 3))
    for batch_indices, columns, graph in _batches(p, rows, indices, batch_size):
        remainder, batch_forces = (
            np.asarray(x, np.float64)
            for x in _energy_and_forces(p.model, p.energy_scale, params, graph)
        )
        totals[batch_indices] = remainder[: len(batch_indices)] + sum_reference(
            p.reference_energies, columns
        )
        start = np.repeat(offsets[batch_indices] - columns.offsets[:-1], columns.n_atoms)
        forces[start + np.arange(len(columns.numbers))] = batch_forces[: len(columns.numbers)]
    return totals, forces


def _n_atoms(rows: Store | Columns) -> np.ndarray:
    """Return the number of atoms of each structure."""
    return rows.n_atoms if isinstance(rows, Columns) else np.asarray(rows.index("n_atoms"))


def atom_features(potential: Potential, columns: Columns, *, batch_size: int = 64) -> np.ndarray:
    """Compute the invariant features of every atom, (A, F) float32, in the order of `columns`.

    They describe the environment of the atom as the model represents it.

    Raises:
      ValueError: As for `energies`.
    """
    p, all_features = potential, None
    params = jax.device_put(p.params)
    for batch_indices, _, graph in _batches(p, columns, np.arange(len(columns)), batch_size):
        rows = columns.atoms_of(batch_indices)
        features = np.asarray(invariant_features(p.model, params, graph))
        if all_features is None:
            all_features = np.empty((len(columns.numbers), features.shape[1]), np.float32)
        all_features[rows] = features[: len(rows)]
    return np.empty((0, 0), np.float32) if all_features is None else all_features


def mean_features(
    potential: Potential, rows: Store | Columns, indices: np.ndarray, *, batch_size: int = 64
) -> np.ndarray:
    """Compute the mean of the invariant features over the atoms of each structure, (S, F) float32.

    Args:
      potential: The force field.
      rows: Structures.
      indices: Indices of the S structures in `rows`.
      batch_size: Approximate number of structures per batch.

    Raises:
      ValueError: As for `energies`.
    """
    p, all_means = potential, None
    params = jax.device_put(p.params)
    for batch_indices, columns, graph in _batches(p, rows, indices, batch_size):
        features = np.asarray(invariant_features(p.model, params, graph), np.float64)[
            : len(columns.numbers)
        ]
        means = np.add.reduceat(features, columns.offsets[:-1]) / columns.n_atoms[:, None]
        if all_means is None:
            all_means = np.empty((len(indices), features.shape[1]), np.float32)
        all_means[batch_indices] = means
    return np.empty((0, 0), np.float32) if all_means is None else all_means


@functools.partial(jax.jit, static_argnums=0)
@at_full_precision
def invariant_features(model, params, graph: jraph.GraphsTuple) -> jax.Array:
    """Compute the features of degree 0 and even parity of a padded batch, (N, F)."""
    params, graph = jax.tree.map(jnp.asarray, (params, graph))
    return model.apply(params, graph).features[:, 0, 0, :]


def _batches(
    p: Potential, rows, indices, batch_size: int
) -> Iterator[tuple[np.ndarray, Columns, jraph.GraphsTuple]]:
    """Yield (positions in `indices`, structures, padded batch) until all structures are covered."""
    growing = GrowingBudget(slack=1, multiple=1)
    for start in range(0, len(indices), _PIECE_SIZE):
        columns = rows.take(indices[start : start + _PIECE_SIZE], labels_only=True)
        p.check_elements(columns.numbers)
        sizes = graph_sizes(columns, p.cutoff, p.long_range_cutoff)
        budget = growing.fit(choose_budget(sizes, batch_size))
        for batch_indices in plan_batches(np.arange(len(columns)), sizes, budget):
            batch = columns.take(batch_indices)
            yield (
                start + batch_indices,
                batch,
                build_batch(
                    batch,
                    budget,
                    p.cutoff,
                    p.reference_energies,
                    long_range_cutoff=p.long_range_cutoff,
                ),
            )


@functools.partial(jax.jit, static_argnums=(0, 1))
def batch_energies(model, energy_scale, params, graph):
    """Return the energies of a padded batch, (G,)."""
    # XLA removes the forces, which are not used
    return evaluate(model, params, graph, energy_scale).energy


@functools.partial(jax.jit, static_argnums=(0, 1))
def _energy_and_forces(model, energy_scale, params, graph):
    """Return the energies (G,) and the forces (N, 3) of a padded batch."""
    out = evaluate(model, params, graph, energy_scale)
    return out.energy, out.forces

"""Edge counts of all structures of a store, counted once per cutoff and cached with the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich import progress as bars

from mlip_jax import workers
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.near_origin import move_near_origin
from mlip_jax.datasets.store.array_cache import load_or_compute
from mlip_jax.datasets.store.store import Store
from mlip_jax.graphs.long_range import LatticeSumCutoff, find_lattice_obstacle, in_cells
from mlip_jax.graphs.neighbors import count_edges

# _PER_JOB: structures that one job of a process counts.
_PER_JOB = 16_384
# _WORTH_PROCESSES: structures; starting processes takes longer than counting fewer of them.
_WORTH_PROCESSES = 8 * _PER_JOB


def count_all(columns: Columns, cutoff: float) -> np.ndarray:
    """Count the directed edges of every structure, shape (S,), int32."""
    counts, columns = np.zeros(len(columns), np.int32), move_near_origin(columns)  # as in batches
    for s in range(len(columns)):
        atoms = slice(columns.offsets[s], columns.offsets[s + 1])
        periodic = columns.pbc is not None and columns.pbc[s].any()
        counts[s] = count_edges(
            columns.positions[atoms],
            cutoff,
            columns.cell[s] if periodic else None,
            columns.pbc[s] if periodic else None,
        )
    return counts


def count_all_pairs(columns: Columns, cutoff: float) -> np.ndarray:
    """Count the long-range pairs of every structure, shape (S,), int64.

    With an infinite cutoff they follow from the number of atoms; no positions are read.

    Raises:
      ValueError: The cutoff does not suit a cell, for example since it is infinite.
    """
    if not np.isinf(cutoff):
        return count_all(columns, cutoff).astype(np.int64) // 2
    periodic = _periodic(columns, cutoff)
    counts = all_pairs_of(columns.n_atoms)
    if periodic.any():
        inside = columns.take(np.flatnonzero(periodic))
        counts[periodic] = count_all(inside, in_cells(cutoff)) // 2
    return counts


def _periodic(columns: Columns, cutoff: float) -> np.ndarray:
    """Return which structures are periodic, (S,) bool, after checking the cutoff for their cells."""
    if columns.pbc is None:
        return np.zeros(len(columns), bool)
    periodic = columns.pbc.any(axis=1)
    for s in np.flatnonzero(periodic):
        if reason := find_lattice_obstacle(cutoff, columns.cell[s], columns.pbc[s]):
            raise ValueError(f"{columns.source[s] or f'structure {s}'}: {reason}")
    return periodic


def pair_counts(store: Store, cutoff: float, **options) -> np.ndarray:
    """Return the number of long-range pairs of every structure of a store, shape (S,), int64.

    Args:
      store: Store.
      cutoff: Cutoff of long-range pairs (Å), inf for all pairs.
      **options: See `edge_counts`, which also describes what is stored.

    Raises:
      ValueError: The cutoff does not suit a cell, for example since it is infinite.
    """
    if not np.isinf(cutoff):
        return edge_counts(store, cutoff, **options).astype(np.int64) // 2
    counts = all_pairs_of(store.index("n_atoms"))
    if not store.manifest["periodic"]:
        return counts
    if not isinstance(cutoff, LatticeSumCutoff):
        raise ValueError(
            f"{store.path}: {find_lattice_obstacle(cutoff, np.eye(3), np.ones(3, bool))}"
        )
    periodic = np.concatenate(
        [
            _periodic(columns, cutoff)
            for _, columns in store.chunks(np.arange(len(store)), labels_only=True)
        ]
    )
    inside = edge_counts(store, in_cells(cutoff), **options).astype(np.int64) // 2
    return np.where(periodic, inside, counts)


def all_pairs_of(n_atoms: np.ndarray) -> np.ndarray:
    """Return the number of pairs of n atoms, n (n - 1) / 2, int64."""
    n = np.asarray(n_atoms, np.int64)
    return n * (n - 1) // 2


def edge_counts(
    store: Store, cutoff: float, *, num_processes: int | None = None, progress: bool = True
) -> np.ndarray:
    """Return the number of directed edges of every structure of a store.

    The first call for a cutoff counts them and writes them to the folder edges/ of the store. If
    that fails they are kept in memory, with a warning. A corrupted file is recomputed.

    Args:
      store: Store.
      cutoff: Cutoff radius (Å).
      num_processes: Number of processes that count; None for one per core.
      progress: Whether to show a progress bar.

    Returns:
      Numbers of edges, shape (S,), int32, memory-mapped.
    """
    path = store.path / "edges" / f"{float(cutoff)!r}-{store.digest()}.npy"
    return load_or_compute(
        path,
        np.int32,
        len(store),
        lambda: _count(store, cutoff, num_processes, progress),
        "edge counts",
    )


def _count(store: Store, cutoff: float, num_processes, progress: bool) -> np.ndarray:
    jobs = [
        (store.path, start, min(start + _PER_JOB, len(store)), cutoff)
        for start in range(0, len(store), _PER_JOB)
    ]
    if len(store) < _WORTH_PROCESSES:
        num_processes = 1
    counts = np.zeros(len(store), np.int32)
    bar = bars.Progress(
        bars.TextColumn("counting neighbors"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("structures"),
        bars.TimeRemainingColumn(),
        disable=not progress,
    )
    with bar:
        task = bar.add_task("", total=len(store))
        for index, part in workers.run(_count_part, jobs, num_processes, local=True):
            counts[jobs[index][1] : jobs[index][2]] = part
            bar.update(task, advance=len(part))
    return counts


def _count_part(job: tuple[Path, int, int, float]) -> np.ndarray:
    """Count the edges of the structures of one job, (path of the store, start, stop, cutoff)."""
    path, start, stop, cutoff = job
    return np.concatenate(
        [
            count_all(columns, cutoff)
            for _, columns in Store(path).chunks(np.arange(start, stop), labels_only=True)
        ]
    )

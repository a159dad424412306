"""Structures whose labels would help most: far from the training data, and different from each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections
import numpy as np
from ase import Atoms

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.unseen_elements import of_columns
from mlip_jax.foreign_text import one_line
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import mean_features
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.tasks.force_field_evaluation import data as evaluation_data

_SHORTLIST = 5  # structures that are compared with each other, per chosen structure


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Structures to label next.

    Attributes:
      atoms: The structures, the most useful one first; info["domain_distance"] is the distance of
        the farthest atom from the training atoms, in units of the border of the domain.
      num_pool: Number of structures that were compared.
      num_outside: Number of these that are outside the domain.
    """

    atoms: list[Atoms]
    num_pool: int
    num_outside: int


def propose(
    config: ml_collections.ConfigDict, potential: Potential, domain: Domain, train: Columns
) -> Proposal:
    """Choose structures of config.pool.path.

    The structures with the largest distance of an atom from the training atoms are a shortlist of
    five times the requested number. From it, structures are chosen one by one: each time the one
    whose mean features differ most from those of the training structures and of the chosen ones.

    Args:
      config: Config of task "fine_tune".
      potential: Fine-tuned force field.
      domain: Domain of the force field.
      train: Training structures of the new domain.

    Raises:
      DatasetError: The file cannot be read.
    """
    columns = _read_pool(config, potential)
    if not len(columns):
        return Proposal([], 0, 0)
    distance = atom_domain.farthest(potential, domain, columns)
    shortlist = np.argsort(-distance, kind="stable")[: _SHORTLIST * config.pool.num_next]
    rows = np.concatenate(
        [
            mean_features(potential, train, np.arange(len(train))),
            mean_features(potential, columns, shortlist),
        ]
    )
    spread = np.maximum(rows.std(0), 1e-6 * max(float(np.abs(rows).max()), 1e-12))
    chosen = farthest_first(
        rows[: len(train)] / spread, rows[len(train) :] / spread, config.pool.num_next
    )
    return Proposal(
        [to_ase(columns, int(k), float(distance[k])) for k in shortlist[chosen]],
        len(columns),
        int((distance > 1).sum()),
    )


def farthest_first(known: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Return up to `count` candidates, each the farthest from the known ones and those before it.

    Args:
      known: Features of known samples, (K, F).
      candidates: Features of the candidates, (C, F).
      count: Number of candidates to choose.
    """
    nearest = np.full(len(candidates), np.inf)
    for point in known:
        nearest = np.minimum(nearest, ((candidates - point) ** 2).sum(1))
    chosen: list[int] = []
    for _ in range(min(count, len(candidates))):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((candidates - candidates[chosen[-1]]) ** 2).sum(1))
        nearest[chosen] = -1.0
    return np.array(chosen, np.int64)


def _read_pool(config: Any, potential: Potential) -> Columns:
    """Read the pool: at most pool.max_structures of it, without unknown elements."""
    data = config.data.copy_and_resolve_references()
    data.unlock()
    data.path, data.reader, data.reader_options = config.pool.path, "auto", ""
    data.require = "none"
    loaded = evaluation_data.from_config(data, config.seed).limited(
        config.pool.max_structures, config.seed
    )
    columns = loaded.rows.take(loaded.indices)
    unseen = of_columns(columns, potential.elements)
    return columns.take(np.flatnonzero(unseen.known)) if len(unseen) else columns


def to_ase(columns: Columns, k: int, distance: float) -> Atoms:
    """Return a structure without labels."""
    s = columns[k]
    atoms = Atoms(s.numbers, s.positions, cell=s.cell, pbc=False if s.pbc is None else s.pbc)
    atoms.info = {"charge": s.charge, "domain_distance": round(distance, 4)}
    atoms.info |= {"num_unpaired_electrons": s.spin} if s.spin else {}
    atoms.info |= {"smiles": one_line(s.smiles)} if s.smiles else {}
    return atoms

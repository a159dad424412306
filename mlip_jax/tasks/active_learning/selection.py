"""Selection of the structures of a round: candidates, filters, uncertainty and choice."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from mlip_jax.datasets import unseen_elements
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.geometry import segment_sum
from mlip_jax.label_budget import choice
from mlip_jax.label_budget.exploration import Exploration, explore
from mlip_jax.label_budget.uncertainty import Prediction, Uncertainty, predict
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import mean_features

log = logging.getLogger(__name__)

# Failures without any usable label after which a molecule has no further candidates.
_MAX_FAILURES = 2
_NOT_SHARED = -1  # `record` of candidates from the force field


def select_batch(
    inputs: Any, state: Any, strategy: str, count: int, rng: np.random.Generator
) -> Columns:
    """Return the structures to label next; `record` is their index in the shared candidates, or -1.

    Args:
      inputs: LabelingInputs of the run.
      state: StrategyState after the last round.
      strategy: Strategy of the choice.
      count: Number of structures.
      rng: Random generator.
    """
    shared = _remaining(inputs.candidates, state)
    if strategy == choice.RANDOM:
        return shared.take(rng.permutation(len(shared))[:count])
    propose, members = inputs.config.propose, state.members
    explored = _explore(propose, members[0], shared, state.labeled, rng)
    candidates = Columns.concatenate([shared, explored]) if len(explored) else shared
    known = known_rows(members[0], candidates)
    prediction = predict(members, known)
    usable = np.flatnonzero(_is_usable(known, prediction, propose.max_force))
    known, prediction = known.take(usable), _take(prediction, known, usable)
    if not len(known):
        return known
    uncertainty = Uncertainty(
        inputs.config.choose.uncertainty, members, state.labeled, inputs.config.seed
    ).of(known, prediction)
    chosen = choice.choose(
        strategy,
        count,
        uncertainty,
        mean_features(members[0], known, np.arange(len(known))),
        mean_features(members[0], state.labeled, np.arange(len(state.labeled))),
        rng,
    )
    return known.take(chosen)


def known_rows(potential: Potential, columns: Columns) -> Columns:
    """Return the structures whose elements the force field knows."""
    known = unseen_elements.of_columns(columns, potential.elements).known
    if not known.all():
        log.warning(
            "skipping %d of %d structures: they contain elements without labels",
            int((~known).sum()),
            len(columns),
        )
    return columns.take(np.flatnonzero(known))


def _remaining(candidates: Columns, state: Any) -> Columns:
    """Return the shared candidates that are not used up, without molecules that only fail."""
    labeled = set(state.labeled.molecule.tolist())
    hopeless = {
        name
        for name, failures in state.failed.items()
        if failures >= _MAX_FAILURES and name not in labeled
    }
    rows = np.array(
        [
            k
            for k in range(len(candidates))
            if k not in state.taken and candidates.molecule[k] not in hopeless
        ],
        np.int64,
    )
    return dataclasses.replace(candidates.take(rows), record=rows)


def _explore(
    propose: Any, potential: Potential, shared: Columns, labeled: Columns, rng: np.random.Generator
) -> Columns:
    """Return candidates from dynamics and relaxations by the force field."""
    starts = Columns.concatenate([shared, labeled]) if len(shared) else labeled
    explored = explore(
        potential,
        known_rows(potential, starts),
        Exploration(
            tuple(propose.kinds),
            propose.num_molecules,
            propose.md_temperature,
            propose.md_steps,
            propose.md_frames,
            propose.relaxation_steps,
            propose.relaxation_frames,
            int(rng.integers(2**31)),
        ),
    )
    return dataclasses.replace(explored, record=np.full(len(explored), _NOT_SHARED))


def _is_usable(columns: Columns, prediction: Prediction, max_force: float) -> np.ndarray:
    """Return whether the predictions of each structure are finite, with bounded forces, (S,)."""
    largest = np.abs(prediction.forces).max(axis=(0, 2))  # (A,)
    bad = ~np.isfinite(largest) | (largest > max_force)
    return (segment_sum(bad.astype(np.int64), columns.offsets[:-1]) == 0) & np.isfinite(
        prediction.energy
    )


def _take(prediction: Prediction, columns: Columns, rows: np.ndarray) -> Prediction:
    """Return the predictions of some of the structures."""
    return Prediction(prediction.energies[:, rows], prediction.forces[:, columns.atoms_of(rows)])

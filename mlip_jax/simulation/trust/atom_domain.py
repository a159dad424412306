"""The domain of a force field: how far the atoms of a structure lie from those of its training structures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import atom_features
from mlip_jax.simulation.trust.domain import FILE, Domain

FORCES = "forces"
_OF_AN_ELEMENT = 1024  # training atoms that are kept, at most


@dataclasses.dataclass(frozen=True)
class DomainEvaluation:
    """Structures with their distance from the training structures, and what was wrong there; S of them.

    Attributes:
      distance: Of the atom that lies farthest away, (S,), in units of the border.
      force_error: Mean |error| of the force components, (S,) eV/Å; NaN without a label.
      energy_error: |error| of the total energy over the number of atoms, (S,) eV; NaN without a label.
    """

    distance: np.ndarray
    force_error: np.ndarray
    energy_error: np.ndarray


def fit(potential: Potential, train: Columns, valid: Columns, force_errors: np.ndarray, seed: int = 0) -> Domain:
    """The domain of a force field.

    Args:
      train: Training structures, of whose atoms up to about a thousand for each element are kept.
      valid: Validation structures with A atoms.
      force_errors: Predicted less reference forces there, (A, 3) eV/Å; NaN where there is no label.

    Raises:
      ValueError: There are no structures, or elements that the force field was not trained on.
    """
    if not len(train) or not len(valid):
        raise ValueError("a domain needs training and validation structures")
    kept, errors = _kept(train.numbers, np.random.default_rng(seed)), np.abs(force_errors).mean(1)
    return Domain.fit(atom_features(potential, train)[kept], atom_features(potential, valid),
                      {FORCES: errors} if np.isfinite(errors).any() else {}, valid.offsets)


def judge(potential: Potential, domain: Domain, columns: Columns, energy_errors: np.ndarray,
          force_errors: np.ndarray) -> DomainEvaluation:
    """Distances of structures beside their errors: energies (S,) in eV, forces (A, 3) in eV/Å."""
    starts, atoms = columns.offsets[:-1], columns.n_atoms
    return DomainEvaluation(farthest(potential, domain, columns),
                            np.add.reduceat(np.abs(force_errors).mean(1), starts) / atoms,
                            np.abs(energy_errors) / atoms)


def farthest(potential: Potential, domain: Domain, columns: Columns) -> np.ndarray:
    """Distance of the atom of each structure that lies farthest from training, (S,), in units of the border: beyond 1
    the structure lies outside. In batches."""
    return np.maximum.reduceat(domain.distance(atom_features(potential, columns)), columns.offsets[:-1]) / domain.border


def of_workdir(path: str | Path) -> Domain | None:
    """The domain of the force field of a training run; None where the run has come to none, or it is no workdir."""
    file = Path(path) / FILE
    return Domain.load(file) if file.is_file() else None


def properties(domain: Domain) -> tuple[str, ...]:
    """Names of what `results` gives."""
    return ("domain_distance", "outside_domain", *(["forces_expected_error"] if FORCES in domain.errors else []))


def results(domain: Domain, features: np.ndarray) -> dict[str, Any]:
    """What a calculator tells of one structure from the features (n_atoms, F) of its atoms.

    Returns:
      domain_distance, (n_atoms,), where 1 is the border; outside_domain, whether an atom lies beyond it; and, where
      validation had forces, forces_expected_error, (n_atoms,) eV/Å: the mean |error| of the force components of
      validation atoms as far away.
    """
    distance = domain.distance(features)
    made = {"domain_distance": distance / domain.border, "outside_domain": bool(domain.outside(distance).any())}
    if FORCES in domain.errors:
        made["forces_expected_error"] = domain.expected_error(FORCES, distance)
    return made


def _kept(numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of atoms, of each element at most so many, drawn at random: common ones must not crowd out rare ones."""
    kept = []
    for element in np.unique(numbers):
        rows = np.flatnonzero(numbers == element)
        kept.append(rng.choice(rows, min(len(rows), _OF_AN_ELEMENT), replace=False))
    return np.sort(np.concatenate(kept))

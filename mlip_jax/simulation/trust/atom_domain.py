"""Domain of a force field: distance of the atoms of a structure from the training atoms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.importers import published, split_options
from mlip_jax.potential import BEST, Potential
from mlip_jax.simulation.energies import atom_features
from mlip_jax.simulation.trust.domain import FILE, Domain

FORCES = "forces"
_MAX_PER_ELEMENT = 1024  # maximum number of training atoms kept per element


@dataclasses.dataclass(frozen=True)
class DomainEvaluation:
    """Distances and errors of S structures.

    Attributes:
      distance: Distance of the farthest atom from the training atoms, in units of the border, (S,).
      force_error: Mean |error| of the force components (eV/Å), (S,); NaN without a label.
      energy_error: |error| of the total energy per atom (eV), (S,); NaN without a label.
    """

    distance: np.ndarray
    force_error: np.ndarray
    energy_error: np.ndarray


def fit(
    potential: Potential,
    train: Columns,
    valid: Columns,
    force_errors: np.ndarray,
    seed: int = 0,
    max_per_element: int = _MAX_PER_ELEMENT,
) -> Domain:
    """Fit the domain of a force field.

    Args:
      potential: The force field.
      train: Training structures.
      valid: Validation structures with A atoms.
      force_errors: Predicted minus reference forces of the validation structures (eV/Å), (A, 3);
        NaN without a label.
      seed: Seed of the choice of training atoms.
      max_per_element: Maximum number of training atoms kept per element.

    Raises:
      ValueError: If there are no structures, or elements that the force field was not trained on.
    """
    if not len(train) or not len(valid):
        raise ValueError("a domain needs training and validation structures")
    rows, errors = (
        sample_per_element(train.numbers, np.random.default_rng(seed), max_per_element),
        np.abs(force_errors).mean(1),
    )
    return Domain.fit(
        atom_features(potential, train)[rows],
        atom_features(potential, valid),
        {FORCES: errors} if np.isfinite(errors).any() else {},
        valid.offsets,
    )


def evaluate(
    potential: Potential,
    domain: Domain,
    columns: Columns,
    energy_errors: np.ndarray,
    force_errors: np.ndarray,
) -> DomainEvaluation:
    """Compute the distances of structures from training, along with their errors.

    Args:
      potential: The force field.
      domain: Domain of the force field.
      columns: S structures with A atoms.
      energy_errors: Errors of the total energies (eV), (S,).
      force_errors: Errors of the forces (eV/Å), (A, 3).
    """
    starts, atoms = columns.offsets[:-1], columns.n_atoms
    return DomainEvaluation(
        farthest(potential, domain, columns),
        np.add.reduceat(np.abs(force_errors).mean(1), starts) / atoms,
        np.abs(energy_errors) / atoms,
    )


def farthest(potential: Potential, domain: Domain, columns: Columns) -> np.ndarray:
    """Compute the distance from training of the farthest atom of each structure, (S,). In batches.

    Distances are in units of the border: beyond 1 the structure is outside the domain.
    """
    return (
        np.maximum.reduceat(
            domain.distance(atom_features(potential, columns)), columns.offsets[:-1]
        )
        / domain.border
    )


def farthest_of_members(
    members: Sequence[Potential], domains: Sequence[Domain | None], columns: Columns
) -> np.ndarray | None:
    """Return the largest distance of `farthest` over the members of an ensemble, (S,).

    A structure is outside the domain of an ensemble if it is outside that of a member. Members
    whose domain is unknown are ignored; the result is None if no domain is known.
    """
    distances = [
        farthest(member, domain, columns)
        for member, domain in zip(members, domains)
        if domain is not None
    ]
    return np.max(distances, axis=0) if distances else None


def load_domain(path: str | Path) -> Domain | None:
    """Load the domain of the force field of a training run.

    Return None if the run has not written one yet, or if `path` is another folder than a workdir or
    its folder of best checkpoints. The name of a force field of the package is a path, too, and so
    is the exported force field "parameters:FOLDER". Options after "#" do not change the domain.
    """
    name = split_options(str(path))[0].removeprefix("parameters:")
    path = published.own_folder(name) or Path(name)
    file = (path.parent if path.name == BEST else path) / FILE
    return Domain.load(file) if file.is_file() else None


def of(force_field: Any) -> Domain | None:
    """Return the domain of a force field: that of its workdir or of its calculator, or None."""
    if isinstance(force_field, str | Path):
        return load_domain(force_field)
    return getattr(force_field, "domain", None)


def properties(domain: Domain) -> tuple[str, ...]:
    """Return the names of the results of `results`."""
    return (
        "domain_distance",
        "outside_domain",
        *(["forces_expected_error"] if FORCES in domain.errors else []),
    )


def results(domain: Domain, features: np.ndarray, *, unseen: bool = False) -> dict[str, Any]:
    """Return the properties of the domain for one structure from its features (n_atoms, F).

    Args:
      domain: Domain of the force field.
      features: Features of the atoms.
      unseen: Whether charge, spin or periodicity of the structure never occurs in training. The
        features do not show it.

    Returns:
      domain_distance, (n_atoms,), where 1 is the border; outside_domain, whether an atom is beyond
      it or `unseen`; and, if the validation structures had forces, forces_expected_error,
      (n_atoms,) eV/Å: the mean |error| of the force components of validation atoms at the same
      distance, NaN beyond the border and if `unseen`.
    """
    distance = domain.distance(features)
    values = {
        "domain_distance": distance / domain.border,
        "outside_domain": unseen or bool(domain.outside(distance).any()),
    }
    if FORCES in domain.errors:
        expected = domain.expected_error(FORCES, distance)
        values["forces_expected_error"] = np.full_like(expected, np.nan) if unseen else expected
    return values


def sample_per_element(
    numbers: np.ndarray, rng: np.random.Generator, max_count: int = _MAX_PER_ELEMENT
) -> np.ndarray:
    """Return the rows of at most `max_count` random atoms per element.

    Without the limit common elements would crowd out rare ones.
    """
    chosen = []
    for element in np.unique(numbers):
        rows = np.flatnonzero(numbers == element)
        chosen.append(rng.choice(rows, min(len(rows), max_count), replace=False))
    return np.sort(np.concatenate(chosen))

"""Force fields as arguments: anything that names one or several force fields becomes one object.

`Potential`, calculator, workdir, "IMPORTER:FILE", and several of them, as in "runs/a,runs/b" or a
list, whose mean is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlip_jax import importers
from mlip_jax.importers import split_force_fields
from mlip_jax.potential import Potential
from mlip_jax.simulation.ensemble_mean import mean_potential
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import Domain


def load_force_field(given: Any) -> Potential:
    """Load a force field, or the mean of several.

    Args:
      given: Force field in any form that `importers.load_force_field` accepts, several of them
        separated by commas or in a list, or an `EnsembleCalculator`.

    Raises:
      ValueError: Another object, or force fields that cannot be averaged.
      CheckpointError, FileNotFoundError: There is no readable force field at a location.
    """
    items = split_force_fields(given)
    members = [importers.load_force_field(item) for item in items]
    return members[0] if len(members) == 1 else mean_potential(members)


def load_domains(given: Any) -> tuple[Domain | None, ...]:
    """Return the domain of each force field of `given`; None where it is unknown."""
    return tuple(_domain(item) for item in split_force_fields(given))


def _domain(item: Any) -> Domain | None:
    if isinstance(item, str | Path):
        return atom_domain.load_domain(item)
    return getattr(item, "domain", None)

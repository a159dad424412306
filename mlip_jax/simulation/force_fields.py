"""Force fields as arguments: anything that names one or several force fields becomes one object.

`Potential`, calculator, workdir, "IMPORTER:FILE", and several of them, as in "runs/a,runs/b" or a
list, whose mean is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from mlip_jax import importers
from mlip_jax.datasets.columns import Columns
from mlip_jax.importers import split_force_fields
from mlip_jax.potential import Potential
from mlip_jax.simulation import user_warnings
from mlip_jax.simulation.ensemble_mean import mean_potential, members_of
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.coverage import unseen_states
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.structure import from_ase, hill_formula


def load_mean_force_field(given: Any) -> Potential:
    """Load a force field, or the mean of several.

    Args:
      given: Force field in any form that `importers.load_force_field` accepts, several of them
        separated by commas or in a list, or an `EnsembleCalculator`.

    Raises:
      ValueError: Another object, or force fields that cannot be averaged.
      CheckpointError, FileNotFoundError: There is no readable force field at a location.
    """
    members = load_each(split_force_fields(given))
    return members[0] if len(members) == 1 else mean_potential(members)


def load_each(items: Sequence[Any]) -> list[Potential]:
    """Load the members of an ensemble; warn if a term is added to only some of them.

    Args:
      items: Force fields, as from `importers.split_force_fields`.
    """
    names = [item for item in items if isinstance(item, str)]
    if len(names) == len(items):
        chosen = [importers.split_options(name)[1].get("dispersion") for name in names]
        if len(set(chosen)) > 1:
            name = next(name for name, functional in zip(names, chosen) if functional)
            user_warnings.warn(
                f"the members of the ensemble differ in their added dispersion: {name} has it. To "
                f"add it to all members, write "
                f"{','.join(map(_without_dispersion, names))}##dispersion={max(filter(None, chosen))}"
            )
    return [importers.load_force_field(item) for item in items]


def _without_dispersion(name: str) -> str:
    """Return a name without the option that adds a dispersion term."""
    return "#".join(part for part in name.split("#") if not part.startswith("dispersion="))


def load_domains(given: Any) -> tuple[Domain | None, ...]:
    """Return the domain of each force field of `given`; None where it is unknown."""
    return tuple(_domain(item) for item in split_force_fields(given))


def _domain(item: Any) -> Domain | None:
    if isinstance(item, str | Path):
        return atom_domain.load_domain(item)
    return getattr(item, "domain", None)


@dataclasses.dataclass(frozen=True)
class TrustCheck:
    """Check whether molecules are like the training data of a force field.

    Attributes:
      members: The force field, or the members of an ensemble.
      domains: Domain of each of them, or None.
    """

    members: tuple[Potential, ...]
    domains: tuple[Domain | None, ...]

    @classmethod
    def load(cls, given: Any, potential: Potential) -> TrustCheck:
        """Create the check of a force field.

        Args:
          given: Force field as the user names it.
          potential: Result of `load_mean_force_field` for it.
        """
        return cls(members_of(potential), load_domains(given))

    def reasons(self, molecules: Sequence[Atoms]) -> list[str]:
        """Return the reason why each molecule is outside the domain, or "", in order."""
        reasons = [
            unseen[0].message if (unseen := unseen_states(atoms, self.members)) else ""
            for atoms in molecules
        ]
        if not molecules or not any(self.domains):
            return reasons
        columns = Columns.from_structures(map(from_ase, molecules))
        distances = atom_domain.farthest_of_members(self.members, self.domains, columns)
        for k, distance in enumerate(distances.tolist()):
            if not reasons[k] and not distance <= 1:  # NaN is outside
                reasons[k] = (
                    f"an atom is {distance:.2g} times as far from the training atoms as the "
                    "boundary of the domain"
                )
        return reasons

    def message(self, molecules: Sequence[Atoms], name: str) -> str:
        """Return a message about the molecules outside the domain, or "".

        Args:
          molecules: Molecules of elements that the force field knows, with finite positions.
          name: Plural name of the molecules, such as "relaxed molecules".
        """
        reasons = self.reasons(molecules)
        outside = [k for k, reason in enumerate(reasons) if reason]
        if not outside:
            return ""
        first = hill_formula(molecules[outside[0]].numbers)
        return (
            f"{len(outside)} of {len(molecules)} {name} are outside the domain of the force field, "
            f"so its energies may be wrong; the first, {first}: {reasons[outside[0]]}"
        )

    def warn(self, molecules: Sequence[Atoms], name: str) -> None:
        """Warn if molecules are outside the domain; see `message`."""
        message = self.message(molecules, name)
        if message:
            user_warnings.warn(message, user_warnings.OutsideDomainWarning)

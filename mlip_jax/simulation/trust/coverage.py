"""Charges, spins, periodicity and sizes that occur in the training data of a force field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from mlip_jax.datasets.charges import has_odd_electrons
from mlip_jax.datasets.columns import Columns
from mlip_jax.potential import Potential
from mlip_jax.structure import electronic_value, from_ase

_STATES = (
    ("charge", "charges", "total charge is"),
    ("num_unpaired_electrons", "spins", "number of unpaired electrons is"),
)
# A molecule is too large if it has more than this many times the atoms of the largest one of
# training. Any molecule with fewer atoms than the smallest one is too small.
LARGER = 5


class UnseenState(NamedTuple):
    """State of a structure that the training data do not contain.

    Attributes:
      name: "charge", "num_unpaired_electrons", "pbc" or "size".
      message: Explanation for the user.
    """

    name: str
    message: str


def unseen_states(atoms: Atoms, members: Sequence[Potential]) -> list[UnseenState]:
    """Return the states of a structure that a force field, or a member of several, never saw.

    Imported force fields whose training data are unknown, and what was not yet recorded when a
    force field was trained, are not judged.

    Args:
      atoms: Structure.
      members: Force field, or the members of an ensemble.
    """
    statistics = _statistics(members)
    unseen = []
    for key, name, words in _STATES:
        value = electronic_value(atoms, key)
        if value == 0:
            continue
        # None: unknown (imported)
        trained_on = [known for s in statistics if (known := s.get(name, [0.0])) is not None]
        other = [known or [0.0] for known in trained_on if value not in (known or [0.0])]
        if other:
            unseen.append(
                UnseenState(
                    key,
                    f"atoms.info['{key}'] is {value:g}, but this force field was trained only on "
                    f"molecules whose {words} {', '.join(f'{c:g}' for c in other[0])}",
                )
            )
    if judges_odd_electrons(members):
        columns = Columns.from_structures([from_ase(atoms)])
        if has_odd_electrons(columns)[0]:
            electrons = int(atoms.numbers.sum() - round(electronic_value(atoms, "charge")))
            unseen.append(
                UnseenState(
                    "num_unpaired_electrons",
                    f"the structure has {electrons} electrons, an odd number, and no label of its "
                    "unpaired electrons, but all molecules that this force field was trained on "
                    "have an even number or a label. Check the total charge, "
                    "atoms.info['charge'], or set atoms.info['num_unpaired_electrons']",
                )
            )
    if atoms.pbc.any() and any(s.get("periodic") is False for s in statistics):
        unseen.append(
            UnseenState(
                "pbc",
                "the structure is periodic, but this force field was trained only on molecules",
            )
        )
    for low, high in [] if atoms.pbc.any() else _sizes(statistics):
        if not low <= len(atoms) <= LARGER * high:
            unseen.append(
                UnseenState(
                    "size",
                    f"the molecule has {len(atoms)} atoms, but this force field was trained only "
                    f"on molecules of {low} to {high} atoms",
                )
            )
            break
    return unseen


def has_unseen_state(columns: Columns, members: Sequence[Potential]) -> np.ndarray:
    """Return whether each structure has a state that `unseen_states` would list, (S,) bool."""
    statistics, unseen = _statistics(members), np.zeros(len(columns), bool)
    spin = np.zeros(len(columns)) if columns.spin is None else columns.spin
    for values, name in ((columns.charge, "charges"), (spin, "spins")):
        for s in statistics:
            known = s.get(name, [0.0])
            if known is not None:
                unseen |= (values != 0) & ~np.isin(values, known or [0.0])
    if judges_odd_electrons(members):
        unseen |= has_odd_electrons(columns)
    if columns.pbc is not None and any(s.get("periodic") is False for s in statistics):
        unseen |= columns.pbc.any(axis=1)
    molecule = True if columns.pbc is None else ~columns.pbc.any(axis=1)
    for low, high in _sizes(statistics):
        unseen |= molecule & ((columns.n_atoms < low) | (columns.n_atoms > LARGER * high))
    return unseen


def judges_sizes(members: Sequence[Potential]) -> bool:
    """Return whether the sizes of the training molecules of a force field are known."""
    return bool(_sizes(_statistics(members)))


def judges_odd_electrons(members: Sequence[Potential]) -> bool:
    """Return whether a force field was trained only on even numbers of electrons, or labels."""
    return any(s.get("odd_electrons") is False for s in _statistics(members))


def _sizes(statistics: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return the smallest and largest numbers of atoms of training molecules that are known."""
    return [tuple(sizes) for s in statistics if (sizes := s.get("sizes"))]


def _statistics(members: Sequence[Potential]) -> list[dict[str, Any]]:
    """Return the statistics of the training data of force fields, {} if they are unknown."""
    # the mean of an ensemble has the metadata of its members
    metadata = [m for member in members for m in member.metadata.get("members", [member.metadata])]
    return [m.get("statistics", {}) for m in metadata]

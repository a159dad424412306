"""Which structures a run uses, and how they are split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from ase.data import atomic_numbers

from mlip_jax.structure import Structure

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass
class Selection:
    """Filter of structures that counts what it takes away.

    Attributes:
      elements: Symbols that are allowed; None allows all.
      charge: Total charge that is asked for, in e; None allows all.
      max_atoms: Largest size; None allows all.
      max_force: Largest force on an atom in eV/Å; None allows all.
      removed: Count by reason, filled while filtering.
      kept: Structures that passed.
    """

    elements: Sequence[str] | None = None
    charge: float | None = None
    max_atoms: int | None = None
    max_force: float | None = None
    removed: dict[str, int] = dataclasses.field(default_factory=dict)
    kept: int = 0

    def __post_init__(self):
        for symbol in self.elements or ():
            if symbol not in atomic_numbers:
                raise ValueError(f"data.elements: {symbol!r} is not the symbol of an element")

    def filter(self, structures: Iterable[Structure]) -> Iterator[Structure]:
        """The structures that pass, in their order."""
        allowed = None if self.elements is None else {atomic_numbers[e] for e in self.elements}
        for s in structures:
            reason = self._reason(s, allowed)
            if reason:
                self.removed[reason] = self.removed.get(reason, 0) + 1
            else:
                self.kept += 1
                yield s

    def _reason(self, s: Structure, allowed) -> str | None:
        if self.charge is not None and s.charge != self.charge:
            return "charge"
        if allowed is not None and not allowed.issuperset(s.numbers.tolist()):
            return "elements"
        if self.max_atoms is not None and len(s) > self.max_atoms:
            return "too many atoms"
        no_forces = s.forces is None or not np.isfinite(s.forces).any()
        if not np.isfinite(s.energy) and no_forces:
            return "no labels"
        if self.max_force is not None and not no_forces and np.nanmax(np.abs(s.forces)) > self.max_force:
            return "force too large"
        return None


def split(molecule: np.ndarray, counts: Sequence[int], *, by: str = "molecule", seed: int = 0) -> dict[str, np.ndarray]:
    """Indices of the training, validation and test structures: disjoint, sorted, a pure function of the arguments.

    Args:
      molecule: Molecule of each structure, shape (S,).
      counts: Structures asked for in train, valid and test. Where there are fewer in all, each part is scaled
        down in proportion.
      by: "molecule": no molecule stands in two parts (counts are then met as closely as whole molecules
        allow). "random": structures are drawn one by one.
      seed: Of the shuffle.

    Raises:
      ValueError: Unknown `by`, or fewer structures (molecules) than parts.
    """
    wanted = np.asarray(counts, float)
    if by not in ("molecule", "random"):
        raise ValueError(f"data.split must be 'molecule' or 'random', received {by!r}")
    if wanted.shape != (3,) or (wanted < 0).any() or wanted[0] < 1:
        raise ValueError(f"split counts must be three numbers, the first at least 1; received {list(counts)}")
    labels = molecule if by == "molecule" else np.arange(len(molecule))
    units, unit_of, unit_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(units) < (wanted > 0).sum():
        raise ValueError(f"{len(molecule)} structures of {len(units)} molecules cannot be split by {by} into "
                         f"{int((wanted > 0).sum())} parts")
    wanted *= min(1.0, len(molecule) / wanted.sum())
    order = np.random.default_rng(seed).permutation(len(units))
    middle = np.cumsum(unit_sizes[order]) - 0.5 * unit_sizes[order]
    part = np.searchsorted(np.cumsum(wanted), middle, side="right")
    _leave_no_part_empty(part, wanted)
    part_of_unit = np.empty(len(units), np.int64)
    part_of_unit[order] = part
    part_of = part_of_unit[unit_of]
    return {name: np.flatnonzero(part_of == p) for p, name in enumerate(SPLITS)}


def _leave_no_part_empty(part: np.ndarray, wanted: np.ndarray) -> None:
    """Give each empty part that was asked for one unit that no part has, else one of the largest part."""
    for p in np.flatnonzero(wanted > 0):
        if not (part == p).any():
            units = np.bincount(part, minlength=4)
            giver = 3 if units[3] else int(np.argmax(units[:3]))
            part[np.flatnonzero(part == giver)[-1]] = p

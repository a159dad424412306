"""Structures with elements that the training split lacks.

A model cannot describe such elements: their parameters keep their initial values, and the reference
energies are zero. A few such structures would dominate every average. So all tasks exclude them
from validation, from the choice of the best checkpoint and from the headline errors, and report
their number and elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from ase.data import chemical_symbols

from mlip_jax.datasets.columns import Columns, Rows

_BLOCK = 4096  # structures in memory at a time


@dataclasses.dataclass(frozen=True)
class UnseenElements:
    """Structures with elements that the training split lacks, among S structures.

    Attributes:
      known: Whether training has all elements of a structure, (S,) bool.
      structures_by_element: Number of structures that contain an unseen element, by its symbol.
    """

    known: np.ndarray
    structures_by_element: Mapping[str, int]

    def __len__(self) -> int:
        """Return the number of structures with unseen elements."""
        return int((~self.known).sum())

    @property
    def symbols(self) -> str:
        """Symbols of the unseen elements, separated by commas."""
        return ", ".join(self.structures_by_element)

    def describe(self, noun: str = "structures") -> str:
        """Return the numbers of structures as a phrase.

        >>> UnseenElements(np.array([True, False]), {"Cl": 1}).describe("test structures")
        '1 of 2 test structures with elements that the training split lacks (Cl: 1)'
        """
        counts = ", ".join(f"{symbol}: {n}" for symbol, n in self.structures_by_element.items())
        return (
            f"{len(self)} of {len(self.known)} {noun} with elements that the training split lacks "
            f"({counts})"
        )

    def to_json(self) -> dict[str, object]:
        """Return the numbers of structures, for metrics.json."""
        return {
            "num_structures": len(self),
            "num_structures_of_split": len(self.known),
            "elements": dict(self.structures_by_element),
        }


def of_columns(columns: Columns, elements: Collection[int]) -> UnseenElements:
    """Find the structures of columns with elements other than `elements` (atomic numbers)."""
    structure = np.repeat(np.arange(len(columns)), columns.n_atoms)  # of each atom
    unseen = ~np.isin(columns.numbers, sorted(elements))
    pairs = np.unique(np.stack([columns.numbers[unseen], structure[unseen]]), axis=1)
    known = np.ones(len(columns), bool)
    known[pairs[1]] = False
    numbers, counts = np.unique(pairs[0], return_counts=True)
    return UnseenElements(
        known, {chemical_symbols[z]: int(n) for z, n in zip(numbers, counts, strict=True)}
    )


def of_rows(rows: Rows, indices: np.ndarray, elements: Collection[int]) -> UnseenElements:
    """Find the structures `indices` of `rows` with elements other than `elements`, in blocks."""
    blocks = [
        of_columns(rows.take(indices[start : start + _BLOCK], labels_only=True), elements)
        for start in range(0, len(indices), _BLOCK)
    ]
    return _concatenate(blocks)


def _concatenate(blocks: Sequence[UnseenElements]) -> UnseenElements:
    """Join the results of blocks in order; the most frequent element comes first."""
    counts: dict[str, int] = {}
    for block in blocks:
        for symbol, n in block.structures_by_element.items():
            counts[symbol] = counts.get(symbol, 0) + n
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return UnseenElements(
        np.concatenate([np.zeros(0, bool), *(block.known for block in blocks)]), dict(ordered)
    )

"""Tests for structures with elements that the training split lacks."""

import numpy as np

from mlip_jax.datasets import unseen_elements
from mlip_jax.datasets.columns import Columns
from mlip_jax.structure import Structure


def columns(*numbers):
    return Columns.from_structures(
        Structure(np.array(z, np.int32), np.zeros((len(z), 3))) for z in numbers
    )


def test_structures_are_counted_once_per_element(monkeypatch):
    """Detects counts of atoms in place of structures, and blocks that do not add up."""
    rows = columns([6, 1], [17, 17, 1], [1], [9, 17], [8])
    monkeypatch.setattr(unseen_elements, "_BLOCK", 2)
    for order in (np.arange(5), np.array([3, 0, 1])):
        found = unseen_elements.of_rows(rows, order, {1, 6, 8})
        assert found.known.tolist() == [s not in (1, 3) for s in order]
        assert len(found) == 2 and found.to_json()["elements"] == {"Cl": 2, "F": 1}
    assert found.describe("test structures") == (
        "2 of 3 test structures with elements that the training split lacks (Cl: 2, F: 1)"
    )


def test_no_structures_and_no_unseen_elements():
    nothing = unseen_elements.of_rows(columns(), np.zeros(0, int), {1})
    assert len(nothing) == 0 and nothing.known.shape == (0,) and nothing.symbols == ""
    assert len(unseen_elements.of_columns(columns([1], [1, 1]), [1])) == 0

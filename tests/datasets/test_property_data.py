"""Tests for properties: selection of structures, normalization and its inverse."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.property_data import Samples, Target, fit_targets, select_labeled
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.structure import Structure


def structures(count=12, seed=0):
    rng = np.random.default_rng(seed)
    for s in range(count):
        numbers = rng.choice([1, 6, 8], 3 + s % 4).astype(np.int32)
        yield Structure(
            numbers,
            rng.normal(size=(len(numbers), 3)),
            molecule=f"m{s}",
            record=s,
            properties={
                "gap": 4 + rng.normal(),
                "u0": -13.6 * (numbers == 1).sum()
                - 1030.0 * (numbers == 6).sum()
                - 2040.0 * (numbers == 8).sum()
                + rng.normal(),
                "dipole": rng.normal(size=3),
            },
            atom_properties={"charges": 0.1 * numbers + rng.normal(0, 0.01, len(numbers))},
        )


COLUMNS = Columns.from_structures(structures())
VALUES = {name: COLUMNS.properties[name] for name in ("gap", "u0", "dipole")}


def fitted(*names, **options):
    return fit_targets(COLUMNS, np.arange(len(COLUMNS)), VALUES, names, options)


def test_target_kinds_and_scales():
    gap, u0, dipole, charges = fitted("gap", "u0", "dipole", "charges", u0={"pooling": "sum"})
    assert [t.kind for t in (gap, u0, dipole, charges)] == ["scalar", "scalar", "vector", "atom"]
    assert gap.shift == pytest.approx(VALUES["gap"].mean()) and gap.scale == pytest.approx(
        VALUES["gap"].std()
    )
    # without the element contributions, only noise remains of thousands of eV
    assert u0.scale < 3 and u0.elements[6] == pytest.approx(-1030, abs=3)
    assert (
        dipole.scale == pytest.approx(np.sqrt((VALUES["dipole"] ** 2).mean())) and dipole.shift == 0
    )
    assert charges.elements[8] == pytest.approx(0.8, abs=0.02) and charges.scale < 0.02
    for t in (gap, u0, dipole):
        assert np.sqrt((t.to_training(VALUES[t.name], COLUMNS) ** 2).mean()) == pytest.approx(1)


@given(st.sampled_from(["gap", "u0", "dipole", "charges"]), st.integers(0, 99))
def test_to_physical_inverts_to_training(name, seed):
    (target,) = fitted(name, **{name: {"pooling": "sum"}} if name == "u0" else {})
    other = Columns.from_structures(structures(5, seed))
    values = other.atom_properties[name] if name == "charges" else other.properties[name]
    back = Target.from_json(target.to_json())
    np.testing.assert_allclose(
        back.to_physical(target.to_training(values, other), other), values, rtol=1e-12
    )


def test_constant_property_is_rejected():
    with pytest.raises(DatasetError, match="'gap' is constant"):
        fit_targets(
            COLUMNS, np.arange(len(COLUMNS)), {"gap": np.full(len(COLUMNS), 2.0)}, ["gap"], {}
        )


def test_unsupported_property_shapes_are_rejected():
    with pytest.raises(DatasetError, match="'q' has the shape \\(3, 3\\)"):
        fit_targets(
            COLUMNS, np.arange(len(COLUMNS)), {"q": np.zeros((len(COLUMNS), 3, 3))}, ["q"], {}
        )


class InMemory:
    """Columns in place of a store."""

    path = "memory"

    def __init__(self, columns):
        self._columns = columns

    def chunks(self, indices):
        for part in np.array_split(indices, 3):
            yield part, self._columns.take(part)


def test_structures_with_a_known_property_are_selected():
    gap = VALUES["gap"].copy()
    gap[[1, 4]] = np.nan
    store = InMemory(dataclasses.replace(COLUMNS, properties={**COLUMNS.properties, "gap": gap}))
    index, values = select_labeled(store, np.array([0, 1, 2, 4, 7]), ["gap"])
    assert index.tolist() == [0, 2, 7] and values["gap"].tolist() == gap[[0, 2, 7]].tolist()
    with pytest.raises(DatasetError, match="none of the 2 structures has a known gap"):
        select_labeled(store, np.array([1, 4]), ["gap"])
    with pytest.raises(DatasetError, match="unknown property.*Did you mean 'gap'"):
        select_labeled(store, np.array([1, 4]), ["gop"])


def test_samples_match_their_targets_in_any_order():
    (charges,) = fitted("charges")
    samples = Samples(COLUMNS, np.array([5, 2, 9]), {"gap": np.array([0.5, 0.2, 0.9])}, (charges,))
    taken = samples.take(np.array([2, 0]), labels_only=True)
    assert taken.record.tolist() == [9, 5] and taken.properties["gap"].tolist() == [0.9, 0.5]
    expected = COLUMNS.take(np.array([9, 5]))
    np.testing.assert_allclose(
        charges.to_physical(taken.atom_properties["charges"], taken),
        expected.atom_properties["charges"],
    )

"""Tests for columns of structures."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.structure import Structure


@st.composite
def structures(draw):
    items = []
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    for s, n in enumerate(draw(st.lists(st.integers(1, 8), max_size=8))):
        periodic = draw(st.booleans())
        items.append(
            Structure(
                rng.integers(1, 90, n).astype(np.int32),
                rng.normal(size=(n, 3)),
                energy=float(rng.normal()),
                forces=rng.normal(size=(n, 3)),
                charge=float(rng.integers(-2, 3)),
                cell=rng.normal(size=(3, 3)) if periodic else None,
                pbc=np.array([True, False, s % 2 == 0]) if periodic else None,
                molecule=draw(st.sampled_from(["a", "[O]([H])[H]", "a very long name " * 5])),
                conformer=s,
                smiles="C" * s,
                record=7 * s,
                subset=f"part {s % 2}",
                source=f"file.hdf5:{s}",
                properties={"gap": float(rng.normal()), "dipole": rng.normal(size=3)},
                atom_properties={"charges": rng.normal(size=n)},
            )
        )
    return items


def assert_equal(a: Structure, b: Structure):
    for field in dataclasses.fields(Structure):
        np.testing.assert_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


@settings(max_examples=40, deadline=None)
@given(items=structures())
def test_round_trip(items):
    columns = Columns.from_structures(iter(items))
    assert len(columns) == len(items)
    assert columns.n_atoms.tolist() == [len(s) for s in items]
    for found, given_ in zip(columns, items):
        assert_equal(found, given_)
    assert (
        columns.positions.dtype == columns.energy.dtype == np.float64
        and columns.numbers.dtype == np.int32
    )


@settings(max_examples=40, deadline=None)
@given(items=structures().filter(bool), seed=st.integers(0, 99))
def test_take_equals_indexing(items, seed):
    columns = Columns.from_structures(items)
    indices = np.random.default_rng(seed).integers(0, len(items), 5)  # repeated ones too
    taken = columns.take(indices)
    assert len(taken) == 5 and taken.offsets[-1] == len(taken.numbers)
    for found, s in zip(taken, indices):
        assert_equal(found, items[s])
    nothing = columns.take(np.zeros(0, np.int64))
    assert len(nothing) == 0 and len(nothing.numbers) == 0 and nothing.offsets.tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(items=structures().filter(lambda items: len(items) > 1), cut=st.integers(0, 8))
def test_concatenate_keeps_the_order(items, cut):
    cut = min(cut, len(items) - 1)
    parts = [Columns.from_structures(items[:cut]), Columns.from_structures(items[cut:])]
    for found, given_ in zip(Columns.concatenate([p for p in parts if len(p)]), items, strict=True):
        assert_equal(found, given_)


def test_missing_properties_become_nan():
    one, two = (
        Structure(np.array([1, 1]), np.zeros((2, 3)), source="f:1", properties=p, atom_properties=a)
        for p, a in (({"gap": 1.0}, {}), ({"dipole": np.ones(3)}, {"charges": np.ones(2)}))
    )
    columns = Columns.from_structures([one, two])
    np.testing.assert_array_equal(columns.properties["gap"], [1.0, np.nan])
    np.testing.assert_array_equal(columns.properties["dipole"], [[np.nan] * 3, [1.0] * 3])
    np.testing.assert_array_equal(columns.atom_properties["charges"], [np.nan, np.nan, 1.0, 1.0])
    apart = Columns.concatenate([Columns.from_structures([s]) for s in (one, two)])
    np.testing.assert_equal(apart.properties, columns.properties)
    np.testing.assert_equal(apart.atom_properties, columns.atom_properties)
    with pytest.raises(ValueError, match=r"f:1.*'gap' has shape \(2,\), expected \(\)"):
        Columns.from_structures(
            [
                one,
                Structure(
                    np.array([1]), np.zeros((1, 3)), source="f:1", properties={"gap": np.ones(2)}
                ),
            ]
        )


def test_missing_labels_are_nan():
    columns = Columns.from_structures([Structure(np.array([1]), np.zeros((1, 3)))])
    assert np.isnan(columns.energy).all() and np.isnan(columns.forces).all()
    assert columns.cell is None and columns.pbc is None


@pytest.mark.parametrize("bad", [{"positions": np.zeros((3, 3))}, {"forces": np.zeros((1, 3))}])
def test_structure_with_invalid_shapes_is_rejected(bad):
    fields = {"numbers": np.array([1, 1]), "positions": np.zeros((2, 3)), "source": "file:7"} | bad
    with pytest.raises(ValueError, match="file:7.*must have shape"):
        Structure(**fields)


def test_one_long_name_does_not_pad_the_others():
    long, short = (
        Structure(np.array([1]), np.zeros((1, 3)), smiles=s) for s in ("C" * 100_000, "C")
    )
    columns = Columns.from_structures([long] + [short] * 1000)
    assert (
        columns.smiles.nbytes < 10_000
        and columns.smiles[0] == "C" * 100_000
        and columns.smiles[1] == "C"
    )


def test_spins_are_kept():
    """Columns without unpaired electrons have none; all others get zeros when they are joined."""
    radical, closed = (Structure(np.array([1]), np.zeros((1, 3)), spin=spin) for spin in (1.0, 0.0))
    parts = [Columns.from_structures([closed]), Columns.from_structures([radical, closed])]
    joined = Columns.concatenate(parts)
    assert parts[0].spin is None and joined.spin.tolist() == [0, 1, 0]
    assert [s.spin for s in joined.take(np.array([1, 0]))] == [1, 0] and parts[0][0].spin == 0

"""Tests for the filters against a plain implementation, one structure at a time."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality import filters
from mlip_jax.datasets.quality.filters import REASONS, Filters
from mlip_jax.structure import Structure

NAN = float("nan")


def structure(numbers=(1, 6), spread=1.0, **fields):
    positions = np.arange(len(numbers))[:, None] * spread * np.array([1.0, 0, 0])
    return Structure(np.array(numbers, np.int32), positions, **{"energy": -1.0} | fields)


def names(actual):
    return [REASONS[k] for k in actual]


GOOD = structure(forces=np.ones((2, 3)))
# Coplanar lattice vectors leave distances undefined; the filter used to keep such structures.
FLAT = dataclasses.replace(
    GOOD, cell=np.array([[4.0, 0, 0], [0, 4, 0], [4, 4, 0]]), pbc=np.ones(3, bool)
)


@pytest.mark.parametrize(
    ("options", "dropped", "reason"),
    [
        (
            {},
            dataclasses.replace(GOOD, positions=np.array([[0, 0, 0], [NAN, 0, 0]])),
            "positions not finite",
        ),
        (
            {},
            dataclasses.replace(GOOD, positions=np.array([[0, 0, 0], [0, np.inf, 0]])),
            "positions not finite",
        ),
        ({"charge": 0.0}, structure(charge=1.0), "charge"),
        ({"elements": ("H", "C")}, structure((1, 8)), "elements"),
        ({"min_atoms": 2}, structure((6,)), "too few atoms"),
        ({"max_atoms": 3}, structure((1,) * 4), "too many atoms"),
        ({}, structure(energy=NAN), "no labels"),
        ({}, structure(energy=np.inf, forces=np.full((2, 3), NAN)), "no labels"),
        ({"require": "energy"}, structure(energy=NAN, forces=np.ones((2, 3))), "no energy"),
        ({"require": "both"}, structure(energy=NAN, forces=np.ones((2, 3))), "no energy"),
        ({"require": "forces"}, structure(), "no forces"),
        ({"require": "both"}, structure(), "no forces"),
        (
            {"max_force": 2.0},
            structure(forces=np.array([[0, 0, 0], [0, -3.0, NAN]])),
            "force too large",
        ),
        ({"min_distance": 0.5}, structure(spread=0.3), "atoms too close"),
        ({"min_distance": 0.5}, FLAT, "invalid cell"),
    ],
)
def test_each_filter(options, dropped, reason):
    columns = Columns.from_structures([GOOD, dropped, GOOD])
    assert names(Filters(**options).reasons(columns)) == ["kept", reason, "kept"]


def test_reasons_are_int8_codes():
    actual = Filters().reasons(Columns.from_structures([GOOD]))
    assert actual.dtype == np.int8 and len(REASONS) < 128


def test_first_reason_is_reported():
    bad = structure((8,) * 5, 0.1, charge=2.0, energy=NAN, forces=np.full((5, 3), 99.0))
    everything = {
        "charge": 0.0,
        "elements": ("H",),
        "min_atoms": 6,
        "max_atoms": 4,
        "require": "energy",
        "max_force": 1.0,
        "min_distance": 0.5,
    }
    expected = [
        "charge",
        "elements",
        "too few atoms",
        "too many atoms",
        "no energy",
        "force too large",
        "atoms too close",
    ]
    columns = Columns.from_structures([bad])
    for name, reason in zip(list(everything), expected):
        assert names(Filters(**everything).reasons(columns)) == [reason]
        everything[name] = "any" if name == "require" else None
    assert names(Filters(**everything).reasons(columns)) == ["kept"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elements": ("H", "Xy")}, "'Xy' is not the symbol"),
        ({"elements": "HC"}, "sequence of symbols"),
        ({"require": "all"}, "any, energy, forces, both, none; received 'all'"),
        ({"max_force": -1.0}, "max_force must be positive"),
        ({"min_distance": NAN}, "min_distance must be positive"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Filters(**options)


def naive(f: Filters, s: Structure) -> str:
    allowed = {"H": 1, "C": 6, "O": 8}
    forces = np.full((len(s), 3), NAN) if s.forces is None else s.forces
    no_energy, no_forces = not np.isfinite(s.energy), not np.isfinite(forces).any()
    rules = [
        ("positions not finite", not np.isfinite(s.positions).all()),
        ("charge", f.charge is not None and s.charge != f.charge),
        (
            "elements",
            f.elements is not None
            and not {allowed[e] for e in f.elements} >= set(s.numbers.tolist()),
        ),
        ("too few atoms", f.min_atoms is not None and len(s) < f.min_atoms),
        ("too many atoms", f.max_atoms is not None and len(s) > f.max_atoms),
        ("no labels", f.require != "none" and no_energy and no_forces),
        ("no energy", f.require in ("energy", "both") and no_energy),
        ("no forces", f.require in ("forces", "both") and no_forces),
        (
            "force too large",
            f.max_force is not None
            and any(abs(x) > f.max_force for x in forces.ravel() if np.isfinite(x)),
        ),
        (
            "atoms too close",
            f.min_distance is not None and len(s) > 1 and pdist(s.positions).min() < f.min_distance,
        ),
    ]
    return next((reason for reason, applies in rules if applies), "kept")


@st.composite
def random_structures(draw):
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    structures = []
    for _ in range(draw(st.integers(0, 12))):
        n = int(rng.integers(0, 7))
        forces = rng.normal(size=(n, 3)) * 2
        forces[rng.random((n, 3)) < rng.choice([0, 0.5, 1.0])] = NAN
        positions = rng.normal(size=(n, 3)) * 1.5
        positions[rng.random((n, 3)) < rng.choice([0, 0, 0.2])] = NAN
        structures.append(
            Structure(
                rng.choice([1, 6, 8], n).astype(np.int32),
                positions,
                energy=float(rng.choice([NAN, -1.0])),
                charge=float(rng.choice([0, 0, 1])),
                forces=None if rng.random() < 0.2 else forces,
            )
        )
    return structures


@settings(max_examples=200, deadline=None)
@given(
    structures=random_structures(),
    f=st.builds(
        Filters,
        elements=st.sampled_from([None, ("H", "C"), ("H", "C", "O")]),
        charge=st.sampled_from([None, 0.0, 1]),
        min_atoms=st.sampled_from([None, 2]),
        max_atoms=st.sampled_from([None, 4]),
        max_force=st.sampled_from([None, 3.0]),
        min_distance=st.sampled_from([None, 0.8]),
        require=st.sampled_from(filters.REQUIRE),
    ),
)
def test_block_equals_single_structures(structures, f):
    columns = Columns.from_structures(structures)
    assert names(f.reasons(columns)) == [naive(f, s) for s in structures]
    rms = filters.force_rms_per_structure(columns)
    for s, actual in zip(columns, rms):
        known = s.forces[np.isfinite(s.forces)]
        assert (
            np.isnan(actual)
            if not len(known)
            else actual == pytest.approx(np.sqrt((known**2).mean()))
        )


def test_precomputed_distances_are_used():
    columns = Columns.from_structures([GOOD, GOOD])
    assert names(Filters(min_distance=0.5).reasons(columns, shortest=np.array([0.1, NAN]))) == [
        "atoms too close",
        "kept",
    ]


def naive_outliers(molecule, values, z, min_count, floor):
    actual = []
    for m, x in zip(molecule, values):
        values_of_molecule = np.array(
            [v for k, v in zip(molecule, values) if k == m and np.isfinite(v)]
        )
        if len(values_of_molecule) < min_count or not np.isfinite(x):
            actual.append(False)
            continue
        mad = np.median(np.abs(values_of_molecule - np.median(values_of_molecule)))
        actual.append(bool(abs(x - np.median(values_of_molecule)) > z * (1.4826 * mad + floor)))
    return actual


@settings(max_examples=150, deadline=None)
@given(
    data=st.lists(
        st.tuples(
            st.sampled_from("abcd"), st.one_of(st.just(NAN), st.integers(-50, 50).map(float))
        ),
        max_size=60,
    ),
    z=st.sampled_from([0.5, 3.0]),
    min_count=st.integers(1, 6),
    floor=st.sampled_from([0.0, 1.0]),
)
def test_robust_outliers_are_found_per_molecule(data, z, min_count, floor):
    molecule, values = (
        np.array([d[0] for d in data], np.str_),
        np.array([d[1] for d in data], float),
    )
    actual = filters.robust_outliers(molecule, values, z, min_count=min_count, floor=floor)
    assert actual.tolist() == naive_outliers(molecule, values, z, min_count, floor)
    numbers = np.array([ord(m) for m in molecule], np.int64)
    np.testing.assert_array_equal(
        filters.robust_outliers(numbers, values, z, min_count=min_count, floor=floor), actual
    )


def test_molecule_outliers_by_energy_and_force():
    rng = np.random.default_rng(0)
    molecule = np.repeat(["a", "b", "few"], [50, 50, 3])
    energy = np.concatenate(
        [-1000 + rng.normal(size=50), -5000 + 0.1 * rng.normal(size=50), [1.0, 2.0, 900.0]]
    )
    rms = rng.uniform(0.8, 1.2, 103)
    energy[[7, 60, 61]] = -960.0, -4996.0, NAN
    rms[[8, 7]] = 40.0, 40.0
    options = {"max_energy_z": 10.0, "max_force_z": 10.0}
    actual = Filters(**options).molecule_outliers(molecule, energy, rms, np.full(103, 20))
    assert {int(s): REASONS[actual[s]] for s in np.flatnonzero(actual)} == {
        7: "energy outlier",
        8: "force outlier",
        60: "energy outlier",
    }
    assert not Filters().molecule_outliers(molecule, energy, rms, np.full(103, 20)).any()


def test_equal_conformations_are_not_outliers():
    """A spread of zero must not turn numerical noise into outliers."""
    energy = np.array([-10.0] * 9 + [-10.0 + 1e-6])
    actual = Filters(max_energy_z=5.0).molecule_outliers(
        np.zeros(10, int), energy, np.ones(10), np.full(10, 3)
    )
    assert not actual.any()


def test_energy_deviation_is_per_atom_from_the_median():
    energy, n_atoms = np.array([0.0, 0.0, 0.0, 5.0, -12.0, NAN]), np.full(6, 10)
    actual = Filters(max_energy_deviation=1.0).molecule_outliers(
        np.zeros(6, int), energy, np.full(6, NAN), n_atoms
    )
    assert names(actual) == ["kept"] * 4 + ["energy outlier", "kept"]


def test_identities_and_counts_of_reasons():
    structures = [
        dataclasses.replace(GOOD, source=f"f.hdf5:{k}", conformer=k, charge=float(k % 2))
        for k in range(4)
    ]
    columns = Columns.from_structures(structures)
    actual = Filters(charge=0.0).reasons(columns)
    assert filters.count_reasons(actual) == {"charge": 2}
    assert filters.identities(columns, actual) == [
        ("f.hdf5:1#1", "charge"),
        ("f.hdf5:3#3", "charge"),
    ]
    assert (
        filters.count_reasons(np.zeros(3, np.int8)) == {}
        and filters.identities(columns, actual * 0) == []
    )


@given(molecule=st.lists(st.sampled_from(["a", "b", "", "long name"]), max_size=20))
def test_molecule_codes_are_equal_for_equal_molecules(molecule):
    codes = filters.molecule_codes(np.array(molecule, np.str_))
    assert [[a == b for a in molecule] for b in molecule] == (codes[:, None] == codes).tolist()


def test_charge_filter_has_a_tolerance():
    columns = Columns.from_structures([structure(charge=c) for c in (1e-9, -2e-4, 0.3, 1.0, NAN)])
    assert names(Filters(charge=0.0).reasons(columns)) == [
        "kept",
        "kept",
        "charge",
        "charge",
        "charge",
    ]
    assert not Filters(charge=NAN).reasons(columns).any()

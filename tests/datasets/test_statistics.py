"""Tests for reference energies and the statistics of a training set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.statistics import (
    NUM_ELEMENTS,
    ElementFit,
    Summary,
    element_counts,
    isolated_from_formation,
    isolated_from_structures,
    reference_energies,
    sum_reference,
)
from mlip_jax.structure import Structure

PLANTED = {1: -13.6, 6: -1036.123456789, 8: -2043.25, 53: -1.0e5}


def columns_of(compositions, energies=None, **fields):
    structures = []
    for s, numbers in enumerate(compositions):
        structures.append(
            Structure(
                np.array(numbers),
                np.zeros((len(numbers), 3)),
                energy=float("nan") if energies is None else float(energies[s]),
                **{k: v[s] for k, v in fields.items()},
            )
        )
    return Columns.from_structures(structures)


def planted_energies(compositions):
    return [sum(PLANTED[z] for z in numbers) for numbers in compositions]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), count=st.integers(20, 60))
def test_least_squares_recovers_known_element_energies(seed, count):
    rng = np.random.default_rng(seed)
    compositions = [[1], [6], [8], [53]] + [
        rng.choice([1, 6, 8, 53], rng.integers(1, 40)) for _ in range(count)
    ]
    columns = columns_of(compositions, planted_energies(compositions))
    reference = reference_energies(Summary([columns]), "least_squares")
    assert reference.shape == (NUM_ELEMENTS,) and reference.dtype == np.float64
    for z, energy in PLANTED.items():
        assert abs(reference[z] - energy) <= 1e-9 * 1.0e5
    assert np.count_nonzero(reference) == len(PLANTED)
    np.testing.assert_allclose(sum_reference(reference, columns), columns.energy, rtol=1e-9)


def test_large_energies_keep_nine_digits():
    compositions = [[53, 1], [53, 53, 1], [1, 1, 6], [6, 53], [8, 1, 1], [53] * 5 + [8]]
    reference = reference_energies(
        Summary([columns_of(compositions, planted_energies(compositions))]), "least_squares"
    )
    assert reference[53] == pytest.approx(-1.0e5, rel=1e-9)
    assert reference[6] == pytest.approx(PLANTED[6], rel=1e-9)


def test_unknown_energies_are_ignored():
    compositions = [[1], [6], [1, 6, 6], [6, 1, 1, 1, 1]]
    energies = np.array(planted_energies(compositions))
    energies[2] = np.nan
    reference = reference_energies(Summary([columns_of(compositions, energies)]), "least_squares")
    assert reference[6] == pytest.approx(PLANTED[6], rel=1e-9)
    with pytest.raises(ValueError, match="no energies to fit"):
        reference_energies(Summary([columns_of(compositions)]), "least_squares")


def test_undetermined_elements_get_the_smallest_norm():
    """Only water: the sums are correct, and the element energies have the smallest norm."""
    columns = columns_of([[8, 1, 1]] * 3, [-2000.0] * 3)
    reference = reference_energies(Summary([columns]), "least_squares")
    assert np.isfinite(reference).all()
    np.testing.assert_allclose(sum_reference(reference, columns), -2000.0, rtol=1e-12)
    assert reference[1] == pytest.approx(2 * reference[8], rel=1e-9)


def test_isolated_atoms_from_formation_energies():
    compositions = [[1, 1], [6, 1, 1, 1, 1], [8, 1, 1], [8, 6, 8]]
    formation = np.array([-4.5, -17.0, np.nan, -16.0])
    energies = np.array(planted_energies(compositions)) + np.nan_to_num(formation, nan=3.0)
    columns = columns_of(compositions, energies)
    isolated = isolated_from_formation([(columns, formation)])
    reference = reference_energies(Summary([columns]), "isolated_atoms", isolated_atoms=isolated)
    for z in (1, 6, 8):
        assert reference[z] == pytest.approx(PLANTED[z], rel=1e-9)
    assert isolated_from_formation([(columns, np.full(4, np.nan))]) is None
    with pytest.raises(ValueError, match="no energies of isolated atoms"):
        reference_energies(Summary([columns]), "isolated_atoms")


def test_element_without_formation_energy_is_nan():
    """Iodine occurs only without formation energy, so its isolated atom is unknown."""
    compositions = [[1, 1], [1, 53], [6, 1, 1, 1, 1], [6, 6]]
    formation = np.array([-4.5, np.nan, -17.0, -5.0])
    columns = columns_of(compositions, np.array(planted_energies(compositions)))
    isolated = isolated_from_formation([(columns, formation)])
    with pytest.raises(ValueError, match=r"lack I\b"):
        reference_energies(Summary([columns]), "isolated_atoms", isolated_atoms=isolated)


def test_reference_energies_by_element_and_none():
    columns = columns_of([[1, 6]], [0.0])
    reference = reference_energies(Summary([columns]), {"H": -1.5, "C": -2.5, "O": 7.0})
    assert reference[1] == -1.5 and reference[6] == -2.5
    assert not reference_energies(Summary([columns]), "none").any()
    with pytest.raises(ValueError, match=r"given reference energies lack C"):
        reference_energies(Summary([columns]), {"H": -1.5})
    with pytest.raises(ValueError, match="'Hy' is not the symbol"):
        reference_energies(Summary([columns]), {"Hy": -1.5})
    with pytest.raises(ValueError, match="received 'lstsq'"):
        reference_energies(Summary([columns]), "lstsq")


def test_element_counts():
    counts = element_counts(np.array([1, 1, 8, 6]), np.array([3, 1]))
    assert counts.shape == (2, NUM_ELEMENTS)
    assert counts[0, 1] == 2 and counts[0, 8] == 1 and counts[1, 6] == 1 and counts.sum() == 4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_blocks_equal_one_block(seed, cuts):
    """Some elements first occur in later blocks, and the energies contain noise."""
    rng = np.random.default_rng(seed)
    compositions = [
        rng.choice([1, 6, 8, 53][: 2 + s // 20], rng.integers(1, 40)) for s in range(60)
    ]
    columns = columns_of(
        compositions, np.array(planted_energies(compositions)) + rng.normal(size=60)
    )
    bounds = sorted({0, *cuts, 60})
    blocks = [columns.take(np.arange(a, b)) for a, b in zip(bounds, bounds[1:])]
    counts = element_counts(columns.numbers, columns.n_atoms)[:, [1, 6, 8, 53]]
    expected = np.linalg.lstsq(counts, columns.energy, rcond=None)[0]
    actual = Summary(blocks)
    np.testing.assert_allclose(actual.fit.solve()[[1, 6, 8, 53]], expected, rtol=1e-9)
    assert actual.atoms.sum() == len(columns.numbers) and actual.elements.tolist() == [1, 6, 8, 53]


def test_fit_without_energies_is_rejected():
    with pytest.raises(ValueError, match="no energies to fit"):
        ElementFit().solve()


def test_odd_numbers_of_electrons_count_unless_labels_or_a_cell_explain_them():
    """Detects radicals without labels; an ion, a labeled radical and a metal are none."""
    for fields, expected in (
        ({}, True),
        ({"charge": -1.0}, False),
        ({"spin": 1.0}, False),
        ({"cell": np.eye(3), "pbc": np.ones(3, bool)}, False),
    ):
        columns = Columns.from_structures([Structure(np.array([6, 1]), np.eye(2, 3), **fields)])
        assert Summary([columns]).odd_electrons == expected
        assert not Summary([columns_of([[1, 1]])]).odd_electrons


def test_sizes_are_those_of_the_molecules():
    """Detects sizes of one block instead of all, and unit cells that count as molecules."""
    crystal = Columns.from_structures(
        [Structure(np.array([6]), np.zeros((1, 3)), cell=np.eye(3), pbc=np.ones(3, bool))]
    )
    assert Summary([columns_of([[1, 1], [1] * 7]), columns_of([[1] * 3])]).sizes == (2, 7)
    assert Summary([crystal, columns_of([[1] * 3])]).sizes == (3, 3)
    assert Summary([crystal]).sizes is None


def test_force_rms_ignores_unknown_forces():
    forces = [np.full((1, 3), 2.0), np.full((1, 3), np.nan)]
    assert Summary([columns_of([[1], [6]], forces=forces)]).force_rms == pytest.approx(2.0)
    assert np.isnan(Summary([columns_of([[1], [6]])]).force_rms)


def test_one_composition_uses_isolated_atoms(caplog):
    """The minimum-norm fit gave hydrogen in methane -807 eV without a word."""
    columns = columns_of([[6, 1, 1, 1, 1]] * 3 + [[8]], [-1100.0, -1101.0, -1100.5, -2043.0])
    summary = Summary([columns])
    assert summary.fit.undetermined().tolist() == [1, 6]
    isolated = np.full(NUM_ELEMENTS, np.nan)
    isolated[[1, 6, 8]] = -13.6, -1029.0, -2042.0
    reference = reference_energies(summary, "least_squares", isolated_atoms=isolated)
    assert reference[[1, 6, 8]].tolist() == [-13.6, -1029.0, -2042.0]
    assert "do not determine those of H, C; using" in caplog.text
    isolated[1] = np.nan
    reference_energies(summary, "least_squares", isolated_atoms=isolated)
    assert "no physical meaning" in caplog.text


def test_determined_compositions_have_no_undetermined_elements():
    for compositions in ([[1, 1, 8], [1, 8], [8]], [[1]], [[6, 1], [6, 1, 1], [8, 6, 1], [53, 8]]):
        columns = columns_of(compositions, planted_energies(compositions))
        assert not len(Summary([columns]).fit.undetermined())
    assert not len(ElementFit().undetermined())


def test_isolated_atoms_among_the_structures():
    """The lowest energy of a neutral atom counts; ions and unknown energies do not."""
    columns = columns_of(
        [[1], [1], [1, 1], [6], [8], [1]],
        [-13.2, -13.6, -31.7, np.nan, -2042.0, -50.0],
        charge=[0, 0, 0, 0, 0, -1],
    )
    energies = isolated_from_structures([columns])
    assert energies[1] == -13.6 and energies[8] == -2042.0 and np.isnan(energies[6])
    assert isolated_from_structures([columns_of([[1, 1]], [-31.7])]) is None

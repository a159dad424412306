"""Tests that planted errors are recovered, with missing labels and in any order of structures."""

import json
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mlip_jax.datasets.statistics import element_counts
from mlip_jax.reports import errors
from mlip_jax.reports.predictions import Predictions

SEEDS = st.integers(0, 2**32 - 1)
ENERGIES = st.floats(-50, 50)
quick = hypothesis.settings(deadline=None, max_examples=30)
# Ignore warnings about objects of other tests, which the garbage collector may raise here.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


def make(seed, num_molecules=12, conformers=3, noise=0.0):
    """Return predictions for random molecules of 2 to 20 H, C and O atoms, with random errors."""
    rng = np.random.default_rng(seed)
    molecules = [rng.choice([1, 6, 8], rng.integers(2, 21)) for _ in range(num_molecules)]
    # Two sizes and all elements, so that every fit has one answer.
    molecules[:4] = [np.array(z) for z in ([1, 6], [1, 8, 8], [6, 6, 1, 8], [1, 1, 1, 6, 8])]
    numbers = [z for z in molecules for _ in range(conformers)]
    offsets = np.concatenate([[0], np.cumsum([len(z) for z in numbers])])
    count, atoms = len(numbers), offsets[-1]
    energy, forces = rng.normal(-3e4, 1e4, count), rng.normal(size=(atoms, 3))
    return Predictions(
        numbers=np.concatenate(numbers),
        offsets=offsets,
        energy=energy,
        energy_predicted=energy + noise * rng.normal(size=count),
        forces=forces,
        forces_predicted=forces + noise * rng.normal(size=(atoms, 3)),
        molecule=[f"m{m}" for m in range(num_molecules) for _ in range(conformers)],
        conformer=np.tile(np.arange(conformers), num_molecules),
        subset=rng.choice(["a", "b"], count),
        source=["test"] * count,
    )


def replace(p, **fields):
    names = ("numbers", "offsets", "energy", "energy_predicted", "forces", "forces_predicted")
    names += ("molecule", "conformer", "subset", "source")
    return Predictions(**{name: getattr(p, name) for name in names} | fields)


def select(p, structures):
    structures = np.asarray(structures, dtype=int)
    atoms = np.concatenate(
        [np.arange(p.offsets[s], p.offsets[s + 1]) for s in structures] or [np.arange(0)]
    )
    per_atom = {name: getattr(p, name)[atoms] for name in ("numbers", "forces", "forces_predicted")}
    names = ("energy", "energy_predicted", "molecule", "conformer", "subset", "source")
    per_structure = {name: getattr(p, name)[structures] for name in names}
    offsets = np.concatenate([[0], np.cumsum(p.sizes[structures])])
    return Predictions(offsets=offsets, **per_atom, **per_structure)


def without_labels(p, structures):
    energy, forces = p.energy.copy(), p.forces.copy()
    energy[structures] = np.nan
    forces[np.isin(p.structure_of_atom, structures)] = np.nan
    return replace(p, energy=energy, forces=forces)


@quick
@hypothesis.given(seed=SEEDS, shift=ENERGIES)
def test_constant_shift_is_the_error(seed, shift):
    p = make(seed)
    p = replace(p, energy_predicted=p.energy + shift, forces_predicted=p.forces + shift)
    s = errors.summary(p)
    close = {"rel": 1e-9, "abs": 1e-6}
    assert s["energy_mae_ev"] == pytest.approx(abs(shift), **close)
    assert s["energy_rmse_ev"] == pytest.approx(abs(shift), **close)
    assert s["energy_mae_mev_per_atom"] == pytest.approx(
        np.mean(1e3 * abs(shift) / p.sizes), **close
    )
    assert s["force_mae_mev_per_ang"] == pytest.approx(1e3 * abs(shift), **close)
    assert s["force_rmse_mev_per_ang"] == pytest.approx(1e3 * abs(shift), **close)
    assert s["energy_slope_mev_per_atom"] == pytest.approx(0, abs=1e-6)


@quick
@hypothesis.given(seed=SEEDS, slope=st.floats(-0.5, 0.5), intercept=ENERGIES)
def test_planted_slope_is_recovered(seed, slope, intercept):
    p = make(seed)
    p = replace(p, energy_predicted=p.energy + intercept + slope * p.sizes)
    fit = errors.energy_slope(p)
    assert fit.slope == pytest.approx(1e3 * slope, abs=1e-6)
    assert fit.stderr == pytest.approx(0, abs=1e-6)
    line, stderr = fit.line(np.array([3.0, 40.0]))
    np.testing.assert_allclose(line, 1e3 * (intercept + slope * np.array([3, 40])), atol=1e-5)
    np.testing.assert_allclose(stderr, 0, atol=1e-5)


@quick
@hypothesis.given(seed=SEEDS, copies=st.integers(2, 5))
def test_copies_of_conformations_do_not_make_the_slope_more_certain(seed, copies):
    p = make(seed, noise=0.1)
    repeated = select(p, np.tile(np.arange(p.num_structures), copies))
    once, many = errors.energy_slope(p), errors.energy_slope(repeated)
    assert many.slope == pytest.approx(once.slope, rel=1e-6, abs=1e-6)
    # The only difference is the small-sample factor (N - 1) / (N - 2).
    assert many.stderr == pytest.approx(once.stderr, rel=0.02)


def test_clustered_standard_error_matches_the_spread():
    slopes, stderrs = [], []
    for seed in range(200):
        p = make(seed, num_molecules=60, conformers=4)
        shared = np.repeat(np.random.default_rng(seed).normal(size=60), 4)
        fit = errors.energy_slope(replace(p, energy_predicted=p.energy + shared))
        slopes.append(fit.slope)
        stderrs.append(fit.stderr)
    # Without clustering the standard error would be half of the spread.
    assert np.mean(stderrs) == pytest.approx(np.std(slopes), rel=0.2)


@pytest.mark.parametrize("structures", [[], [0], [0, 1, 2]])
def test_slope_without_two_sizes_is_none(structures):
    s = errors.summary(select(make(0, noise=0.1), structures))
    assert s["energy_slope_mev_per_atom"] is None
    assert s["energy_slope_stderr_mev_per_atom"] is None


def test_two_molecules_have_a_slope_but_no_standard_error():
    s = errors.summary(select(make(0, noise=0.1), np.arange(6)))
    assert s["energy_slope_mev_per_atom"] is not None
    assert s["energy_slope_stderr_mev_per_atom"] is None


@quick
@hypothesis.given(seed=SEEDS, data=st.data())
def test_missing_labels_equal_missing_structures(seed, data):
    p = make(seed, noise=0.3)
    missing = data.draw(
        st.sets(st.integers(0, p.num_structures - 1), max_size=p.num_structures - 1)
    )
    kept = [s for s in range(p.num_structures) if s not in missing]
    unlabeled = errors.summary(without_labels(p, list(missing)))
    subset = errors.summary(select(p, kept))
    for key in set(subset) - {"num_structures", "num_atoms", "num_molecules"}:
        assert unlabeled[key] == pytest.approx(subset[key], rel=1e-6, abs=1e-9), key


@quick
@hypothesis.given(seed=SEEDS)
def test_order_of_structures_does_not_matter(seed):
    p = make(seed, noise=2.0)
    q = select(p, np.random.default_rng(seed).permutation(p.num_structures))
    functions = (
        errors.summary,
        errors.per_element,
        errors.per_size,
        lambda x: sorted(errors.per_subset(x), key=lambda group: group.label),
        errors.force_outliers,
        lambda x: sorted(errors.worst_molecules(x, 100), key=lambda row: row.molecule),
        errors.per_element_correction,
    )
    for function in functions:
        _assert_close(errors.json_safe(function(p)), errors.json_safe(function(q)))


def _assert_close(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    else:
        assert a == b


@quick
@hypothesis.given(seed=SEEDS, planted=st.tuples(*[st.floats(-1, 1)] * 3))
def test_planted_energies_per_element_are_recovered(seed, planted):
    valid, test = make(seed), make(seed + 1)
    elements = np.array([1, 6, 8])
    valid, test = (
        replace(
            p,
            energy_predicted=p.energy
            + element_counts(p.numbers, p.sizes, elements) @ np.array(planted),
        )
        for p in (valid, test)
    )
    for fitted_on in (valid, test, None):
        result = errors.per_element_correction(test, fitted_on)
        assert result["mae_before_mev_per_atom"] == pytest.approx(
            errors.summary(test)["energy_mae_mev_per_atom"]
        )
        assert result["mae_after_mev_per_atom"] == pytest.approx(0, abs=1e-5)
        expected = dict(zip("HCO", -1e3 * np.array(planted), strict=True))
        assert result["correction_mev_per_atom"] == pytest.approx(expected, abs=1e-5)


def test_correction_is_zero_for_elements_it_was_not_fitted_on():
    p = make(0)
    p = replace(p, energy_predicted=p.energy + 0.5 * p.sizes)
    hydrogen = replace(select(p, [0]), numbers=[1, 1])
    result = errors.per_element_correction(p, hydrogen)
    assert result["correction_mev_per_atom"] == pytest.approx({"H": -500, "C": 0, "O": 0}, abs=1e-6)


@quick
@hypothesis.given(seed=SEEDS, data=st.data())
def test_planted_outliers_are_found(seed, data):
    p = make(seed, noise=0.1)
    atoms = sorted(data.draw(st.sets(st.integers(0, p.num_atoms - 1), max_size=5)))
    predicted = p.forces_predicted.copy()
    predicted[atoms] = p.forces[atoms] + [0, 6, -8]
    outliers = errors.force_outliers(replace(p, forces_predicted=predicted))
    names = list(zip(p.molecule.tolist(), p.conformer.tolist(), strict=True))
    starts = {name: offset for name, offset in zip(names, p.offsets[:-1], strict=True)}
    assert sorted(starts[o.molecule, o.conformer] + o.atom for o in outliers) == atoms
    assert all(o.residual == pytest.approx(10) for o in outliers)
    for o in outliers:
        a = starts[o.molecule, o.conformer] + o.atom
        assert o.reference_norm == pytest.approx(np.linalg.norm(p.forces[a]))
        assert o.element == {1: "H", 6: "C", 8: "O"}[p.numbers[a]]


def test_group_errors_equal_errors_of_the_selection():
    p = make(3, noise=0.2)
    for group in errors.per_subset(p):
        s = errors.summary(select(p, np.flatnonzero(p.subset == group.label)))
        assert group.num_structures == s["num_structures"] and group.num_atoms == s["num_atoms"]
        for kind in ("energy_{}_mev_per_atom", "force_{}_mev_per_ang"):
            for key in (kind.format("mae"), kind.format("rmse")):
                assert getattr(group, key) == pytest.approx(s[key])
    for group in errors.per_element(p):
        of_element = errors.force_errors(p)[p.numbers == {"H": 1, "C": 6, "O": 8}[group.label]]
        assert group.num_atoms == len(of_element)
        assert group.force_mae_mev_per_ang == pytest.approx(1e3 * errors.mae(of_element))
        assert group.force_rmse_mev_per_ang == pytest.approx(1e3 * errors.rmse(of_element))
    bins = errors.per_size(p)
    assert len(bins) <= 10 and sum(b.num_structures for b in bins) == p.num_structures
    assert bins[0].label == "1–2"


def test_worst_molecule_comes_first():
    p = make(5, noise=1e-3)
    energy = p.energy.copy()
    energy[p.molecule == "m7"] -= 100
    worst = errors.worst_molecules(replace(p, energy=energy), count=4)
    size = p.sizes[p.molecule == "m7"][0]
    assert len(worst) == 4 and worst[0].molecule == "m7"
    assert worst[0].num_atoms == size and worst[0].num_conformers == 3
    assert worst[0].energy_mean_error_mev_per_atom == pytest.approx(1e5 / size, rel=1e-2)


def test_predictions_that_are_not_finite_are_counted():
    p = make(0)
    energy, forces = p.energy.copy(), p.forces.copy()
    energy[0], forces[0, 1] = np.inf, np.nan
    s = errors.summary(replace(p, energy_predicted=energy, forces_predicted=forces))
    assert s["num_nonfinite_predictions"] == 2 and s["energy_mae_ev"] == 0


def test_empty_split_has_no_errors():
    s = errors.summary(select(make(0), []))
    assert {key for key, value in s.items() if value is None} == {
        key for key in s if not key.startswith("num_")
    }
    assert all(value == 0 for key, value in s.items() if key.startswith("num_"))
    json.dumps(s, allow_nan=False)


def test_json_safe():
    value = {"a": [1.0, math.nan, np.float64(np.inf)], "b": (np.int64(3), "x", None)}
    assert errors.json_safe(value) == {"a": [1.0, None, None], "b": [3, "x", None]}


def test_save_and_load(tmp_path):
    p = replace(without_labels(make(0), [1]), subset=["ωB97M 水"] * 36)
    path = p.save(tmp_path / "test.predictions")
    assert [file.name for file in tmp_path.iterdir()] == ["test.predictions"]
    q = Predictions.load(path)
    for name in (
        "numbers",
        "offsets",
        "energy",
        "energy_predicted",
        "forces",
        "molecule",
        "conformer",
        "subset",
    ):
        np.testing.assert_array_equal(getattr(p, name), getattr(q, name))


def test_invalid_files_are_errors(tmp_path):
    path = tmp_path / "p.npz"
    np.savez(path, numbers=[1])
    with pytest.raises(ValueError, match="p.npz.*missing arrays.*energy"):
        Predictions.load(path)
    np.savez(path, numbers=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="p.npz"):
        Predictions.load(path)
    for junk in (b"", b"not a zip", b"PK\x03\x04 but then junk"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="p.npz"):
            Predictions.load(path)
    with pytest.raises(FileNotFoundError):
        Predictions.load(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"energy": np.zeros(35)}, r"energy: expected shape \(36,\).*\(35,\)"),
        ({"forces": np.zeros((3, 3))}, r"forces: expected shape"),
        ({"offsets": np.arange(37)}, "offsets: must start at 0"),
        ({"molecule": ["a"]}, "molecule: expected shape"),
        ({"conformer": np.zeros(36)}, "conformer: must contain integers"),
        ({"energy": ["a"] * 36}, "energy: must contain real numbers"),
    ],
)
def test_wrong_shapes_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(make(0), **fields)


def test_padding_atoms_and_empty_structures_are_errors():
    p = select(make(0), [0, 3])
    with pytest.raises(ValueError, match="Remove padding atoms"):
        replace(p, numbers=np.zeros(p.num_atoms, dtype=int))
    with pytest.raises(ValueError, match="structure 0 has the atoms 0 to 0"):
        replace(p, offsets=[0, 0, p.num_atoms])

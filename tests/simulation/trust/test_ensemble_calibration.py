"""Tests for the calibration of ensembles: the factor is recovered, and belongs to its members."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from mlip_jax import EnsembleCalculator
from mlip_jax.datasets.columns import Columns
from mlip_jax.simulation.trust.ensemble_calibration import (
    FILE,
    Calibration,
    EnsembleErrors,
    Scale,
    evaluate,
)
from mlip_jax.structure import Structure
from tests.simulation.structures import random_molecule
from tests.tasks.property_runs import write_force_field


def test_the_factor_is_recovered():
    """Gaussian errors with a standard deviation of 3 times the spread, for one and three
    components.
    """
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(0, 0.4, 20_000))
    for shape in ((20_000,), (20_000, 3)):
        errors = 3.0 * (spread * rng.normal(size=shape).T).T
        errors[::7] = np.nan
        scale = Scale.fit(errors, spread)
        assert scale.factor == pytest.approx(3, rel=0.05) and scale.floor == pytest.approx(
            np.quantile(np.delete(spread, np.s_[::7]), 0.1)
        )
        z = errors.reshape(20_000, -1) / scale.expected(spread)[:, None]
        assert np.sqrt(np.nanmean(z**2)) == pytest.approx(1)
    assert Scale.fit(np.full(5, np.nan), np.ones(5)) is None
    with pytest.raises(ValueError, match="identical results"):
        Scale.fit(np.ones(5), np.zeros(5))


def test_chance_agreement_has_no_large_weight():
    rng = np.random.default_rng(1)
    spread = np.ones(1000)
    spread[0] = 1e-9
    assert Scale.fit(rng.normal(size=1000), spread).factor < 1.2


@pytest.fixture(scope="module")
def members(make_potential):
    return [make_potential("tiny", seed) for seed in (1, 2)]


def fitted_calibration(members, **changes):
    return dataclasses.replace(
        Calibration(tuple(m.digest() for m in members), Scale(2.0, 1e-6), Scale(3.0, 1e-6), 10),
        **changes,
    )


def test_spread_and_errors_equal_those_of_the_calculator(members):
    atoms = [random_molecule(n, seed=n) for n in (5, 6)]
    rows = Columns.from_structures(
        [
            Structure(a.numbers, a.positions, energy=1.5, forces=np.full((len(a), 3), 0.2))
            for a in atoms
        ]
    )
    errors, calculator = evaluate(members, rows, np.arange(2)), EnsembleCalculator(members)
    for s, a in enumerate(atoms):
        calculator.calculate(a)
        atoms_of_structure, r = rows.atoms_of(np.array([s])), calculator.results
        assert errors.energy_error[s] * len(a) == pytest.approx(r["energy"] - 1.5, rel=1e-5)
        assert errors.energy_spread[s] * len(a) == pytest.approx(r["energy_std"], rel=1e-4)
        np.testing.assert_allclose(
            errors.force_error[atoms_of_structure], r["forces"] - 0.2, atol=1e-3
        )
        np.testing.assert_allclose(
            errors.force_spread[atoms_of_structure],
            np.sqrt((r["forces_std"] ** 2).mean(1)),
            rtol=1e-3,
        )
    with pytest.raises(ValueError, match="all different"):
        evaluate([members[0], members[0]], rows, np.arange(2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_calculator(members, dtype):
    atoms, calibration = random_molecule(6, seed=3), fitted_calibration(members)
    calculator = EnsembleCalculator(
        members[::-1], dtype, calibration
    )  # the order of members does not matter
    assert {"energy_expected_error", "forces_expected_error"} < set(
        calculator.implemented_properties
    )
    for one in (calculator, pickle.loads(pickle.dumps(calculator))):
        expected = one.get_property("forces_expected_error", atoms)
        np.testing.assert_allclose(expected, 3 * np.sqrt((one.results["forces_std"] ** 2).mean(1)))
        assert one.get_property("energy_expected_error", atoms) == pytest.approx(
            2 * one.results["energy_std"]
        )
    calculator.export_properties()  # ASE has no names for these
    energies_only = EnsembleCalculator(members, dtype, fitted_calibration(members, forces=None))
    assert "forces_expected_error" not in energies_only.implemented_properties
    assert set(energies_only.calibration.results(0.1, np.ones((6, 3)))) == {"energy_expected_error"}


def test_other_members(members, make_potential, tmp_path):
    third = make_potential("tiny", 3)
    with pytest.raises(
        ValueError, match=f"other members: .*{members[1].digest()}.*this ensemble has"
    ):
        EnsembleCalculator([members[0], third], calibration=fitted_calibration(members))
    for seed in (0, 1):
        write_force_field(tmp_path / f"ff-{seed}", seed)
    paths = [tmp_path / "ff-0", tmp_path / "ff-1"]
    fitted_calibration(members).save(tmp_path / FILE)
    with pytest.raises(ValueError, match="other members"):
        EnsembleCalculator.from_workdirs(paths, calibration=tmp_path)
    calibration = fitted_calibration(EnsembleCalculator.from_workdirs(paths).potentials)
    calibration.save(tmp_path / "own.json", remark="kept")
    assert Calibration.load(tmp_path / "own.json") == calibration
    assert json.loads((tmp_path / "own.json").read_text())["remark"] == "kept"
    assert (
        EnsembleCalculator.from_workdirs(paths, calibration=tmp_path / "own.json").calibration
        == calibration
    )


def test_missing_and_invalid_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="Create one with configs/ensemble.py"):
        Calibration.load(tmp_path)
    for text in (
        "{",
        "[]",
        '{"members": ["a"], "energy": {"factor": 1}, "forces": null, "num_structures": 1}',
    ):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ValueError, match="not a valid ensemble calibration"):
            Calibration.load(tmp_path)


def test_without_labels(members):
    nothing = EnsembleErrors(
        np.array([3]), np.array([np.nan]), np.ones(1), np.full((3, 3), np.nan), np.ones(3)
    )
    with pytest.raises(ValueError, match="these have neither"):
        Calibration.fit(members, nothing)

"""Tests for exact second derivatives and the vibrations derived from them."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed
from ase.constraints import FixAtoms
from ase.optimize import BFGS
from ase.vibrations import Vibrations

from mlip_jax.simulation.calculators import compiled
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from tests.simulation.structures import crystal, random_molecule


@pytest.fixture(scope="module")
def shared(make_potential):
    """Function shared(kind, dtype) that returns a calculator shared by tests."""
    return functools.cache(lambda kind, dtype: MLIPCalculator(make_potential(kind), dtype))


def by_differences(calculator, atoms, step=1e-3):
    """Return fourth-order central differences of the forces, (3n, 3n)."""
    columns = []
    for n, x in np.ndindex(len(atoms), 3):
        forces = {}
        for k in (-2, -1, 1, 2):
            moved = atoms.copy()
            moved.positions[n, x] += k * step
            forces[k] = calculator.get_property("forces", moved)
        columns.append(
            -(8 * (forces[1] - forces[-1]) - (forces[2] - forces[-2])).ravel() / (12 * step)
        )
    return np.array(columns)


@pytest.mark.parametrize(
    "kind, atoms",
    [
        ("tiny", random_molecule(6, seed=3)),
        pytest.param("so3krates", random_molecule(5, seed=3), marks=pytest.mark.slow),
        ("tiny", crystal(3.0)),
    ],
    ids=["painn", "so3krates", "cell smaller than the cutoff"],
)
def test_agrees_with_differences_of_forces(shared, kind, atoms):
    calculator = shared(kind, "float64")
    hessian = calculator.get_hessian(atoms)
    assert hessian.shape == (3 * len(atoms), 3 * len(atoms)) and hessian.dtype == np.float64
    assert np.abs(hessian).max() > 0.1
    np.testing.assert_allclose(hessian, by_differences(calculator, atoms), rtol=0, atol=1e-6)
    # a shift of all atoms changes no force
    np.testing.assert_allclose(hessian.reshape(-1, len(atoms), 3).sum(axis=1), 0.0, atol=1e-9)


def test_is_symmetric_before_symmetrization(shared):
    calculator, atoms = shared("tiny", "float64"), random_molecule(6, seed=3)
    shape, packed = calculator.compiled.pack(atoms, atoms.positions)
    with jax.enable_x64(True):
        columns = np.asarray(calculator.compiled.run_hessian(shape, *packed, np.int32(0)))
    assert (columns[:, len(atoms) :] == 0).all() and (columns[3 * len(atoms) :] == 0).all()
    raw = columns[: 3 * len(atoms), : len(atoms)].reshape(3 * len(atoms), -1)
    np.testing.assert_allclose(raw, raw.T, rtol=0, atol=1e-10)
    np.testing.assert_allclose(raw, calculator.get_hessian(atoms), rtol=0, atol=1e-10)


def test_columns_in_blocks_are_the_same(shared, make_potential, monkeypatch):
    atoms = random_molecule(6, seed=3)
    expected = shared("tiny", "float64").get_hessian(atoms)
    monkeypatch.setattr(compiled, "_COLUMN_EDGES", 5 * 64)
    calculator = MLIPCalculator(make_potential("tiny"), "float64")
    calls, run = [], calculator.compiled.run_hessian
    monkeypatch.setattr(
        calculator.compiled, "run_hessian", lambda *args: calls.append(1) or run(*args)
    )
    np.testing.assert_allclose(calculator.get_hessian(atoms), expected, rtol=0, atol=1e-11)
    assert len(calls) == 4 and calculator.num_compiles == 1
    calculator.get_hessian(random_molecule(5, seed=1))
    assert calculator.num_compiles == 1  # once per size


def test_float32(shared):
    atoms = random_molecule(6, seed=3)
    expected = shared("tiny", "float64").get_hessian(atoms)
    np.testing.assert_allclose(
        shared("tiny", "float32").get_hessian(atoms),
        expected,
        rtol=0,
        atol=1e-4 * np.abs(expected).max(),
    )


def test_keeps_the_results_of_the_last_calculation(shared):
    calculator, atoms = shared("tiny", "float64"), random_molecule(6, seed=3)
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    calculator.get_hessian(random_molecule(5, seed=1))
    assert calculator.check_state(atoms) == [] and calculator.results["energy"] == energy


def test_structures_without_second_derivatives(shared):
    atoms = molecule("H2O")
    atoms.positions[1] = atoms.positions[0]
    with pytest.raises(CalculationFailed, match="same position"):
        shared("tiny", "float64").get_hessian(atoms)
    with pytest.raises(ValueError, match="not trained on Si"):
        shared("tiny", "float64").get_hessian(molecule("SiH4"))


def test_vibrations(morse_potential, tmp_path):
    """Vibrations of the exact Hessian equal those that ASE computes from forces."""
    atoms = molecule("CH3OH")
    atoms.calc = MLIPCalculator(morse_potential, "float64")
    BFGS(atoms, logfile=None).run(fmax=1e-4, steps=200)
    exact = atoms.calc.get_vibrations(atoms).get_frequencies()
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"), delta=0.002, nfree=4)
    vibrations.run()
    np.testing.assert_allclose(exact.real[6:], vibrations.get_frequencies().real[6:], rtol=1e-3)
    assert (
        np.abs(exact[:6]).max() < 5 < 100 < exact[6].real
    )  # cm^-1: six motions of the whole molecule, then the internal ones
    atoms.set_constraint(FixAtoms([0, 1]))
    held = atoms.calc.get_vibrations(atoms)
    assert len(held.get_frequencies()) == 3 * (len(atoms) - 2)
    np.testing.assert_array_equal(held.get_mask(), [False, False, True, True, True, True])


def test_frequencies_away_from_a_minimum_warn(shared):
    with pytest.warns(UserWarning, match="not at a minimum"):
        shared("tiny", "float64").get_vibrations(random_molecule(4, seed=3))

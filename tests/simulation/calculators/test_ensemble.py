"""Tests for ensembles: agreement with their members, and one program for all of them."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_stress

from mlip_jax import EnsembleCalculator
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from tests.simulation.structures import crystal, random_molecule
from tests.tasks.property_runs import write_force_field

NAMES = ("energy", "energies", "forces")


@pytest.fixture(scope="module")
def members(make_potential):
    """Two members of one architecture with one of another between them.

    Their energy scales and reference energies differ.
    """
    second = dataclasses.replace(make_potential("tiny", 2), energy_scale=0.6)
    return make_potential("tiny", 1), make_potential("painn"), second


@pytest.fixture(scope="module")
def ensemble(members):
    return EnsembleCalculator(members, "float64")


@pytest.fixture(scope="module")
def single_calculators(members):
    return [MLIPCalculator(member, "float64") for member in members]


def test_mean_and_standard_deviation(ensemble, single_calculators):
    atoms = random_molecule(6, seed=3)
    atoms.calc = ensemble
    for name in NAMES:
        values = np.array(
            [calculator.get_property(name, atoms) for calculator in single_calculators]
        )
        scale = np.abs(values).max()
        np.testing.assert_allclose(
            ensemble.get_property(name, atoms), values.mean(0), rtol=0, atol=1e-12 * scale
        )
        np.testing.assert_allclose(
            ensemble.results[f"{name}_std"], values.std(0, ddof=1), rtol=0, atol=1e-11 * scale
        )
    assert (
        isinstance(ensemble.results["energy_std"], float)
        and atoms.get_potential_energy(True) == atoms.calc.results["energy"]
    )
    assert ensemble.results["forces_std"].shape == (6, 3)
    assert set(ensemble.export_properties()) >= {"energy", "forces"}


def test_one_program_for_all_members(members):
    ensemble = EnsembleCalculator(members)
    for seed in range(3):
        ensemble.get_property("forces", random_molecule(6, seed))
    assert ensemble.num_compiles == 1
    assert [group.indices for group in ensemble.groups] == [(0, 2), (1,)]


def test_stress(ensemble):
    atoms = crystal(3.0)
    atoms.calc = ensemble
    np.testing.assert_allclose(
        atoms.get_stress(), calculate_numerical_stress(atoms, 1e-4), rtol=1e-5, atol=1e-7
    )
    assert ensemble.get_property("stress_std", atoms).shape == (6,)
    assert (ensemble.get_property("stress_std", atoms) > 0).all()
    with pytest.raises(PropertyNotImplementedError):
        ensemble.get_property("stress_std", molecule("H2O"))


def test_hessian_is_the_mean_over_members(ensemble):
    atoms, forces = random_molecule(6, seed=3), []
    for step in (-1e-4, 1e-4):
        moved = atoms.copy()
        moved.positions[2, 1] += step
        forces.append(ensemble.get_property("forces", moved).ravel())
    column = (forces[0] - forces[1]) / 2e-4
    np.testing.assert_allclose(
        ensemble.get_hessian(atoms)[:, 7], column, rtol=0, atol=1e-6 * np.abs(column).max()
    )


def test_copies(ensemble):
    atoms = random_molecule(6, seed=3)
    expected = ensemble.get_property("forces_std", atoms)
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        np.testing.assert_array_equal(other.get_property("forces_std", atoms), expected)
        assert other.num_compiles == 0  # results are copied, too


def test_from_workdirs(tmp_path):
    for seed in (0, 1):
        write_force_field(tmp_path / f"ff-{seed}", seed)
    ensemble = EnsembleCalculator.from_workdirs([tmp_path / "ff-0", tmp_path / "ff-1"])
    assert [p.digest() for p in ensemble.potentials] == [
        Potential.load(tmp_path / f"ff-{n}").digest() for n in (0, 1)
    ]
    assert {"energy_std", "forces_std", "stress_std"} < set(ensemble.implemented_properties)
    assert ensemble.num_compiles == 0


def test_errors(members, tmp_path):
    with pytest.raises(ValueError, match="at least two force fields, received 1"):
        EnsembleCalculator(members[:1])
    with pytest.raises(ValueError, match="same cutoff.*4.0.*3.5"):
        EnsembleCalculator([members[0], dataclasses.replace(members[1], cutoff=3.5)])
    with pytest.raises(ValueError, match="list of workdirs"):
        EnsembleCalculator.from_workdirs(tmp_path)
    limited = dataclasses.replace(members[1], elements=(1, 6))
    with pytest.raises(ValueError, match="not trained on O"):
        EnsembleCalculator([members[0], limited]).get_property("energy", molecule("H2O"))
    broken = dataclasses.replace(
        members[2], params=jax.tree.map(lambda leaf: leaf * np.nan, members[2].params)
    )
    with pytest.raises(CalculationFailed, match="NaN"):
        EnsembleCalculator([members[0], broken]).get_property("energy", molecule("H2O"))


def test_charges_that_a_member_was_not_trained_on(members):
    known = [
        dataclasses.replace(m, metadata={"statistics": {"charges": c}})
        for m, c in zip(members[:2], ([-1.0, 0.0], [0.0]))
    ]
    ion = molecule("H2O")
    ion.info["charge"] = -1
    with pytest.warns(UserWarning, match="whose total charge is 0"):
        EnsembleCalculator(known).get_property("energy", ion)

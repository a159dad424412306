"""Tests for the calculator in use: ASE's conventions, threads, processes, copies, cells of any
size.
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.calculator import CalculatorSetupError, PropertyNotImplementedError

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.importers import parameters
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from tests.simulation.structures import crystal, random_molecule


@pytest.fixture(scope="module")
def calculator(make_potential):
    return MLIPCalculator(make_potential("tiny"), "float64")


def test_conventions_of_get_property(calculator):
    atoms = random_molecule(6)
    calculator.reset()
    with pytest.raises(CalculatorSetupError, match="requires atoms"):
        calculator.get_property("energy")
    assert calculator.get_property("energy", atoms, allow_calculation=False) is None
    energy = calculator.get_property("energy", atoms)
    assert calculator.get_property("energy", atoms, allow_calculation=False) == energy
    assert calculator.get_property("energy") == energy
    assert not calculator.calculation_required(atoms, ["energy", "forces"])
    assert set(calculator.export_properties()) >= {"energy", "free_energy", "forces", "energies"}
    for name in ("magmoms", "charges", "hessian", "stresses"):
        for given in (atoms, None):
            with pytest.raises(PropertyNotImplementedError):
                calculator.get_property(name, given)
    atoms.positions[0, 0] += 0.1
    assert calculator.calculation_required(atoms, ["energy"])
    assert calculator.get_property("forces", atoms, allow_calculation=False) is None
    assert calculator.todict() == {} and calculator.name == "mlipcalculator"


def test_created_from_text(make_potential, tmp_path):
    """As created by programs that can pass only text."""
    folder = parameters.save(make_potential("tiny"), tmp_path / "ff")
    created = MLIPCalculator(f"parameters:{folder}", "float64")
    assert (
        created.potential.digest()
        == MLIPCalculator(make_potential("tiny"), "float64").potential.digest()
    )
    with pytest.raises(CheckpointError, match="no such directory"):
        MLIPCalculator(tmp_path / "nothing")


def test_number_of_atoms_that_changes(calculator):
    atoms = random_molecule(7, seed=2)
    atoms.calc = calculator
    assert atoms.get_forces().shape == (7, 3)
    whole = atoms.get_potential_energy()
    taken = atoms.pop(3)
    assert atoms.get_forces().shape == (6, 3) and atoms.get_potential_energies().shape == (6,)
    atoms.append(taken)
    assert atoms.get_potential_energy() == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True)])
def test_cell_smaller_than_the_cutoff_is_its_supercell(calculator, pbc):
    atoms = crystal(3.0)  # the cutoff is 4 Å
    atoms.pbc = pbc
    repeats = 1 + np.array(pbc)
    large, times = atoms.repeat(repeats), repeats.prod()
    atoms.calc = large.calc = calculator
    assert large.get_potential_energy() == pytest.approx(
        times * atoms.get_potential_energy(), abs=1e-8
    )
    np.testing.assert_allclose(
        large.get_forces(), np.tile(atoms.get_forces(), (times, 1)), atol=1e-9
    )
    if all(pbc):
        np.testing.assert_allclose(large.get_stress(), atoms.get_stress(), atol=1e-10)


def test_several_threads(calculator):
    """Each thread has its own atoms, and all share the calculator."""
    structures = [random_molecule(6, seed) for seed in range(6)]
    expected = [calculator.get_property("forces", atoms) for atoms in structures]
    before = calculator.num_compiles

    def work(n):
        for _ in range(20):
            atoms = structures[n].copy()
            atoms.calc = calculator
            np.testing.assert_array_equal(atoms.get_forces(), expected[n])
            assert np.isfinite(atoms.get_potential_energy())
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert calculator.num_compiles == before


def test_spawned_process(calculator):
    atoms = random_molecule(6)
    expected = calculator.get_property("forces", atoms)
    calculator.get_property(
        "energy", random_molecule(6, seed=1)
    )  # so that the worker has to compute
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        forces = pool.apply(calculator.get_property, ("forces", atoms))
    np.testing.assert_allclose(
        forces, expected, rtol=0, atol=1e-13
    )  # the worker compiles its own program


def test_a_shallow_copy_is_independent(calculator):
    atoms, other = random_molecule(6), molecule("H2O")
    energy = calculator.get_property("energy", atoms)
    twin = copy.copy(calculator)
    assert twin.get_property("energy", other) != energy
    assert calculator.get_property("energy", atoms, allow_calculation=False) == energy


def test_float64_next_to_a_program_in_float32(make_potential):
    """In a process where x64 is off and stays off.

    Positions differ by less than float32 can resolve.
    """
    code = """
import jax, numpy as np, sys, pickle
calculator, atoms = pickle.load(sys.stdin.buffer)
energies = []
for _ in range(2):
    energies.append(calculator.get_property("energy", atoms))
    atoms.positions[0, 0] += 1e-9
slope = (energies[1] - energies[0]) / 1e-9
assert abs(slope + calculator.get_property("forces", atoms)[0, 0]) < 1e-2, slope
assert jax.numpy.zeros(1).dtype == np.float32
"""
    # reference energies would take the digits of the difference
    potential = dataclasses.replace(make_potential("tiny"), reference_energies=np.zeros(119))
    calculator = MLIPCalculator(potential, "float64")
    subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((calculator, random_molecule(6))),
        check=True,
    )

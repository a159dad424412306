"""Tests for the ASE calculator.

They compare it with direct evaluation, finite differences and invariances, and count compilations.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import pickle
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.test import gradient_test
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation

from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.neighbors import neighbor_list
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import evaluate
from mlip_jax.simulation.calculators import compiled
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.dynamics.velocities import maxwell_boltzmann
from mlip_jax.structure import from_ase
from tests.simulation.structures import crystal, random_molecule


@pytest.fixture(scope="module")
def shared(make_potential):
    """Function shared(kind, dtype) that returns a calculator used by many tests, compiled once."""
    return functools.cache(lambda kind, dtype: MLIPCalculator(make_potential(kind), dtype))


@pytest.fixture(scope="module")
def tiny32(shared):
    return shared("tiny", "float32")


@pytest.fixture(scope="module")
def tiny64(shared):
    return shared("tiny", "float64")


def directly(potential, atoms, dtype):
    """Return (energy, atomic energies, forces) from a batch of exactly this structure.

    Reference energies are added.
    """
    structure = from_ase(atoms)
    columns = Columns.from_structures([structure])
    edges = len(neighbor_list(structure.positions, potential.cutoff).senders)
    batch = build_batch(
        columns, PaddingBudget(len(atoms) + 1, edges + 2, 2), potential.cutoff, dtype=dtype
    )
    with jax.enable_x64(dtype == np.float64):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), potential.params)
        function = jax.jit(lambda p, g: evaluate(potential.model, p, g, potential.energy_scale))
        out = jax.device_get(function(params, batch))
    reference = potential.reference_energies[atoms.numbers]
    n = len(atoms)
    return reference.sum() + float(out.energy[0]), reference + out.energies[:n], out.forces[:n]


@pytest.mark.parametrize("kind", [pytest.param("so3krates", marks=pytest.mark.slow), "painn"])
def test_agrees_with_direct_evaluation(make_potential, shared, kind):
    potential = make_potential(kind)
    atoms = random_molecule(7)
    energy, energies, forces = directly(potential, atoms, np.float64)
    for dtype, tolerance in (("float64", 1e-10), ("float32", 2e-4)):
        atoms.calc = shared(kind, dtype)
        scale = np.abs(forces).max()
        np.testing.assert_allclose(atoms.get_forces(), forces, rtol=0, atol=tolerance * scale)
        assert atoms.get_potential_energy() == pytest.approx(
            energy, rel=1e-14, abs=tolerance * scale
        )
        np.testing.assert_allclose(
            atoms.get_potential_energies(), energies, rtol=1e-14, atol=tolerance * scale
        )
        assert atoms.get_forces().dtype == atoms.get_potential_energies().dtype == np.float64
        assert atoms.get_potential_energies().sum() == pytest.approx(
            atoms.get_potential_energy(), abs=1e-9
        )
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert not jax.config.jax_enable_x64


def test_float32_is_independent_of_the_global_flag(tiny32, make_potential):
    atoms = random_molecule(11)
    expected = tiny32.get_property("forces", atoms)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            MLIPCalculator(make_potential("tiny")).get_property("forces", atoms), expected
        )


@pytest.mark.parametrize("kind", [pytest.param("so3krates", marks=pytest.mark.slow), "painn"])
def test_forces_are_the_gradient(shared, kind, capsys):
    atoms = random_molecule(7, seed=3)
    atoms.calc = shared(kind, "float64")
    numerical = calculate_numerical_forces(atoms, 1e-4)
    np.testing.assert_allclose(atoms.get_forces(), numerical, rtol=1e-5, atol=2e-6)
    gradient_test(atoms, [0, 3])
    differences = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert min(differences) < 2e-6


@pytest.mark.parametrize("size", [3.0, 9.5])
def test_stress_is_the_strain_derivative(tiny64, size):
    atoms = crystal(size)
    if size > tiny64.potential.cutoff:  # some pairs within the cutoff, through the walls too
        atoms.positions *= 0.4
        atoms.positions[1] += atoms.cell[0] * 0.8
    atoms.calc = tiny64
    numerical = calculate_numerical_stress(atoms, 1e-4)
    assert np.abs(numerical).max() > 1e-4
    np.testing.assert_allclose(
        atoms.get_stress(), numerical, rtol=1e-5, atol=1e-6 * np.abs(numerical).max()
    )
    np.testing.assert_allclose(
        atoms.get_forces(), calculate_numerical_forces(atoms, 1e-4), rtol=1e-5, atol=2e-6
    )


def test_stress_in_float32(tiny32, tiny64):
    atoms = crystal(3.0)
    np.testing.assert_allclose(
        tiny32.get_property("stress", atoms),
        tiny64.get_property("stress", atoms),
        rtol=1e-3,
        atol=1e-5,
    )


def test_rotation_of_cell_and_positions(tiny64):
    atoms = crystal(3.0)
    rotation = Rotation.random(random_state=1).as_matrix()
    rotated = atoms.copy()
    rotated.set_cell(atoms.cell.array @ rotation.T)
    rotated.positions = atoms.positions @ rotation.T
    atoms.calc = tiny64
    energy, forces, stress = (
        atoms.get_potential_energy(),
        atoms.get_forces(),
        atoms.get_stress(voigt=False),
    )
    rotated.calc = tiny64
    assert rotated.get_potential_energy() == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(rotated.get_forces(), forces @ rotation.T, atol=1e-10)
    np.testing.assert_allclose(
        rotated.get_stress(voigt=False), rotation @ stress @ rotation.T, atol=1e-10
    )


def test_stress_of_a_left_handed_cell(tiny64):
    """A signed volume would flip the stress; the order of the vectors must not matter."""
    atoms = crystal(3.0)
    other = atoms.copy()
    other.set_cell(atoms.cell.array[[1, 0, 2]])
    assert atoms.cell.handedness == -other.cell.handedness
    np.testing.assert_allclose(
        tiny64.get_property("stress", other), tiny64.get_property("stress", atoms), atol=1e-10
    )


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True)])
def test_lattice_translations_change_nothing(tiny32, tiny64, pbc):
    atoms = crystal(3.0)
    atoms.pbc = pbc
    moved = atoms.copy()
    moved.positions += np.array([[0, 0, 0], [7, 0, -3], [-1, 0, 2], [500, 0, 0]]) @ atoms.cell.array
    for calculator, tolerance in ((tiny64, 1e-9), (tiny32, 1e-4)):
        expected = (
            calculator.get_property("energy", atoms),
            calculator.get_property("forces", atoms),
        )
        assert calculator.get_property("energy", moved) == pytest.approx(expected[0], abs=tolerance)
        np.testing.assert_allclose(
            calculator.get_property("forces", moved), expected[1], atol=tolerance
        )


def test_translation_in_float32(tiny32):
    atoms = random_molecule(11)
    expected = tiny32.get_property("forces", atoms)
    atoms.positions += 1e4
    np.testing.assert_allclose(tiny32.get_property("forces", atoms), expected, atol=1e-5)


def test_stress_of_a_molecule(tiny32):
    atoms = molecule("CH3OH")
    with pytest.raises(PropertyNotImplementedError, match="periodic in all three directions"):
        tiny32.get_property("stress", atoms)
    assert np.isfinite(tiny32.get_property("energy", atoms))
    slab = crystal(3.0)
    slab.pbc = (True, True, False)
    with pytest.raises(PropertyNotImplementedError, match="all three"):
        tiny32.get_property("stress", slab)


def test_compiles_rarely_for_molecules_of_changing_size(make_potential):
    calculator = MLIPCalculator(make_potential("tiny"))
    sizes = np.random.default_rng(1).integers(8, 40, 30)
    for seed, n in enumerate(sizes):
        calculator.get_property("forces", random_molecule(n, seed))
    assert 1 <= calculator.num_compiles <= 6
    before = calculator.num_compiles
    for seed, n in enumerate(sizes):
        calculator.get_property("forces", random_molecule(n, seed))
    assert calculator.num_compiles == before


def test_compiles_once_while_the_number_of_edges_changes(make_potential):
    calculator = MLIPCalculator(make_potential("tiny"))
    atoms = random_molecule(30, spread=2.2)
    start, rng, edges = atoms.positions.copy(), np.random.default_rng(0), set()
    for _ in range(200):
        atoms.positions = start + rng.normal(0, 0.1, start.shape)
        edges.add(len(neighbor_list(atoms.positions, calculator.potential.cutoff).senders))
        calculator.get_property("forces", atoms)
    assert len(edges) > 5
    assert calculator.num_compiles == 1


def test_calculates_only_when_something_changed(tiny32, monkeypatch):
    calls = []
    run = tiny32.compiled.run
    monkeypatch.setattr(tiny32.compiled, "run", lambda *args: calls.append(1) or run(*args))
    atoms = random_molecule(11, seed=5)
    atoms.calc = tiny32
    forces = atoms.get_forces()
    atoms.get_potential_energy()
    atoms.get_potential_energies()
    atoms.set_tags(np.ones(11))
    atoms.get_forces()
    assert len(calls) == 1
    forces[:] = 0.0
    assert (
        np.abs(atoms.get_forces()).max() > 0
    )  # results must be copies that the caller cannot change
    atoms.positions[0] += 0.01
    atoms.get_forces()
    atoms.set_atomic_numbers(atoms.numbers[::-1])
    atoms.get_forces()
    assert len(calls) == 3
    tiny32.calculate(atoms, ["energy"], [])
    assert len(calls) == 3


def test_change_of_charge_is_a_change(tiny32):
    atoms = molecule("CH3OH")
    atoms.calc = tiny32
    atoms.get_potential_energy()
    assert tiny32.check_state(atoms) == []
    atoms.info["charge"] = 1
    assert "charge" in tiny32.check_state(atoms)


def test_failed_calculation_leaves_nothing_stale(tiny32):
    atoms = random_molecule(11)
    energy = tiny32.get_property("energy", atoms)
    broken = atoms.copy()
    broken.positions[3, 1] = np.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN or infinite.*atom 3"):
            tiny32.get_property("energy", broken)
    assert tiny32.get_property("energy", atoms) == energy


def test_errors_state_the_cause(tiny32, make_potential):
    with pytest.raises(ValueError, match="not trained on Si"):
        tiny32.get_property("energy", molecule("SiH4"))
    with pytest.raises(ValueError, match="no atoms"):
        tiny32.get_property("energy", Atoms())
    with pytest.raises(ValueError, match="float16"):
        MLIPCalculator(tiny32.potential, "float16")
    with pytest.raises(CalculationFailed, match="atoms 0 and 1 have the same position"):
        tiny32.get_property("energy", Atoms("HOH", [[0, 0, 0], [0, 0, 0], [0, 0, 1.0]]))
    broken = jax.tree.map(lambda leaf: leaf * np.nan, tiny32.potential.params)
    with pytest.raises(CalculationFailed, match="NaN"):
        MLIPCalculator(dataclasses.replace(tiny32.potential, params=broken)).get_property(
            "energy", molecule("H2O")
        )


def test_single_atom(tiny32, tiny64):
    atom = Atoms("O", [[3.0, -2.0, 1.0]])
    for calculator in (tiny32, tiny64):
        assert (calculator.get_property("forces", atom) == 0).all()
        assert (
            calculator.get_property("energy", atom) == calculator.get_property("energies", atom)[0]
        )
    assert tiny32.get_property("energy", atom) == pytest.approx(
        tiny64.get_property("energy", atom), abs=1e-5
    )


def test_atoms_far_apart(tiny64):
    pair = Atoms("OC", [[0.0, 0, 0], [0, 0, 50.0]])
    apart = sum(tiny64.get_property("energy", Atoms(s)) for s in "OC")
    assert tiny64.get_property("energy", pair) == pytest.approx(apart, abs=1e-9)
    assert (tiny64.get_property("forces", pair) == 0).all()


@pytest.mark.parametrize(
    "statistics, warns",
    [
        ({}, True),
        ({"charges": []}, True),
        ({"charges": [0.0]}, True),
        ({"charges": [-1.0, 0.0]}, False),
        ({"charges": None}, False),
    ],
)
def test_charge_that_was_not_trained_on(make_potential, tiny32, statistics, warns):
    calculator = MLIPCalculator(
        dataclasses.replace(make_potential("tiny"), metadata={"statistics": statistics})
    )
    # nothing is compiled for a warning
    calculator.compiled.run = tiny32.compiled.run
    ion = molecule("CH3OH")
    ion.info["charge"] = -1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(
            "always", UserWarning
        )  # ASE sets shapes of arrays, which NumPy 2.5 deprecates
        for _ in range(2):
            calculator.get_property("energy", ion)
            ion.positions += 0.1
    assert len(caught) == warns  # once, not at each call
    assert not warns or "atoms.info['charge'] is -1" in str(caught[0].message)


def test_copies_and_pickles(make_potential):
    calculator = MLIPCalculator(make_potential("tiny"))
    atoms = random_molecule(11)
    energy = calculator.get_property("energy", atoms)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(other.potential.params))
        assert other.num_compiles == 0
        assert other.get_property("energy", atoms) == energy  # results are copied, too
        other.reset()
        assert other.get_property("energy", atoms) == energy
        assert other.num_compiles == 1
    assert calculator.num_compiles == 1


def test_calculators_of_equal_models_share_their_programs(make_potential, caplog):
    """Detects a calculator per molecule that compiles the same program each time."""
    atoms, compiles, energies = random_molecule(11), [], []
    for seed in (0, 1):
        with caplog.at_level(logging.INFO, compiled.__name__):
            energies.append(
                MLIPCalculator(make_potential("tiny", seed)).get_potential_energy(atoms)
            )
        compiles.append(caplog.text.count("compiling energies"))
    assert compiles[0] == compiles[1] and abs(energies[0] - energies[1]) > 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_relaxation(morse_potential, dtype):
    atoms = molecule("CH3OH")
    ideal = atoms.get_all_distances()
    atoms.rattle(0.05, seed=1)
    atoms.calc = MLIPCalculator(morse_potential, dtype)
    start = atoms.get_potential_energy()
    assert BFGS(atoms, logfile=None).run(fmax=0.05, steps=100)
    assert atoms.get_potential_energy() < start
    assert np.abs(atoms.get_all_distances() - ideal).max() < 0.1
    assert atoms.calc.num_compiles == 1


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("float64", 5e-4)])
def test_dynamics_conserves_energy(morse_potential, dtype, tolerance):
    """Drift of the total energy over 200 fs from 300 K, in eV per atom."""
    atoms = molecule("CH3OH")
    atoms.calc = MLIPCalculator(morse_potential, dtype)
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=100)
    atoms.set_momenta(maxwell_boltzmann(atoms.get_masses(), 300, np.random.default_rng(0)))
    dynamics = VelocityVerlet(atoms, timestep=0.25 * units.fs)
    energies = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()), interval=1)
    dynamics.run(800)
    energies = np.array(energies) / len(atoms)
    assert abs(energies[-100:].mean() - energies[:100].mean()) < tolerance
    assert np.ptp(energies) < 5 * tolerance
    assert atoms.calc.num_compiles == 1


def test_from_workdir(tmp_path, make_potential, tiny32):
    potential = make_potential("tiny")
    metadata = {
        "statistics": {
            "cutoff": potential.cutoff,
            "reference_energies": potential.reference_energies.tolist(),
            "energy_scale": potential.energy_scale,
            "elements": list(potential.elements),
        },
        "config": {
            "model": {
                "name": "schnet",
                "options": {
                    "num_features": 16,
                    "num_layers": 1,
                    "cutoff": potential.cutoff,
                    "zero_init": False,
                },
            }
        },
    }
    store = CheckpointStore(tmp_path / "best")
    store.save(7, {"params": potential.params}, metadata)
    store.close()
    atoms = molecule("CH3OH")
    loaded = MLIPCalculator.from_workdir(tmp_path)
    assert loaded.get_property("energy", atoms) == pytest.approx(
        tiny32.get_property("energy", atoms), abs=1e-6
    )


def test_importing_the_package_is_cheap():
    code = (
        "import sys, mlip_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules; "
        "assert {'MLIPCalculator', 'Potential', 'Structure'} <= set(dir(mlip_jax)); "
        "assert not hasattr(mlip_jax, 'nothing'); from mlip_jax import MLIPCalculator, Potential, Structure, "
        "__version__; assert MLIPCalculator.__name__ == 'MLIPCalculator' and __version__ == '0.1.0'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Tests for equations of state and phonons against exact and independent results."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.eos import EquationOfState as AseEquationOfState
from ase.units import GPa, _amu, _e

from mlip_jax import MLIPCalculator
from mlip_jax.models.allegro import Model as Allegro
from mlip_jax.models.schnet import Model as Schnet
from mlip_jax.potential import Potential
from mlip_jax.simulation.crystals.analysis import (
    CrystalOptions,
    _complete,
    crystal_properties,
    scale_volume,
)
from mlip_jax.simulation.crystals.equation_of_state import fit_equation_of_state
from mlip_jax.simulation.crystals.phonons import (
    compute_force_constants,
    heat_capacity,
    interaction_range,
    supercell_repeats,
    supercell_spacing,
    zero_point_energy,
)
from mlip_jax.simulation.relaxation.result import Relaxation
from mlip_jax.terms import WithTerms
from tests.simulation.analytic import pairwise


def test_the_equation_of_state_is_that_of_ase():
    volumes = np.linspace(36, 44, 7)
    energies = -3.0 + 0.02 * (volumes - 40.3) ** 2 - 0.0006 * (volumes - 40.3) ** 3
    ours = fit_equation_of_state(volumes, energies)
    theirs = AseEquationOfState(volumes, energies, eos="birchmurnaghan")
    volume, energy, modulus = theirs.fit()
    assert ours.volume == pytest.approx(volume, rel=1e-6)
    assert ours.energy == pytest.approx(energy, abs=1e-7)
    assert ours.bulk_modulus == pytest.approx(modulus / GPa, rel=1e-4)
    assert ours.derivative == pytest.approx(theirs.eos_parameters[2], rel=1e-3)
    np.testing.assert_allclose(ours.energies(volumes), energies, atol=3 * ours.residual + 1e-9)
    with pytest.raises(ValueError, match="no minimum"):
        fit_equation_of_state(volumes, volumes)
    with pytest.raises(ValueError, match="requires 5"):
        fit_equation_of_state(volumes, [0, 1, np.nan, np.nan, np.nan, 2, 1])


@pytest.mark.slow
def test_phonons_of_springs_between_neighbors():
    """A cube of springs at rest: ω² = 4 k / m sin²(q / 2) along q, zero across."""
    potential = pairwise("harmonic", length=3.0, stiffness=20.0, cutoff=3.5)
    atoms = Atoms("Ar", cell=[3.0, 3.0, 3.0], pbc=True)
    repeats = supercell_repeats(atoms, 8.5)
    assert repeats == (3, 3, 3)
    calculator = MLIPCalculator(potential, dtype="float64")
    constants = compute_force_constants(atoms, calculator, repeats)
    fractions = np.array([0.0, 0.1, 0.37, 0.5])
    found = constants.frequencies(fractions[:, None] * [1, 0, 0])
    rate = np.sqrt(4 * 20.0 * _e * 1e20 / (atoms.get_masses()[0] * _amu)) / (2e12 * np.pi)
    np.testing.assert_allclose(found[:, 2], rate * np.sin(np.pi * fractions), atol=1e-6)
    np.testing.assert_allclose(found[:, :2], 0, atol=1e-5)
    # k_B per mode if hot, half a quantum per mode
    assert heat_capacity(found, 1e5) == pytest.approx(12, rel=1e-3)
    assert heat_capacity(np.full(3, 40.0), 10.0) < 1e-9
    assert zero_point_energy(np.array([1.0, -5.0])) == pytest.approx(0.5 * 4.135667e-3, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*total charge")
def test_phonons_do_not_depend_on_the_cells_of_the_atoms():
    """Detects pairs at other images than the nearest ones, and a supercell with one cell's charge."""
    potential = pairwise("harmonic", length=3.0, stiffness=20.0, cutoff=3.5)
    atoms = Atoms("Ar2", [[0, 0, 0], [3.0, 0, 0]], cell=[6.0, 3.0, 3.0], pbc=True)
    atoms.info["charge"] = 1
    calculator, charges = MLIPCalculator(potential, dtype="float64"), []
    columns = calculator.get_hessian_columns
    calculator.get_hessian_columns = lambda a, n: charges.append(a.info["charge"]) or columns(a, n)
    moved = atoms.copy()
    moved.positions[1] += 4 * atoms.cell[0]
    found = [
        compute_force_constants(a, calculator, (2, 1, 1)).frequencies([[0.3, 0, 0]])
        for a in (atoms, moved)
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    assert charges == [2, 2]


def test_a_short_supercell_is_reported():
    """Message passing reaches further than the default supercell, which used to be silent."""
    model = Schnet(num_layers=3)
    potential = Potential(model, {}, 5.0, np.zeros(119), 1.0, (18,))
    assert interaction_range(potential) == 15.0
    local = dataclasses.replace(potential, model=WithTerms(Allegro(num_layers=3), ()))
    assert interaction_range(local) == 5.0
    atoms = bulk("Ar", "sc", a=2.9)
    assert supercell_spacing(atoms, supercell_repeats(atoms, 9.0)) == pytest.approx(4 * 2.9)
    # a relaxed crystal with the Hessian of springs
    spring = pairwise("harmonic", length=3.0, stiffness=20.0, cutoff=3.5)
    atoms = Atoms("Ar", cell=[3.0, 3.0, 3.0], pbc=True)
    relaxed, options = Relaxation(atoms, "converged"), CrystalOptions(num_volumes=0, mesh=1)
    calculator = SimpleNamespace(
        potential=spring, get_hessian_columns=lambda cell, n: np.zeros((3 * n, 3 * len(cell)))
    )
    for length, remark in ((7.5, ""), (6.0, "are 6.0 Å apart, but atoms interact up to 3.5 Å")):
        settings = dataclasses.replace(options, supercell_length=length)
        result = _complete(relaxed, np.ones(0), [], calculator, settings)
        assert remark in result.remark and bool(remark) == bool(result.remark)
        assert result.supercell == (int(length / 3 + 0.9),) * 3
        assert result.supercell_spacing == 3 * result.supercell[0]


def test_supercells_of_ewald_sums():
    """The range was infinite, and a supercell with too many vectors ended the whole run."""
    options = (("cutoff", 6.0), ("k_vectors", 100), ("method", "ewald"))
    model = WithTerms(Schnet(num_layers=1, cutoff=5.0), (("electrostatics", options),))
    potential = Potential(model, {}, 5.0, np.zeros(119), 1.0, (18,))
    assert interaction_range(potential) == 6.0
    relaxed = Relaxation(Atoms("Ar", cell=[3.0, 3.0, 3.0], pbc=True), "converged")
    settings = CrystalOptions(num_volumes=0, mesh=1, supercell_length=12.0)
    result = _complete(relaxed, np.ones(0), [], SimpleNamespace(potential=potential), settings)
    assert "no phonons in a supercell of 4 × 4 × 4 cells" in result.remark
    assert "Increase k_vectors" in result.remark and result.bands is None and not result.reason


def test_crystals_at_the_step_limit_are_reported():
    """Detects a bulk modulus of a crystal that is not at a minimum and has no remark.

    The disturbed crystal keeps its refined space group: all vectors between neighbors are equal.
    """
    pytest.importorskip("spglib", reason="spglib determines space groups (extra crystals)")
    potential = pairwise(depth=0.1, length=2.4, cutoff=4.6)
    start = bulk("Ar", "sc", a=2.9).repeat((1, 1, 2))
    start.positions[1, 2] += 0.01
    (result,) = crystal_properties(
        start, potential, max_steps=1, num_volumes=0, supercell_length=0, symprec=0.05
    )
    assert "not relaxed" in result.remark and not result.reason
    np.testing.assert_allclose(np.diff(result.atoms.positions, axis=0)[0], result.atoms.cell[2] / 2)
    scaled = scale_volume(result.atoms, 1.3)
    assert scaled.constraints and scaled.cell.volume == pytest.approx(
        1.3 * result.atoms.cell.volume
    )
    with pytest.raises(ValueError, match="symprec must be positive"):
        CrystalOptions(symprec=-0.1)


@pytest.mark.slow
def test_properties_of_a_crystal():
    """Argon-like fcc crystal: bulk modulus from pressures, stable phonons, reasons for others."""
    potential = pairwise(depth=0.1, length=2.4, cutoff=4.6)
    start = bulk("Ar", "fcc", a=3.9)
    molecule = Atoms("Ar2", [[0, 0, 0], [0, 0, 2.7]])
    result, failed = crystal_properties([start, molecule], potential, supercell_length=9.3, mesh=4)
    assert "not periodic" in failed.reason and result.reason == result.remark == ""
    pressures, volumes = [], result.atoms.cell.volume * np.array([0.995, 1.005])
    for volume in volumes:
        atoms = result.atoms.copy()
        atoms.calc = MLIPCalculator(potential, dtype="float64")
        atoms.set_cell(atoms.cell * (volume / atoms.cell.volume) ** (1 / 3), scale_atoms=True)
        pressures.append(-atoms.get_stress()[:3].mean() / GPa)
    expected = -result.atoms.cell.volume * np.diff(pressures)[0] / np.diff(volumes)[0]
    assert result.eos.bulk_modulus == pytest.approx(expected, rel=0.02)
    assert result.eos.volume == pytest.approx(result.atoms.cell.volume, rel=1e-3)
    assert result.lowest_frequency > -0.1 and result.zero_point_energy > 0
    assert [label for _, label in result.bands.ticks][0] == "G"

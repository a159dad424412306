"""Tests for vibrational analysis: counts of modes, known frequencies, ASE's vibrations, symmetry."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.io import read
from ase.vibrations import Vibrations
from scipy import constants

from mlip_jax import MLIPCalculator
from mlip_jax.simulation.vibrations.analysis import vibrations
from mlip_jax.simulation.vibrations.normal_modes import normal_modes, rotational_symmetry_number
from tests.simulation import analytic
from tests.simulation.analytic import pairwise

STIFFNESS = 20.0


def symmetry_number(name):
    atoms = molecule(name)
    return rotational_symmetry_number(atoms.numbers, atoms.positions, atoms.get_masses())


def spring_hessian(atoms, bend=5.0):
    """Return the Hessian (eV/Å²) of springs between all pairs at rest at these positions."""
    n = len(atoms)
    hessian = np.zeros((n, 3, n, 3))
    for i in range(n):
        for j in range(i):
            unit = atoms.positions[i] - atoms.positions[j]
            unit = unit / np.linalg.norm(unit)
            block = bend * np.outer(unit, unit)
            hessian[i, :, i] += block
            hessian[j, :, j] += block
            hessian[i, :, j] -= block
            hessian[j, :, i] -= block
    return hessian.reshape(3 * n, 3 * n)


@pytest.mark.parametrize(("name", "count", "linear"), [("H2O", 3, False), ("CO2", 4, True)])
def test_translations_and_rotations_are_removed(name, count, linear):
    atoms = molecule(name)
    atoms.rotate(37.0, (1, 2, 3))
    modes = normal_modes(spring_hessian(atoms), atoms.positions, atoms.get_masses())
    assert len(modes.frequencies) == count and modes.linear == linear
    # no net momentum and no net angular momentum
    momenta = modes.displacements * atoms.get_masses()[:, None]
    np.testing.assert_allclose(momenta.sum(1), 0.0, atol=1e-10)
    spin = np.cross(atoms.positions - atoms.get_center_of_mass(), momenta).sum(1)
    np.testing.assert_allclose(spin, 0.0, atol=1e-10)


def test_diatomic_and_its_isotope():
    potential = pairwise("harmonic", length=0.74, stiffness=STIFFNESS)
    pair = Atoms("H2", [[0, 0, 0], [0, 0, 0.9]])
    for mass in (1.008, 2.0141):
        (result,) = vibrations(pair, potential, isotopes={"H": mass})
        omega = np.sqrt(STIFFNESS * 2 / mass * constants.eV / constants.atomic_mass) * 1e10
        exact = omega * constants.hbar / constants.eV / units.invcm
        assert result.frequencies == pytest.approx([exact], rel=1e-6)
        assert result.reduced_masses == pytest.approx([mass], rel=1e-6)  # norm 1: two atoms move
        thermo = result.thermochemistry
        assert thermo.zero_point_energy == pytest.approx(exact * units.invcm / 2)
        assert thermo.symmetry_number == 2 and result.num_imaginary == 0
        assert thermo.free_energy == pytest.approx(thermo.enthalpy - 298.15 * thermo.entropy)


def test_equals_vibrations_of_ase(morse_potential, tmp_path):
    (result,) = vibrations("CO", morse_potential)
    atoms = result.atoms.copy()
    atoms.calc = MLIPCalculator(morse_potential, "float64")
    numeric = Vibrations(atoms, name=str(tmp_path / "vib"), delta=0.002, nfree=4)
    numeric.run()
    assert len(result.frequencies) == 12 and result.fmax < 1e-4
    np.testing.assert_allclose(
        result.frequencies, numeric.get_frequencies().real[6:], rtol=1e-3, atol=0.5
    )
    result.write_modes(tmp_path / "modes.xyz", name="methanol")
    frames = read(tmp_path / "modes.xyz", ":")
    assert len(frames) == 12 and frames[3].arrays["mode"].shape == (6, 3)
    assert frames[3].info["frequency_per_cm"] == pytest.approx(result.frequencies[3])


@pytest.mark.parametrize(
    ("name", "number"),
    [("H2O", 2), ("NH3", 3), ("CH4", 12), ("C6H6", 12), ("C2H4", 4), ("CO2", 2), ("HCN", 1),
     ("CH3OH", 1), ("C2H6", 6)],
)  # fmt: skip
def test_rotational_symmetry_numbers(name, number):
    assert symmetry_number(name) == number


def test_imaginary_modes_and_failures():
    potential = pairwise("lennard_jones", cutoff=30.0)
    line = Atoms("Ar3", [[0, 0, 0], [0, 0, 3.8], [0, 0, 7.6]])  # a saddle point of the triangle
    (result,) = vibrations(line, potential)
    assert result.num_imaginary == 2 and result.thermochemistry.zero_point_energy > 0
    unknown, bad = vibrations([molecule("CH4"), "C("], potential)
    assert "not trained on C" in unknown.reason and "C(" in bad.reason
    with pytest.warns(UserWarning, match="not at a minimum"):
        vibrations(Atoms("Ar2", [[0, 0, 0], [0, 0, 3.6]]), potential, relaxed=True)
    for options in ({"temperature": -1.0}, {"isotopes": {"D": 2}}, {"approximation": "none"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            vibrations(line, potential, **options)


def test_frequencies_need_forces_that_are_the_gradient():
    """Detects frequencies at a geometry where the direct forces vanish, but not the gradient."""
    with pytest.raises(ValueError, match="not at a minimum of the energy and has no frequencies"):
        vibrations(Atoms("H2", [[0, 0, 0], [0, 0, 1.1]]), analytic.springs())

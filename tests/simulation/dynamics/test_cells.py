"""Tests for dynamics at constant pressure: lists, stress and volume while the cell changes."""

import numpy as np
import pytest
from ase import units
from ase.build import bulk

from mlip_jax import MLIPCalculator, MolecularDynamics
from mlip_jax.simulation.dynamics.settings import BAR
from tests.simulation.analytic import pairwise


def crystal(repeat, lattice=5.4):
    atoms = bulk("Ar", "fcc", a=lattice, cubic=True) * repeat
    atoms.positions += np.random.default_rng(0).normal(0, 0.05, (len(atoms), 3))
    return atoms


def at_pressure(atoms, potential, **options):
    return MolecularDynamics(
        atoms,
        potential,
        **{
            "ensemble": "npt",
            "timestep": 4.0,
            "temperature": 40.0,
            "record_every": 1,
            "frame_every": 5,
            "skin": 0.3,
            "dtype": "float64",
            "thermostat_time": 50.0,
            "barostat_time": 200.0,
            "compressibility": 1e-4,
            "stop_on_bond_break": False,
        }
        | options,
    )


def assert_as_fresh(potential, trajectory):
    """Assert that forces, energies and pressures equal those of a calculator with a new list."""
    calculator = MLIPCalculator(potential, "float64")
    for step, atoms in zip(trajectory.steps, trajectory.frames):
        at = list(trajectory.thermo.step).index(step)
        fresh = atoms.copy()
        fresh.calc = calculator
        np.testing.assert_allclose(atoms.get_forces(), fresh.get_forces(), atol=1e-9)
        assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-8)
        assert trajectory.thermo.volume[at] == pytest.approx(atoms.get_volume(), rel=1e-12)
        halfway = atoms.copy()  # the velocities at which the barostat evaluates the pressure
        halfway.set_momenta(atoms.get_momenta() + 2.0 * units.fs * fresh.get_forces())
        inner = (
            2 * halfway.get_kinetic_energy() / 3 / atoms.get_volume()
            - fresh.get_stress(voigt=True)[:3].mean()
        )
        assert trajectory.thermo.pressure[at] == pytest.approx(inner / BAR, abs=1e-4)


def test_steps_at_constant_pressure():
    potential = pairwise(cutoff=4.9)
    ours = at_pressure(crystal((2, 2, 2)), potential, pressure=5000.0).run(25)[0]
    assert ours.broken is None and len(np.unique(ours.thermo.volume)) == 26
    assert_as_fresh(potential, ours)


@pytest.mark.slow
def test_the_recorded_pressure_is_that_of_the_barostat():
    """Without noise, at zero temperature, the volume follows the pressure difference."""
    dynamics = at_pressure(
        crystal((2, 2, 2)),
        pairwise(cutoff=4.9),
        temperature=0.0,
        initial_temperature=80.0,
        pressure=2000.0,
        timestep=16.0,
        frame_every=1,
    )
    thermo = dynamics.run(20)[0].thermo
    strain = np.diff(np.log(thermo.volume))
    used = 2000.0 + strain / (1e-4 / 200.0 * 16.0)
    np.testing.assert_allclose(thermo.pressure[:-1], used, atol=1e-6)
    assert np.ptp(used) > 100


@pytest.mark.slow
def test_lists_of_a_changing_cell_move_to_the_host():
    """Under high pressure lattice planes come closer than lists of the device allow."""
    potential = pairwise(cutoff=4.9)
    dynamics = at_pressure(crystal((2, 2, 2)), potential, pressure=40_000.0, barostat_time=4000.0)
    assert dynamics.lists_built_on == "device" and dynamics.molecules[0].cell.lengths()[0] == 10.8
    ours = dynamics.run(150)[0]
    assert dynamics.lists_built_on == "host" and ours.broken is None and len(ours.steps) == 31
    assert ours.frames[-1].cell.lengths()[0] < 10.4, "which is twice the cutoff and the skin"
    assert np.isnan(ours.thermo.conserved).all()
    np.testing.assert_array_equal(ours.thermo.step, np.arange(151))
    assert_as_fresh(potential, ours)
    again = at_pressure(crystal((2, 2, 2)), potential, pressure=40_000.0, barostat_time=4000.0)
    again.restore(
        dynamics.snapshot()
    )  # a snapshot with lists of the host, restored in a run that starts with lists of the device
    assert again.lists_built_on == "host"
    for a, b in zip(again.run(20)[0].frames, dynamics.run(20)[0].frames):
        np.testing.assert_array_equal(a.positions, b.positions)


@pytest.mark.slow
def test_the_mean_pressure_is_the_target_pressure():
    dynamics = at_pressure(
        crystal((2, 2, 2)),
        pairwise(cutoff=4.9),
        replicas=8,
        pressure=500.0,
        frame_every=0,
        record_every=5,
    )
    thermo = [t.thermo for t in dynamics.run(6000)]
    late = np.array([t.pressure[len(t.pressure) // 3 :].mean() for t in thermo])
    temperature = np.array([t.temperature[len(t.temperature) // 3 :].mean() for t in thermo])
    assert late.mean() == pytest.approx(500.0, abs=4 * late.std() / np.sqrt(8) + 10)
    assert temperature.mean() == pytest.approx(40.0, abs=1.0)

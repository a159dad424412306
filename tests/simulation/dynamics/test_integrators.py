"""Tests for thermostats and barostat against the distributions that they sample."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms, units
from scipy import stats

from mlip_jax.simulation.dynamics import integrators, velocities
from mlip_jax.simulation.dynamics.integrators import (
    CellRescaling,
    Langevin,
    Motion,
    Rescaling,
    kinetic_energies,
)
from mlip_jax.simulation.dynamics.system import Particles, System
from mlip_jax.target_device import compiling_for

KT = units.kB * 300.0
STIFFNESS = 2.0  # eV/Å²


def system(copies, size, cell=None):
    atoms = Atoms(["H", "Li", "He", "C"][:size] if size < 5 else ["Ar"] * size, np.zeros((size, 3)))
    if cell is not None:
        atoms.set_cell(cell)
        atoms.pbc = True
    molecules = System((atoms,) * copies, np.zeros((copies, 3)))
    dof = np.full(copies, 3.0 * size - 3)
    return molecules, molecules.particles(
        np.float64, dof, np.full(copies, KT), np.full(copies, 1e9), False
    )


def springs(positions, particles):
    """Return forces that pull each atom to the center of mass of its molecule, (N, 3)."""
    num = particles.dof.shape[0]
    weights = jax.ops.segment_sum(jnp.ones(len(positions)), particles.molecule, num + 1)
    center = jax.ops.segment_sum(positions, particles.molecule, num + 1) / weights[:, None]
    return -STIFFNESS * (positions - center[particles.molecule])


@functools.partial(jax.jit, static_argnums=(0, 4))
def trajectory(integrator, particles, motion, dt, steps, stiffness):
    """Return kinetic energies, potential energies of the springs, volumes and heat, (steps, M)
    each.
    """

    def step(carry, k):
        motion, forces = carry
        key = jax.random.fold_in(jax.random.key(5), k)
        virial = jnp.zeros_like(motion.heat)
        motion = integrator.begin(motion, forces, virial, particles, dt, key)
        forces = stiffness * springs(motion.positions, particles)
        motion = integrator.end(motion, forces, particles, dt, key)
        stretch = ((forces / STIFFNESS) ** 2).sum(-1) * STIFFNESS / 2
        potential = jax.ops.segment_sum(stretch, particles.molecule, particles.dof.shape[0] + 1)[
            :-1
        ]
        volume = motion.heat if motion.cell is None else jnp.linalg.det(motion.cell)
        return (motion, forces), (
            kinetic_energies(motion.velocities, particles),
            potential,
            volume,
            motion.heat,
        )

    forces = stiffness * springs(motion.positions, particles)
    return jax.lax.scan(step, (motion, forces), jnp.arange(steps))[1]


def at_rest(molecules, particles, speed=0.001):
    rng = np.random.default_rng(0)
    velocities = rng.normal(0, speed, (molecules.nodes, 3))
    velocities[molecules.begin[-1] :] = 0
    zeros = np.zeros((molecules.nodes, 3))
    motion = Motion(zeros, zeros, velocities, molecules.cell, np.zeros(len(molecules.molecules)))
    return integrators.remove_com(jax.tree.map(jnp.asarray, motion), particles)


@pytest.mark.parametrize(
    ("integrator", "stiffness"),
    [(Langevin(friction=1.0), 0.0), (Langevin(friction=1.0), 1.0), (Rescaling(time=0.5), 0.0)],
)
def test_kinetic_energies_are_canonical(double_precision, integrator, stiffness):
    """After many relaxation times kinetic energies of 3 n - 3 degrees of freedom are gamma
    distributed.
    """
    molecules, particles = system(2000, 3)
    motion = at_rest(molecules, particles)
    kinetic, potential, _, heat = trajectory(integrator, particles, motion, 0.2, 150, stiffness)
    last = np.asarray(kinetic[-1]) / KT
    assert stats.kstest(last, stats.gamma(3.0).cdf).pvalue > 0.01
    if stiffness:  # BAOAB has no error in the positions of harmonic oscillators
        mean = np.asarray(potential[-20:]).mean() / KT
        assert mean == pytest.approx(3.0, abs=0.1)
    if not stiffness:  # the thermostat added all of it
        np.testing.assert_allclose(
            heat[-1], kinetic[-1] - kinetic_energies(motion.velocities, particles), atol=1e-12
        )


def test_rescaling_is_the_exact_solution(double_precision):
    """Mean and variance after one step of any length, from a kinetic energy far from the mean.

    The mean approaches its limit as exp(-t); the variance is that of Bussi et al., equation A7.
    """
    molecules, particles = system(20_000, 4)
    dof, mean = 9, 4.5 * KT
    start = 3.0 * mean
    rescaling_factors = jax.jit(integrators.rescaling_factors)
    for time in (0.01, 0.5, 3.0):
        factors = rescaling_factors(jax.random.key(1), jnp.full(20_000, start), particles, time)
        kinetic = np.asarray(factors) ** 2 * start
        kept, lost = np.exp(-time), 1 - np.exp(-time)
        expected = kept * start + lost * mean
        variance = 2 * mean**2 * lost**2 / dof + 4 * kept * lost * mean * start / dof
        assert kinetic.mean() == pytest.approx(expected, abs=4 * np.sqrt(variance / 20_000))
        assert kinetic.var() == pytest.approx(variance, rel=0.05)
    np.testing.assert_array_equal(
        rescaling_factors(jax.random.key(1), jnp.full(20_000, start), particles, 0.0), 1.0
    )


def test_the_volume_of_an_ideal_gas(double_precision):
    """Without forces volumes are gamma distributed: V^(n-1) exp(-P V / kT).

    The center of mass has no momentum, so there is one triple less.
    """
    size, copies = 6, 1500
    target_pressure = 0.004  # eV/Å³
    volume = size * KT / target_pressure
    molecules, particles = system(copies, size, [volume ** (1 / 3)] * 3)
    integrator = CellRescaling(
        time=0.3, pressure=target_pressure, barostat_time=1.0, compressibility=1 / target_pressure
    )
    motion = at_rest(molecules, particles, 0.005)
    _, _, volumes, _ = trajectory(integrator, particles, motion, 0.02, 400, 0.0)
    last = np.asarray(volumes[-1]) * target_pressure / KT
    assert last.mean() == pytest.approx(size, abs=4 * np.sqrt(size / copies) + 0.05)
    assert stats.kstest(last, stats.gamma(size).cdf).pvalue > 0.01


def a_step(integrator, motion, forces, particles, dt):
    key = jax.random.key(0)
    moved = integrator.begin(motion, forces, jnp.zeros(3), particles, dt, key)
    return integrator.end(moved, forces, particles, dt, key)


def test_a_time_step_of_zero_changes_nothing(double_precision):
    molecules, particles = system(3, 3, [9.0] * 3)
    motion = at_rest(molecules, particles, 0.1)
    forces = jnp.ones((molecules.nodes, 3))
    for integrator in (
        integrators.Verlet(),
        Langevin(friction=1.0),
        Rescaling(time=0.5),
        CellRescaling(time=0.5, pressure=1.0),
    ):
        end = jax.jit(a_step, static_argnums=0)(integrator, motion, forces, particles, 0.0)
        for now, before in zip(end, motion):
            np.testing.assert_allclose(now, before, rtol=0, atol=1e-15)


def test_noise_depends_on_molecule_and_atom(double_precision):
    molecules, particles = system(5, 3)
    noise = molecules.split(
        np.asarray(integrators.normal(jax.random.key(0), particles, np.float64))
    )
    fewer, of_fewer = system(2, 2)
    less = fewer.split(np.asarray(integrators.normal(jax.random.key(0), of_fewer, np.float64)))
    assert len(np.unique(noise)) == 45
    np.testing.assert_array_equal(less[1], noise[1][:2])


def test_drift_keeps_rounding_errors():
    motion = Motion(
        *(jnp.asarray(x, jnp.float32) for x in ([[8.0, 0, 0]], [[0.0] * 3], [[1e-5 / 3, 0, 0]])),
        None,
        jnp.zeros(1),
    )
    far = jax.jit(
        lambda m: jax.lax.fori_loop(0, 30_000, lambda _, m: integrators.drift(m, 1.0), m)
    )(motion)
    assert float(far.positions[0, 0]) == pytest.approx(8.1, abs=1e-6)


def test_each_momentum_has_an_energy_of_kt_over_two():
    """A width without the mass, or a variance, shows in the energies of light and heavy atoms."""
    masses = np.repeat([1.0, 30.0], 10_000)
    momenta = velocities.maxwell_boltzmann(masses, 300.0, np.random.default_rng(0))
    energies = (momenta**2).reshape(2, -1) / (2 * masses.reshape(2, -1)[:, :1])
    np.testing.assert_allclose(energies.mean(1), KT / 2, rtol=0.03)


@pytest.mark.parametrize(
    ("atoms", "dof"),
    [
        (Atoms("CO2", [[0, 0, 0], [0, 0, 1.2], [0, 0, -1.2]]), 4),
        (Atoms("OH2", [[0, 0, 0], [0, 0, 1], [0, 1, 0]]), 3),
        (Atoms("H"), 0),
        (Atoms("H2", [[0, 0, 0], [0.3, 0.4, 0.5]]), 1),
    ],
)
def test_velocities_at_the_start(atoms, dof):
    assert velocities.degrees_of_freedom(atoms, True, True) == dof
    velocities.draw(atoms, 300.0, np.random.default_rng(0), dof, True, True)
    momenta, arms = atoms.get_momenta(), atoms.positions - atoms.get_center_of_mass()
    np.testing.assert_allclose(momenta.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cross(arms, momenta).sum(0), 0, atol=1e-10)
    assert atoms.get_kinetic_energy() == pytest.approx(0.5 * dof * KT, abs=1e-12)


@pytest.mark.parametrize(
    "values, padding", [([0.5, 2.0], 1.0), ([True, False], False), ([7, 8], -1)]
)
def test_atoms_get_the_values_of_their_molecules_as_on_a_cpu(values, padding):
    """Detects values of another molecule, and padding atoms that get those of a molecule."""
    empty = Particles(*[None] * len(Particles._fields))
    particles = empty._replace(molecule=jnp.asarray([0, 0, 1, 2], jnp.int32))
    for platform in ("cpu", "gpu"):
        with compiling_for(platform):
            found = particles.of_atoms(jnp.asarray(values), padding)
        np.testing.assert_array_equal(found, [values[0], values[0], values[1], padding])
        assert found.dtype == jnp.asarray(values).dtype

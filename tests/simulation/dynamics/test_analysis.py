"""Tests for spectra and distances of motions that are known analytically."""

import numpy as np
import pytest
from ase import units

from mlip_jax.simulation.dynamics import analysis
from mlip_jax.simulation.dynamics.analysis import SampledTrajectory, distances, overlap, spectrum

PER_FS = 2.99792458e-5  # cm⁻¹ as a frequency


def oscillator(wavenumber, frames=4000, spacing=1.0, amplitude=0.05):
    """Return the trajectory of two atoms that oscillate along their bond."""
    time = np.arange(frames) * spacing
    phase = 2 * np.pi * wavenumber * PER_FS * time
    stretch = amplitude * np.sin(phase)
    speed = amplitude * 2 * np.pi * wavenumber * PER_FS * np.cos(phase) / units.fs
    positions, velocities = np.zeros((frames, 2, 3)), np.zeros((frames, 2, 3))
    positions[:, 0, 0], positions[:, 1, 0] = -0.5 - stretch / 2, 0.5 + stretch / 2
    velocities[:, 0, 0], velocities[:, 1, 0] = -speed / 2, speed / 2
    return SampledTrajectory(positions, velocities, np.array([1.0, 1.0]), spacing)


@pytest.mark.parametrize("wavenumber", [300.0, 1650.0, 3200.0])
def test_a_spring_has_one_line(wavenumber):
    x, density = spectrum(oscillator(wavenumber))
    assert x[np.argmax(density)] == pytest.approx(wavenumber, abs=6)
    assert np.trapezoid(density, x) == pytest.approx(1.0, abs=0.01)
    near = np.abs(x - wavenumber) < 60
    assert np.trapezoid(density[near], x[near]) > 0.99


def test_the_heavier_atom_counts_by_its_mass():
    trajectory = oscillator(1000.0)
    other = oscillator(2000.0)
    velocities = np.stack([trajectory.velocities[:, 0], other.velocities[:, 0] / 2], axis=1)
    x, density = spectrum(
        SampledTrajectory(trajectory.positions, velocities, np.array([3.0, 1.0]), 1.0)
    )
    low, high = (np.trapezoid(density[part], x[part]) for part in (x < 1500, x >= 1500))
    assert low / high == pytest.approx(3.0, rel=0.02)


def test_frames_too_far_apart_or_too_few():
    with pytest.raises(ValueError, match="at most 4.17 fs"):
        spectrum(oscillator(1000.0, spacing=5.0))
    with pytest.raises(ValueError, match="16 frames"):
        spectrum(oscillator(1000.0, frames=8))


def test_distances_of_a_spring_are_within_its_amplitude():
    r, density = distances(oscillator(1000.0), longest=2.0, bins=400)
    assert np.trapezoid(density, r) == pytest.approx(1.0, abs=0.02)
    inside = density > 0
    assert r[inside].min() == pytest.approx(0.95, abs=0.01) and r[inside].max() == pytest.approx(
        1.05, abs=0.01
    )


def test_independent_atoms_in_a_cell_have_a_flat_distribution():
    rng = np.random.default_rng(0)
    positions = rng.uniform(0, 12.0, (60, 60, 3))
    r, g = distances(
        SampledTrajectory(positions, positions, np.ones(60), 1.0, 12.0 * np.eye(3)),
        longest=5.5,
        bins=11,
    )
    np.testing.assert_allclose(g[2:], 1.0, atol=0.05)
    assert r[0] == 0.25


def test_overlap():
    x = np.linspace(0, 10, 2001)

    def bell(at):
        return np.exp(-0.5 * (x - at) ** 2)

    assert overlap(x, 3 * bell(4), x, bell(4)) == pytest.approx(1.0, abs=1e-6)
    assert overlap(x, bell(4), x, bell(6)) == pytest.approx(0.3173, abs=1e-3)  # erfc(1 / sqrt 2)
    assert overlap(x, bell(1), x, bell(9)) < 1e-3


def test_temperature():
    rng = np.random.default_rng(1)
    masses = np.array([1.0, 12.0, 16.0, 1.0])
    velocities = rng.normal(size=(4000, 4, 3)) * np.sqrt(300 * units.kB / masses)[:, None]
    velocities -= (masses[:, None] * velocities).sum(1, keepdims=True) / masses.sum()
    assert analysis.temperature(
        SampledTrajectory(velocities, velocities, masses, 1.0)
    ) == pytest.approx(300, rel=0.02)

"""Analysis of trajectories: distances between atoms, and the vibrational spectrum."""

from __future__ import annotations

import dataclasses

import numpy as np
from ase import units
from ase.geometry import get_distances

_SPEED_OF_LIGHT = 2.99792458e-5  # cm/fs
_SMOOTHING = 10.0  # cm⁻¹, standard deviation of the Gaussian that smooths spectra


@dataclasses.dataclass(frozen=True)
class SampledTrajectory:
    """Frames of a molecule, evenly spaced in time.

    Attributes:
      positions: Positions (Å), (K, n, 3).
      velocities: Velocities in ASE's unit, (K, n, 3).
      masses: Masses (amu), (n,).
      spacing: Time between frames (fs).
      cell: Lattice vectors (Å), (3, 3), if periodic; otherwise None.
    """

    positions: np.ndarray
    velocities: np.ndarray
    masses: np.ndarray
    spacing: float
    cell: np.ndarray | None = None


def distances(
    trajectory: SampledTrajectory, longest: float = 8.0, bins: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the radial distribution of all pairs of atoms.

    For a molecule the density is that of the distances (1/Å), and its integral to infinity is one.
    For a periodic cell it is g(r), which is one for independent atoms, from nearest images;
    `longest` should be less than half of the cell.

    Args:
      trajectory: Trajectory.
      longest: Largest distance (Å).
      bins: Number of bins.

    Returns:
      Distances r (Å) and density, (bins,) each.
    """
    edges = np.linspace(0.0, longest, bins + 1)
    n, counts = trajectory.positions.shape[1], np.zeros(bins)
    i, j = np.triu_indices(n, 1)
    for frame in trajectory.positions:
        if trajectory.cell is None:
            pair_distances = np.linalg.norm(frame[i] - frame[j], axis=1)
        else:
            pair_distances = get_distances(frame, cell=trajectory.cell, pbc=True)[1][i, j]
        counts += np.histogram(pair_distances, edges)[0]
    r, width = 0.5 * (edges[1:] + edges[:-1]), edges[1] - edges[0]
    share = counts / max(len(i) * len(trajectory.positions), 1)
    if trajectory.cell is None:
        return r, share / width
    return r, share * abs(np.linalg.det(trajectory.cell)) / (4 * np.pi * r * r * width)


def spectrum(
    trajectory: SampledTrajectory, highest: float = 4000.0
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the vibrational density of states, the mass-weighted power spectrum of velocities.

    Args:
      trajectory: Trajectory.
      highest: Highest wavenumber (cm⁻¹).

    Returns:
      Wavenumbers (cm⁻¹) and the density there, (F,) each. The integral of the density is one; it is
      smoothed by 10 cm⁻¹.

    Raises:
      ValueError: If there are fewer than 16 frames, or if they are too far apart for the highest
        wavenumber.
    """
    frames = len(trajectory.velocities)
    nyquist = 0.5 / (trajectory.spacing * _SPEED_OF_LIGHT)
    if frames < 16 or nyquist < highest:
        raise ValueError(
            f"a spectrum up to {highest:g} cm⁻¹ needs at least 16 frames, at most "
            f"{0.5 / (highest * _SPEED_OF_LIGHT):.3g} fs apart; received {frames}, "
            f"{trajectory.spacing:g} fs apart"
        )
    window = np.hanning(frames)[:, None, None]
    moved = (trajectory.velocities - trajectory.velocities.mean(0)) * window
    power = (np.abs(np.fft.rfft(moved, axis=0)) ** 2).sum(-1) @ trajectory.masses
    wavenumbers = np.fft.rfftfreq(frames, trajectory.spacing * _SPEED_OF_LIGHT)
    kept = wavenumbers <= highest
    step = wavenumbers[1]
    reach = int(np.ceil(4 * _SMOOTHING / step))
    kernel = np.exp(-0.5 * (step * np.arange(-reach, reach + 1) / _SMOOTHING) ** 2)
    # "full" and slice, since "same" returns the length of the kernel if that is longer
    smooth = np.convolve(power, kernel / kernel.sum(), "full")[reach : reach + len(power)][kept]
    return wavenumbers[kept], smooth / max(smooth.sum() * step, 1e-300)


def overlap(x: np.ndarray, first: np.ndarray, other_x: np.ndarray, second: np.ndarray) -> float:
    """Return the overlap of two distributions, from 0 to 1.

    The overlap is the integral of the smaller of the two, after each is normalized.

    >>> x = np.linspace(0.0, 1.0, 11)
    >>> round(overlap(x, np.ones(11), x, np.ones(11)), 6)
    1.0
    """
    second = np.interp(x, other_x, second)
    first, second = (values / max(np.trapezoid(values, x), 1e-300) for values in (first, second))
    return float(np.trapezoid(np.minimum(first, second), x))


def temperature(trajectory: SampledTrajectory) -> float:
    """Return the mean kinetic temperature (K), with three degrees of freedom fewer per molecule.

    The three are those of the center of mass.
    """
    kinetic = 0.5 * (trajectory.masses[:, None] * trajectory.velocities**2).sum((1, 2)).mean()
    return float(2 * kinetic / (max(3 * len(trajectory.masses) - 3, 1) * units.kB))

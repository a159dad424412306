"""Integrators of batched molecular dynamics: velocity Verlet, thermostats and a barostat. Pure.

    M   molecules       N   atoms of all molecules
    units: Å, eV, amu, and the resulting unit of time (ase.units)

A step consists of `begin` (up to the new positions), an evaluation of the forces, and `end` (up to
the new velocities). With a time step of zero nothing changes. Random numbers depend only on seed,
step, molecule and atom.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.graphs.graph import sum_by_graph
from mlip_jax.simulation.dynamics.system import Particles


class Motion(NamedTuple):
    """Positions, velocities and cells.

    Attributes:
      positions: Positions (Å), (N, 3).
      low: Rounding error of the positions that the next step adds (Å), (N, 3).
      velocities: Velocities in ASE's unit, (N, 3).
      cell: Lattice vectors (Å), (M, 3, 3), or None.
      heat: Kinetic energy that the thermostat added in this step (eV), (M,).
    """

    positions: jax.Array
    low: jax.Array
    velocities: jax.Array
    cell: jax.Array | None
    heat: jax.Array


@dataclasses.dataclass(frozen=True)
class Verlet:
    """Constant energy (NVE): velocity Verlet.

    Swope, Andersen, Berens, Wilson, J. Chem. Phys. 76, 637, 1982.

    Attributes:
      fix_com: Whether to remove the motion of the center of mass at each step, which grows by
        rounding otherwise.
    """

    fix_com: bool = True
    needs_stress = False

    def begin(self, motion: Motion, forces, virial, particles: Particles, dt, key) -> Motion:
        """Apply the first half of the kick, and drift."""
        return drift(kick(motion, forces, particles, 0.5 * dt), dt)

    def end(self, motion: Motion, forces, particles: Particles, dt, key) -> Motion:
        """Apply the second half of the kick."""
        motion = kick(motion, forces, particles, 0.5 * dt)
        return remove_com(motion, particles) if self.fix_com else motion


@dataclasses.dataclass(frozen=True)
class Langevin(Verlet):
    """Constant temperature (NVT) by friction and noise: BAOAB.

    Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34. With fix_com the noise is projected
    onto motions that keep the center of mass in place, which samples the canonical distribution of
    these motions.

    Attributes:
      friction: Friction coefficient (1 / ASE's unit of time).
    """

    friction: float = 0.0

    def begin(self, motion: Motion, forces, virial, particles: Particles, dt, key) -> Motion:
        """Apply B, A, O, A: half a kick, and the thermostat in the middle of the drift."""
        motion = drift(kick(motion, forces, particles, 0.5 * dt), 0.5 * dt)
        before = kinetic_energies(motion.velocities, particles)
        kept, lost = jnp.exp(-self.friction * dt), -jnp.expm1(-2 * self.friction * dt)
        target = particles.of_atoms(particles.target, 0.0)
        noise = jnp.sqrt(lost * target / particles.masses)[:, None] * normal(
            key, particles, motion.positions.dtype
        )
        motion = motion._replace(velocities=kept * motion.velocities + noise)
        motion = remove_com(motion, particles) if self.fix_com else motion
        given = kinetic_energies(motion.velocities, particles) - before
        return drift(motion._replace(heat=motion.heat + given), 0.5 * dt)


@dataclasses.dataclass(frozen=True)
class Rescaling(Verlet):
    """Constant temperature (NVT) by stochastic velocity rescaling.

    Bussi, Donadio, Parrinello, J. Chem. Phys. 126, 014101, 2007. All velocities of a molecule are
    multiplied by one random factor, such that its kinetic energy is canonical.

    Attributes:
      time: Relaxation time of the kinetic energy (ASE's unit of time).
    """

    time: float = 1.0

    def end(self, motion: Motion, forces, particles: Particles, dt, key) -> Motion:
        """Apply the second half of the kick and the thermostat."""
        motion = super().end(motion, forces, particles, dt, key)
        before = kinetic_energies(motion.velocities, particles)
        factors = rescaling_factors(key, before, particles, dt / self.time)
        scale = particles.of_atoms(factors, 1.0)[:, None]
        motion = motion._replace(velocities=motion.velocities * scale)
        return motion._replace(heat=motion.heat + (factors * factors - 1) * before)


@dataclasses.dataclass(frozen=True)
class CellRescaling(Rescaling):
    """Constant pressure and temperature (NPT) by stochastic cell rescaling of the volume.

    Bernetti and Bussi, J. Chem. Phys. 153, 114107, 2020, with the thermostat of `Rescaling`. The
    cell keeps its shape.

    Attributes:
      pressure: Target pressure (eV/Å³).
      barostat_time: Relaxation time of the volume (ASE's unit of time).
      compressibility: Compressibility (Å³/eV). An estimate is sufficient: it changes how fast the
        volume follows, not its mean.
    """

    pressure: float = 0.0
    barostat_time: float = 1.0
    compressibility: float = 1.0
    needs_stress = True

    def begin(self, motion: Motion, forces, virial, particles: Particles, dt, key) -> Motion:
        """Apply half a kick, change the volume, and drift.

        d log V = β/τ (P - P₀) dt + sqrt(2 kT β / (V τ)) dW, equation 7 of the paper. Positions
        scale with the cell and velocities inversely, which preserves the phase space volume.
        """
        inner = self.inner_pressure(motion, forces, virial, particles, dt)
        motion = kick(motion, forces, particles, 0.5 * dt)
        volume = jnp.abs(jnp.linalg.det(motion.cell))
        rate = self.compressibility / self.barostat_time
        noise = molecule_normal(jax.random.fold_in(key, 1), particles, volume.dtype)
        strain = (
            rate * (inner - self.pressure) * dt
            + jnp.sqrt(2 * particles.target * rate * dt / volume) * noise
        )
        # scale of a length, (M,)
        scale = jnp.exp(strain / 3)
        of_atoms = particles.of_atoms(scale, 1.0)[:, None]
        return drift(
            motion._replace(
                positions=motion.positions * of_atoms,
                low=motion.low * of_atoms,
                cell=motion.cell * scale[:, None, None],
                velocities=motion.velocities / of_atoms,
            ),
            dt,
        )

    def inner_pressure(self, motion: Motion, forces, virial, particles: Particles, dt) -> jax.Array:
        """Return the pressure that changes the volume in the next step (eV/Å³), (M,).

        The velocities are those half a step later, and the mean of this pressure is the target
        pressure. With velocities of the full step it would be lower by the time step error of stiff
        bonds, as the mean kinetic energy is.
        """
        halfway = kick(motion, forces, particles, 0.5 * dt)
        volume = jnp.abs(jnp.linalg.det(motion.cell))
        return pressure(kinetic_energies(halfway.velocities, particles), virial, volume)


def kick(motion: Motion, forces, particles: Particles, dt) -> Motion:
    """Return the motion after forces have acted on the velocities for a time."""
    return motion._replace(velocities=motion.velocities + dt * forces / particles.masses[:, None])


def drift(motion: Motion, dt) -> Motion:
    """Return the motion after a drift, by compensated summation (Kahan, Commun. ACM 8, 40, 1965).

    A step moves an atom by about 0.01 Å. A float32 position of about 10 Å keeps four digits of it.
    The rest is added in the next step, so positions are as accurate as with twice the digits.
    """
    change = motion.velocities * dt + motion.low
    positions = motion.positions + change
    return motion._replace(positions=positions, low=change - (positions - motion.positions))


def remove_com(motion: Motion, particles: Particles) -> Motion:
    """Return the motion without the velocity of the center of mass of each molecule."""
    mean = _per_molecule(particles.mass_fractions[:, None] * motion.velocities, particles)
    return motion._replace(velocities=motion.velocities - particles.of_atoms(mean, 0.0))


def kinetic_energies(velocities: jax.Array, particles: Particles) -> jax.Array:
    """Return the kinetic energy of each molecule (eV), (M,)."""
    return _per_molecule(0.5 * particles.masses * (velocities * velocities).sum(-1), particles)


def pressure(kinetic: jax.Array, virial: jax.Array, volume: jax.Array) -> jax.Array:
    """Return the pressure (eV/Å³), (M,).

    Args:
      kinetic: Kinetic energies (eV), (M,).
      virial: Traces of the stress, with ASE's sign (eV/Å³), (M,).
      volume: Volumes (Å³), (M,).
    """
    return 2 * kinetic / (3 * volume) - virial / 3


def rescaling_factors(key, kinetic: jax.Array, particles: Particles, steps) -> jax.Array:
    """Draw the factors of the velocities, (M,), from the exact solution over a time.

    Equations A7 and A8 of Bussi et al.

    Args:
      key: Random key of the step.
      kinetic: Kinetic energies (eV), (M,).
      particles: Atoms.
      steps: Time in units of the thermostat's relaxation time.
    """
    kept, lost = jnp.exp(-steps), -jnp.expm1(-steps)
    first = molecule_normal(key, particles, kinetic.dtype)
    # sum of the squares of dof - 1 normal numbers
    shape = 0.5 * (particles.dof - 1)
    others = 2 * jax.vmap(
        lambda s, a: jax.random.gamma(
            jax.random.fold_in(jax.random.fold_in(key, 2), s),
            jnp.where(a > 0, a, 1.0),
            dtype=kinetic.dtype,
        )
    )(particles.stream, shape)
    others = jnp.where(shape > 0, others, 0.0)
    share = (
        0.5 * particles.target / jnp.where(kinetic > 0, kinetic, 1.0)
    )  # kT/2 over the kinetic energy
    squared = (
        kept + lost * share * (first * first + others) + 2 * first * jnp.sqrt(kept * lost * share)
    )
    turns = first * jnp.sqrt(lost * share) + jnp.sqrt(kept) < 0
    sign = jnp.where(turns, -1.0, 1.0)
    # without motion there is nothing to scale, and without degrees of freedom only rounding errors
    return jnp.where(
        (kinetic > 0) & (particles.dof > 0), sign * jnp.sqrt(jnp.maximum(squared, 0.0)), 1.0
    )


def normal(key, particles: Particles, dtype) -> jax.Array:
    """Draw normal numbers for each atom, (N, 3).

    They depend only on key, molecule and the number of the atom in its molecule.
    """
    streams = particles.of_atoms(particles.stream, -1)

    def of_atom(stream, number):
        return jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, stream), number), (3,), dtype
        )

    return jax.vmap(of_atom)(streams, particles.number)


def molecule_normal(key, particles: Particles, dtype) -> jax.Array:
    """Draw a normal number for each molecule, (M,)."""
    return jax.vmap(lambda s: jax.random.normal(jax.random.fold_in(key, s), (), dtype))(
        particles.stream
    )


def _per_molecule(values, particles: Particles) -> jax.Array:
    """Sum values of atoms (N, ...) over each molecule, (M, ...)."""
    num = particles.dof.shape[0]
    return sum_by_graph(values, particles.molecule, num)

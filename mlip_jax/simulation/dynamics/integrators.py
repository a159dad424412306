"""Steps of molecular dynamics of many molecules at once: velocity Verlet, thermostats and a barostat. Pure.

    M   molecules       N   atoms of all of them       units: Å, eV, amu, and what time is in these (ase.units)

A step is `begin` (up to the new positions), an evaluation of the forces, and `end` (up to the new velocities). With a
time step of zero nothing changes. Random numbers depend on seed, step, molecule and atom, and on nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.simulation.dynamics.system import Particles


class Motion(NamedTuple):
    """Where the atoms are and go.

    Attributes:
      positions: (N, 3) Å. low: What rounding has left out of them, (N, 3) Å.
      velocities: (N, 3). cell: (M, 3, 3) Å or None. heat: Kinetic energy that a thermostat gave in this step, eV, (M,).
    """

    positions: jax.Array
    low: jax.Array
    velocities: jax.Array
    cell: jax.Array | None
    heat: jax.Array


@dataclasses.dataclass(frozen=True)
class Verlet:
    """Constant energy (NVE): velocity Verlet (Swope, Andersen, Berens, Wilson, J. Chem. Phys. 76, 637, 1982).

    Attributes:
      fix_com: Take out the motion of the centre of mass at each step, which rounding else lets grow.
    """

    fix_com: bool = True
    needs_stress = False

    def begin(self, motion: Motion, forces, virial, particles: Particles, dt, key) -> Motion:
        """Half a kick, and the drift."""
        return drifted(kicked(motion, forces, particles, 0.5 * dt), dt)

    def end(self, motion: Motion, forces, particles: Particles, dt, key) -> Motion:
        """The other half of the kick."""
        motion = kicked(motion, forces, particles, 0.5 * dt)
        return without_com(motion, particles) if self.fix_com else motion


@dataclasses.dataclass(frozen=True)
class Langevin(Verlet):
    """Constant temperature (NVT) by friction and noise: BAOAB (Leimkuhler and Matthews, Appl. Math. Res. Express 2013,
    34).

    With fix_com the noise is projected on motions that leave the centre of mass where it is, which samples the
    canonical distribution of those.

    Attributes:
      friction: In units of 1 / time.
    """

    friction: float = 0.0

    def begin(self, motion: Motion, forces, virial, particles: Particles, dt, key) -> Motion:
        """B, A, O, A: half a kick, and the thermostat in the middle of the drift."""
        motion = drifted(kicked(motion, forces, particles, 0.5 * dt), 0.5 * dt)
        before = kinetic_energies(motion.velocities, particles)
        kept, lost = jnp.exp(-self.friction * dt), -jnp.expm1(-2 * self.friction * dt)
        target = jnp.append(particles.target, 0.0)[particles.molecule]
        noise = jnp.sqrt(lost * target / particles.masses)[:, None] * normal(key, particles, motion.positions.dtype)
        motion = motion._replace(velocities=kept * motion.velocities + noise)
        motion = without_com(motion, particles) if self.fix_com else motion
        given = kinetic_energies(motion.velocities, particles) - before
        return drifted(motion._replace(heat=motion.heat + given), 0.5 * dt)


@dataclasses.dataclass(frozen=True)
class Rescaling(Verlet):
    """Constant temperature (NVT) by stochastic velocity rescaling (Bussi, Donadio, Parrinello, J. Chem. Phys. 126,
    014101, 2007): all velocities of a molecule times one random factor, so that its kinetic energy is canonical.

    Attributes:
      time: Of the thermostat, in which the kinetic energy forgets what it was.
    """

    time: float = 1.0

    def end(self, motion: Motion, forces, particles: Particles, dt, key) -> Motion:
        """The other half of the kick, and the thermostat."""
        motion = super().end(motion, forces, particles, dt, key)
        before = kinetic_energies(motion.velocities, particles)
        factors = rescaling_factors(key, before, particles, dt / self.time)
        motion = motion._replace(velocities=motion.velocities * jnp.append(factors, 1.0)[particles.molecule, None])
        return motion._replace(heat=motion.heat + (factors * factors - 1) * before)


@dataclasses.dataclass(frozen=True)
class CellRescaling(Rescaling):
    """Constant pressure and temperature (NPT): stochastic cell rescaling of the volume (Bernetti and Bussi, J. Chem.
    Phys. 153, 114107, 2020) with the thermostat above. The cell keeps its shape.

    Attributes:
      pressure: eV/Å³. barostat_time: In which the volume follows. compressibility: Å³/eV, of which an estimate is
        enough: it changes how fast the volume follows, not what it is.
    """

    pressure: float = 0.0
    barostat_time: float = 1.0
    compressibility: float = 1.0
    needs_stress = True

    def begin(self, motion: Motion, forces, virial, particles: Particles, dt, key) -> Motion:
        """Half a kick, a change of the volume, and the drift.

        d log V = β/τ (P - P₀) dt + sqrt(2 kT β / (V τ)) dW, equation 7 of the paper; positions go with the cell,
        velocities against it, so that volume in phase space is kept.
        """
        inner = self.inner_pressure(motion, forces, virial, particles, dt)
        motion = kicked(motion, forces, particles, 0.5 * dt)
        volume = jnp.abs(jnp.linalg.det(motion.cell))
        rate = self.compressibility / self.barostat_time
        noise = molecule_normal(jax.random.fold_in(key, 1), particles, volume.dtype)
        strain = rate * (inner - self.pressure) * dt + jnp.sqrt(
            2 * particles.target * rate * dt / volume) * noise
        scale = jnp.exp(strain / 3)
        of_atoms = jnp.append(scale, 1.0)[particles.molecule, None]
        return drifted(motion._replace(
            positions=motion.positions * of_atoms, low=motion.low * of_atoms, cell=motion.cell * scale[:, None, None],
            velocities=motion.velocities / of_atoms), dt)

    def inner_pressure(self, motion: Motion, forces, virial, particles: Particles, dt) -> jax.Array:
        """The pressure that a step from here changes the volume by, eV/Å³, (M,): with velocities half a step on.

        Its mean is the pressure that was asked for. With velocities of the full step it is lower by what the step is
        too long for stiff bonds, as the mean kinetic energy is.
        """
        halfway = kicked(motion, forces, particles, 0.5 * dt)
        volume = jnp.abs(jnp.linalg.det(motion.cell))
        return pressure(kinetic_energies(halfway.velocities, particles), virial, volume)


def kicked(motion: Motion, forces, particles: Particles, dt) -> Motion:
    """Velocities after forces have acted for a time."""
    return motion._replace(velocities=motion.velocities + dt * forces / particles.masses[:, None])


def drifted(motion: Motion, dt) -> Motion:
    """Positions after a time, by compensated summation (Kahan, Commun. ACM 8, 40, 1965).

    A step moves an atom by about 0.01 Å, of which a float32 that counts in 10 Å keeps four digits; what it drops goes
    into the next step, so that the positions are as good as if they had twice the digits.
    """
    change = motion.velocities * dt + motion.low
    positions = motion.positions + change
    return motion._replace(positions=positions, low=change - (positions - motion.positions))


def without_com(motion: Motion, particles: Particles) -> Motion:
    """Velocities less that of the centre of mass."""
    momenta = _per_molecule(particles.masses[:, None] * motion.velocities, particles)
    masses = _per_molecule(particles.masses, particles)
    mean = jnp.append(momenta / masses[:, None], jnp.zeros((1, 3), momenta.dtype), axis=0)
    return motion._replace(velocities=motion.velocities - mean[particles.molecule])


def kinetic_energies(velocities: jax.Array, particles: Particles) -> jax.Array:
    """eV, (M,)."""
    return _per_molecule(0.5 * particles.masses * (velocities * velocities).sum(-1), particles)


def pressure(kinetic: jax.Array, virial: jax.Array, volume: jax.Array) -> jax.Array:
    """eV/Å³, (M,), from kinetic energies (eV), the trace of the stress (eV/Å³, ASE's sign) and volumes (Å³)."""
    return 2 * kinetic / (3 * volume) - virial / 3


def rescaling_factors(key, kinetic: jax.Array, particles: Particles, steps) -> jax.Array:
    """Factors of the velocities, (M,): the exact solution over a time, equations A7 and A8 of Bussi et al.

    Args:
      kinetic: eV, (M,). steps: The time in units of that of the thermostat.
    """
    kept, lost = jnp.exp(-steps), -jnp.expm1(-steps)
    first = molecule_normal(key, particles, kinetic.dtype)
    # the sum of the squares of dof - 1 normal numbers
    shape = 0.5 * (particles.dof - 1)
    others = 2 * jax.vmap(lambda s, a: jax.random.gamma(
        jax.random.fold_in(jax.random.fold_in(key, 2), s), jnp.where(a > 0, a, 1.0), dtype=kinetic.dtype))(
            particles.stream, shape)
    others = jnp.where(shape > 0, others, 0.0)
    share = 0.5 * particles.target / jnp.where(kinetic > 0, kinetic, 1.0)  # of the mean energy of a degree of freedom
    squared = kept + lost * share * (first * first + others) + 2 * first * jnp.sqrt(kept * lost * share)
    turns = first * jnp.sqrt(lost * share) + jnp.sqrt(kept) < 0
    sign = jnp.where(turns, -1.0, 1.0)
    # without any motion there is nothing to scale
    return jnp.where(kinetic > 0, sign * jnp.sqrt(jnp.maximum(squared, 0.0)), 1.0)


def normal(key, particles: Particles, dtype) -> jax.Array:
    """Normal numbers for each atom, (N, 3), that depend on key, molecule and the number of the atom there."""
    streams = jnp.append(particles.stream, -1)[particles.molecule]

    def of_atom(stream, number):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, stream), number), (3,), dtype)

    return jax.vmap(of_atom)(streams, particles.number)


def molecule_normal(key, particles: Particles, dtype) -> jax.Array:
    """A normal number for each molecule, (M,)."""
    return jax.vmap(lambda s: jax.random.normal(jax.random.fold_in(key, s), (), dtype))(particles.stream)


def _per_molecule(values, particles: Particles) -> jax.Array:
    num = particles.dof.shape[0]
    return jax.ops.segment_sum(values, particles.molecule, num + 1, indices_are_sorted=True)[:num]

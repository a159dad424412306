"""Detection of molecules that break: bonds, temperature and displacements. Pure.

M   molecules       N   atoms of all molecules, including padding
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlip_jax.graphs.graph import max_by_graph
from mlip_jax.simulation.dynamics.device import state as md_state
from mlip_jax.simulation.dynamics.device.molecule_masks import any_of_molecule
from mlip_jax.simulation.dynamics.device.state import RUNNING, DynamicsState
from mlip_jax.simulation.dynamics.integrators import Motion, kinetic_energies
from mlip_jax.simulation.dynamics.system import Particles


def mark_far_moves(
    particles: Particles, state: DynamicsState, motion: Motion, max_displacement: float
) -> jax.Array:
    """Return status codes, (M,), after marking molecules that moved too far or to NaN.

    Args:
      particles: Atoms.
      state: State before the step.
      motion: Positions after the step.
      max_displacement: Maximum displacement of an atom in one step (Å).
    """
    moved = motion.positions - state.positions
    # negated, so that NaN counts as too far
    far = any_of_molecule(~((moved * moved).sum(-1) <= max_displacement**2), particles)
    return jnp.where((state.code == RUNNING) & far, md_state.TOO_FAST, state.code)


def mark_broken(
    particles: Particles,
    state: DynamicsState,
    motion: Motion,
    code: jax.Array,
    bond_range: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """Mark running molecules that are too hot or have a broken bond.

    Args:
      particles: Atoms and bonds.
      state: State before the step.
      motion: Positions and velocities after the step.
      code: Status codes after the step, (M,).
      bond_range: Range of the bond length over the sum of the covalent radii.

    Returns:
      Status codes and numbers of the broken bonds, (M,) int32 each.
    """
    num = code.shape[0]
    kinetic = kinetic_energies(motion.velocities, particles)
    # One atom with a fixed center of mass has no temperature, only rounding errors.
    hot = (particles.dof > 0) & (kinetic > 0.5 * particles.dof * particles.hottest)
    breakage = jnp.where(hot, md_state.TOO_HOT, RUNNING)
    culprit = state.culprit
    if particles.bonds.shape[0]:
        i, j = particles.bonds.T
        vectors = motion.positions[j] - motion.positions[i]
        molecule = particles.molecule[i]
        if particles.bond_shifts is not None:
            shifts = particles.bond_shifts.astype(vectors.dtype)
            vectors += jnp.einsum("bc,bcx->bx", shifts, motion.cell[molecule])
        ratio = jnp.sqrt((vectors * vectors).sum(-1)) / particles.bond_length
        bad = (ratio < bond_range[0]) | (ratio > bond_range[1])
        # last broken bond of each molecule, negative if there is none, (M,)
        worst = max_by_graph(jnp.where(bad, jnp.arange(len(ratio)), -1), molecule, num, -1)
        stretched = ratio[jnp.maximum(worst, 0)] > 1
        breakage = jnp.where(
            worst >= 0, jnp.where(stretched, md_state.STRETCHED, md_state.COLLAPSED), breakage
        )
        culprit = jnp.where((code == RUNNING) & (worst >= 0), worst, culprit)
    code = jnp.where(code == RUNNING, breakage, code)
    return code.astype(jnp.int32), culprit.astype(jnp.int32)

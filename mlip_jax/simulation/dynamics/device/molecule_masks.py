"""Selection by molecule in arrays of atoms or molecules."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlip_jax.graphs.graph import max_by_graph
from mlip_jax.simulation.dynamics.device.state import RUNNING
from mlip_jax.simulation.dynamics.integrators import Motion
from mlip_jax.simulation.dynamics.system import Particles


def any_of_molecule(values: jax.Array, particles: Particles) -> jax.Array:
    """Return whether any atom of each molecule has a true value, (N,) -> (M,)."""
    num = particles.dof.shape[0]
    return max_by_graph(values.astype(jnp.int32), particles.molecule, num, 0) > 0


def select(
    condition: jax.Array, particles: Particles, new: jax.Array | None, old: jax.Array | None
) -> jax.Array | None:
    """Return arrays of atoms or molecules: `new` where `condition` (M,) holds, otherwise `old`."""
    if new is None:
        return None
    # an array of atoms: there are more of them than molecules, since one is padding
    if new.shape[0] == particles.molecule.shape[0]:
        condition = particles.of_atoms(condition, False)
    return jnp.where(condition.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def where_running(code: jax.Array, particles: Particles, new: Motion, old: Motion) -> Motion:
    """Return the motion `new` of running molecules and `old` of the others."""
    return Motion(*(select(code == RUNNING, particles, a, b) for a, b in zip(new, old)))

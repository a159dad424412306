"""Arrays of the loop of molecular dynamics: state and pending half step.

M   molecules       N   atoms of all molecules, including padding
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph

from mlip_jax.simulation.dynamics.integrators import Motion

# Status codes of a molecule.
RUNNING, NOT_FINITE, TOO_FAST, STRETCHED, COLLAPSED, TOO_HOT = range(6)
NEW = -1  # the step before the first evaluation


class DynamicsState(NamedTuple):
    """State of a simulation.

    Attributes:
      step: Number of steps made, () int32; NEW before the first evaluation.
      positions: Positions (Å), (N, 3).
      low: Rounding errors of the positions (Å), (N, 3), see `Motion`.
      velocities: Velocities in ASE's unit, (N, 3).
      forces: Forces (eV/Å), (N, 3).
      virial: Trace of the stress (eV/Å³), (M,); zero if the integrator does not need it.
      cell: Lattice vectors (Å), (M, 3, 3), or None.
      energies: Initial energies of the atoms (eV), (N,).
      energy: Energies of the molecules minus their initial energies (eV), (M,).
      heat: Kinetic energy added by the thermostat so far (eV), (M,).
      heat_low: Rounding error of `heat` (eV), (M,).
      code: Status code of each molecule, (M,) int32.
      broken_at: Step at which the molecule broke, (M,) int32.
      culprit: Number of the broken bond, (M,) int32.
      graph: Neighbor list, with the positions from which it was built.
      wanted: Edges and long-range pairs of the last list, and edges within the cutoff at the last
        step, (3,) int32. The capacity must be enlarged if they exceed it.
      lists: Number of lists built since the start, () int32.
      stale: Whether the host must build a list, () bool.
    """

    step: jax.Array
    positions: jax.Array
    low: jax.Array
    velocities: jax.Array
    forces: jax.Array
    virial: jax.Array
    cell: jax.Array | None
    energies: jax.Array
    energy: jax.Array
    heat: jax.Array
    heat_low: jax.Array
    code: jax.Array
    broken_at: jax.Array
    culprit: jax.Array
    graph: jraph.GraphsTuple
    wanted: jax.Array
    lists: jax.Array
    stale: jax.Array


class HalfStep(NamedTuple):
    """First half of the step after a state, up to the evaluation of the forces.

    Attributes:
      motion: Positions and velocities after the half step.
      code: Status codes after the half step, (M,) int32.
      empty: Whether no step has been started, () bool.
      moved: Whether the list may lack pairs at the new positions, () bool.
      narrow: Whether the cell has become too small for lists of the device, () bool; None if it
        cannot.
    """

    motion: Motion
    code: jax.Array
    empty: jax.Array
    moved: jax.Array
    narrow: jax.Array | None

    def is_narrow(self) -> jax.Array:
        """Return `narrow` as an array."""
        return jnp.asarray(False) if self.narrow is None else self.narrow

"""What a simulation is at, what is ahead of it, and what is kept of it: the arrays of the loop.

    M   molecules       N   atoms of all of them, padding included       R   records       F   frames
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jraph
import numpy as np

from mlip_jax.simulation.dynamics.integrators import Motion

# What has become of a molecule.
RUNNING, NOT_FINITE, TOO_FAST, STRETCHED, COLLAPSED, TOO_HOT = range(6)
NEW = -1  # the step before the first evaluation


class DynamicsState(NamedTuple):
    """All that a simulation is at.

    Attributes:
      step: Steps made, () int32; NEW before forces are known.
      positions, low: See `Motion`, (N, 3) Å. velocities: (N, 3). forces: eV/Å, (N, 3).
      virial: Trace of the stress, eV/Å³, (M,); zero where it is not needed. cell: (M, 3, 3) Å or None.
      energies: Of the atoms at the start, eV, (N,). energy: Of the molecules less that at the start, eV, (M,).
      heat, heat_low: What thermostats have given so far, eV, (M,), and what rounding left out of it.
      code: What has become of each molecule, (M,) int32. broken_at: Step of that, (M,) int32.
      culprit: Number of the bond that broke, (M,) int32.
      graph: List of neighbours, with the positions that it was made of.
      wanted: Edges and long-range pairs of the last list, and edges within the cutoff at the last step, (3,) int32. If
        they are more than there is room for, there has to be more.
      lists: How many lists were made since the start, () int32.
      stale: The host must make a list, () bool.
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
    """The first half of the step after a state, up to where forces are needed.

    Attributes:
      motion: Where it brings the molecules. code: What becomes of them on the way, (M,) int32.
      empty: Nothing has been begun, () bool. moved: The list may lack pairs there, () bool.
      narrow: The cell has become too small for the device's lists, () bool.
    """

    motion: Motion
    code: jax.Array
    empty: jax.Array
    moved: jax.Array
    narrow: jax.Array


class Records(NamedTuple):
    """What is kept of the steps of a dispatch: the first `num_records` rows and `num_frames` frames.

    Attributes:
      step: (R,). energy, kinetic, heat, volume, pressure: (R, M), eV, Å³, eV/Å³.
      frame_step: (F,). positions, velocities, forces: (F, N, 3). frame_energy: (F, M). cell: (F, M, 3, 3) or None.
    """

    num_records: jax.Array
    step: jax.Array
    energy: jax.Array
    kinetic: jax.Array
    heat: jax.Array
    volume: jax.Array
    pressure: jax.Array
    num_frames: jax.Array
    frame_step: jax.Array
    frame_energy: jax.Array
    positions: jax.Array
    velocities: jax.Array
    forces: jax.Array
    cell: jax.Array | None


def filled(records: Records) -> Records:
    """Copies of the rows and frames that there are, on the host: whoever keeps them keeps no empty room."""
    frames = ("frame_step", "frame_energy", "positions", "velocities", "forces", "cell")
    rows = ("step", "energy", "kinetic", "heat", "volume", "pressure")
    kept = {name: np.array(getattr(records, name)[:int(count)]) for names, count in (
        (rows, records.num_records), (frames, records.num_frames)) for name in names
        if getattr(records, name) is not None}
    return records._replace(**kept)

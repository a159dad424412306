"""Recording of steps during a dispatch, on the device.

M   molecules       N   atoms of all molecules, including padding
R   records         F   frames
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.simulation.dynamics.device.state import DynamicsState
from mlip_jax.simulation.dynamics.integrators import Motion, Verlet, kinetic_energies
from mlip_jax.simulation.dynamics.system import Particles


class Records(NamedTuple):
    """Recorded steps of a dispatch: the first `num_records` rows and `num_frames` frames.

    Attributes:
      num_records: Number of rows, () int32.
      step: Steps of the rows, (R,).
      energy: Energies as in `DynamicsState` (eV), (R, M).
      kinetic: Kinetic energies (eV), (R, M).
      heat: Kinetic energy added by the thermostat (eV), (R, M).
      volume: Volumes (Å³), (R, M).
      pressure: Pressures (eV/Å³), (R, M).
      num_frames: Number of frames, () int32.
      frame_step: Steps of the frames, (F,).
      frame_energy: Energies of the frames (eV), (F, M).
      positions: Positions (Å), (F, N, 3).
      velocities: Velocities in ASE's unit, (F, N, 3).
      forces: Forces (eV/Å), (F, N, 3).
      cell: Lattice vectors (Å), (F, M, 3, 3), or None.
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


def trim(records: Records) -> Records:
    """Return host copies of the filled rows and frames only, which frees the rest of the memory."""
    frames = ("frame_step", "frame_energy", "positions", "velocities", "forces", "cell")
    rows = ("step", "energy", "kinetic", "heat", "volume", "pressure")
    kept = {
        name: np.array(getattr(records, name)[: int(count)])
        for names, count in ((rows, records.num_records), (frames, records.num_frames))
        for name in names
        if getattr(records, name) is not None
    }
    return records._replace(**kept)


@dataclasses.dataclass(frozen=True)
class DynamicsRecorder:
    """Recording of rows and frames; everything here is static.

    Attributes:
      integrator: Integrator, which determines the pressure.
      record_every: Steps between rows; 0 records none.
      frame_every: Steps between frames; 0 records none.
      max_records: Maximum number of rows of a dispatch (R).
      max_frames: Maximum number of frames of a dispatch (F).
    """

    integrator: Verlet
    record_every: int
    frame_every: int
    max_records: int
    max_frames: int

    def empty(self, state: DynamicsState) -> Records:
        """Return empty records."""
        dtype, num = state.positions.dtype, state.code.shape[0]
        # the last row receives the values of steps that are not recorded
        rows, frames = self.max_records + 1, self.max_frames + 1
        numbers = jnp.zeros((rows, num), dtype)
        atoms = jnp.zeros((frames, *state.positions.shape), dtype)
        cell = None if state.cell is None else jnp.zeros((frames, num, 3, 3), dtype)
        return Records(
            jnp.int32(0),
            jnp.zeros(rows, jnp.int32),
            *[numbers] * 5,
            jnp.int32(0),
            jnp.zeros(frames, jnp.int32),
            jnp.zeros((frames, num), dtype),
            atoms,
            atoms,
            atoms,
            cell,
        )

    def is_full(self, records: Records) -> jax.Array:
        """Return whether there is no space for another row or frame, () bool."""
        return ~((records.num_records < self.max_records) & (records.num_frames < self.max_frames))

    def is_due(self, step: jax.Array) -> jax.Array:
        """Return whether a row or a frame is to be recorded at this step, () bool."""
        due = jnp.asarray(False)
        for every in (self.record_every, self.frame_every):
            due |= (step % every == 0) if every else False
        return due

    def append(
        self,
        records: Records,
        particles: Particles,
        timestep: jax.Array,
        state: DynamicsState,
        due: jax.Array,
    ) -> Records:
        """Append a row and a frame to the records if the step is `due` for them."""
        if self.record_every:
            volume = (
                jnp.zeros_like(state.energy)
                if state.cell is None
                else jnp.abs(jnp.linalg.det(state.cell))
            )
            row = dict(
                step=state.step,
                energy=state.energy,
                kinetic=kinetic_energies(state.velocities, particles),
                heat=state.heat,
                volume=volume,
                pressure=self._pressure(particles, timestep, state),
            )
            is_due = due & (state.step % self.record_every == 0)
            records = _write_row(records, "num_records", is_due, self.max_records, row)
        if self.frame_every:
            frame = dict(
                frame_step=state.step,
                frame_energy=state.energy,
                positions=state.positions,
                velocities=state.velocities,
                forces=state.forces,
            )
            if state.cell is not None:
                frame["cell"] = state.cell
            is_due = due & (state.step % self.frame_every == 0)
            records = _write_row(records, "num_frames", is_due, self.max_frames, frame)
        return records

    def _pressure(self, particles, timestep, state: DynamicsState) -> jax.Array:
        """Return the pressure for the barostat's next step, (M,); zero without a barostat."""
        if not self.integrator.needs_stress:
            return jnp.zeros_like(state.energy)
        motion = Motion(state.positions, state.low, state.velocities, state.cell, state.heat)
        return self.integrator.inner_pressure(
            motion, state.forces, state.virial, particles, timestep
        )


def _write_row(
    records: Records, counter: str, due: jax.Array, capacity: int, values: dict[str, jax.Array]
) -> Records:
    """Write values into the next row if `due`, otherwise into the unused last row. In place."""
    count = getattr(records, counter)
    row = jnp.where(due, count, capacity)
    return records._replace(
        **{counter: count + due.astype(jnp.int32)},
        **{
            name: jax.lax.dynamic_update_index_in_dim(getattr(records, name), value, row, 0)
            for name, value in values.items()
        },
    )

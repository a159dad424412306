"""Start of a simulation: momenta of the molecules and state before the first evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import jraph
import numpy as np
from ase import Atoms

from mlip_jax.simulation.dynamics import velocities
from mlip_jax.simulation.dynamics.device.state import NEW, DynamicsState
from mlip_jax.simulation.dynamics.settings import Settings
from mlip_jax.simulation.dynamics.system import System


def initialize_momenta(
    molecules: Sequence[Atoms], settings: Settings, temperatures: np.ndarray
) -> np.ndarray:
    """Draw momenta for molecules without any, or for all, and return the degrees of freedom, (M,).

    Args:
      molecules: Molecules, which receive the momenta.
      settings: Settings of the run.
      temperatures: Temperature of each molecule (K), (M,).
    """
    s, dof = settings, []
    for m, atoms in enumerate(molecules):
        has_momenta = not s.draw_momenta and atoms.has("momenta") and atoms.get_momenta().any()
        # a Langevin thermostat excites rotations again, and given momenta may contain them
        fix_rotation = s.fix_rotation and s.ensemble != "langevin" and not has_momenta
        dof.append(velocities.degrees_of_freedom(atoms, s.fix_com, fix_rotation))
        if not has_momenta:
            start = temperatures[m] if s.initial_temperature is None else s.initial_temperature
            rng = np.random.default_rng([s.seed, m])
            velocities.draw(atoms, start, rng, dof[-1], s.fix_com, fix_rotation)
        elif s.fix_com:
            velocities.stop_center_of_mass(atoms)
    return np.array(dof, np.float64)


def initial_state(system: System, graph: jraph.GraphsTuple, dtype) -> DynamicsState:
    """Return the state before the first evaluation, as NumPy arrays.

    Args:
      system: Molecules with momenta.
      graph: Neighbor list of the initial positions.
      dtype: Dtype of the dynamics.
    """
    positions, num = system.padded("positions", dtype), len(system.molecules)
    real, whole = np.zeros(num, dtype), np.zeros(num, np.int32)
    momenta = system.padded("momenta", np.float64)
    masses = np.asarray(system.particles(np.float64, *[real] * 3, False).masses)
    zeros = np.zeros_like(positions)
    return DynamicsState(
        step=np.int32(NEW),
        positions=positions,
        low=zeros,
        velocities=(momenta / masses[:, None]).astype(dtype),
        forces=zeros,
        virial=real,
        cell=None if system.cell is None else system.cell.astype(dtype),
        energies=zeros[:, 0],
        energy=real,
        heat=real,
        heat_low=real,
        code=whole,
        broken_at=whole,
        culprit=whole - 1,
        graph=graph,
        wanted=np.zeros(3, np.int32),
        lists=np.int32(1),
        stale=np.bool_(False),
    )

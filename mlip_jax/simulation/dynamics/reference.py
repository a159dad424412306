"""Trajectories of the reference method, for comparison with those of a force field."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.constraints import FixCom
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, ZeroRotation
from rich.progress import track

from mlip_jax import workers
from mlip_jax.files import make_subfolder
from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.simulation.dynamics.analysis import SampledTrajectory
from mlip_jax.simulation.dynamics.velocities import maxwell_boltzmann
from mlip_jax.simulation.reference.oracle import Method
from mlip_jax.workdir import atomic_open

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of the reference dynamics.

    Attributes:
      temperature: Temperature (K).
      timestep: Time step (fs).
      friction: Friction coefficient (1/fs).
      num_steps: Number of steps.
      every: Steps between frames.
      seed: Seed of the first molecule; each later one has the next seed.
    """

    temperature: float
    timestep: float
    friction: float
    num_steps: int
    every: int
    seed: int


def reference_trajectories(
    method: Method, molecules: Sequence[Atoms], plan: Plan, folder: Path, num_processes: int | None
) -> list[SampledTrajectory | None]:
    """Run Langevin dynamics of each molecule with `method`.

    Trajectories that `folder` contains from an earlier start are loaded. A molecule at which the
    method failed has None; the log states the reason.

    Args:
      method: Reference method.
      molecules: Initial geometries.
      plan: Settings of the dynamics.
      folder: Folder for the trajectories.
      num_processes: Number of worker processes.
    """
    make_subfolder(folder)
    files = [folder / f"{m}.npz" for m in range(len(molecules))]
    waiting = [m for m, file in enumerate(files) if not file.exists()]
    jobs = [(method, molecules[m], dataclasses.replace(plan, seed=plan.seed + m)) for m in waiting]
    for k, (positions, velocities, error) in track(
        workers.run(_simulate, jobs, num_processes), "reference dynamics", total=len(jobs)
    ):
        if error:
            log.warning("%s failed for molecule %d: %s", method.name, waiting[k], error)
            continue
        with atomic_open(files[waiting[k]]) as file:
            np.savez(
                file,
                positions=positions.astype(np.float32),
                velocities=velocities.astype(np.float32),
            )
    return [
        _load(file, atoms, plan) if file.exists() else None for file, atoms in zip(files, molecules)
    ]


def _simulate(job) -> tuple[np.ndarray, np.ndarray, str]:
    """Return positions and velocities of the frames, (K, n, 3) each, and an error message or "".

    The frames include the start.
    """
    method, molecule, plan = job
    rng, atoms = np.random.default_rng(plan.seed), molecule.copy()
    atoms.calc = method.calculator(atoms)
    atoms.set_momenta(maxwell_boltzmann(atoms.get_masses(), plan.temperature, rng))
    Stationary(atoms)
    if not atoms.pbc.any():
        # linear molecules give values that are not finite and not used
        with np.errstate(invalid="ignore", divide="ignore"):
            ZeroRotation(atoms)
    atoms.set_constraint(FixCom())
    dynamics = Langevin(
        atoms,
        plan.timestep * units.fs,
        temperature_K=plan.temperature,
        friction=plan.friction / units.fs,
        rng=rng,
        fixcm=False,
    )
    positions, velocities = [], []

    def keep():
        positions.append(atoms.positions.copy())
        velocities.append(atoms.get_velocities())

    dynamics.attach(keep, plan.every)
    try:
        dynamics.run(plan.num_steps)
    except Exception as error:  # calculators raise anything
        return (
            np.zeros((0, len(atoms), 3)),
            np.zeros((0, len(atoms), 3)),
            f"{type(error).__name__}: {error}",
        )
    return np.array(positions), np.array(velocities), ""


def _load(path: Path, atoms: Atoms, plan: Plan) -> SampledTrajectory:
    """Load a trajectory from an npz file."""
    with open_npz(path) as file:
        return SampledTrajectory(
            file["positions"].astype(np.float64),
            file["velocities"].astype(np.float64),
            atoms.get_masses(),
            plan.every * plan.timestep,
            atoms.cell.array if atoms.pbc.all() else None,
        )

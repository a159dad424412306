"""Candidates from the current force field: snapshots of hot dynamics and of relaxations.

These reach geometries that the force field itself visits, also those where it is wrong.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms

from mlip_jax.datasets.columns import Columns
from mlip_jax.label_budget.geometry import is_physical, to_atoms
from mlip_jax.potential import Potential
from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.structure import from_ase

log = logging.getLogger(__name__)

DYNAMICS, RELAXATIONS = "md", "relaxations"
_TIMESTEP = 0.5  # fs


class Exploration(NamedTuple):
    """Options of the dynamics and relaxations.

    Attributes:
      kinds: Kinds of candidates: "md", "relaxations".
      num_molecules: Number of molecules per round and kind.
      temperature: Temperature of the dynamics (K).
      md_steps: Number of steps of 0.5 fs per trajectory.
      md_frames: Number of snapshots per trajectory.
      relaxation_steps: Maximum number of steps per relaxation.
      relaxation_frames: Maximum number of snapshots per relaxation.
      seed: Seed.
    """

    kinds: tuple[str, ...]
    num_molecules: int
    temperature: float
    md_steps: int
    md_frames: int
    relaxation_steps: int
    relaxation_frames: int
    seed: int


def explore(potential: Potential, starts: Columns, options: Exploration) -> Columns:
    """Return physical snapshots of dynamics and relaxations from some of the starting structures.

    Args:
      potential: The current force field.
      starts: Structures to start from: intact molecules with elements that the force field knows.
      options: Options.
    """
    rng, structures = np.random.default_rng(options.seed), []
    for kind in (DYNAMICS, RELAXATIONS):
        if kind not in options.kinds or not len(starts):
            continue
        rows = _one_per_molecule(starts, options.num_molecules, rng)
        begin = [to_atoms(starts[row]) for row in rows]
        frames = (_dynamics if kind == DYNAMICS else _relaxations)(potential, begin, options)
        for row, start, trajectory in zip(rows, begin, frames, strict=True):
            molecule = starts[row]
            structures += [
                from_ase(
                    _with_positions(start, positions),
                    molecule=molecule.molecule,
                    smiles=molecule.smiles,
                    conformer=molecule.conformer,
                    subset=kind,
                    source=f"{molecule.molecule} {kind}",
                )
                for positions in trajectory
                if is_physical(start, positions)
            ]
    return Columns.from_structures(structures)


def _one_per_molecule(starts: Columns, count: int, rng: np.random.Generator) -> list[int]:
    """Return a random structure of each of `count` random molecules."""
    order = rng.permutation(len(starts))
    _, first = np.unique(starts.molecule[order].astype(str), return_index=True)
    return sorted(order[rng.permutation(first)[:count]].tolist())


def _dynamics(
    potential: Potential, starts: Sequence[Atoms], options: Exploration
) -> list[list[np.ndarray]]:
    """Return snapshots (Å), (n, 3), of hot dynamics from each structure, without the start."""
    every = max(options.md_steps // max(options.md_frames, 1), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scoring of candidates reports unseen states
        dynamics = MolecularDynamics(
            list(starts),
            potential,
            temperature=options.temperature,
            timestep=_TIMESTEP,
            frame_every=every,
            record_every=every,
            seed=options.seed,
        )
    trajectories = dynamics.run(options.md_steps)
    broken = len(dynamics.broken)
    if broken:
        log.info("hot dynamics: %d of %d molecules broke", broken, len(starts))
    return [[frame.positions for frame in t.frames[1:]] for t in trajectories]


def _relaxations(
    potential: Potential, starts: Sequence[Atoms], options: Exploration
) -> list[list[np.ndarray]]:
    """Return snapshots (Å), (n, 3), of a relaxation of each structure, without the start."""
    every = max(options.relaxation_steps // max(options.relaxation_frames, 1), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        relaxer = Relaxer(
            potential, fmax=0.01, max_steps=options.relaxation_steps, trajectory_every=every
        )
    results = dict(relaxer.stream(enumerate(starts)))
    frames = [results[k].frames or [] for k in range(len(starts))]
    return [[frame.positions for frame in f[1:]] for f in frames]


def _with_positions(atoms: Atoms, positions: np.ndarray) -> Atoms:
    """Return a copy of the atoms at other positions."""
    moved = atoms.copy()
    moved.positions = positions
    return moved

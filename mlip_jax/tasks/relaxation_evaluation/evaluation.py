"""Relaxation of molecules with a force field, and evaluation of the geometries by the oracle."""

from __future__ import annotations

from typing import Any

import ml_collections
import numpy as np
from ase import Atoms
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mlip_jax.datasets.selection.geometry_pools import InitialGeometry
from mlip_jax.potential import Potential
from mlip_jax.reports.force2geo.comparison import EvaluatedForceField, StartMolecules
from mlip_jax.simulation.reference.oracle import Oracle, ReferenceEvaluation
from mlip_jax.simulation.reference.result_cache import ResultCache, key_of
from mlip_jax.wording import count_of

_RELAX = ("optimizer", "fmax", "max_steps", "maxstep", "dtype")
_NO_GEOMETRY = ReferenceEvaluation(
    np.nan, None, "not evaluated: the relaxation returned no geometry"
)


def make_relaxer(potential: Potential, options: ml_collections.ConfigDict) -> Any:
    """Return the batched relaxer of a force field, see simulation/relaxation/relax.py."""
    from mlip_jax.simulation.relaxation.relax import Relaxer

    return Relaxer(
        potential, batch_atoms=options.batch_atoms, **{name: options[name] for name in _RELAX}
    )


def relax(
    name: str,
    potential: Potential,
    starts: list[InitialGeometry],
    options: ml_collections.ConfigDict,
    cache: ResultCache,
) -> dict[str, dict[str, Any]]:
    """Relax molecules with a force field, except those in the cache.

    Returns:
      The result per molecule by name: "status", "reason", "steps", "positions" (None if the
      relaxation failed or they are not finite), and the force field's "energy_start", "energy"
      (eV), "fmax_start" and "fmax" (eV/Å).

    Raises:
      RuntimeError: The relaxation returned no result for a molecule.
    """
    settings = {"force_field": potential.digest()} | {key: options[key] for key in _RELAX}
    keys = {s.name: key_of(settings, s.atoms) for s in starts}
    pending = [s for s in starts if keys[s.name] not in cache]
    bar = Progress(
        TextColumn(f"{name} relaxes"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not pending,
    )
    with bar:
        task = bar.add_task("", total=len(starts), completed=len(starts) - len(pending))
        relaxer = make_relaxer(potential, options) if pending else None
        for key, result in (
            relaxer.stream((s.name, s.atoms.copy()) for s in pending) if pending else ()
        ):
            cache.add(keys[key], _to_plain(result))
            bar.advance(task)
    missing = [s.name for s in starts if keys[s.name] not in cache]
    if missing:
        raise RuntimeError(
            f"{name}: the relaxation returned no result for {count_of(len(missing), 'molecule')}, "
            f"the first is {missing[0]}"
        )
    return {s.name: cache[keys[s.name]] for s in starts}


def _to_plain(result) -> dict[str, Any]:
    """Return the result of a relaxation as plain values for the cache."""
    positions = result.atoms.positions
    has_geometry = result.status != "failed" and np.isfinite(positions).all()
    return {
        "status": result.status,
        "reason": result.reason,
        "steps": int(result.steps),
        "positions": positions.tolist() if has_geometry else None,
        **{
            key: float(getattr(result, key))
            for key in ("energy_start", "energy", "fmax_start", "fmax")
        },
    }


def evaluate_starts(oracle: Oracle, starts: list[InitialGeometry], config) -> StartMolecules:
    """Compute the oracle's energies of the start geometries and of the minima to compare with.

    The latter are the reference geometries of the data, or the oracle's own minima.
    """
    atoms = {s.name: s.atoms for s in starts}
    at_start = oracle.evaluate(atoms, "oracle: starts")
    if config.data.reference == "data":
        at_end = oracle.evaluate(
            {s.name: _with_positions(s, s.reference) for s in starts},
            "oracle: reference geometries",
        )
    else:
        at_end = oracle.minimize(
            atoms,
            fmax=config.oracle.fmax,
            max_steps=config.oracle.max_steps,
            label="oracle: minima of the oracle",
        )
    return StartMolecules(
        starts,
        *([results[s.name] for s in starts] for results in (at_start, at_end)),
        oracle=oracle.method.name,
    )


def evaluate_relaxed(
    oracle: Oracle, name: str, starts: list[InitialGeometry], relaxed: dict[str, dict[str, Any]]
) -> EvaluatedForceField:
    """Compute the oracle's energies and forces at the relaxed geometries of a force field."""
    geometries = {
        s.name: _with_positions(s, relaxed[s.name]["positions"])
        for s in starts
        if relaxed[s.name]["positions"] is not None
    }
    results = oracle.evaluate(geometries, f"oracle: geometries relaxed by {name}")
    return EvaluatedForceField(
        name, [relaxed[s.name] for s in starts], [results.get(s.name, _NO_GEOMETRY) for s in starts]
    )


def _with_positions(start: InitialGeometry, positions) -> Atoms:
    """Return the atoms of a start with other positions (Å)."""
    atoms = start.atoms.copy()
    atoms.positions = np.reshape(positions, (-1, 3))
    return atoms

"""Task `force2geo_eval`: relax unseen molecules with force fields and evaluate the geometries.

A reference method, the oracle, computes the energies and forces by which they are evaluated.
"""

from __future__ import annotations

import collections
import json
import logging
from pathlib import Path
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

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers, source
from mlip_jax.datasets.molecules import files
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import initial_geometries
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.selection.initial_geometries import (
    FileStarts,
    SmilesStarts,
    Start,
    StoreStarts,
)
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.reports.force2geo.report import EvaluatedForceField, StartMolecules, write_report
from mlip_jax.simulation.reference.oracle import Method, Oracle, ReferenceEvaluation
from mlip_jax.simulation.reference.result_cache import ResultCache, key_of
from mlip_jax.simulation.relaxation.metrics import Limits
from mlip_jax.workdir import claimed, write_json

log = logging.getLogger(__name__)

_RELAX = ("optimizer", "fmax", "max_steps", "maxstep", "dtype")
_NO_GEOMETRY = ReferenceEvaluation(np.nan, None, "not asked: the relaxation gave no geometry")


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Evaluate force fields by `config`, or resume a run in `workdir`; return the report's path.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, OracleError, ImportError: The
        message explains how to fix the problem.
    """
    config = configs.complete(config, defaults.force2geo_defaults())
    paths = force_fields(config.force_field)
    limits = Limits(config.metrics.chemical_accuracy, config.metrics.fmax, config.metrics.min_gap)
    method = Method(config.oracle.method, source.reader_options(config.oracle.options))
    _check(config)
    with claimed(workdir, configs.identity(config)) as folder:
        potentials = {name: load_force_field(path) for name, path in paths.items()}
        starts, notes = _starts(config, folder, paths, potentials)
        with (
            ResultCache(config.oracle.cache or folder / "oracle.jsonl") as results,
            ResultCache(folder / "relaxations.jsonl") as relaxations,
        ):
            oracle = Oracle(method, results, num_processes=config.oracle.num_processes or None)
            molecules = judge_starts(oracle, starts, config)
            evaluated = [
                judge(
                    oracle, name, starts, relax(name, potential, starts, config.relax, relaxations)
                )
                for name, potential in potentials.items()
            ]
        notes += _levels(potentials, method.name)
        report = write_report(
            folder,
            molecules,
            evaluated,
            limits,
            notes=notes,
            num_bootstrap=config.metrics.num_bootstrap,
            seed=config.seed,
            info=_info(config, method, paths, potentials),
        )
    log.info("report: %s", report)
    return report


def force_fields(text: str | None) -> dict[str, str]:
    """Parse a list of force fields and return {name: path}.

    A path is a workdir or anything else that `importers.load_force_field` loads.

    >>> force_fields("runs/spice, painn=runs/spice_painn")
    {'spice': 'runs/spice', 'painn': 'runs/spice_painn'}

    Raises:
      ConfigError: There is no path, or two force fields have the same name.
    """
    paths: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        name, equals, path = (p.strip() for p in part.rpartition("="))
        name = name or Path(path).name
        if not path or name in paths:
            raise ConfigError(
                f"force_field: expected 'path' or 'name=path,name2=path2' with different names; received "
                f"{text!r}"
            )
        paths[name] = path
    if not paths:
        raise ConfigError(
            "force_field: give the workdir of a training run, --config.force_field=runs/spice, or "
            "several as name=path,name2=path2"
        )
    return paths


def _check(config) -> None:
    if config.data.reference == "data" and not config.data.reference_stage:
        raise ConfigError(
            "data.reference='data' takes the last snapshot of data.reference_stage, which is not given"
        )


# --- Molecules ---


def _starts(config, folder: Path, paths, potentials) -> tuple[list[Start], list[str]]:
    """Return the molecules of this run and notes about them for the report.

    They are chosen once and stored in starts.json.
    """
    kept = folder / "starts.json"
    if kept.exists():
        values = json.loads(kept.read_text())
        return [Start.from_json(v) for v in values["molecules"]], values["notes"]
    notes: list[str] = []
    processes = config.oracle.num_processes or None
    runs = _runs(paths, config.data, notes)
    choice = initial_geometries.MoleculeSelection(
        count=config.data.num_molecules,
        selection=config.data.selection,
        first=config.data.first,
        seed=config.seed,
        elements=frozenset.intersection(*(frozenset(p.elements) for p in potentials.values())),
        seen=_seen(runs, notes, processes),
        allow_seen=config.data.allow_seen,
    )
    starts, left_out = initial_geometries.choose(_pool(config, runs), choice, processes)
    for reason, count in collections.Counter(left_out.values()).most_common(10):
        notes.append(f"Molecules left out because {reason}: {count:,}.")
    seen = sum(s.seen for s in starts)
    if seen:
        notes.insert(
            0,
            f"{seen:,} of {len(starts):,} molecules were in the training or validation part of a force "
            "field (data.allow_seen): this is no test of unseen molecules.",
        )
    if len(starts) < config.data.num_molecules and config.data.selection != "all":
        notes.append(
            f"There are {len(starts):,} molecules; {config.data.num_molecules:,} were asked for."
        )
    for note in notes:
        log.warning("%s", note)
    write_json(folder / "left_out.json", left_out)
    write_json(kept, {"molecules": [s.to_json() for s in starts], "notes": notes})
    return [Start.from_json(s.to_json()) for s in starts], notes


def _runs(paths, data, notes) -> dict[str, RunData]:
    """Return the training data of each force field by name.

    Add a note if the data of a force field cannot be found; raise DatasetError if its test split is
    required.
    """
    runs = {}
    for name, path in paths.items():
        try:
            runs[name] = RunData.load(path)
        except DatasetError as error:
            if not data.path and not runs:
                raise DatasetError(
                    f"{error} Or give molecules to judge by as config.data.path."
                ) from error
            notes.append(
                f"What {name} was trained on is not known, so that these molecules may be among it: {error}"
            )
    return runs


def _seen(runs: dict[str, RunData], notes, num_processes) -> frozenset[str]:
    """Return skeletons of all molecules in training and validation splits of the force fields."""
    skeletons: set[str] = set()
    for name, data in runs.items():
        log.info("%s: comparing the molecules that it was trained on", name)
        found, unread = data.seen_skeletons(num_processes)
        skeletons |= found
        if unread:
            notes.append(
                f"RDKit cannot read {unread:,} of the molecules that {name} was trained on: they may be among "
                "these."
            )
    return frozenset(skeletons)


def _pool(config, runs: dict[str, RunData]) -> StoreStarts | SmilesStarts | FileStarts:
    """Return the source of molecules: a file, a data set, or the test split of a force field."""
    data = config.data.copy_and_resolve_references()
    reference_stage = data.reference_stage if data.reference == "data" else None
    if data.path and not data.stage and not reference_stage and _is_plain(data):
        is_smiles = files.kind_of(data.path) in initial_geometries.SMILES_FILES
        return (SmilesStarts if is_smiles else FileStarts)(data.path, config.seed)
    if data.path:
        loaded = source.load(data)
        return StoreStarts(loaded.store, loaded.indices, data.stage, reference_stage)
    own = next(iter(runs.values()))
    data.path = str(own.store.path)
    loaded = source.load(data)
    held_out = np.intersect1d(loaded.indices, own.held_out())
    if not len(held_out):
        raise DatasetError(
            f"{own.workdir}: no molecule is in the test part of its data alone. Give molecules to judge "
            "by as config.data.path."
        )
    return StoreStarts(loaded.store, held_out, data.stage, reference_stage)


def _is_plain(data) -> bool:
    """Return whether data.path is a plain file of molecules, not a data set with conformers."""
    path = Path(data.path)
    if data.reader != "auto" or data.reader_options or not path.is_file():
        return False
    if files.kind_of(path) in (*initial_geometries.SMILES_FILES, "sdf"):
        return True
    return readers.detect(path) == "ase"


# --- Relaxation and evaluation ---


def make_relaxer(potential: Potential, options: ml_collections.ConfigDict) -> Any:
    """Return the batched relaxer of a force field, see simulation/relaxation/relax.py."""
    from mlip_jax.simulation.relaxation.relax import Relaxer

    return Relaxer(
        potential, batch_atoms=options.batch_atoms, **{name: options[name] for name in _RELAX}
    )


def relax(
    name: str,
    potential: Potential,
    starts: list[Start],
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
    waiting = [s for s in starts if keys[s.name] not in cache]
    bar = Progress(
        TextColumn(f"{name} relaxes"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not waiting,
    )
    with bar:
        task = bar.add_task("", total=len(starts), completed=len(starts) - len(waiting))
        relaxer = make_relaxer(potential, options) if waiting else None
        for key, found in (
            relaxer.stream((s.name, s.atoms.copy()) for s in waiting) if waiting else ()
        ):
            cache.add(keys[key], _plain(found))
            bar.advance(task)
    missing = [s.name for s in starts if keys[s.name] not in cache]
    if missing:
        raise RuntimeError(
            f"{name}: the relaxation says nothing of {len(missing)} molecules, the first {missing[0]}"
        )
    return {s.name: cache[keys[s.name]] for s in starts}


def _plain(found) -> dict[str, Any]:
    """Return the result of a relaxation as plain values for the cache."""
    positions = found.atoms.positions
    has_geometry = found.status != "failed" and np.isfinite(positions).all()
    return {
        "status": found.status,
        "reason": found.reason,
        "steps": int(found.steps),
        "positions": positions.tolist() if has_geometry else None,
        **{
            key: float(getattr(found, key))
            for key in ("energy_start", "energy", "fmax_start", "fmax")
        },
    }


def judge_starts(oracle: Oracle, starts: list[Start], config) -> StartMolecules:
    """Compute the oracle's energies of the start geometries and of the minima to compare with.

    The latter are the reference geometries of the data, or the oracle's own minima.
    """
    atoms = {s.name: s.atoms for s in starts}
    at_start = oracle.evaluate(atoms, "oracle: starts")
    if config.data.reference == "data":
        at_end = oracle.evaluate(
            {s.name: _moved(s, s.reference) for s in starts}, "oracle: reference geometries"
        )
    else:
        at_end = oracle.minimize(
            atoms,
            fmax=config.oracle.fmax,
            max_steps=config.oracle.max_steps,
            label="oracle: its own minima",
        )
    return StartMolecules(
        starts,
        *([found[s.name] for s in starts] for found in (at_start, at_end)),
        oracle=oracle.method.name,
    )


def judge(
    oracle: Oracle, name: str, starts: list[Start], relaxed: dict[str, dict[str, Any]]
) -> EvaluatedForceField:
    """Compute the oracle's energies and forces at the relaxed geometries of a force field."""
    moved = {
        s.name: _moved(s, relaxed[s.name]["positions"])
        for s in starts
        if relaxed[s.name]["positions"] is not None
    }
    found = oracle.evaluate(moved, f"oracle: where {name} ends")
    return EvaluatedForceField(
        name, [relaxed[s.name] for s in starts], [found.get(s.name, _NO_GEOMETRY) for s in starts]
    )


def _moved(start: Start, positions) -> Atoms:
    atoms = start.atoms.copy()
    atoms.positions = np.reshape(positions, (-1, 3))
    return atoms


# --- Notes and settings for the report ---


def _levels(potentials: dict[str, Potential], oracle: str) -> list[str]:
    """Return a note per force field whose level of theory differs from the oracle's."""
    notes = []
    for name, potential in potentials.items():
        level = potential.metadata.get("statistics", {}).get("level_of_theory", "unknown")
        if oracle.lower() not in level.lower():
            notes.append(
                f"{name} was trained on labels of {level}, and the oracle is {oracle}: where the two differ, "
                "a perfect force field has errors in this report."
            )
    return notes


def _info(config, method, paths, potentials) -> dict[str, dict[str, Any]]:
    of_data = (
        "path",
        "stage",
        "reference",
        "reference_stage",
        "selection",
        "num_molecules",
        "first",
        "allow_seen",
    )
    info = {
        "molecules": {key: config.data[key] for key in of_data} | {"seed": config.seed},
        "relaxation": dict(config.relax),
        "oracle": dict(config.oracle) | {"version": method.settings()["version"]},
    }
    info = {
        name: {k: "unset" if v is None else v for k, v in items.items()}
        for name, items in info.items()
    }
    for name, potential in potentials.items():
        model = (potential.metadata.get("config") or {}).get("model", {})
        info[f"force field {name}"] = {
            "workdir": paths[name],
            "model": model.get("name"),
            "digest of parameters": potential.digest(),
            "labels": potential.metadata.get("statistics", {}).get("level_of_theory", "unknown"),
        }
    return info

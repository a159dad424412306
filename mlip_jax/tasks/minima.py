"""Task `minima`: search the energy minima of molecules and compare them with a reference method."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import logging
import platform
from pathlib import Path
from typing import IO, Any

import jax
import ml_collections
from ase.io import write

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.datasets.molecules.files import CsvColumns, fingerprint, kind_of, read_molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.reports.minima import MoleculeMinima, ReferenceMinimum, write_minima_report
from mlip_jax.simulation.reference.oracle import Method, Oracle
from mlip_jax.simulation.reference.result_cache import ResultCache
from mlip_jax.simulation.relaxation.minima import SearchOptions, find_minima
from mlip_jax.workdir import atomic_open, check_origin, claimed, write_json, write_text

log = logging.getLogger(__name__)

TABLE, FRAMES, PARTS = "minima.csv", "minima.xyz", "parts"
_COLUMNS = (
    "molecule",
    "name",
    "rank",
    "energy_ev",
    "relative_energy_ev",
    "found_in_round",
    "times_found",
)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Search minima of the molecules of `config`, or resume in `workdir`; return the report's path.

    Molecules that cannot be read or embedded are reported and skipped.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, OracleError, ValueError: The message
        explains how to fix the problem.
    """
    config = configs.complete(config, defaults.minima_defaults())
    search = _checked(config)
    with claimed(workdir, configs.identity(config)) as workdir:
        potential = load_force_field(config.force_field)
        check_origin(
            workdir / "origin.json",
            {"input": fingerprint(config.input), "force_field": potential.digest()},
            "minima of other molecules or with another force field",
        )
        molecules = _searched(config, workdir / PARTS, potential, search)
        with atomic_open(workdir / FRAMES, "w", encoding="utf-8") as file:
            _write_frames(file, molecules)
        write_text(workdir / TABLE, _table(molecules))
        report = write_minima_report(
            workdir,
            molecules,
            _judged(config, workdir, molecules),
            title=f"Minima by {Path(config.force_field).name}",
            info=_info(config, potential),
            files=[FRAMES, TABLE],
        )
        log.info("report: %s", report)
        return report


def _checked(c) -> SearchOptions:
    """Check the config and return the options of the search."""
    for name, example in (("force_field", "runs/spice"), ("input", "molecules.smi")):
        if not c[name]:
            raise ConfigError(f"{name} is not given: --config.{name}={example}")
    if c.judged:
        _method(c)
    if distributed.count() > 1:
        raise ConfigError(f"the search runs in one process, this run has {distributed.count()}")
    try:
        return SearchOptions(**c.search.to_dict())
    except ValueError as error:
        raise ConfigError(f"search: {error}") from error


def _method(c) -> Method:
    return Method(c.oracle.method, source.reader_options(c.oracle.options))


# --- Search, in batches of molecules ---


def _searched(
    config, folder: Path, potential: Potential, search: SearchOptions
) -> list[MoleculeMinima]:
    """Search all molecules of the file; each batch is saved to disk when it is complete."""
    folder.mkdir(exist_ok=True)
    found: list[MoleculeMinima] = []
    groups = (
        (number, list(records))
        for number, records in itertools.groupby(
            _records(config), key=lambda record: record.index // _each(config)
        )
    )
    for number, batch in enumerate(iter(lambda: list(itertools.islice(groups, config.batch)), [])):
        path = folder / f"{number:06d}.json"
        if not path.exists():
            write_json(path, [m.to_json() for m in _search(batch, potential, search)])
        found += [MoleculeMinima.from_json(m) for m in json.loads(path.read_text())]
        log.info("%d molecules done: %d minima", len(found), sum(len(m.minima) for m in found))
    if not any(m.minima for m in found):
        why = found[0].failure or f"left out: {found[0].left_out}" if found else "it holds none"
        raise DatasetError(
            f"{config.input}: no minimum of any molecule was found; the first: {why}"
        )
    return found


def _each(config) -> int:
    """Return the number of starting geometries per molecule: 1 unless the input is SMILES."""
    return config.geometries if kind_of(config.input) in ("smi", "csv") else 1


def _records(config):
    return read_molecules(
        config.input,
        num_conformers=_each(config),
        mmff=config.mmff,
        seed=config.search.seed,
        limit=config.limit,
        columns=CsvColumns(config.smiles_column, config.name_column),
    )


def _search(batch, potential: Potential, search: SearchOptions) -> list[MoleculeMinima]:
    """Search one batch of molecules, given as (number, records) pairs."""
    made, starts = [], []
    for number, records in batch:
        geometries = [r.atoms for r in records if r.atoms is not None]
        first = next((r for r in records if r.atoms is not None), records[0])
        failure = "" if geometries else first.failure
        if geometries:
            try:
                potential.check_elements(geometries[0].numbers)
            except ValueError as error:
                failure = str(error)
        if failure:
            log.warning("molecule %d is left out: %s", number, failure)
        else:
            starts.append([_with_smiles(atoms, first.smiles) for atoms in geometries])
        made.append((number, first, failure))
    found = iter(find_minima(starts, potential, **dataclasses.asdict(search)) if starts else [])
    return [
        MoleculeMinima.of(
            number,
            first.name or first.smiles or f"molecule {number}",
            failure,
            None if failure else next(found),
        )
        for number, first, failure in made
    ]


def _with_smiles(atoms, smiles: str):
    """Return a copy with its SMILES, from which the search infers bond orders and symmetries."""
    atoms = atoms.copy()
    atoms.info["smiles"] = smiles
    return atoms


# --- Output ---


def _table(molecules: list[MoleculeMinima]) -> str:
    """Return the text of minima.csv."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for m in molecules:
        for rank, minimum in enumerate(m.minima):
            table.writerow(
                [
                    m.number,
                    m.name,
                    rank,
                    minimum.energy,
                    minimum.energy - m.minima[0].energy,
                    minimum.round,
                    minimum.times,
                ]
            )
    return text.getvalue()


def _write_frames(file: IO[str], molecules: list[MoleculeMinima]) -> None:
    """Write all minima as extended XYZ frames."""
    for m in molecules:
        for rank, minimum in enumerate(m.minima):
            atoms = minimum.to_atoms(m)
            atoms.info |= {
                "molecule": m.number,
                "name": m.name,
                "rank": rank,
                "relative_energy_ev": minimum.energy - m.minima[0].energy,
            }
            write(file, atoms, format="extxyz")


def _judged(config, workdir: Path, molecules: list[MoleculeMinima]) -> list[ReferenceMinimum]:
    """Evaluate and relax the lowest minima of each molecule with the reference method.

    Return an empty list if config.judged is zero.
    """
    if not config.judged:
        return []
    oracle = Oracle(
        _method(config),
        ResultCache(workdir / "oracle.jsonl"),
        num_processes=config.oracle.num_processes or None,
    )
    chosen = {
        f"{m.number}-{rank}": minimum.to_atoms(m)
        for m in molecules
        for rank, minimum in enumerate(m.minima[: config.judged])
    }
    there = oracle.evaluate(chosen, label="energies of the minima")
    relaxed = oracle.minimize(
        chosen,
        fmax=config.search.fmax,
        max_steps=config.search.max_steps,
        label="minima of the reference method",
    )
    return [
        ReferenceMinimum(
            m,
            rank,
            there[key].energy,
            relaxed[key].energy if relaxed[key].converged else float("nan"),
        )
        for m in molecules
        for rank in range(min(len(m.minima), config.judged))
        for key in [f"{m.number}-{rank}"]
    ]


def _info(config, potential: Potential) -> dict[str, dict[str, Any]]:
    plain = configs.to_dict(config)
    return {
        "Molecules": {
            "input": config.input,
            **fingerprint(config.input),
            "geometries of each": _each(config),
        },
        "Force field": {
            "from": config.force_field,
            "digest": potential.digest(),
            "forces": potential.origin_of_forces,
            "cutoff (Å)": potential.cutoff,
            "level of theory": potential.metadata.get("statistics", {}).get(
                "level_of_theory", "unknown"
            ),
        },
        "Search (eV, Å, K, ps)": {k: str(v) for k, v in plain["search"].items()},
        "Hardware": {"device": jax.devices()[0].device_kind, "system": platform.platform()},
    }

"""Task `crystal`: relaxed cells, equations of state and phonons of the crystals of a file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from ase.io import write

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules.files import fingerprint, read_molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.files import make_subfolder, write_joined
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.foreign_text import table_text
from mlip_jax.importers.catalog.published_list import LIST_COMMAND, find
from mlip_jax.potential import Potential
from mlip_jax.reports.simulations.crystal import ReportedCrystal, write_crystal_report
from mlip_jax.reports.simulations.run_settings import run_settings
from mlip_jax.simulation.crystals.analysis import (
    IMAGINARY,
    CrystalAnalysis,
    CrystalOptions,
    analyze_crystals,
)
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.workdir import atomic_open, check_origin, claimed, write_json, write_text

log = logging.getLogger(__name__)

TABLE, VOLUMES, PHONONS, PARTS = "crystals.csv", "equations_of_state.csv", "phonons", "parts"
RELAXED = "relaxed.xyz"


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Analyze the crystals of `config`, or resume in `workdir`; return the path of the report.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, ValueError: The message explains how
        to fix the problem.
      RuntimeError: No crystal has a result. Tables and report are written before.
    """
    config = configs.complete(config, defaults.crystal_defaults())
    options = _check(config)
    with claimed(workdir, configs.identity(config)) as workdir:
        potential = load_mean_force_field(config.force_field)
        check_origin(
            workdir / "origin.json",
            {"input": fingerprint(config.input), "force_field": potential.digest()},
            "properties of other crystals or with another force field",
        )
        records = list(read_molecules(config.input, limit=config.limit, num_processes=1))
        if not records:
            raise DatasetError(f"{config.input}: contains no crystals")
        _analyze_all(config, workdir, potential, options, records)
        results = [
            ReportedCrystal(**parse_json(read_bytes(_part(workdir, record)))) for record in records
        ]
        _write_tables(workdir, results)
        _write_structures(workdir, records)
        report = write_crystal_report(
            workdir,
            results,
            title=f"Crystals by {Path(config.force_field).name}",
            info=run_settings(config, potential, "Crystals"),
            files=[TABLE, VOLUMES, RELAXED, f"{PHONONS}/"],
            imaginary=IMAGINARY,
        )
        log.info("report: %s", report)
        if all(r.reason for r in results):
            raise RuntimeError(
                f"all {len(results)} crystals failed: see the reasons in {workdir / TABLE}"
            )
        return report


def _check(c) -> CrystalOptions:
    """Check the config and return the options of the analysis."""
    if not c.force_field:
        raise ConfigError(
            "force_field is required; that of the package is for molecules. Examples: "
            f"--config.force_field=sevennet-0 ({find('sevennet-0').source}), or the workdir of a "
            f"training run, --config.force_field=runs/salts. {LIST_COMMAND}"
        )
    if not c.input:
        raise ConfigError("input is required, e.g. --config.input=crystals.xyz")
    if distributed.count() > 1:
        raise ConfigError(
            f"crystals are analyzed in one process, but this run has {distributed.count()}"
        )
    try:
        return CrystalOptions(**{f.name: c[f.name] for f in dataclasses.fields(CrystalOptions)})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _part(workdir: Path, record: MoleculeRecord, suffix: str = "json") -> Path:
    return workdir / PARTS / f"{record.index:06d}.{suffix}"


def _analyze_all(config, workdir: Path, potential: Potential, options, records) -> None:
    """Analyze the crystals that have no result in the workdir, and write each when it is done."""
    for folder in (PARTS, PHONONS):
        make_subfolder(workdir / folder)
    missing = [record for record in records if not _part(workdir, record).exists()]
    if len(missing) < len(records):
        log.info("resuming: %d of %d crystals are done", len(records) - len(missing), len(records))
    by_index = {record.index: record for record in missing}
    given = {record.index: record.atoms for record in missing if record.atoms is not None}
    for record in missing:
        if record.atoms is None:
            _save(workdir, record, CrystalAnalysis(None, record.failure))
    trusted = TrustCheck.load(config.force_field, potential)
    for index, result in analyze_crystals(given, potential, options):
        name = by_index[index].display_name
        outside = "" if result.reason else trusted.reasons([result.atoms])[0]
        if outside:
            log.warning("%s is outside the domain of the force field: %s", name, outside)
        if result.remark:
            log.warning("%s: %s", name, result.remark)
        _save(workdir, by_index[index], result, outside)
        log.info(
            "%s: %s",
            name,
            result.reason
            or f"bulk modulus {result.eos.bulk_modulus if result.eos else np.nan:.4g} GPa, lowest "
            f"phonon {result.lowest_frequency:.3g} THz",
        )


def _save(
    workdir: Path, record: MoleculeRecord, result: CrystalAnalysis, outside: str = ""
) -> None:
    """Write the result of a crystal, its relaxed structure and its phonons."""
    values: dict[str, Any] = {
        "index": record.index,
        "name": record.display_name,
        "reason": result.reason,
    }
    if not result.reason:
        atoms, eos, bands = result.atoms, result.eos, result.bands
        values |= {
            "remark": result.remark,
            "outside_domain": outside,
            "n_atoms": len(atoms),
            "energy": result.energy,
            "cell": atoms.cell.cellpar().tolist(),
            "volume": atoms.cell.volume,
            "volumes": result.volumes.tolist(),
            "energies": result.energies.tolist(),
            "zero_point_energy": result.zero_point_energy,
            "heat_capacity": result.heat_capacity,
            "supercell": list(result.supercell),
            "supercell_spacing": result.supercell_spacing,
            "interaction_range": result.interaction_range,
            "lowest_frequency": result.lowest_frequency,
        }
        if eos is not None:
            grid = np.linspace(result.volumes.min(), result.volumes.max(), 100)
            values |= {"bulk_modulus": eos.bulk_modulus, "derivative": eos.derivative}
            values["curve"] = [grid.tolist(), eos.energies(grid).tolist()]
        if bands is not None:
            values |= {"distances": bands.distances.tolist(), "ticks": bands.ticks}
            values["bands"] = bands.frequencies.tolist()
            with atomic_open(workdir / PHONONS / f"{record.index:06d}.npz") as file:
                np.savez(file, distances=bands.distances, path=bands.frequencies, mesh=bands.mesh)
        with atomic_open(_part(workdir, record, "xyz"), "w") as file:
            write(file, atoms, format="extxyz")
    write_json(_part(workdir, record), values)


def _write_structures(workdir: Path, records: Sequence[MoleculeRecord]) -> None:
    """Write the relaxed crystals into one file, in the order of the input."""
    write_joined(workdir / RELAXED, [_part(workdir, record, "xyz") for record in records])


def _write_tables(workdir: Path, results: Sequence[ReportedCrystal]) -> None:
    """Write the tables of the crystals and of their equations of state."""
    columns = {
        "index": "index",
        "name": "name",
        "reason": "reason",
        "n_atoms": "n_atoms",
        "energy_ev": "energy",
        "volume_ang3": "volume",
        "bulk_modulus_gpa": "bulk_modulus",
        "bulk_modulus_derivative": "derivative",
        "lowest_frequency_thz": "lowest_frequency",
        "zero_point_energy_ev": "zero_point_energy",
        "heat_capacity_kb": "heat_capacity",
        "supercell_spacing_ang": "supercell_spacing",
        "interaction_range_ang": "interaction_range",
    }
    rows = [
        [*(getattr(r, field) for field in columns.values()), int(bool(r.outside_domain))]
        for r in results
    ]
    write_text(workdir / TABLE, table_text([*columns, "outside_domain"], rows))
    points = [
        (r.index, r.name, volume, energy)
        for r in results
        for volume, energy in zip(r.volumes, r.energies)
    ]
    write_text(workdir / VOLUMES, table_text(["index", "name", "volume_ang3", "energy_ev"], points))

"""Task `minima`: search the energy minima of molecules and compare them with a reference method."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
from pathlib import Path
from typing import IO, Any

import ml_collections
from ase.io import write

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.datasets.molecules.config_input import read_input
from mlip_jax.datasets.molecules.files import fingerprint, kind_of
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.files import make_subfolder
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.foreign_text import TableWriter, one_line
from mlip_jax.potential import Potential
from mlip_jax.reports.minima.report import write_minima_report
from mlip_jax.reports.minima.results import MoleculeMinima, ReferenceMinimum
from mlip_jax.reports.simulations.run_settings import run_settings
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.reference.oracle import Method, Oracle
from mlip_jax.simulation.reference.result_cache import ResultCache
from mlip_jax.simulation.relaxation.minima import SearchOptions, find_minima
from mlip_jax.simulation.user_warnings import domain_in_log
from mlip_jax.wording import count_of
from mlip_jax.workdir import atomic_open, check_origin, claimed, write_json, write_text

log = logging.getLogger(__name__)

TABLE, FRAMES, PARTS = "minima.csv", "minima.xyz", "parts"
_COLUMNS = (
    "molecule",
    "name",
    "rank",
    "energy_ev",
    "relative_energy_ev",
    "relative_energy_kcal_mol",
    "population",
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
    search = _check(config)
    with claimed(workdir, configs.identity(config)) as workdir, domain_in_log():
        potential = load_mean_force_field(config.force_field)
        check_origin(
            workdir / "origin.json",
            {"input": fingerprint(config.input), "force_field": potential.digest()},
            "minima of other molecules or with another force field",
        )
        molecules = _search_all(config, workdir / PARTS, potential, search)
        minima = [minimum.to_atoms(m) for m in molecules for minimum in m.minima]
        if message := TrustCheck.load(config.force_field, potential).message(minima, "minima"):
            log.warning("%s", message)
        with atomic_open(workdir / FRAMES, "w", encoding="utf-8") as file:
            _write_frames(file, molecules)
        write_text(workdir / TABLE, _table(molecules, config.population_temperature))
        report = write_minima_report(
            workdir,
            molecules,
            _evaluate_lowest(config, workdir, molecules),
            title=f"Minima by {Path(config.force_field).name}",
            info=_settings(config, potential),
            files=[FRAMES, TABLE],
            temperature=config.population_temperature,
            notes=[message] if message else [],
        )
        log.info("report: %s", report)
        return report


def _check(c) -> SearchOptions:
    """Check the config and return the options of the search."""
    for name, example in (("force_field", "runs/spice"), ("input", "molecules.smi")):
        if not c[name]:
            raise ConfigError(f"{name} is required, e.g. --config.{name}={example}")
    if c.num_reference_minima:
        _method(c)
    if distributed.count() > 1:
        raise ConfigError(f"the search runs in one process, but this run has {distributed.count()}")
    try:
        return SearchOptions(**c.search.to_dict())
    except ValueError as error:
        raise ConfigError(f"search: {error}") from error


def _method(c) -> Method:
    return Method(c.oracle.method, source.reader_options(c.oracle.options))


# --- Search, in batches of molecules ---


def _search_all(
    config, folder: Path, potential: Potential, search: SearchOptions
) -> list[MoleculeMinima]:
    """Search all molecules of the file; each batch is saved to disk when it is complete."""
    make_subfolder(folder)
    molecules: list[MoleculeMinima] = []
    groups = (
        (number, list(records))
        for number, records in itertools.groupby(
            _records(config), key=lambda record: record.index // _geometries_per_molecule(config)
        )
    )
    for number, batch in enumerate(
        iter(lambda: list(itertools.islice(groups, config.batch_molecules)), [])
    ):
        path = folder / f"{number:06d}.json"
        if not path.exists():
            write_json(path, [m.to_json() for m in _search(batch, potential, search)])
        molecules += [MoleculeMinima.from_json(m) for m in parse_json(read_bytes(path))]
        log.info(
            "%s done: %s",
            count_of(len(molecules), "molecule"),
            count_of(sum(len(m.minima) for m in molecules), "minimum"),
        )
    if not any(m.minima for m in molecules):
        reason = "the file contains no molecules"
        if molecules:
            first = molecules[0]
            reason = f"the first: {first.failure or f'rejected geometries: {first.left_out}'}"
        raise DatasetError(f"{config.input}: no minimum of any molecule was found; {reason}")
    return molecules


def _geometries_per_molecule(config) -> int:
    """Return the number of starting geometries per molecule: 1 unless the input is SMILES."""
    return config.num_conformers if kind_of(config.input) in ("smi", "csv") else 1


def _records(config):
    return read_input(
        config, num_conformers=_geometries_per_molecule(config), seed=config.search.seed
    )


def _search(batch, potential: Potential, search: SearchOptions) -> list[MoleculeMinima]:
    """Search one batch of molecules, given as (number, records) pairs."""
    outcomes, starts = [], []
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
            log.warning("%s skipped: %s", first.display_name, failure)
        else:
            starts.append([_with_smiles(atoms, first.smiles) for atoms in geometries])
        outcomes.append((number, first, failure))
    minima = iter(find_minima(starts, potential, **dataclasses.asdict(search)) if starts else [])
    return [
        MoleculeMinima.from_result(
            number, first.display_name, failure, None if failure else next(minima)
        )
        for number, first, failure in outcomes
    ]


def _with_smiles(atoms, smiles: str):
    """Return a copy with its SMILES, from which the search infers bond orders and symmetries."""
    atoms = atoms.copy()
    atoms.info["smiles"] = smiles
    return atoms


# --- Output ---


def _table(molecules: list[MoleculeMinima], temperature: float) -> str:
    """Return the text of minima.csv, with populations at a temperature (K)."""
    text = io.StringIO()
    table = TableWriter(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for m in molecules:
        energies, populations = m.relative_energies(), m.populations(temperature)
        for rank, minimum in enumerate(m.minima):
            table.writerow(
                [
                    m.number,
                    m.name,
                    rank,
                    minimum.energy,
                    minimum.energy - m.minima[0].energy,
                    energies[rank],
                    populations[rank],
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
                "name": one_line(m.name),
                "rank": rank,
                "relative_energy_ev": minimum.energy - m.minima[0].energy,
            }
            write(file, atoms, format="extxyz")


def _evaluate_lowest(
    config, workdir: Path, molecules: list[MoleculeMinima]
) -> list[ReferenceMinimum]:
    """Evaluate and relax the lowest minima of each molecule with the reference method.

    Return an empty list if config.num_reference_minima is zero.
    """
    if not config.num_reference_minima:
        return []
    oracle = Oracle(
        _method(config),
        ResultCache(workdir / "oracle.jsonl"),
        num_processes=config.oracle.num_processes or None,
    )
    lowest = {
        f"{m.number}-{rank}": minimum.to_atoms(m)
        for m in molecules
        for rank, minimum in enumerate(m.minima[: config.num_reference_minima])
    }
    at_minima = oracle.evaluate(lowest, label="energies of the minima")
    relaxed = oracle.minimize(
        lowest,
        fmax=config.search.fmax,
        max_steps=config.search.max_steps,
        label="minima of the reference method",
    )
    return [
        ReferenceMinimum(
            m,
            rank,
            at_minima[key].energy,
            relaxed[key].energy if relaxed[key].converged else float("nan"),
        )
        for m in molecules
        for rank in range(min(len(m.minima), config.num_reference_minima))
        for key in [f"{m.number}-{rank}"]
    ]


def _settings(config, potential: Potential) -> dict[str, dict[str, Any]]:
    """Return names and values of molecules, force field and settings for the report."""
    settings = run_settings(config, potential)
    settings["Molecules"]["geometries per molecule"] = _geometries_per_molecule(config)
    search = {k: str(v) for k, v in configs.to_dict(config)["search"].items()}
    del settings["Settings"]
    return settings | {"Search (eV, Å, K, ps)": search}

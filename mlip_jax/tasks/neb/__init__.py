"""Task `neb`: minimum-energy paths of the reactions of a file."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ase import Atoms
from ase.io import write

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules.files import fingerprint, read_molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.files import make_subfolder, write_joined
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.foreign_text import one_line, one_line_values, table_text
from mlip_jax.importers.catalog.published_list import LIST_COMMAND, find
from mlip_jax.potential import Potential
from mlip_jax.reports.simulations.reactions import ReportedPath, write_reaction_report
from mlip_jax.reports.simulations.run_settings import run_settings
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.reactions.neb import NEBOptions, ReactionPath, find_paths
from mlip_jax.simulation.relaxation.journal import FAILURES
from mlip_jax.structure import hill_formula
from mlip_jax.wording import count_of
from mlip_jax.workdir import atomic_open, check_origin, claimed, write_json, write_text

log = logging.getLogger(__name__)

TABLE, IMAGES, PARTS = "barriers.csv", "paths.xyz", "parts"


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Find the paths of `config`, or resume in `workdir`; return the path of the report.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, ValueError: The message explains how
        to fix the problem.
      RuntimeError: All paths failed or diverged. Table and report are written before.
    """
    config = configs.complete(config, defaults.neb_defaults())
    options = _check(config)
    with claimed(workdir, configs.identity(config)) as workdir:
        potential = load_mean_force_field(config.force_field)
        check_origin(
            workdir / "origin.json",
            {"input": fingerprint(config.input), "force_field": potential.digest()},
            "paths of other reactions or with another force field",
        )
        reactions = read_paths(config.input)
        _find_all(config, workdir, potential, options, reactions)
        results = [
            ReportedPath(**parse_json(read_bytes(_part(workdir, k)))) for k in range(len(reactions))
        ]
        write_text(workdir / TABLE, _table(results))
        write_joined(workdir / IMAGES, [_part(workdir, k, "xyz") for k in range(len(reactions))])
        report = write_reaction_report(
            workdir,
            results,
            title=f"Reaction paths by {Path(config.force_field).name}",
            info=run_settings(config, potential, "Reactions"),
            files=[TABLE, IMAGES],
        )
        log.info("report: %s", report)
        if all(r.status in FAILURES for r in results):
            raise RuntimeError(
                f"all {len(results)} paths failed or diverged: see the reasons in {workdir / TABLE}"
            )
        return report


def read_paths(path: str | Path) -> list[tuple[str, list[Atoms]]]:
    """Return names and structures of the paths of a file.

    Consecutive structures with the same name form a path; without names, structures 1 and 2, 3 and
    4, ... are the ends of a path.

    Raises:
      DatasetError: A structure cannot be read, or a path has fewer than two structures.
    """
    records = list(read_molecules(path, num_processes=1))
    for record in records:
        if record.atoms is None:
            raise DatasetError(f"{path}: {record.failure}")
    if not records or len(records) % 2 and not all(record.name for record in records):
        raise DatasetError(
            f"{path}: contains {count_of(len(records), 'structure')}; expected two per reaction, "
            "or structures with the name of their path"
        )
    if all(record.name for record in records):
        groups = [
            (name, [record.atoms for record in group])
            for name, group in itertools.groupby(records, key=lambda record: record.name)
        ]
    else:
        pairs = zip(records[::2], records[1::2])
        groups = [
            (f"{hill_formula(a.atoms.numbers)} {k}", [a.atoms, b.atoms])
            for k, (a, b) in enumerate(pairs)
        ]
    short = [name for name, images in groups if len(images) < 2]
    if short:
        raise DatasetError(f"{path}: the path {short[0]!r} has only one structure")
    return groups


def _check(c) -> NEBOptions:
    """Check the config and return the options of the bands."""
    if not c.force_field:
        raise ConfigError(
            "force_field is required; that of the package is not for reactions. Examples: "
            f"--config.force_field=sevennet-0 for surfaces and crystals ({find('sevennet-0').source}), "
            f"--config.force_field=so3lr for molecules ({find('so3lr').source}), or the workdir of a "
            f"training run, --config.force_field=runs/reactions. {LIST_COMMAND}"
        )
    if not c.input:
        raise ConfigError("input is required, e.g. --config.input=reactions.xyz")
    if distributed.count() > 1:
        raise ConfigError(
            f"paths are optimized in one process, but this run has {distributed.count()}"
        )
    try:
        return NEBOptions(**{f.name: c[f.name] for f in dataclasses.fields(NEBOptions)})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _part(workdir: Path, index: int, suffix: str = "json") -> Path:
    return workdir / PARTS / f"{index:06d}.{suffix}"


def _find_all(config, workdir: Path, potential: Potential, options, reactions) -> None:
    """Find the paths that have no result in the workdir, and write each when it is done."""
    make_subfolder(workdir / PARTS)
    missing = {
        k: images for k, (_, images) in enumerate(reactions) if not _part(workdir, k).exists()
    }
    if len(missing) < len(reactions):
        done = len(reactions) - len(missing)
        log.info("resuming: %d of %d paths are done", done, len(reactions))
    trusted = TrustCheck.load(config.force_field, potential)
    for k, result in find_paths(missing, potential, options):
        outside = trusted.message(result.images, f"images of {reactions[k][0]}")
        if outside:
            log.warning("%s", outside)
        if result.remark:
            log.warning("%s: %s", reactions[k][0], result.remark)
        _save(workdir, k, reactions[k][0], result)
        log.info(
            "%s: %s",
            reactions[k][0],
            result.reason
            or f"{result.status} after {count_of(result.steps, 'step')}, barrier {result.barrier:.4f} eV",
        )


def _save(workdir: Path, index: int, name: str, result: ReactionPath) -> None:
    """Write the result of a path and its images."""
    values: dict[str, Any] = {
        "index": index,
        "name": name,
        "status": result.status,
        "reason": result.reason,
    }
    if result.images:
        values |= {
            "n_atoms": len(result.images[0]),
            "steps": result.steps,
            "fmax": result.fmax,
            "barrier": result.barrier,
            "reverse_barrier": result.reverse_barrier,
            "reaction_energy": result.reaction_energy,
            "distances": result.distances.tolist(),
            "energies": result.energies.tolist(),
        }
        for number, image in enumerate(result.images):
            image.info = one_line_values(image.info) | {"name": one_line(name), "image": number}
        with atomic_open(_part(workdir, index, "xyz"), "w") as file:
            write(file, result.images, format="extxyz")
    write_json(_part(workdir, index), values)


def _table(results: Sequence[ReportedPath]) -> str:
    """Return the table of the barriers; unknown numbers are empty."""
    columns = {
        "index": "index",
        "name": "name",
        "status": "status",
        "reason": "reason",
        "steps": "steps",
        "barrier_ev": "barrier",
        "reverse_barrier_ev": "reverse_barrier",
        "reaction_energy_ev": "reaction_energy",
        "fmax_ev_per_ang": "fmax",
    }
    return table_text(columns, ([getattr(r, field) for field in columns.values()] for r in results))

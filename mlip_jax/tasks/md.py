"""Task `md`: molecules of a file -> trajectories, energies and temperatures, a report."""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from ase import Atoms

from mlip_jax import config as configs
from mlip_jax import distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecule_files import CsvColumns, fingerprint, read_molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.reports.md import Run, read_thermo, write_md_report
from mlip_jax.reports.molecules import Picture
from mlip_jax.simulation.md import MolecularDynamics
from mlip_jax.simulation.md_outputs import RESTART, THERMO, TRAJECTORIES, OutputError, Outputs
from mlip_jax.simulation.md_progress import Progress, nanoseconds_per_day
from mlip_jax.simulation.md_settings import Settings
from mlip_jax.workdir import check_origin, claimed

log = logging.getLogger(__name__)

ORIGIN = "origin.json"
_MOST_PICTURES, _MOST_ATOMS = 4, 120


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Simulate the molecules of `config`, or go on where a run in `workdir` was stopped; returns the path of the report.

    Raises:
      ConfigError, WorkdirError, DatasetError, OutputError, CheckpointError, ValueError: With what to do about it.
    """
    config = configs.complete(config, configs.md_defaults())
    settings = _checked(config)
    with claimed(workdir, configs.identity(config)) as workdir:
        potential = load_force_field(config.force_field)
        molecules, names = _molecules(config)
        dynamics = MolecularDynamics(molecules, potential, replicas=config.replicas, **dataclasses.asdict(settings))
        check_origin(workdir / ORIGIN, {"input": fingerprint(config.input), "force_field": potential.digest()},
                     "dynamics of other molecules or with another force field")
        outputs = Outputs(workdir, [name for name in names for _ in range(config.replicas)])
        seconds = _go_on(dynamics, outputs)
        try:
            seconds = _simulate(config, dynamics, outputs, seconds)
        except (SystemExit, KeyboardInterrupt):
            log.warning("stopped; the same command goes on from the last restart file")
            raise
        return _report(config, workdir, dynamics, outputs, seconds)


def _checked(c) -> Settings:
    for name, least in (("replicas", 1), ("limit", 1), ("num_steps", 1)):
        if c[name] is not None and c[name] < least:
            raise ConfigError(f"{name} must be {least} or more, received {c[name]}")
    if not c.restart_seconds >= 0:
        raise ConfigError(f"restart_seconds must be at least 0, received {c.restart_seconds}")
    for name, example in (("force_field", "runs/spice"), ("input", "molecule.xyz")):
        if not c[name]:
            raise ConfigError(f"{name} is not given: --config.{name}={example}")
    if distributed.count() > 1:
        raise ConfigError(f"dynamics run in one process, this run has {distributed.count()}; start one for each part "
                          "of the molecules, with workdirs of their own")
    try:
        return Settings(**{f.name: c[f.name] for f in dataclasses.fields(Settings)})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _molecules(config) -> tuple[list[Atoms], list[str]]:
    """Molecules and their names.

    Raises:
      DatasetError: There are none, or one cannot be read.
    """
    records = list(read_molecules(config.input, mmff=config.mmff, seed=config.seed, limit=config.limit,
                                  columns=CsvColumns(config.smiles_column, config.name_column), num_processes=1))
    if not records:
        raise DatasetError(f"{config.input}: holds no molecules")
    for record in records:
        if record.atoms is None:
            raise DatasetError(f"{config.input}: molecule {record.index} cannot be simulated: {record.failure}")
    return [r.atoms for r in records], [r.name or r.smiles for r in records]


def _go_on(dynamics: MolecularDynamics, outputs: Outputs) -> float:
    """Where a restart file says, or from the start; the seconds until then."""
    found = outputs.load()
    if found is None:
        outputs.begin()
        return 0.0
    snapshot, seconds = found
    try:
        dynamics.restore(snapshot)
    except ValueError as error:
        raise OutputError(f"{RESTART}: {error}. Give another --workdir.") from error
    log.info("going on from step %d", dynamics.step)
    return seconds


def _simulate(config, dynamics: MolecularDynamics, outputs: Outputs, before: float) -> float:
    """Make the steps that are left; the seconds that all have taken."""
    left = config.num_steps - dynamics.step
    if left < 0:
        log.info("%d steps are there already, more than num_steps", dynamics.step)
    begin = saved = time.monotonic()
    known: set[int] = set(dynamics.broken)
    with Progress(config.num_steps, dynamics.step, config.timestep) as progress:
        for thermo, frames in dynamics.stream(max(left, 0)):
            outputs.write(thermo, frames, config.timestep)
            broken = dynamics.broken
            for m in sorted(broken.keys() - known):
                log.warning("molecule %d broke at step %d: %s", m, broken[m].step, broken[m].reason)
            known = set(broken)
            progress.show(dynamics.step, thermo, len(broken))
            if time.monotonic() - saved >= config.restart_seconds:
                outputs.save(dynamics.snapshot(), before + time.monotonic() - begin)
                saved = time.monotonic()
    seconds = before + time.monotonic() - begin
    outputs.save(dynamics.snapshot(), seconds)
    if len(known) == len(dynamics.molecules):
        log.warning("all molecules have broken; there is nothing left to simulate")
    log.info("%d programs were compiled, lists were made %d times by the %s", dynamics.num_compiles,
             dynamics.lists_made, dynamics.lists_by)
    return seconds


def _report(config, workdir: Path, dynamics: MolecularDynamics, outputs: Outputs, seconds: float) -> Path:
    names = [f"{outputs.name(m) or atoms.get_chemical_formula()}" + (
        f" · {m % config.replicas}" if config.replicas > 1 else "") for m, atoms in enumerate(dynamics.molecules)]
    about = Run(
        names, [len(a) for a in dynamics.molecules], {m: (b.step, b.reason) for m, b in dynamics.broken.items()},
        dynamics.step, config.timestep, config.temperature, config.ensemble, seconds,
        nanoseconds_per_day(dynamics.step / seconds, config.timestep) if seconds > 0 else float("nan"))
    report = write_md_report(
        workdir, about, read_thermo(workdir / THERMO), info=_info(config, dynamics.potential),
        title=f"{Path(config.force_field).name} moves {Path(config.input).name}",
        pictures=_pictures(config, dynamics, outputs, names),
        files=[THERMO, *([f"{TRAJECTORIES}/"] if config.frame_every else []), RESTART])
    log.info("report: %s", report)
    return report


def _pictures(config, dynamics, outputs, names) -> list[Picture]:
    """Some molecules at the start and as they were last, one replica of each."""
    from ase.io import read

    pictures = []
    for m, atoms in list(enumerate(dynamics.molecules))[::config.replicas]:
        path = outputs.trajectory(m)
        if len(pictures) < _MOST_PICTURES and path.exists() and len(atoms) <= _MOST_ATOMS:
            last = read(path, index=-1, format="extxyz")
            pictures.append(Picture(names[m], atoms, last, f"{last.info['time_fs'] / 1000:.3g} ps"))
    return pictures


def _info(config, potential: Potential) -> dict[str, dict[str, Any]]:
    settings = {k: v for k, v in configs.to_dict(config).items() if k not in ("task", "force_field", "input")}
    return {
        "Molecules": {"input": config.input, **fingerprint(config.input)},
        "Force field": {"from": config.force_field, "digest": potential.digest(),
                        "level of theory": potential.metadata.get("statistics", {}).get("level_of_theory", "unknown"),
                        "cutoff (Å)": potential.cutoff},
        "Settings (fs, K, Å, bar)": {k: "" if v is None else str(v) for k, v in settings.items()},
        "Hardware": {"device": jax.devices()[0].device_kind, "machine": platform.machine(),
                     "system": platform.platform()}}

"""Task `md`: run molecular dynamics of molecules and report energies and temperatures."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import ml_collections
from ase import Atoms

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules.config_input import read_input
from mlip_jax.datasets.molecules.files import fingerprint
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.reports.molecules import Picture
from mlip_jax.reports.simulations.md import Run, read_thermo, write_md_report
from mlip_jax.reports.simulations.run_settings import run_settings
from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.dynamics.outputs import RESTART, THERMO, TRAJECTORIES, DynamicsOutputs
from mlip_jax.simulation.dynamics.progress import nanoseconds_per_day
from mlip_jax.simulation.dynamics.run import run_md
from mlip_jax.simulation.dynamics.settings import Settings
from mlip_jax.simulation.dynamics.trajectories import read_trajectory
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.user_warnings import domain_in_log
from mlip_jax.workdir import check_origin, claimed

log = logging.getLogger(__name__)

ORIGIN = "origin.json"
_MAX_PICTURES, _MAX_ATOMS = 4, 120  # molecules in the figure, atoms of each


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Simulate the molecules of `config`, or resume a run in `workdir`; return the report's path.

    Raises:
      ConfigError, WorkdirError, DatasetError, OutputError, CheckpointError, ValueError: The message
        explains how to fix the problem.
      RuntimeError: All molecules broke. The report is written before.
    """
    config = configs.complete(config, defaults.md_defaults())
    settings = _check(config)
    with claimed(workdir, configs.identity(config)) as workdir, domain_in_log():
        potential = load_mean_force_field(config.force_field)
        molecules, names = read_all(config)
        _log_momenta(molecules, settings)
        dynamics = MolecularDynamics(
            molecules, potential, replicas=config.replicas, **dataclasses.asdict(settings)
        )
        if message := TrustCheck.load(config.force_field, potential).message(
            molecules, "molecules"
        ):
            log.warning("%s", message)
        check_origin(
            workdir / ORIGIN,
            {"input": fingerprint(config.input), "force_field": potential.digest()},
            "dynamics of other molecules or with another force field",
        )
        outputs = DynamicsOutputs(
            workdir,
            [name for name in names for _ in range(config.replicas)],
            config.trajectory_format,
        )
        with distributed.report_end(
            "stopped; rerun the same command to resume from the last restart file"
        ):
            seconds = run_md(dynamics, outputs, config.num_steps, config.restart_seconds)
        report = _report(config, workdir, dynamics, outputs, seconds, [message] if message else [])
        if len(dynamics.broken) == len(dynamics.molecules):
            raise RuntimeError(f"all molecules broke: see the reasons in {report}")
        return report


def _check(c) -> Settings:
    """Check the config and return the settings of the dynamics."""
    for name, example in (("force_field", "runs/spice"), ("input", "molecule.xyz")):
        if not c[name]:
            raise ConfigError(f"{name} is required, e.g. --config.{name}={example}")
    if distributed.count() > 1:
        raise ConfigError(
            f"dynamics run in one process, but this run has {distributed.count()}. Divide the "
            "molecules into several files and start a run with its own workdir for each."
        )
    try:
        return Settings(**{f.name: c[f.name] for f in dataclasses.fields(Settings)})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _log_momenta(molecules: list[Atoms], settings: Settings) -> None:
    """Log how many molecules continue with the momenta of their file."""
    count = sum(bool(atoms.get_momenta().any()) for atoms in molecules)
    if count and not settings.draw_momenta:
        log.info(
            "%d of %d molecules continue with the momenta of the input. For new ones, set "
            "--config.draw_momenta=True",
            count,
            len(molecules),
        )


def read_all(config) -> tuple[list[Atoms], list[str]]:
    """Return the molecules of config.input and their names.

    Raises:
      DatasetError: The file contains no molecules, or one of them cannot be read.
    """
    records = list(read_input(config, num_processes=1))
    if not records:
        raise DatasetError(f"{config.input}: contains no molecules")
    for record in records:
        if record.atoms is None:
            raise DatasetError(
                f"{config.input}: molecule {record.index} cannot be simulated: {record.failure}"
            )
    return [r.atoms for r in records], [r.display_name for r in records]


def _report(
    config,
    workdir: Path,
    dynamics: MolecularDynamics,
    outputs: DynamicsOutputs,
    seconds: float,
    notes: list[str],
) -> Path:
    names = [
        outputs.name(m) + (f" · {m % config.replicas}" if config.replicas > 1 else "")
        for m in range(len(dynamics.molecules))
    ]
    about = Run(
        names,
        [len(a) for a in dynamics.molecules],
        {m: (b.step, b.reason) for m, b in dynamics.broken.items()},
        dynamics.step,
        config.timestep,
        config.temperature,
        config.ensemble,
        seconds,
        nanoseconds_per_day(dynamics.step / seconds, config.timestep)
        if seconds > 0
        else float("nan"),
    )
    report = write_md_report(
        workdir,
        about,
        read_thermo(workdir / THERMO),
        info=run_settings(config, dynamics.potential, units="fs, K, Å, bar"),
        title=f"Dynamics of {Path(config.input).name} with {Path(config.force_field).name}",
        pictures=_pictures(config, dynamics, outputs, names),
        files=[THERMO, *([f"{TRAJECTORIES}/"] if config.frame_every else []), RESTART],
        notes=notes,
    )
    log.info("report: %s", report)
    return report


def _pictures(config, dynamics, outputs, names) -> list[Picture]:
    """Return pictures of some molecules at the start and in the last frame, one replica each."""
    pictures = []
    for m, atoms in list(enumerate(dynamics.molecules))[:: config.replicas]:
        path = outputs.trajectory(m)
        if len(pictures) < _MAX_PICTURES and path.exists() and len(atoms) <= _MAX_ATOMS:
            (last,) = read_trajectory(path, slice(-1, None))
            pictures.append(Picture(names[m], atoms, last, f"{last.info['time_fs'] / 1000:.3g} ps"))
    return pictures

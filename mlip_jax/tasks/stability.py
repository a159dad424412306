"""Task `stability`: measure energy drift and the survival of molecules at several temperatures."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import ml_collections
import numpy as np
from ase import Atoms

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.datasets.molecules.files import fingerprint
from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.foreign_text import TableWriter
from mlip_jax.potential import Potential
from mlip_jax.reports.simulations.md import drift, read_thermo
from mlip_jax.reports.simulations.run_settings import run_settings
from mlip_jax.reports.simulations.stability import (
    Comparison,
    Replica,
    Stability,
    compare,
    write_stability_report,
)
from mlip_jax.simulation.dynamics import reference as md_reference
from mlip_jax.simulation.dynamics.analysis import SampledTrajectory
from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.dynamics.outputs import THERMO, DynamicsOutputs
from mlip_jax.simulation.dynamics.run import run_md
from mlip_jax.simulation.dynamics.trajectories import read_trajectory
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.reference.oracle import Method
from mlip_jax.simulation.relaxation.relax import relax
from mlip_jax.tasks.md import read_all
from mlip_jax.workdir import atomic_open, check_origin, claimed

log = logging.getLogger(__name__)

NVE, LANGEVIN, COMPARED = "nve", "langevin", "compared"
STARTS, TABLE, ORIGIN = "starts.npz", "stability.csv", "origin.json"
# Largest time between frames for spectra (fs); friction (1/fs) that hardly broadens their lines.
_MAX_SPACING, _WEAK_FRICTION = 2.0, 0.001
_COMMON = (
    "timestep",
    "skin",
    "bond_range",
    "max_temperature",
    "dtype",
    "seed",
    "record_every",
    "allow_nonconservative",
)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Simulate the molecules of `config`, or resume a run in `workdir`; return the report's path.

    Raises:
      ConfigError, WorkdirError, DatasetError, OutputError, CheckpointError, ValueError: The message
        explains how to fix the problem.
      RuntimeError: All replicas broke. The report is written before.
    """
    config = configs.complete(config, defaults.stability_defaults())
    _check(config)
    with claimed(workdir, configs.identity(config)) as workdir:
        potential = load_mean_force_field(config.force_field)
        molecules, names = read_all(config)
        check_origin(
            workdir / ORIGIN,
            {"input": fingerprint(config.input), "force_field": potential.digest()},
            "dynamics of other molecules or with another force field",
        )
        _relax_molecules(config, workdir / STARTS, molecules, names, potential)
        trust = TrustCheck.load(config.force_field, potential)
        if message := trust.message(molecules, "molecules"):
            log.warning("%s", message)
        drifts, nve_speed = _run_nve(config, workdir / NVE, molecules, names, potential)
        replicas, speed = _run_langevin(config, workdir / LANGEVIN, molecules, names, potential)
        _write_table(workdir / TABLE, replicas, names)
        stability = Stability(
            names,
            [len(a) for a in molecules],
            drifts,
            replicas,
            config.picoseconds,
            config.timestep,
            speed,
            nve_speed,
            _compare_with_reference(config, workdir / COMPARED, molecules, names, potential),
        )
        report = write_stability_report(
            workdir,
            stability,
            title=f"Stability of {Path(config.force_field).name}",
            info=run_settings(config, potential, units="fs, K, Å"),
            files=[TABLE, f"{NVE}/{THERMO}", f"{LANGEVIN}/{THERMO}"],
        )
        log.info("report: %s", report)
        if all(r.broke_at is not None for r in replicas):
            raise RuntimeError(
                f"all {len(replicas)} replicas broke: see the reasons in {workdir / TABLE}"
            )
        return report


def _check(c) -> None:
    for name, example in (("force_field", "runs/spice"), ("input", "molecules.smi")):
        if not c[name]:
            raise ConfigError(f"{name} is required, e.g. --config.{name}={example}")
    if c.compare_picoseconds:
        _method(c)
    if not c.temperatures:
        raise ConfigError("temperatures is empty; expected at least one temperature (K)")
    if distributed.count() > 1:
        raise ConfigError(f"dynamics run in one process, but this run has {distributed.count()}")


def _relax_molecules(
    config, path: Path, molecules: list[Atoms], names, potential: Potential
) -> None:
    """Move the molecules to energy minima, which an earlier start of this run may have saved."""
    if not config.relax_first:
        return
    if not path.exists():
        results = relax(molecules, potential, dtype=config.dtype)
        for name, result in zip(names, results):
            if not result.converged:
                log.warning(
                    "%s: relaxation did not converge: %s", name, result.reason or result.status
                )
        positions = np.concatenate([r.atoms.positions for r in results])
        with atomic_open(path) as file:
            np.savez(file, positions=positions)
    # Positions of all molecules are stored as one array (A, 3).
    with open_npz(path) as file:
        parts = np.split(file["positions"], np.cumsum([len(a) for a in molecules])[:-1])
    for atoms, positions in zip(molecules, parts):
        atoms.positions = positions


def _run_nve(config, folder: Path, molecules, names, potential) -> tuple[list[float], float]:
    """Return the energy drift per molecule (meV/atom/ps, NaN if unknown) and steps per second."""
    if not config.nve_picoseconds:
        return [float("nan")] * len(molecules), float("nan")
    dynamics = MolecularDynamics(
        molecules,
        potential,
        ensemble="nve",
        temperature=config.nve_temperature,
        frame_every=0,
        draw_momenta=True,  # those of the file have another temperature
        **{name: config[name] for name in _COMMON},
    )
    run_md(
        dynamics,
        DynamicsOutputs(folder, names),
        _steps(config, config.nve_picoseconds),
        config.restart_seconds,
    )
    thermo = read_thermo(folder / THERMO)
    return [
        float("nan")
        if m in dynamics.broken or m not in thermo
        else drift(thermo[m]["time"], thermo[m]["conserved"], len(a))
        for m, a in enumerate(molecules)
    ], dynamics.steps_per_second


def _run_langevin(config, folder: Path, molecules, names, potential) -> tuple[list[Replica], float]:
    """Return the outcome of each replica, and the steps per second of all replicas together."""
    # one replica per (temperature, molecule, repetition), all in one batch
    cases = [
        (t, m)
        for t in config.temperatures
        for m in range(len(molecules))
        for _ in range(config.replicas)
    ]
    dynamics = MolecularDynamics(
        [molecules[m] for _, m in cases],
        potential,
        ensemble="langevin",
        friction=config.friction,
        frame_every=0,
        temperatures=[t for t, _ in cases],
        draw_momenta=True,  # those of the file have another temperature
        **{name: config[name] for name in _COMMON},
    )
    run_md(
        dynamics,
        DynamicsOutputs(folder, [names[m] for _, m in cases]),
        _steps(config, config.picoseconds),
        config.restart_seconds,
    )
    broken = dynamics.broken
    return [
        Replica(
            m,
            t,
            broken[k].step * config.timestep / 1000 if k in broken else None,
            broken[k].reason if k in broken else "",
        )
        for k, (t, m) in enumerate(cases)
    ], dynamics.steps_per_second


def _compare_with_reference(config, folder: Path, molecules, names, potential) -> list[Comparison]:
    """Compare distances and spectra of the force field with those of the reference method.

    Return an empty list if config.compare_picoseconds is zero.
    """
    if not config.compare_picoseconds:
        return []
    every = max(1, int(_MAX_SPACING / config.timestep))
    steps = _steps(config, config.compare_picoseconds)
    outputs = DynamicsOutputs(folder, names, config.trajectory_format)
    dynamics = MolecularDynamics(
        molecules,
        potential,
        ensemble="langevin",
        friction=_WEAK_FRICTION,
        frame_every=every,
        temperature=config.compare_temperature,
        draw_momenta=True,  # those of the file have another temperature
        **{name: config[name] for name in _COMMON},
    )
    run_md(dynamics, outputs, steps, config.restart_seconds)
    plan = md_reference.Plan(
        config.compare_temperature, config.timestep, _WEAK_FRICTION, steps, every, config.seed
    )
    reference = md_reference.reference_trajectories(
        _method(config), molecules, plan, folder / "reference", config.oracle.num_processes or None
    )
    return [
        compare(
            names[m],
            _discard_start(_read_sampled(outputs.trajectory(m), every * config.timestep)),
            _discard_start(trajectory),
        )
        for m, trajectory in enumerate(reference)
        if trajectory is not None and m not in dynamics.broken
    ]


def _method(config) -> Method:
    return Method(config.oracle.method, source.reader_options(config.oracle.options))


def _read_sampled(path: Path, spacing: float) -> SampledTrajectory:
    frames = read_trajectory(path)
    return SampledTrajectory(
        np.array([a.positions for a in frames]),
        np.array([a.get_velocities() for a in frames]),
        frames[0].get_masses(),
        spacing,
        frames[0].cell.array if frames[0].pbc.all() else None,
    )


def _discard_start(trajectory: SampledTrajectory) -> SampledTrajectory:
    """Return the trajectory without its first fifth, which still depends on the start."""
    first = len(trajectory.positions) // 5
    return dataclasses.replace(
        trajectory, positions=trajectory.positions[first:], velocities=trajectory.velocities[first:]
    )


def _steps(config, picoseconds: float) -> int:
    return max(1, round(1000 * picoseconds / config.timestep))


def _write_table(path: Path, replicas: list[Replica], names: list[str]) -> None:
    with atomic_open(path, "w", newline="", encoding="utf-8") as file:
        table = TableWriter(file, lineterminator="\n")
        table.writerow(["molecule", "name", "temperature_k", "broke_at_ps", "reason"])
        table.writerows(
            [
                r.molecule,
                names[r.molecule],
                r.temperature,
                "" if r.broke_at is None else r.broke_at,
                r.reason,
            ]
            for r in replicas
        )

"""Task `vibrations`: vibrations and thermochemistry of the molecules of a file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules.config_input import read_input
from mlip_jax.datasets.molecules.files import fingerprint
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.files import make_subfolder
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.foreign_text import table_text
from mlip_jax.potential import Potential
from mlip_jax.reports.simulations.run_settings import run_settings
from mlip_jax.reports.simulations.vibrations import ReportedVibrations, write_vibrations_report
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.user_warnings import domain_in_log
from mlip_jax.simulation.vibrations.analysis import (
    VibrationalAnalysis,
    VibrationOptions,
    analyze,
    check_forces,
    minimize,
)
from mlip_jax.wording import count_of
from mlip_jax.workdir import check_origin, claimed, write_json, write_text

log = logging.getLogger(__name__)

MODES, FREQUENCIES, THERMOCHEMISTRY, PARTS = (
    "modes",
    "vibrations.csv",
    "thermochemistry.csv",
    "parts",
)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Analyze the molecules of `config`, or resume in `workdir`; return the path of the report.

    Molecules that cannot be read, relaxed or analyzed are reported with the reason.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, ValueError: The message explains how
        to fix the problem.
      RuntimeError: No molecule has a result. Tables and report are written before.
    """
    config = configs.complete(config, defaults.vibrations_defaults())
    options = _check(config)
    with claimed(workdir, configs.identity(config)) as workdir, domain_in_log():
        potential = load_mean_force_field(config.force_field)
        check_forces(potential)
        check_origin(
            workdir / "origin.json",
            {"input": fingerprint(config.input), "force_field": potential.digest()},
            "vibrations of other molecules or with another force field",
        )
        records = _records(config)
        _analyze_all(config, workdir, potential, options, records)
        results = [
            ReportedVibrations(**parse_json(read_bytes(_part(workdir, record))))
            for record in records
        ]
        write_text(workdir / FREQUENCIES, _frequency_table(results))
        write_text(workdir / THERMOCHEMISTRY, _thermochemistry_table(results))
        report = write_vibrations_report(
            workdir,
            results,
            title=f"Vibrations by {Path(config.force_field).name}",
            info=run_settings(config, potential),
            files=[THERMOCHEMISTRY, FREQUENCIES, f"{MODES}/"],
        )
        failed = [result for result in results if result.reason]
        if failed:
            log.warning(
                "%d of %d molecules have no result; the first, %s: %s",
                len(failed),
                len(results),
                failed[0].name,
                failed[0].reason,
            )
        log.info("report: %s", report)
        if len(failed) == len(results):
            raise RuntimeError(
                f"all {len(results)} molecules failed: see the reasons in "
                f"{workdir / THERMOCHEMISTRY}"
            )
        return report


def _check(c) -> VibrationOptions:
    """Check the config and return the options of the analysis."""
    for name, example in (("force_field", "runs/spice"), ("input", "molecules.smi")):
        if not c[name]:
            raise ConfigError(f"{name} is required, e.g. --config.{name}={example}")
    if distributed.count() > 1:
        raise ConfigError(
            f"vibrations are computed in one process, but this run has {distributed.count()}"
        )
    isotopes = {}
    for item in filter(None, (part.strip() for part in c.isotopes.split(","))):
        symbol, _, mass = item.partition("=")
        try:
            isotopes[symbol.strip()] = float(mass)
        except ValueError as error:
            raise ConfigError(
                f"isotopes: expected masses by element, as in 'H=2.0141', received {item!r}"
            ) from error
    fields = {f.name for f in dataclasses.fields(VibrationOptions)} - {"isotopes"}
    try:
        return VibrationOptions(**{name: c[name] for name in fields}, isotopes=isotopes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _records(config) -> list[MoleculeRecord]:
    """Return the molecules of the file."""
    records = list(read_input(config, num_processes=config.num_processes or None))
    if not records:
        raise DatasetError(f"{config.input}: contains no molecules")
    return records


def _part(workdir: Path, record: MoleculeRecord) -> Path:
    return workdir / PARTS / f"{record.index:06d}.json"


def _analyze_all(
    config, workdir: Path, potential: Potential, options: VibrationOptions, records
) -> None:
    """Relax and analyze the molecules that have no result; save each when it is complete."""
    for folder in (PARTS, MODES):
        make_subfolder(workdir / folder)
    waiting = [record for record in records if not _part(workdir, record).exists()]
    for record in waiting:
        if record.atoms is None:
            _save(workdir, record, None, record.failure)
    given = {record.index: record.atoms for record in waiting if record.atoms is not None}
    by_index = {record.index: record for record in waiting}
    calculator = MLIPCalculator(potential, dtype="float64")
    trust = TrustCheck.load(config.force_field, potential)
    for index, minimum in minimize(given, potential, options, config.relaxed):
        analysis = analyze(minimum, calculator, options)
        name = by_index[index].display_name
        outside = "" if analysis.reason else trust.reasons([analysis.atoms])[0]
        if outside:
            log.warning("%s is outside the domain: %s", name, outside)
        _save(workdir, by_index[index], analysis, analysis.reason, outside)
        log.info("%s: %s", name, analysis.reason or _summary(analysis))


def _summary(analysis: VibrationalAnalysis) -> str:
    thermo = analysis.thermochemistry
    return (
        f"{count_of(len(analysis.frequencies), 'mode')}, {analysis.num_imaginary} imaginary; "
        f"zero-point energy {thermo.zero_point_energy:.4f} eV, free energy {thermo.free_energy:.4f} eV"
    )


def _save(
    workdir: Path,
    record: MoleculeRecord,
    analysis: VibrationalAnalysis | None,
    reason: str,
    outside: str = "",
) -> None:
    """Write the result of one molecule, and its modes."""
    name = record.display_name
    content: dict[str, Any] = {"index": record.index, "name": name, "reason": reason}
    if analysis is not None and not reason:
        analysis.write_modes(workdir / MODES / f"{record.index:06d}.xyz", name=name)
        content |= {
            "outside": outside,
            "energy": analysis.energy,
            "fmax": analysis.fmax,
            "frequencies": analysis.frequencies.tolist(),
            "reduced_masses": analysis.reduced_masses.tolist(),
            "thermochemistry": dataclasses.asdict(analysis.thermochemistry),
        }
    write_json(_part(workdir, record), content)


def _frequency_table(results: Sequence[ReportedVibrations]) -> str:
    """Return the text of vibrations.csv."""
    header = ("molecule", "name", "mode", "frequency_per_cm", "reduced_mass_amu")
    return table_text(
        header,
        [
            (r.index, r.name, k, frequency, mass)
            for r in results
            for k, (frequency, mass) in enumerate(zip(r.frequencies, r.reduced_masses))
        ],
    )


def _thermochemistry_table(results: Sequence[ReportedVibrations]) -> str:
    """Return the text of thermochemistry.csv, with empty cells for molecules without a result."""
    units = {
        "zero_point_energy": "ev",
        "enthalpy": "ev",
        "entropy": "ev_per_k",
        "free_energy": "ev",
        "temperature": "k",
        "pressure": "bar",
    }
    header = [
        "molecule",
        "name",
        "reason",
        "energy_ev",
        "fmax_ev_per_ang",
        "imaginary_modes",
        *(f"{name}_{unit}" for name, unit in units.items()),
        "symmetry_number",
        "outside_domain",
    ]
    return table_text(
        header,
        [
            (r.index, r.name, r.reason) + ("",) * (len(header) - 3)
            if r.reason
            else (
                r.index,
                r.name,
                "",
                r.energy,
                r.fmax,
                r.num_imaginary,
                *(r.thermochemistry[name] for name in units),
                r.thermochemistry["symmetry_number"],
                int(bool(r.outside)),
            )
            for r in results
        ],
    )

"""Task `evaluate`: errors of force fields on labelled structures, and predictions for others."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from ase import Atoms

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.store.store import Store
from mlip_jax.reports.evaluation import evaluation_metrics, write_evaluation_report
from mlip_jax.reports.html_page import scores_text
from mlip_jax.reports.simulations.run_settings import hardware
from mlip_jax.simulation.batch_prediction import BatchPredictor, ForceFieldMember, load_members
from mlip_jax.simulation.trust.ensemble_calibration import Calibration
from mlip_jax.tasks.force_field_evaluation import data as evaluation_data
from mlip_jax.tasks.force_field_evaluation import outputs
from mlip_jax.tasks.force_field_evaluation.data import EvaluationData
from mlip_jax.tasks.force_field_evaluation.evaluation import EvaluatedStructures, evaluate
from mlip_jax.tasks.force_field_evaluation.result import EvaluationResult
from mlip_jax.wording import count_of
from mlip_jax.workdir import check_origin, claimed

log = logging.getLogger(__name__)

PARTS, ORIGIN = "parts", "origin.json"


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Evaluate force fields by `config`, or resume a run in `workdir`; return the report's path.

    All processes of a run call this function. Each takes a share of the structures, and the leader
    merges the results.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, ValueError: The message explains how
        to fix the problem.
    """
    evaluate_config(config, workdir)
    return Path(workdir) / "report.html"


def evaluate_config(
    config: ml_collections.ConfigDict,
    workdir: str | Path | None,
    force_field: Any = None,
    atoms: Sequence[Atoms] | None = None,
) -> EvaluationResult | None:
    """Evaluate force fields on structures; see `run`.

    Args:
      config: Config of the task.
      workdir: Folder of the results, or None to write no file.
      force_field: Force fields in any form that `importers.split_force_fields` accepts, in place of
        config.force_field.
      atoms: Structures in place of those of config.data.

    Returns:
      The result, or None on processes other than the leader.
    """
    config = configs.complete(config, defaults.evaluate_defaults())
    given = config.force_field if force_field is None else force_field
    if isinstance(given, str) and not given:
        raise ConfigError("force_field is required, e.g. --config.force_field=runs/spice")
    with contextlib.ExitStack() as stack:
        with distributed.leader_first("workdir"):
            if workdir is not None and distributed.leader():
                stack.enter_context(claimed(workdir, configs.identity(config)))
        predictor, calibration = _predictor(config, given)
        with distributed.leader_first("data"):  # the leader builds the store, others open it
            data = _open_data(config, atoms)
        folder = None if workdir is None else Path(workdir)
        if folder is not None and distributed.leader():
            _check_origin(folder / ORIGIN, data, predictor)
        with distributed.report_end(
            "stopped; finished parts are saved. Rerun the same command to resume."
            if folder is not None
            else "stopped"
        ):
            evaluated = evaluate(data, predictor, None if folder is None else folder / PARTS)
        if evaluated is None:
            return None
        evaluated = dataclasses.replace(evaluated, align_energies=config.align_energies)
        return _finish(config, folder, evaluated, predictor, calibration)


def _predictor(config, given: Any) -> tuple[BatchPredictor, Calibration | None]:
    """Load the force fields and, for an ensemble, the calibration."""
    members = load_members(given)
    calibration = Calibration.load(config.calibration) if config.calibration else None
    predictor = BatchPredictor(
        members, dtype=config.dtype, batch_atoms=config.batch_atoms, calibration=calibration
    )
    if not predictor.elements:
        raise ConfigError("force_field: the members of the ensemble have no element in common")
    return predictor, calibration


def _open_data(config, atoms: Sequence[Atoms] | None) -> EvaluationData:
    if atoms is None:
        data = evaluation_data.from_config(config.data, config.seed)
    else:
        options = source.reader_options(config.data.reader_options)
        data = evaluation_data.from_atoms(atoms, options)
    return data.limited(config.max_structures, config.seed)


def _check_origin(path: Path, data: EvaluationData, predictor: BatchPredictor) -> None:
    """Raise WorkdirError if structures or force fields differ from those of the first start."""
    check_origin(
        path,
        {"data": data.digest(), "force_fields": [m.potential.digest() for m in predictor.members]},
        "predictions for other structures or by another force field",
    )


def _finish(
    config,
    workdir: Path | None,
    evaluated: EvaluatedStructures,
    predictor: BatchPredictor,
    calibration: Calibration | None,
) -> EvaluationResult:
    """Compute the errors and write the files and the report."""
    domain = evaluated.distances_and_errors()
    skipped = evaluated.skipped_counts() | (
        {"unusable molecule": len(evaluated.data.unusable)} if evaluated.data.unusable else {}
    )
    metrics = evaluation_metrics(
        evaluated.labelled,
        evaluated.predictions,
        has_labels=evaluated.has_labels,
        seconds=evaluated.seconds,
        skipped=skipped,
        domain=domain,
        calibration=calibration,
    )
    metrics["level_of_theory"] = {
        "data": evaluated.data.level_of_theory,
        "force_field": [m.level_of_theory for m in predictor.members],
    }
    _log_scores(evaluated, metrics)
    if workdir is None:
        return EvaluationResult(metrics, evaluated)
    files = [outputs.ARRAYS]
    evaluated.labelled.save(workdir / outputs.ARRAYS)
    if config.write_structures:
        outputs.write_structures(workdir / outputs.STRUCTURES, evaluated)
        files.append(outputs.STRUCTURES)
    if skipped:
        outputs.write_skipped(workdir / outputs.SKIPPED_FILE, evaluated)
        files.append(outputs.SKIPPED_FILE)
    report = write_evaluation_report(
        workdir,
        evaluated.labelled,
        evaluated.predictions,
        metrics,
        title=f"Evaluation on {evaluated.data.name}",
        notes=[*evaluated.data.notes, *_notes(evaluated, predictor)],
        info=_settings(config, evaluated, predictor),
        files=files,
        domain=domain,
        calibration=calibration,
    )
    log.info("report: %s", report)
    return EvaluationResult(metrics, evaluated, report)


def _notes(evaluated: EvaluatedStructures, predictor: BatchPredictor) -> list[str]:
    """Return notes on labels, levels of theory and training structures, and log them."""
    notes, data = [], evaluated.data
    levels = {m.level_of_theory for m in predictor.members}
    if not evaluated.has_labels:
        notes.append("The structures have no reference energies or forces: there are no errors.")
    elif levels != {data.level_of_theory} or levels == {"unknown"}:
        notes.append(
            f"Level of theory: {data.level_of_theory} (data), {' / '.join(sorted(levels))} (force "
            "field). "
            + (
                "Energies are compared after a fit of per-element energies to their errors."
                if evaluated.align_energies
                else "If they differ, energies are shifted per element: set align_energies."
            )
        )
    for member in predictor.members:
        if count := _num_trained(member, evaluated):
            notes.append(
                f"{count:,} of {len(evaluated.indices):,} structures are in the training split of "
                f"{member.name}: their errors are too small."
            )
    for note in notes:
        log.warning("%s", note)
    return notes


def _num_trained(member: ForceFieldMember, evaluated: EvaluatedStructures) -> int:
    """Return how many of the structures the force field was trained on, as far as is known."""
    rows = evaluated.data.rows
    if not isinstance(rows, Store):
        return 0
    try:
        trained = RunData.load(member.name)
    except DatasetError:
        return 0
    if trained.store.digest() != rows.digest():
        return 0
    return int(np.isin(evaluated.indices, trained.parts["train"]).sum())


def _log_scores(evaluated: EvaluatedStructures, metrics: dict[str, Any]) -> None:
    """Log skipped structures and the most important errors."""
    for reason, count in metrics["skipped"].items():
        log.warning(
            "skipped and not part of the errors: %s (%s)", count_of(count, "structure"), reason
        )
    scores = metrics["evaluated"]
    if scores is None:
        log.info("%s predicted", count_of(len(evaluated.indices), "structure"))
        return
    log.info("%s: %s", count_of(len(evaluated.indices), "structure"), scores_text(scores))


def _settings(
    config, evaluated: EvaluatedStructures, predictor: BatchPredictor
) -> dict[str, dict[str, Any]]:
    """Return names and values of data, force fields and settings for the report."""
    data = evaluated.data
    counts = {
        name: ", ".join(f"{a}: {b}" for a, b in value.items()) or "none"
        if isinstance(value, dict)
        else value
        for name, value in data.counts.items()
    }
    return {
        "Data": {"name": data.name, "level of theory": data.level_of_theory, **counts},
        "Force field": {
            m.name: f"{m.potential.digest()}, {m.level_of_theory}, cutoff {m.potential.cutoff:g} Å, "
            f"forces {m.potential.origin_of_forces}"
            for m in predictor.members
        },
        "Settings": {
            k: str(v)
            for k, v in configs.to_dict(config).items()
            if k not in ("task", "force_field", "data")
        },
        "Hardware": hardware(),
    }

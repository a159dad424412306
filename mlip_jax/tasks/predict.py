"""Task `predict`: relax the molecules of a file and predict properties with expected errors."""

from __future__ import annotations

import contextlib
import csv
import logging
import shlex
from collections.abc import Container
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules.config_input import count_input, read_input
from mlip_jax.datasets.molecules.files import fingerprint
from mlip_jax.reports.attributions import AttributedMolecule
from mlip_jax.reports.prediction import write_prediction_report
from mlip_jax.simulation.force_fields import load_mean_force_field
from mlip_jax.simulation.relaxation import journal as relax_journal
from mlip_jax.simulation.relaxation import merge
from mlip_jax.simulation.relaxation.inputs import close_records
from mlip_jax.simulation.relaxation.journal import Journal, Layout, check_any_succeeded
from mlip_jax.simulation.relaxation.progress import RelaxationProgressBar
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.tasks.property_prediction.attributions import attribute
from mlip_jax.tasks.property_prediction.conformers import PredictionInput, prediction_inputs
from mlip_jax.tasks.property_prediction.ensemble import Ensemble
from mlip_jax.workdir import check_origin, claimed

log = logging.getLogger(__name__)

RESULTS, PARTS, ORIGIN = "predictions.csv", "parts", "origin.json"
PREDICTED, FAILED = "predicted", "failed"
_DESCRIPTION = ("index", "name", "smiles", "status", "reason", "n_atoms", "geometry")


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Predict properties by `config`, or resume a run in `workdir`; return the path of the report.

    All processes of a run call this function. Each takes a share of the molecules, and the leader
    merges the results.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, JournalError: The message explains
        how to fix the problem.
      RuntimeError: No molecule was predicted. Table and report are written before.
    """
    config = configs.complete(config, defaults.predict_defaults())
    _check(config)
    with contextlib.ExitStack() as stack:
        with distributed.leader_first("workdir"):
            if distributed.leader():
                stack.enter_context(claimed(workdir, configs.identity(config)))
            workdir = Path(workdir)
            total = count_input(config)
            ensemble = Ensemble.load(config.predictor)
            relaxer = _relaxer(config, ensemble)
            if distributed.leader():
                check_origin(
                    workdir / ORIGIN,
                    {
                        "input": fingerprint(config.input),
                        "force_field": relaxer.potential.digest() if relaxer else None,
                        "predictors": [m.digest() for m in ensemble.members],
                    },
                    "predictions of other molecules, at other geometries or by other predictors",
                )
        _predict_share(config, workdir / PARTS, ensemble, relaxer, total)
        distributed.barrier("predicted")
        return (
            _finish(config, workdir, total, ensemble, relaxer)
            if distributed.leader()
            else workdir / "report.html"
        )


def _check(c) -> None:
    for name, example in (("predictor", "runs/gap"), ("input", "molecules.csv")):
        if not c[name]:
            raise ConfigError(f"{name} is required, e.g. --config.{name}={example}")
    if c.conformer_weights == "boltzmann" and c.force_field in (None, "", "none"):
        raise ConfigError(
            "conformer_weights='boltzmann' requires the energies of a force field: set force_field, "
            "or --config.conformer_weights=mean"
        )


def _layout(ensemble: Ensemble) -> Layout:
    """Return the layout of the table of results, which has one line per molecule."""
    return Layout((*_DESCRIPTION, *ensemble.columns), ())


def _relaxer(config, ensemble: Ensemble) -> Relaxer | None:
    """Return the relaxer, or None to predict at the given geometries.

    Only the config selects the force field, since a checkpoint of other people could contain any
    path.

    Raises:
      ConfigError: The predictor was trained on relaxed geometries, and the config does not say
        whether to relax.
    """
    path = config.force_field
    if path is None:
        trained = ensemble.members[0].metadata["config"]["data"].get("force_field")
        if trained:
            raise ConfigError(
                f"the predictor was evaluated at geometries relaxed with {trained!r}. Set "
                f"--config.force_field={shlex.quote(str(trained))} to relax the molecules with it, "
                "another force field, or --config.force_field=none to predict at the given "
                "geometries"
            )
        path = "none"
        if ensemble.reads_positions:
            log.info("predicting at the given geometries; set force_field to relax them first")
    if path in ("none", ""):
        return None
    if not ensemble.reads_positions:
        raise ConfigError(
            f"force_field: received {path!r}, but the predictor reads bonds, not positions. Set "
            "--config.force_field=none"
        )
    return Relaxer(
        load_mean_force_field(path),
        fmax=config.fmax,
        max_steps=config.max_steps,
        devices=jax.local_devices(),
        molecules_only=True,
    )


# --- Prediction ---


def _predict_share(
    config, folder: Path, ensemble: Ensemble, relaxer: Relaxer | None, total: int
) -> None:
    """Predict the molecules in the share of this process that no process has predicted yet."""
    layout, share = _layout(ensemble), (distributed.index(), distributed.count())
    with Journal(folder, distributed.index(), layout) as journal:
        done = relax_journal.finished(folder, layout)
        mine = range(share[0], total, share[1])
        before = sum(index in done for index in mine)
        failed = relax_journal.count_failures(folder, layout, lambda index: index in mine)
        if before == len(mine):
            return
        records = _read(config, ensemble, _Finished(done, config.num_conformers), share)
        journal.start_clock()
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(
                RelaxationProgressBar(len(mine), before, "predicting", failed=failed)
            )
            stack.callback(close_records, records)
            inputs = stack.enter_context(
                contextlib.closing(_inputs(config, records, relaxer, ensemble))
            )
            pending: list[PredictionInput] = []
            for molecule in inputs:
                if molecule.reason:
                    cells = [None] * len(ensemble.columns)
                    journal.add([*_description(molecule, FAILED), *cells])
                    progress.add(FAILED)
                    continue
                pending.append(molecule)
                if sum(len(m.conformers) for m in pending) >= config.batch_size:
                    _predict_batch(pending, config, ensemble, journal, progress)
                    pending = []
            if pending:
                _predict_batch(pending, config, ensemble, journal, progress)


def _read(config, ensemble: Ensemble, skip: Container[int], share=(0, 1)):
    """Return the records of the conformers to predict; see `read_input`."""
    return read_input(
        config,
        num_conformers=config.num_conformers,
        skip=skip,
        share=share,
        num_processes=config.num_processes or None,
        embed=ensemble.reads_positions,
        ahead=2 * config.batch_size,  # workers embed the next batch during a prediction
    )


def _inputs(config, records, relaxer: Relaxer | None, ensemble: Ensemble):
    """Return the molecules of records; see `prediction_inputs`."""
    temperature = config.temperature if config.conformer_weights == "boltzmann" else None
    return prediction_inputs(records, relaxer, ensemble, config.num_conformers, temperature)


class _Finished:
    """Indices of the conformers of finished molecules."""

    def __init__(self, molecules: Container[int], num_conformers: int):
        self._molecules, self._num = molecules, num_conformers

    def __contains__(self, index: int) -> bool:
        return index // self._num in self._molecules


class _OtherMolecules:
    """All indices of conformers except those of some molecules."""

    def __init__(self, molecules: Container[int], num_conformers: int):
        self._molecules, self._num = molecules, num_conformers

    def __contains__(self, index: int) -> bool:
        return index // self._num not in self._molecules


def _attribute(
    config, workdir: Path, ensemble: Ensemble, relaxer: Relaxer | None
) -> dict[str, list[AttributedMolecule]]:
    """Return the molecules whose attributions the report shows, by property."""

    def inputs(wanted):
        skip = _OtherMolecules(wanted, config.num_conformers)
        records = _read(config, ensemble, skip)
        with contextlib.ExitStack() as stack:
            stack.callback(close_records, records)
            yield from _inputs(config, records, relaxer, ensemble)

    return attribute(ensemble, workdir / RESULTS, inputs)


def _predict_batch(
    batch: list[PredictionInput], config, ensemble: Ensemble, journal: Journal, progress
) -> None:
    """Predict a batch of molecules and write the results to the journal."""
    columns = ensemble.predict(
        [molecule.conformers for molecule in batch],
        [molecule.weights for molecule in batch],
        config.batch_size,
        config.coverage,
    )
    for m, molecule in enumerate(batch):
        cells = [columns[name][m].item() for name in ensemble.columns]
        journal.add([*_description(molecule, PREDICTED), *cells])
        progress.add(PREDICTED)


def _description(molecule: PredictionInput, status: str) -> list[Any]:
    """Return the cells of a molecule before those of the properties."""
    record = molecule.record
    num_atoms = None if record.atoms is None else len(record.atoms)
    return [
        molecule.index,
        record.table_name,
        record.smiles,
        status,
        molecule.reason,
        num_atoms,
        molecule.geometry,
    ]


def _finish(config, workdir: Path, total: int, ensemble: Ensemble, relaxer: Relaxer | None) -> Path:
    """Merge the parts and write the report."""
    seconds = merge.merge(workdir / PARTS, _layout(ensemble), workdir / RESULTS, {}, total)
    with open(workdir / RESULTS, newline="", encoding="utf-8") as file:
        rows = sum(1 for _ in csv.reader(file)) - 1  # without the header
    if rows != total:
        raise RuntimeError(
            f"{workdir / RESULTS}: contains {rows} of {total} molecules. Rerun the same command."
        )
    report = write_prediction_report(
        workdir,
        workdir / RESULTS,
        ensemble.targets,
        seconds=seconds,
        title=f"{', '.join(t.name for t in ensemble.targets)} of {Path(config.input).name}",
        info=_settings(config, ensemble, relaxer),
        attributed=_attribute(config, workdir, ensemble, relaxer),
    )
    log.info("%s; report: %s", workdir / RESULTS, report)
    check_any_succeeded(workdir / PARTS, _layout(ensemble), total, workdir / RESULTS)
    return report


def _settings(config, ensemble: Ensemble, relaxer: Relaxer | None) -> dict[str, dict[str, Any]]:
    """Return names and values of molecules, predictors and settings for the report."""
    trained = {
        f"predictor {i}": ", ".join(
            f"{k}: {m.metadata['statistics'][k]}" for k in ("num_structures", "level_of_theory")
        )
        for i, m in enumerate(ensemble.members)
    }
    return {
        "Molecules": {"input": config.input, **fingerprint(config.input)},
        "Trained on": trained,
        "Geometries": {"force field": relaxer.potential.digest() if relaxer else "none"},
        "Settings": {k: str(v) for k, v in configs.to_dict(config).items() if k != "task"},
    }

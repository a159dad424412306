"""Evaluation of a trained force field, its domain and its report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mlip_jax import distributed
from mlip_jax.checkpoint import from_arrays
from mlip_jax.datasets.stress import stress_labels
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.potential import Potential
from mlip_jax.reports.html_page import scores_text
from mlip_jax.reports.predictions import Predictions
from mlip_jax.reports.simulations.run_settings import hardware
from mlip_jax.reports.training import write_report
from mlip_jax.reports.unseen import UnseenStructures
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.atom_domain import DomainEvaluation
from mlip_jax.simulation.trust.domain import FILE as DOMAIN_FILE
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.tasks.force_field_training.comparison import compare
from mlip_jax.tasks.force_field_training.preparation import TrainingRun
from mlip_jax.training.data import Split
from mlip_jax.training.device.packing import pack
from mlip_jax.training.evaluation import predict, restore_best
from mlip_jax.training.loop import TrainingLoop
from mlip_jax.training.recorder import writing

log = logging.getLogger(__name__)

_MAX_UNSEEN = 10_000  # maximum number of structures with unseen elements in their own errors
_ENERGY_ONLY_NOTE = (
    "The training used only energies (loss.beta is 0): no forces were computed, and the report "
    "contains none."
)


def report_run(
    run: TrainingRun, loop: TrainingLoop, params: Any, seconds: float, fill: dict[str, float]
) -> Path:
    """Evaluate the best checkpoint on all splits, fit the domain and write the report.

    Args:
      run: Inputs of the run.
      loop: Training loop of the run, which has ended.
      params: Parameters of the same shapes as those of the checkpoint.
      seconds: Training time (s).
      fill: Fraction of each padded size that is filled, see `training.prepare.make_batches`.

    Returns:
      Path of the report. Only the leader writes it.
    """
    best = restore_best(run.workdir)
    # packed as in validation, for which the evaluation is compiled
    best_params = loop.trainer.replicate(pack(from_arrays(params, best.arrays, "params/")))
    splits = _sample(run)
    unseen = {name: split.sample(_MAX_UNSEEN, 0) for name, (split, _) in run.unseen.items()}

    def predict_all(splits: dict[str, Split]) -> dict[str, Predictions]:
        return {
            name: _combine(
                split, predict(loop.trainer, best_params, split, loop.batches), not run.energy_only
            )
            for name, split in splits.items()
        }

    predictions, unseen_predictions = predict_all(splits), predict_all(unseen)
    if not distributed.leader():
        return run.workdir / "report.html"
    potential = Potential.from_checkpoint(best.arrays, best.metadata)
    domain, evaluation = _fit_domain(run, potential, splits, predictions)
    workdir = run.workdir
    info = _provenance(run, potential, loop, seconds, fill, best.step)
    if run.initial is not None:
        info["Fine-tuning, test errors before → after"] = compare(run, potential)
    with writing(workdir):
        for name, prediction in predictions.items():
            prediction.save(workdir / f"predictions_{name}.npz")
        for name, prediction in unseen_predictions.items():
            prediction.save(workdir / f"predictions_{name}_unseen_elements.npz")
        if domain is not None:
            domain.save(workdir / DOMAIN_FILE)
        report = write_report(
            workdir,
            predictions,
            title=f"{run.config.model.name} on {run.data.name}",
            metrics_csv=workdir / "metrics.csv",
            seconds=seconds,
            evaluation=evaluation,
            sizes={name: len(split) for name, split in run.splits.items()},
            notes=[*run.data.notes, *([_ENERGY_ONLY_NOTE] if run.energy_only else [])],
            info=info,
            unseen_structures={
                name: UnseenStructures(numbers, unseen_predictions[name])
                for name, (_, numbers) in run.unseen.items()
            },
        )
    _log_scores(workdir)
    log.info("report: %s", report)
    return report


def _sample(run: TrainingRun) -> dict[str, Split]:
    """Return the structures of each split that the report evaluates."""
    c = run.config.report
    return {
        name: split.sample(c.max_train if name == "train" else c.max_test, run.config.seed)
        for name, split in run.splits.items()
    }


def _combine(split: Split, predicted, with_forces: bool) -> Predictions:
    """Combine labels and predictions of a split; drop force labels if no forces are computed."""
    c = split.columns()
    forces = c.forces if with_forces else np.full_like(c.forces, np.nan)  # no predictions
    return Predictions(
        numbers=c.numbers,
        offsets=c.offsets,
        energy=c.energy,
        energy_predicted=predicted.energy,
        forces=forces,
        forces_predicted=predicted.forces,
        molecule=c.molecule,
        conformer=c.conformer,
        subset=c.subset,
        source=c.source,
        stress=stress_labels(c),
        stress_predicted=predicted.stress,
    )


def _fit_domain(
    run: TrainingRun,
    potential: Potential,
    splits: dict[str, Split],
    predictions: dict[str, Predictions],
) -> tuple[Domain | None, DomainEvaluation | None]:
    """Fit the domain of the force field, and compute errors and distances of test structures.

    Return (None, None) without training or validation structures, and no evaluation without test
    structures.
    """
    rng, errors = np.random.default_rng(run.config.seed), {}
    for name, split in splits.items():
        p = predictions[name]
        members = np.sort(rng.permutation(len(split))[: run.config.report.max_domain])
        if len(members):
            columns = split.columns(members, labels_only=True)
            atoms = np.concatenate([np.arange(p.offsets[s], p.offsets[s + 1]) for s in members])
            errors[name] = (
                columns,
                p.energy_predicted[members] - p.energy[members],
                p.forces_predicted[atoms] - p.forces[atoms],
            )
    if not {"train", "valid"} <= set(errors):
        return None, None
    (train, *_), (valid, _, valid_force_errors) = errors["train"], errors["valid"]
    domain = atom_domain.fit(potential, train, valid, valid_force_errors, run.config.seed)
    if "test" not in errors:
        return domain, None
    return domain, atom_domain.evaluate(potential, domain, *errors["test"])


def _provenance(
    run: TrainingRun,
    potential: Potential,
    loop: TrainingLoop,
    seconds: float,
    fill: dict[str, float],
    best_step: int,
) -> dict[str, dict[str, Any]]:
    """Return names and values about data, model, training and machine for the report."""
    config, data, statistics = run.config, run.data, run.statistics
    return {
        "Data": {
            "file": data.name,
            "level of theory": statistics["level_of_theory"],
            "split": config.data.split_files or f"by {config.data.split}",
            **{
                k: ", ".join(f"{a}: {b}" for a, b in v.items()) or "none"
                if isinstance(v, dict)
                else v
                for k, v in data.counts.items()
            },
            "training structures": statistics["num_structures"],
            "training molecules": statistics["num_molecules"],
            "force RMS (eV/Å)": "no forces"
            if statistics["force_rms"] is None
            else round(statistics["force_rms"], 4),
            "mean neighbors": round(statistics["mean_neighbors"], 2),
            "reference energies": config.data.reference_energies,
        },
        "Model": {
            "architecture": config.model.name,
            "forces": potential.origin_of_forces,
            "parameters": sum(p.size for p in jax.tree.leaves(potential.params)),
            **{k: str(v) for k, v in config.model.options.items()},
            **{
                f"energy term {k}": ", ".join(f"{a}={b}" for a, b in v) or "on"
                for k, v in getattr(run.model, "terms", ())
            },
        },
        "Training": {
            "steps": loop.num_steps,
            "best checkpoint at step": best_step,
            "training time (s)": round(seconds, 1),
            "fraction of padded edges that are real": round(fill["n_edge"], 4),
            **{
                f"{a}.{b}": str(v)
                for a in ("loss", "optimizer", "train")
                for b, v in config[a].items()
            },
        },
        "Hardware": hardware(),
        "Versions": run.metadata["versions"],
    }


def _log_scores(workdir: Path) -> None:
    """Log the most important test errors of metrics.json."""
    scores = parse_json(read_bytes(workdir / "metrics.json"))["test"] or {}
    log.info("test: %s", scores_text(scores))

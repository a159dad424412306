"""Task `ensemble`: calibrate the spread of several force fields as expected error of their mean."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.potential import Potential
from mlip_jax.reports import ensemble as report
from mlip_jax.simulation.trust import ensemble_calibration
from mlip_jax.simulation.trust.ensemble_calibration import FILE, Calibration, EnsembleErrors
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Write ensemble.json and report.html, and return the path of the report.

    With several processes, only the leader does the work; the others wait for it.

    Raises:
      ConfigError, WorkdirError, CheckpointError, DatasetError, ValueError: The message explains how
        to fix the problem.
    """
    config = configs.complete(config, defaults.ensemble_defaults())
    workdir, paths = Path(workdir), [p.strip() for p in config.members.split(",") if p.strip()]
    if len(paths) < 2:
        raise ConfigError(
            "members: expected the workdirs of at least two training runs, e.g. "
            f"--config.members=runs/a,runs/b,runs/c, received {config.members!r}"
        )
    if distributed.leader():
        with claimed(workdir, configs.identity(config)):
            _calibrate(config, workdir, paths)
    distributed.barrier("calibrated")
    return workdir / "report.html"


def _calibrate(config, workdir: Path, paths: list[str]) -> None:
    """Fit the calibration to the validation split and evaluate it on the test split, if any."""
    potentials = [Potential.load(path) for path in paths]
    errors, notes = {}, []
    for split in ("valid", "test"):
        try:
            errors[split], split_notes = _evaluate(config, paths, potentials, split)
        except DatasetError as error:
            if split == "valid":
                raise
            split_notes = [f"There is no test split to evaluate the calibration on: {error}"]
        notes += [n for n in split_notes if n not in notes]
    calibration = Calibration.fit(potentials, errors["valid"])
    scores = {split: report.scores(calibration, e) for split, e in errors.items()}
    calibration.save(workdir / FILE, part="valid", scores=scores, notes=notes)
    for note in notes:
        log.warning("%s", note)
    for name in ("energy", "forces"):
        scale = getattr(calibration, name)
        log.info(
            "%s: %s",
            name,
            "no labels"
            if scale is None
            else f"the expected error is {scale.factor:.2f} times the spread over the members",
        )
    path = report.write_ensemble_report(
        workdir,
        calibration,
        errors,
        scores,
        notes=notes,
        info={
            "Members": {
                path: f"{p.metadata['config']['model']['name']}, {p.digest()}"
                for path, p in zip(paths, potentials)
            }
        },
    )
    log.info("report: %s", path)


def _evaluate(config, paths, potentials, split: str) -> tuple[EnsembleErrors, list[str]]:
    """Evaluate all members on structures that none of them was trained on; also return notes."""
    store, indices, notes = ensemble_calibration.held_out(
        paths, potentials, split, config.max_structures, config.seed
    )
    log.info("%s: %d structures by %d members", split, len(indices), len(potentials))
    return ensemble_calibration.evaluate(potentials, store, indices), notes

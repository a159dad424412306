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
            "members: give the workdirs of two or more training runs, "
            f"--config.members=runs/a,runs/b,runs/c; received {config.members!r}"
        )
    if distributed.leader():
        with claimed(workdir, configs.identity(config)):
            _calibrate(config, workdir, paths)
    distributed.barrier("calibrated")
    return workdir / "report.html"


def _calibrate(config, workdir: Path, paths: list[str]) -> None:
    """Fit the calibration to the validation split and evaluate it on the test split, if any."""
    potentials = [Potential.load(path) for path in paths]
    judged, notes = {}, []
    for part in ("valid", "test"):
        try:
            judged[part], told = _evaluated(config, paths, potentials, part)
        except DatasetError as error:
            if part == "valid":
                raise
            told = [f"There is no test part to judge by: {error}"]
        notes += [n for n in told if n not in notes]
    calibration = Calibration.fit(potentials, judged["valid"])
    scores = {part: report.scores(calibration, e) for part, e in judged.items()}
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
            else f"the error to expect is {scale.factor:.2f} times the spread over the members",
        )
    path = report.write_ensemble_report(
        workdir,
        calibration,
        judged,
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


def _evaluated(config, paths, potentials, part: str) -> tuple[EnsembleErrors, list[str]]:
    """Evaluate all members on structures that none of them was trained on; also return notes."""
    store, indices, notes = ensemble_calibration.held_out(
        paths, potentials, part, config.max_structures, config.seed
    )
    log.info("%s: %d structures by %d members", part, len(indices), len(potentials))
    return ensemble_calibration.evaluate(potentials, store, indices), notes

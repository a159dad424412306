"""Task `ensemble`: calibrate the spread of several force fields as expected error of their mean."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.potential import Potential
from mlip_jax.reports import ensemble as report
from mlip_jax.simulation.trust import ensemble_calibration, ensemble_structures
from mlip_jax.simulation.trust.ensemble_calibration import FILE, Calibration
from mlip_jax.wording import count_of
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
    """Fit the calibration to some held-out structures and evaluate it on others, if any."""
    potentials = [Potential.load(path) for path in paths]
    structures = ensemble_structures.choose(paths, potentials, config.max_structures, config.seed)
    errors, notes = {}, structures.notes
    for name, indices in structures.indices.items():
        log.info("%s: %s by %d members", name, count_of(len(indices), "structure"), len(potentials))
        errors[name] = ensemble_calibration.evaluate(potentials, structures.store, indices)
    calibration = Calibration.fit(potentials, errors["calibration"])
    scores = {split: report.scores(calibration, e) for split, e in errors.items()}
    calibration.save(workdir / FILE, part=structures.part, scores=scores, notes=notes)
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

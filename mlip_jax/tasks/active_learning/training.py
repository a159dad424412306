"""Training of the force fields of a round, on all labels so far."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import ml_collections

from mlip_jax import defaults
from mlip_jax.datasets import atoms_list
from mlip_jax.datasets.columns import Columns
from mlip_jax.files import make_subfolder
from mlip_jax.potential import Potential
from mlip_jax.tasks import train
from mlip_jax.tasks.force_field_training.report import report_run
from mlip_jax.workdir import write_json

log = logging.getLogger(__name__)

_SHARED = ("model", "potential", "loss", "optimizer", "train")  # parts of the config of a training


def train_members(
    config: ml_collections.ConfigDict,
    folder: Path,
    labeled: Columns,
    valid: Columns,
    starts: list[str],
    *,
    report: bool,
) -> list[Potential]:
    """Train the members of a round, or resume, and return their best force fields.

    Args:
      config: Complete config of task "active_learning".
      folder: Folder of the round.
      labeled: Labeled training structures.
      valid: Labeled validation structures.
      starts: Force field that each member starts from; "" for random parameters.
      report: Whether to write the report of each training, and its domain.
    """
    return [
        _train_member(config, folder, labeled, valid, member, start, report)
        for member, start in enumerate(starts)
    ]


def member_folders(folder: Path, count: int) -> list[Path]:
    """Return the workdirs of the members of a round."""
    return [folder / f"member_{member}" for member in range(count)]


def _train_member(config, folder, labeled, valid, member, start, report) -> Potential:
    """Train a member unless it is finished."""
    workdir = member_folders(folder, member + 1)[member]
    finished = folder / f"member_{member}{'_report' if report else ''}.json"
    if not finished.exists():
        c = training_config(config, folder, member, start)
        write_data(folder, labeled, valid)
        with train.prepared(c, workdir) as run:
            loop, params, seconds, fill = train.fit(run)
            if report:
                report_run(run, loop, params, seconds, fill)
        write_json(finished, {"seconds": seconds})
    return Potential.load(workdir)


def write_data(folder: Path, labeled: Columns, valid: Columns) -> None:
    """Write the structures of a round and their split, unless they are written."""
    data, split = make_subfolder(folder / "data"), folder / "split.json"
    if split.exists():
        return
    atoms_list.write_trajectory(data / "structures.traj", [*labeled, *valid])
    numbers = list(range(len(labeled) + len(valid)))
    write_json(split, {"train": numbers[: len(labeled)], "valid": numbers[len(labeled) :]})


def training_config(
    config: ml_collections.ConfigDict, folder: Path, member: int, start: str
) -> ml_collections.ConfigDict:
    """Return the config of task "train" of a member."""
    c = defaults.train_defaults()
    c.seed = config.seed + 1_000 * member
    for part in _SHARED:
        # a copy: a new run adds options of the model, which later rounds inherit instead
        for name, value in copy.deepcopy(config[part]).items():
            c[part][name] = value
    c.init.workdir = start
    c.data.path, c.data.directory = str(folder / "data" / "structures.traj"), str(folder / "data")
    level = config.oracle.method.replace(";", ",")
    c.data.reader = "ase"
    c.data.reader_options = f"{atoms_list.TRAJECTORY_OPTIONS}; level_of_theory={level}"
    c.data.reference_energies = config.data.reference_energies
    c.data.elements, c.data.confirm_units = None, True  # `labels.check_oracle` has checked them
    c.data.split_files = str(folder / "split.json")
    return c

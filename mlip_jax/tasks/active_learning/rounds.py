"""Rounds of active learning: choose, label, train, evaluate. Each stage is on disk when it ends.

Files of a round:

    batch.npz         structures to label
    labels.npz        those with usable labels
    labels.json       reasons for the others, number and duration of the calculations
    member_0/, ...    trainings
    evaluation.json   errors, expected errors, and how the batch was spent

A rerun continues after the last complete stage. Labels are in the cache of the oracle as soon as they
arrive, so no structure is labeled twice.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mlip_jax.datasets import unseen_elements
from mlip_jax.datasets.builtin.conformations import stable_hash
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.files import make_subfolder
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.label_budget import choice, labels
from mlip_jax.label_budget.columns_file import load_columns, save_columns
from mlip_jax.potential import Potential
from mlip_jax.simulation.reference.oracle import Oracle
from mlip_jax.tasks.active_learning import training
from mlip_jax.tasks.active_learning.evaluation import evaluate
from mlip_jax.tasks.active_learning.selection import select_batch
from mlip_jax.wording import count_of
from mlip_jax.workdir import write_json

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LabelingInputs:
    """Inputs that all strategies of a run share.

    Attributes:
      config: Complete config of the task.
      workdir: Folder of the run.
      oracle: Reference method with its cache.
      candidates: Candidates of the training molecules that need no force field.
      valid: Labeled validation structures.
      test: Labeled test structures; may be empty.
      spent: Number of calculations for the validation structures.
      seconds: Duration of these calculations (s).
    """

    config: ml_collections.ConfigDict
    workdir: Path
    oracle: Oracle
    candidates: Columns
    valid: Columns
    test: Columns
    spent: int
    seconds: float


@dataclasses.dataclass
class StrategyState:
    """State of a strategy after a round.

    Attributes:
      labeled: Labeled training structures of all rounds.
      taken: Indices of the shared candidates that are used up.
      failed: Molecules of failed calculations, once per failure.
      calls: Number of calculations within the budget.
      seconds: Duration of these calculations (s).
      members: Force fields of the last round; empty before the first.
      folders: Their workdirs.
    """

    labeled: Columns
    taken: set[int]
    failed: Counter
    calls: int
    seconds: float
    members: list[Potential] = dataclasses.field(default_factory=list)
    folders: list[Path] = dataclasses.field(default_factory=list)


def run_strategy(inputs: LabelingInputs, strategy: str) -> list[dict[str, Any]]:
    """Run all rounds of a strategy, or resume, and return their evaluations.

    Args:
      inputs: Shared inputs.
      strategy: Strategy of the choice. Its folder has the same name; the first round is shared.
    """
    config = inputs.config
    state = StrategyState(
        inputs.candidates.take(np.zeros(0, np.int64)),
        set(),
        Counter(),
        inputs.spent,
        inputs.seconds,
    )
    evaluations: list[dict[str, Any]] = []
    for number in range(config.rounds.num_rounds):
        folder = round_folder(inputs.workdir, strategy, number)
        count = _batch_size(config, state.calls, inputs.spent, number)
        batch = _batch(inputs, state, strategy, number, folder, count)
        if not len(batch):
            log.warning("%s: no candidates are left", strategy)
            break
        trained = folder
        summary = _label(inputs, state, batch, number, folder)
        _check_validation(inputs, state)
        last = number + 1 == config.rounds.num_rounds or state.calls >= config.budget
        starts = _starts(config, state)
        _train(inputs, state, starts, folder, report=last and strategy == config.choose.strategy)
        evaluation = _evaluate(inputs, state, folder)
        evaluations.append(summary | evaluation)
        log.info("%s, round %d: %s", strategy, number + 1, _progress(evaluation, state, config))
        if last or _reaches(evaluation, config.target_error):
            break
    if not evaluations:
        raise DatasetError("there are no candidates: no molecule has a physical geometry")
    if strategy == config.choose.strategy and not last:  # its report needs no further training
        _train(inputs, state, starts, trained, report=True)
    return evaluations


def round_folder(workdir: Path, strategy: str, number: int) -> Path:
    """Return the folder of a round; the first one is common to all strategies."""
    if number == 0:
        return make_subfolder(workdir / "round_1")
    return make_subfolder(make_subfolder(workdir / strategy) / f"round_{number + 1}")


def _batch_size(config: ml_collections.ConfigDict, calls: int, spent: int, number: int) -> int:
    """Return the number of structures that a round labels."""
    left = config.budget - calls
    rounds_left = config.rounds.num_rounds - number
    if number == 0 and rounds_left > 1:
        return min(max(round(config.rounds.first_fraction * (config.budget - spent)), 1), left)
    return max(-(-left // rounds_left), 0)


def _batch(inputs, state, strategy, number, folder, count) -> Columns:
    """Return the structures that a round labels: those on disk, or a new choice."""
    path = folder / "batch.npz"
    if path.exists():
        batch = load_columns(path)
    else:
        rng = np.random.default_rng(
            stable_hash(inputs.config.seed, f"{strategy if number else ''} {number}")
        )
        if number == 0:
            rows = choice.choose_first(inputs.candidates, count, rng)
            batch = dataclasses.replace(inputs.candidates.take(rows), record=rows)
        else:
            batch = select_batch(inputs, state, strategy, count, rng)
        save_columns(path, batch)
    state.taken |= {int(row) for row in batch.record if row >= 0}
    return batch


def _label(inputs, state, batch: Columns, number: int, folder: Path) -> dict[str, Any]:
    """Label a batch, add it to the state and return how it was spent."""
    path, summary_path = folder / "labels.npz", folder / "labels.json"
    if not summary_path.exists():
        # Without this, a later round of structures that all fail could never be finished.
        required = not len(state.labeled)
        result = labels.label(inputs.oracle, batch, f"round {number + 1}", required=required)
        usable, failures = result.columns, dict(result.failures)
        outliers = labels.energy_outliers(usable, state.labeled)
        for row in np.flatnonzero(outliers).tolist():
            name = f"round {number + 1} {result.rows[row]}: {usable.molecule[row]}"
            failures[f"{name}, {usable.subset[row]}"] = "energy outlier"
        save_columns(path, usable.take(np.flatnonzero(~outliers)))
        failed = set(range(len(batch))) - set(result.rows[~outliers].tolist())
        write_json(
            summary_path,
            {
                "calls": len(batch),
                "seconds": result.seconds,
                "failures": failures,
                "failed_molecules": [str(batch.molecule[k]) for k in sorted(failed)],
            },
        )
    summary = parse_json(read_bytes(summary_path))
    new = load_columns(path)
    state.labeled = Columns.concatenate([state.labeled, new]) if len(state.labeled) else new
    state.failed.update(summary["failed_molecules"])
    state.calls += summary["calls"]
    state.seconds += summary["seconds"]
    return {
        "round": number + 1,
        "calls": state.calls,
        "oracle_seconds": state.seconds,
        "failures": summary["failures"],
        "num_labels": len(state.labeled),
        "num_molecules": len(set(state.labeled.molecule)),
        "kinds": dict(Counter(new.subset.tolist())),
        "per_molecule": _labels_per_molecule(state.labeled),
    }


def _check_validation(inputs, state) -> None:
    """Raise DatasetError if no validation structure consists of labeled elements."""
    unseen = unseen_elements.of_columns(inputs.valid, np.unique(state.labeled.numbers).tolist())
    if not unseen.known.any():
        raise DatasetError(
            "the expected error needs validation structures of elements with labels, received "
            f"{unseen.describe('validation structures')}. All labels are kept. Increase the budget, "
            "rounds.first_fraction or held_out.valid_fraction in a new workdir."
        )


def _labels_per_molecule(labeled: Columns) -> dict[str, int]:
    """Return the number of molecules by their number of labels, with keys as in JSON."""
    counts = Counter(Counter(labeled.molecule.tolist()).values())
    return {str(number): molecules for number, molecules in sorted(counts.items())}


def _starts(config: ml_collections.ConfigDict, state: StrategyState) -> list[str]:
    """Return the force field that each member starts from, "" for random parameters."""
    if state.folders and config.rounds.warm_start:
        return [str(path) for path in state.folders]
    return [config.init.workdir] * config.rounds.members


def _train(inputs, state, starts: list[str], folder: Path, *, report: bool) -> None:
    """Train the members on all labels."""
    state.members = training.train_members(
        inputs.config, folder, state.labeled, inputs.valid, starts, report=report
    )
    state.folders = training.member_folders(folder, len(starts))


def _evaluate(inputs, state, folder: Path) -> dict[str, Any]:
    """Return the evaluation of a round."""
    path = folder / "evaluation.json"
    if not path.exists():
        write_json(path, evaluate(inputs, state))
    return parse_json(read_bytes(path)) | {"force_field": [str(path) for path in state.folders]}


def _reaches(evaluation: dict[str, Any], target: float | None) -> bool:
    """Return whether the expected error is below the target (meV/Å)."""
    return target is not None and evaluation["expected_error"] * 1e3 < target


def _progress(evaluation: dict[str, Any], state: StrategyState, config) -> str:
    """Return the state of a strategy for the log."""
    test = evaluation["test"]
    text = (
        f"{count_of(len(state.labeled), 'label')}, {state.calls} of {config.budget} calculations, "
        f"expected force error {1e3 * evaluation['expected_error']:.1f} meV/Å (validation)"
    )
    return text + (f", test {1e3 * test['force_mae']:.1f} meV/Å" if test else "")


def final_force_field(evaluations: Sequence[dict[str, Any]]) -> str:
    """Return the force field of the last round, as every task accepts it."""
    return ",".join(evaluations[-1]["force_field"])

"""Tests for the handling of non-finite steps: message, file and decision."""

import csv
import logging

import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.shapes import Sizes
from mlip_jax.structure import Structure
from mlip_jax.training import nonfinite as module
from mlip_jax.training.data import Split, StepPlan
from mlip_jax.training.nonfinite import NonFinite, TrainingError


@pytest.fixture(scope="module")
def split():
    """Split whose members 0, 1, ... are the structures mol#49, mol#48, ..."""
    columns = Columns.from_structures(
        Structure(np.array([1]), np.zeros((1, 3)), source="mol", conformer=k) for k in range(50)
    )
    return Split(columns, np.arange(50)[::-1], Sizes(np.ones(50, np.int64), np.zeros(50, np.int64)))


def plan(*members):
    return StepPlan([np.array(m, np.int64) for m in members], 0)


def written(workdir):
    with open(workdir / "nonfinite.csv", newline="") as file:
        return [(int(row["step"]), row["structure"]) for row in csv.DictReader(file)]


def test_structures_of_all_micro_batches_are_listed(split, tmp_path):
    with pytest.raises(
        TrainingError, match="step 7 with the structures mol#48, mol#47, mol#9; "
    ) as raised:
        NonFinite("stop", split, tmp_path).should_roll_back([(7, plan([1, 2], [], [40]))], 0)
    assert "--config.train.on_nonfinite=skip" in str(raised.value)
    assert written(tmp_path) == [(7, "mol#48"), (7, "mol#47"), (7, "mol#9")]


def test_the_message_lists_only_structures_of_the_first_nonfinite_step(split, tmp_path):
    with pytest.raises(TrainingError, match="step 3 with the structures mol#49; "):
        NonFinite("stop", split, tmp_path).should_roll_back([(3, plan([0])), (5, plan([1]))], 0)
    assert written(tmp_path) == [(3, "mol#49"), (5, "mol#48")]


def test_a_large_batch_is_listed_in_part_and_written_in_full(split, tmp_path):
    with pytest.raises(TrainingError, match="mol#30 and 15 more;") as raised:
        NonFinite("stop", split, tmp_path).should_roll_back([(1, plan(np.arange(35)))], 0)
    assert "mol#29" not in str(raised.value)
    assert len(written(tmp_path)) == 35


def test_a_structure_is_written_once(split, tmp_path):
    """Also if the run was restarted."""
    for _ in range(2):
        judge = NonFinite("skip", split, tmp_path)
        for step in (4, 9):
            assert not judge.should_roll_back([(step, plan([0, 1]))], 0)
    assert written(tmp_path) == [(4, "mol#49"), (4, "mol#48"), (9, "mol#49"), (9, "mol#48")]


@pytest.mark.parametrize(("step", "said"), [(1, True), (2, False)])
def test_a_nonfinite_first_step_hints_at_the_model(split, tmp_path, step, said):
    with pytest.raises(TrainingError, match=f"in step {step} with the structures mol#49") as raised:
        NonFinite("stop", split, tmp_path).should_roll_back([(step, plan([0]))], 0)
    assert ("model.options.layer_norm_1=True" in str(raised.value)) == said


def test_the_structures_are_listed_even_if_nothing_can_be_written(split, tmp_path, caplog):
    (tmp_path / "nonfinite.csv").mkdir()
    with pytest.raises(TrainingError, match="step 7 with the structures mol#49; "):
        NonFinite("stop", split, tmp_path).should_roll_back([(7, plan([0]))], 0)
    assert "nonfinite.csv: cannot be written" in caplog.text


def test_only_one_process_writes(split, tmp_path):
    assert not NonFinite("skip", split, tmp_path).should_roll_back([(1, plan([0]))], 0, write=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("calls", "each"), [(100, 1), (20, 5)])
def test_the_number_of_skipped_steps_is_limited(split, tmp_path, calls, each, caplog):
    judge = NonFinite("skip", split, tmp_path)
    with caplog.at_level(logging.WARNING):
        for call in range(calls):
            assert not judge.should_roll_back([(call, plan([0]))] * each, 0, write=False)
    assert caplog.text.count("Skipping this step") == calls
    with pytest.raises(TrainingError, match="101 steps were skipped"):
        judge.should_roll_back([(200, plan([0]))], 0, write=False)


def test_rollbacks_are_counted_by_the_run(split, tmp_path):
    judge = NonFinite("rollback", split, tmp_path)
    for rollbacks in range(module.MAX_ROLLBACKS):
        assert judge.should_roll_back([(1, plan([0]))], rollbacks)
    with pytest.raises(TrainingError, match=f"rolled back {module.MAX_ROLLBACKS} times"):
        judge.should_roll_back([(1, plan([0]))], module.MAX_ROLLBACKS)


def test_an_unknown_choice_is_an_error_with_the_nearest_name(split, tmp_path):
    with pytest.raises(
        ConfigError, match="train.on_nonfinite 'roll_back'. Did you mean 'rollback'"
    ):
        NonFinite("roll_back", split, tmp_path)

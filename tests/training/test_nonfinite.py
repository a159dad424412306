"""What is said, written and decided about updates that are not finite."""

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
    """Places 0, 1, ... are structures mol#49, mol#48, ..."""
    columns = Columns.from_structures(
        Structure(np.array([1]), np.zeros((1, 3)), source="mol", conformer=k) for k in range(50)
    )
    return Split(columns, np.arange(50)[::-1], Sizes(np.ones(50, np.int64), np.zeros(50, np.int64)))


def group(*places):
    return StepPlan([np.array(p, np.int64) for p in places], 0)


def written(workdir):
    with open(workdir / "nonfinite.csv", newline="") as file:
        return [(int(row["step"]), row["structure"]) for row in csv.DictReader(file)]


def test_structures_of_all_micro_batches_are_named(split, tmp_path):
    with pytest.raises(
        TrainingError, match="step 7, whose batch holds mol#48, mol#47, mol#9; "
    ) as raised:
        NonFinite("stop", split, tmp_path).should_roll_back([(7, group([1, 2], [], [40]))], 0)
    assert "--config.train.on_nonfinite=skip" in str(raised.value)
    assert written(tmp_path) == [(7, "mol#48"), (7, "mol#47"), (7, "mol#9")]


def test_only_those_of_the_first_bad_update_are_in_the_message(split, tmp_path):
    with pytest.raises(TrainingError, match="step 3, whose batch holds mol#49; "):
        NonFinite("stop", split, tmp_path).should_roll_back([(3, group([0])), (5, group([1]))], 0)
    assert written(tmp_path) == [(3, "mol#49"), (5, "mol#48")]


def test_a_large_batch_is_not_listed_in_full_but_written(split, tmp_path):
    with pytest.raises(TrainingError, match="mol#30 and 15 more;") as raised:
        NonFinite("stop", split, tmp_path).should_roll_back([(1, group(np.arange(35)))], 0)
    assert "mol#29" not in str(raised.value)
    assert len(written(tmp_path)) == 35


def test_what_is_met_again_is_written_once(split, tmp_path):
    """Also by another start of the run."""
    for _ in range(2):
        judge = NonFinite("skip", split, tmp_path)
        for step in (4, 9):
            assert not judge.should_roll_back([(step, group([0, 1]))], 0)
    assert written(tmp_path) == [(4, "mol#49"), (4, "mol#48"), (9, "mol#49"), (9, "mol#48")]


@pytest.mark.parametrize(("step", "said"), [(1, True), (2, False)])
def test_what_is_bad_from_the_start_is_laid_to_the_model(split, tmp_path, step, said):
    with pytest.raises(TrainingError, match=f"in step {step}, whose batch holds mol#49") as raised:
        NonFinite("stop", split, tmp_path).should_roll_back([(step, group([0]))], 0)
    assert ("model.options.layer_norm_1=True" in str(raised.value)) == said


def test_the_structures_are_named_though_nothing_can_be_written(split, tmp_path, caplog):
    (tmp_path / "nonfinite.csv").mkdir()
    with pytest.raises(TrainingError, match="step 7, whose batch holds mol#49; "):
        NonFinite("stop", split, tmp_path).should_roll_back([(7, group([0]))], 0)
    assert "nonfinite.csv: cannot be written" in caplog.text


def test_only_one_process_writes(split, tmp_path):
    assert not NonFinite("skip", split, tmp_path).should_roll_back(
        [(1, group([0]))], 0, write=False
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("calls", "each"), [(100, 1), (20, 5)])
def test_many_may_be_passed_over_but_not_more(split, tmp_path, calls, each, caplog):
    judge = NonFinite("skip", split, tmp_path)
    with caplog.at_level(logging.WARNING):
        for call in range(calls):
            assert not judge.should_roll_back([(call, group([0]))] * each, 0, write=False)
    assert caplog.text.count("passed over") == calls
    with pytest.raises(TrainingError, match="101 updates were passed over"):
        judge.should_roll_back([(200, group([0]))], 0, write=False)


def test_rollbacks_are_counted_by_the_run(split, tmp_path):
    judge = NonFinite("rollback", split, tmp_path)
    for rollbacks in range(module.MOST_ROLLBACKS):
        assert judge.should_roll_back([(1, group([0]))], rollbacks)
    with pytest.raises(TrainingError, match=f"gone back {module.MOST_ROLLBACKS} times"):
        judge.should_roll_back([(1, group([0]))], module.MOST_ROLLBACKS)


def test_an_unknown_choice_names_the_nearest(split, tmp_path):
    with pytest.raises(
        ConfigError, match="train.on_nonfinite 'roll_back'. Did you mean 'rollback'"
    ):
        NonFinite("roll_back", split, tmp_path)

"""Test that a run that is killed repeatedly ends like an uninterrupted one."""

import random
import signal
import time

import numpy as np
import pytest

from tests.tasks.runs import (
    assert_alike,
    environment,
    finish,
    metrics,
    newest,
    run,
    start,
    steps_of,
    stopped_step,
)

KILLS = 30
RUN = {
    "model": "schnet",
    "train__num_steps": 600,
    "train__log_every": 10,
    "train__valid_every": 25,
    "train__checkpoint_every": 5,
}


@pytest.mark.slow
def test_thirty_kills_change_nothing(tmp_path):
    uninterrupted, workdir = tmp_path / "uninterrupted", tmp_path / "run"
    code, output = run(uninterrupted, **RUN)
    assert code == 0, output
    begin = time.monotonic()
    # duration of a run with all programs compiled
    code, output = run(tmp_path / "again", **RUN)
    duration = time.monotonic() - begin
    assert code == 0, output
    chance = random.Random(0)
    step, reached = 0, []
    for kill in range(KILLS):
        number = signal.SIGTERM if kill % 2 else signal.SIGKILL
        process = start(workdir, env=environment(), **RUN)
        time.sleep(chance.uniform(0.1, 1.0) * duration)
        process.send_signal(number)
        code, output = finish(process)
        # or it was done, or was killed before Python could take the signal
        assert code in (
            {0, -signal.SIGKILL} if number == signal.SIGKILL else {0, 75, -signal.SIGTERM}
        ), output
        if stopped_step(output) is not None:
            assert code == 75
        before, step = step, _sound(workdir)
        assert step >= before, "the newest checkpoint went back"
        reached.append(step)
        if stopped_step(output) is not None:
            assert step == stopped_step(output)
    assert len(set(reached)) > 5, f"the kills did not hit the training: {reached}"
    code, output = run(workdir, **RUN)
    assert code == 0, output
    for kind in ("checkpoints", "best"):
        ours, theirs = newest(workdir, kind), newest(uninterrupted, kind)
        assert ours.step == theirs.step
        for name, value in theirs.arrays.items():
            np.testing.assert_array_equal(ours.arrays[name], value, err_msg=f"{kind} {name}")
    np.testing.assert_array_equal(metrics(workdir)["step"], metrics(uninterrupted)["step"])
    for part in ("train", "valid", "test"):
        ours, theirs = (np.load(w / f"predictions_{part}.npz") for w in (workdir, uninterrupted))
        for name in ("energy_predicted", "forces_predicted"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{part} {name}")
    assert_alike(tmp_path / "again", uninterrupted)


def _sound(workdir):
    """Return the newest step, and assert that every complete checkpoint can be read."""
    from mlip_jax.checkpoint import CheckpointStore

    steps = steps_of(workdir)
    if not steps:
        return 0
    store = CheckpointStore(workdir / "checkpoints", read_only=True)
    try:
        for step in steps:
            assert store.read_step(step).step == step
        return steps[-1]
    finally:
        store.close()

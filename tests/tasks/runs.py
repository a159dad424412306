"""Runs of the main job in processes of their own, on a small data set with GFN2-xTB labels."""

import atexit
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mlip_jax.checkpoint import CheckpointStore
from tests.compilation import xla_flags
from tests.forks import Forks

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests/data/gfn2_small.hdf5"
OPTIONS = {  # of the smallest models that show what a run does
    "so3krates": {"num_features": 12, "num_layers": 1, "num_heads": 2, "degrees": "(1,2)"},
    "schnet": {"num_features": 8, "num_layers": 1}}
SMALL = {
    "data.path": DATA, "data.split_seed": 1, "train.num_steps": 24, "train.batch_size": 4, "train.log_every": 4,
    "train.valid_every": 8, "train.checkpoint_every": 4, "optimizer.warmup_steps": 2,
    # compiles in less time than Muon; tests/training/test_loop.py has that
    "optimizer.name": "adam", "optimizer.learning_rate": 1e-3}


def flags(workdir, model="so3krates", **changes):
    """Flags of a small run; `changes` are config fields with __ for the dot."""
    fields = SMALL | {f"model.options.{k}": v for k, v in OPTIONS[model].items()}
    fields |= {k.replace("__", "."): v for k, v in changes.items()}
    return [f"--config={REPOSITORY}/configs/spice.py:{model}", f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in fields.items())]


def command(workdir, model="so3krates", **changes):
    """Command line of a small run."""
    return [sys.executable, "-m", "mlip_jax.main", *flags(workdir, model, **changes)]


def environment(devices=None):
    """Of the runs: the repository can be imported, and programs that one run compiled serve the others."""
    cache = Path(tempfile.gettempdir()) / f"mlip_jax_tests_{os.getuid()}"
    virtual = {} if devices is None else {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(f"--xla_force_host_platform_device_count={devices}")}
    return dict(os.environ, GLIBC_TUNABLES="", PYTHONPATH=str(REPOSITORY), JAX_COMPILATION_CACHE_DIR=str(cache),
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3", **virtual)


def start(workdir, cwd=None, env=None, **changes):
    """Start a run in a process of its own: a fork of one that has imported the task, or, with `env`, a new one."""
    if env is None:
        return ForkedRun(cwd or workdir.parent, flags(workdir, **changes))
    return subprocess.Popen(command(workdir, **changes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            cwd=cwd or workdir.parent, env=env)


@functools.cache
def _forks():
    """The process that has imported what a training run needs, which takes 3 CPU-seconds."""
    forks = Forks("mlip_jax.main", "mlip_jax.cli.flags", "mlip_jax.tasks.train", **environment())
    atexit.register(forks.__exit__)
    return forks


class ForkedRun:
    """A run in a fork; the methods are those of subprocess.Popen."""

    def __init__(self, cwd, arguments):
        self._log = tempfile.TemporaryFile("w+")
        self._fork = _forks().start(
            "import os, sys; os.chdir(sys.argv.pop(1)); from mlip_jax.main import main; main()", cwd, *arguments,
            stdout=self._log)
        self.pid, self.poll, self.kill = self._fork.pid, self._fork.poll, self._fork.kill

    @property
    def returncode(self):
        return self._fork.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=300):
        """Return the output and None when the process has ended."""
        self._fork.wait(timeout)
        self._log.seek(0)
        return self._log.read(), None


def finish(process, timeout=300):
    """Exit code and output (white space folded) of a process."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, " ".join(output.split())


def run(workdir, cwd=None, env=None, **changes):
    """Return the exit code and the output (white space folded) of a run."""
    return finish(start(workdir, cwd, env, **changes))


def wait_for(condition, process, seconds=240):
    """Until `condition` holds; the process must live so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.005)


def wait_for_step(workdir, step, process):
    """Until the update `step` is in the metrics."""
    metrics = workdir / "metrics.csv"

    def reached():
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        return len(rows) > 1 and int(re.match(r"\d*", rows[-1])[0] or 0) >= step

    wait_for(reached, process)


def stop_at(workdir, step, number=signal.SIGTERM, env=None, **changes):
    """Exit code and output of a run that gets a signal when it has come to `step`."""
    process = start(workdir, env=env, **changes)
    wait_for_step(workdir, step, process)
    process.send_signal(number)
    return finish(process)


def stopped_step(output):
    """Where a run says that a signal stopped it; None if it does not say so."""
    found = re.search(r"stopped by SIG\w+ at step (\d+)", output)
    return int(found[1]) if found else None


def newest(workdir, kind="checkpoints"):
    """The newest checkpoint that can be read, or None."""
    if not (workdir / kind).is_dir():
        return None
    store = CheckpointStore(workdir / kind, read_only=True)
    try:
        return store.restore()
    finally:
        store.close()


def steps_of(workdir, kind="checkpoints"):
    """Steps of the checkpoints that claim to be complete."""
    folder = workdir / kind
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


def metrics(workdir):
    """metrics.csv by columns."""
    return np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True)


def assert_alike(workdir, expected, atol=None):
    """Checkpoints, metrics and predictions are the same bit by bit, or to `atol`."""

    def compare(a, b, what):
        if atol is None:
            np.testing.assert_array_equal(a, b, err_msg=what)
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=what)

    for kind in ("checkpoints", "best"):
        ours, theirs = newest(workdir, kind), newest(expected, kind)
        assert ours.step == theirs.step and ours.arrays.keys() == theirs.arrays.keys()
        for name, value in theirs.arrays.items():
            compare(ours.arrays[name], value, f"{kind} {name}")
    ours, theirs = metrics(workdir), metrics(expected)
    np.testing.assert_array_equal(ours["step"], theirs["step"])
    if atol is not None:
        return
    for column in ("epoch", "learning_rate", "train_loss", "train_force_mae_mev_per_ang", "valid_loss"):
        np.testing.assert_array_equal(ours[column], theirs[column], err_msg=column)
    for part in ("train", "valid", "test"):
        with np.load(workdir / f"predictions_{part}.npz") as a, np.load(expected / f"predictions_{part}.npz") as b:
            for name in ("energy_predicted", "forces_predicted"):
                np.testing.assert_array_equal(a[name], b[name], err_msg=f"{part} {name}")

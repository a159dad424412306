"""Training runs in separate processes, on a small data set with GFN2-xTB labels, for the tests."""

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
OPTIONS = {  # model options: the smallest models that exercise a run
    "schnet": {"num_features": 8, "num_layers": 1},
    "painn_oc": {"num_features": 8, "num_layers": 1, "num_radial": 8, "direct_forces": True},
}
SMALL = {
    "data.path": DATA,
    "data.split_seed": 3,  # valid and test have only elements that the training split has
    "train.num_steps": 24,
    "train.batch_size": 4,
    "train.log_every": 4,
    "train.valid_every": 8,
    "train.checkpoint_every": 4,
    "optimizer.warmup_steps": 2,
    # Adam compiles faster than Muon, which tests/training/test_loop.py covers
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-3,
}


def flags(workdir, model="schnet", **changes):
    """Return the flags of a small run. `changes` are config fields with __ in place of dots."""
    fields = SMALL | {f"model.options.{k}": v for k, v in OPTIONS[model].items()}
    fields |= {k.replace("__", "."): v for k, v in changes.items()}
    return [
        f"--config={REPOSITORY}/configs/spice.py:{model}",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in fields.items()),
    ]


def command(workdir, model="schnet", **changes):
    """Return the command line of a small run."""
    return [sys.executable, "-m", "mlip_jax.main", *flags(workdir, model, **changes)]


def environment(devices=None):
    """Return the environment of a run.

    The run can import the repository and shares its compiled programs with other runs.

    Args:
      devices: Number of virtual CPU devices. None: the default devices.
    """
    virtual = (
        {}
        if devices is None
        else {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(f"--xla_force_host_platform_device_count={devices}"),
        }
    )
    return dict(os.environ, GLIBC_TUNABLES="", PYTHONPATH=str(REPOSITORY), **virtual)


def start(workdir, cwd=None, env=None, **changes):
    """Start a run in another process: in a fork or, with `env`, in a new interpreter."""
    if env is None:
        return ForkedRun(cwd or workdir.parent, flags(workdir, **changes))
    return subprocess.Popen(
        command(workdir, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd or workdir.parent,
        env=env,
    )


@functools.cache
def _forks():
    """Return the process that has imported the modules of a training run (3 CPU-seconds)."""
    modules = (
        "mlip_jax.main",
        "mlip_jax.cli.flags",
        "mlip_jax.tasks.train",
        "mlip_jax.tasks.relax",
    )
    forks = Forks(*modules, "tests.drawing", **environment())
    atexit.register(forks.__exit__)
    return forks


class ForkedRun:
    """Run in a fork, with methods of subprocess.Popen."""

    def __init__(self, cwd, arguments):
        self._log = tempfile.TemporaryFile("w+")
        self._fork = _forks().start(
            "import os, sys; os.chdir(sys.argv.pop(1)); from tests import drawing; "
            "drawing.simplify(blank=True); from mlip_jax.main import main; main()",
            cwd,
            *arguments,
            stdout=self._log,
        )
        self.pid, self.poll, self.kill = self._fork.pid, self._fork.poll, self._fork.kill

    @property
    def returncode(self):
        """Exit code, or None if the run has not ended."""
        return self._fork.returncode

    def send_signal(self, number):
        """Send a signal to the run if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def written(self):
        """Return the output so far."""
        # the run writes at the offset of the same open file, which must not be moved
        return os.pread(self._log.fileno(), 1_000_000, 0).decode()

    def communicate(self, timeout=300):
        """Wait for the end of the run and return (output, None)."""
        self._fork.wait(timeout)
        self._log.seek(0)
        return self._log.read(), None


def finish(process, timeout=300):
    """Wait for a process and return its exit code and output, with white space folded."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, " ".join(output.split())


def run(workdir, cwd=None, env=None, **changes):
    """Run to the end and return the exit code and the output, with white space folded."""
    return finish(start(workdir, cwd, env, **changes))


def wait_for(condition, process, seconds=240):
    """Wait until `condition()` is true. Fail if the process ends before that."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.005)


def wait_for_step(workdir, step, process):
    """Wait until the metrics contain `step` or a later step."""
    metrics = workdir / "metrics.csv"

    def reached():
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        return len(rows) > 1 and int(re.match(r"\d*", rows[-1])[0] or 0) >= step

    wait_for(reached, process)


def stop_at(workdir, step, number=signal.SIGTERM, env=None, **changes):
    """Send a signal to a run when it has reached `step`; return its exit code and output."""
    process = start(workdir, env=env, **changes)
    wait_for_step(workdir, step, process)
    process.send_signal(number)
    return finish(process)


def stopped_step(output):
    """Return the step at which a signal stopped a run, according to its output, or None."""
    found = re.search(r"stopped by SIG\w+ at step (\d+)", output)
    return int(found[1]) if found else None


def newest(workdir, kind="checkpoints"):
    """Return the newest checkpoint that can be read, or None."""
    if not (workdir / kind).is_dir():
        return None
    store = CheckpointStore(workdir / kind, read_only=True)
    try:
        return store.restore()
    finally:
        store.close()


def steps_of(workdir, kind="checkpoints"):
    """Return the steps of the checkpoints whose folder names mark them as complete."""
    folder = workdir / kind
    return (
        sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
        if folder.is_dir()
        else []
    )


def metrics(workdir):
    """Return the columns of metrics.csv by name."""
    return np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True)


def assert_alike(workdir, expected, atol=None):
    """Assert that checkpoints, metrics and predictions of two runs are identical.

    With `atol`, compare only the checkpoints, to that absolute tolerance, and the steps of the
    metrics.
    """

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
    for column in (
        "epoch",
        "learning_rate",
        "train_loss",
        "train_force_mae_mev_per_ang",
        "valid_loss",
    ):
        np.testing.assert_array_equal(ours[column], theirs[column], err_msg=column)
    for part in ("train", "valid", "test"):
        with (
            np.load(workdir / f"predictions_{part}.npz") as a,
            np.load(expected / f"predictions_{part}.npz") as b,
        ):
            for name in ("energy_predicted", "forces_predicted"):
                np.testing.assert_array_equal(a[name], b[name], err_msg=f"{part} {name}")

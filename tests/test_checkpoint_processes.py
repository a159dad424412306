"""Tests for checkpoints of processes that end or are killed, and of several processes."""

import contextlib
import os
import signal
import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from mlip_jax.checkpoint import CheckpointStore
from tests.forks import Forks
from tests.ports import free_port

PRELUDE = """
import os, resource, signal, sys, time
import jax, numpy as np, orbax.checkpoint as ocp
from mlip_jax.checkpoint import CheckpointError, CheckpointStore
directory, arguments = sys.argv[1], sys.argv[2:]

def tree_of(step):
    return {"w": np.full((4, 3), step, np.float32), "b": np.arange(step, dtype=np.float64)}
"""


@pytest.fixture(scope="module")
def forks():
    with Forks("mlip_jax.checkpoint") as forks:
        yield forks


@pytest.fixture
def start(forks, tmp_path_factory):
    """Start a script in a separate process, which is killed after `seconds` seconds."""
    started, folder = [], tmp_path_factory.mktemp("errors")

    def start(script, *arguments, seconds=120):
        (stdin, write), (read, stdout) = os.pipe(), os.pipe()
        errors = folder / f"errors_{len(started)}"
        with open(stdin) as stdin, open(stdout, "w") as stdout, open(errors, "w") as stderr:
            process = forks.start(
                PRELUDE + script, *arguments, stdin=stdin, stdout=stdout, stderr=stderr
            )
        process.stdin, process.stdout, process.errors = open(write, "w"), open(read), errors
        process.watchdog = threading.Timer(seconds, os.kill, (process.pid, signal.SIGKILL))
        process.watchdog.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.watchdog.cancel()
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def finish(process):
    """Wait for the end of a process; return its exit code, output and errors."""
    process.stdin.close()
    out = process.stdout.read()
    code = process.wait()
    process.watchdog.cancel()
    return code, out, process.errors.read_text()


def newest(directory):
    """Return the newest checkpoint, after checking that its arrays are those of its step."""
    with contextlib.closing(CheckpointStore(directory, read_only=True)) as reader:
        restored = reader.restore()
    np.testing.assert_array_equal(restored.arrays["w"], np.full((4, 3), restored.step, np.float32))
    np.testing.assert_array_equal(restored.arrays["b"], np.arange(restored.step, dtype=np.float64))
    return restored


@pytest.mark.parametrize("end", [SystemExit(3), ValueError("the end"), KeyboardInterrupt()])
def test_a_store_that_is_closed_finishes_the_save(tmp_path, monkeypatch, end):
    with pytest.raises(type(end)), contextlib.closing(CheckpointStore(tmp_path)) as store:
        save = ocp.Checkpointer.save
        monkeypatch.setattr(
            ocp.Checkpointer,
            "save",
            lambda *args, **kwargs: (time.sleep(0.1), save(*args, **kwargs)),
        )
        store.save_in_background(2, {"w": np.full((4, 3), 2, np.float32), "b": np.arange(2.0)}, {})
        raise end
    assert newest(tmp_path).step == 2


def test_a_save_interrupted_by_the_end_of_the_interpreter_is_reported(tmp_path, start):
    returned, _, errors = finish(
        start(
            """
store = CheckpointStore(directory)
store.save(1, tree_of(1), {})
save = ocp.Checkpointer.save
ocp.Checkpointer.save = lambda *args, **kwargs: (time.sleep(0.3), save(*args, **kwargs))
store.save_in_background(2, tree_of(2), {})""",
            tmp_path,
        )
    )
    assert returned == 0 and "step 2 cannot be written" in errors, errors
    assert newest(tmp_path).step == 1


def test_full_disk_in_the_background(tmp_path, start):
    """A limit of the file size simulates a full disk. Errors that are not raised are logged."""
    returned, out, errors = finish(
        start(
            """
store = CheckpointStore(directory)
store.save(1, tree_of(1), {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
large = {"x": np.random.default_rng(0).normal(size=100000)}
store.save_in_background(2, large, {})
try:
    store.wait()
except CheckpointError:
    print("raised", os.listdir(directory))
store.wait()
store.save_in_background(3, large, {})""",
            tmp_path,
        )
    )
    assert returned == 0 and out == "raised ['1']\n", out + errors
    assert "step 3 cannot be written" in errors and "step 2" not in errors
    assert newest(tmp_path).step == 1


def test_a_folder_that_cannot_be_created_does_not_block_the_process(tmp_path, start):
    """Detects threads of orbax that wait ten minutes for folders at the end of the process."""
    returned, out, errors = finish(
        start(
            """
import errno
store = CheckpointStore(directory)
store.save(1, tree_of(1), {})
make = os.mkdir

def full(path, *args, **kwargs):
    if os.path.basename(path).startswith("arrays"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    make(path, *args, **kwargs)

os.mkdir = full
store.save_in_background(2, tree_of(2), {})
try:
    store.wait()
except CheckpointError as error:
    print(error)""",
            tmp_path,
            seconds=60,
        )
    )
    assert returned == 0, out + errors
    assert "step 2 cannot be written" in out and "No space left" in out
    assert newest(tmp_path).step == 1


KILLED = """
def train(durable):
    store = CheckpointStore(directory)
    restored = store.restore()
    step = restored.step if restored else 0
    while True:
        step += 1
        for turn in range(1 + step % 2):  # every second one is replaced
            begin = time.monotonic()
            store.save_in_background(step, tree_of(step), {})
            store.wait()
            os.write(durable, b"%d %f\\n" % (step, time.monotonic() - begin))

for line in sys.stdin:  # each line: time of the kill in units of the duration of the first save
    reading, durable = os.pipe()
    child = os.fork()
    if child == 0:
        train(durable)
    os.close(durable)
    out = os.read(reading, 100)
    time.sleep(float(line) * float(out.split()[1]))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 1000):
        out += more
    os.close(reading)
    print(out.splitlines()[-1].split()[0].decode(), flush=True)
"""


def test_killed_at_any_moment(tmp_path, start):
    """After each kill, the newest checkpoint is valid and not older than the last reported one."""
    process = start(KILLED, tmp_path)
    for times in np.random.default_rng(0).uniform(0, 3, 12):
        process.stdin.write(f"{times}\n")
        process.stdin.flush()
        durable = int(process.stdout.readline())
        assert newest(tmp_path).step in (durable, durable + 1)
    returned, _, errors = finish(process)
    assert returned == 0, errors


TWO = """
port, index = arguments[0], int(arguments[1])
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=60)
assert jax.process_count() == 2
if index == 0:
    latest, best = CheckpointStore(directory + "/latest"), CheckpointStore(directory + "/best")
    assert latest.restore() is None
    for step in (1, 2, 3, 3):
        for store in (latest, best):
            store.save_in_background(step, tree_of(step), {})
    latest.wait()
    print(latest.restore().step, latest.steps())
    latest.save(4, tree_of(4), {})
    latest.close()
    best.close()
    print("written", flush=True)
    sys.stdin.readline()
else:
    sys.stdin.readline()  # wait until everything is written
    store = CheckpointStore(directory + "/latest", read_only=True)
    print(store.restore().step)
    store.close()
    try:
        CheckpointStore(directory + "/latest")
    except CheckpointError as error:
        print(error)
"""


def test_only_one_of_two_processes_writes(tmp_path, start):
    port = free_port()
    writer, reader = (start(TWO, tmp_path, port, index) for index in range(2))
    assert [writer.stdout.readline() for _ in range(2)] == ["3 [2, 3]\n", "written\n"]
    for process in (reader, writer):
        process.stdin.write("\n")
        process.stdin.flush()
    results = [finish(process) for process in (reader, writer)]
    assert [code for code, _, _ in results] == [0, 0], results
    restored, error = results[0][1].splitlines()
    assert restored == "4" and "process 1 of 2" in error and "read_only=True" in error
    assert newest(tmp_path / "latest").step == 4 and newest(tmp_path / "best").step == 3

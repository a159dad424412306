"""Tests for workers: each job runs once, errors reach the caller, workers end with their parent."""

import contextlib
import math
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlip_jax import workers
from mlip_jax.workers import run, stream
from tests.worker_jobs import (
    JobError,
    die_at_negative,
    fail_at_three,
    mark,
    settings,
    square,
    wait_for,
    wait_if_first,
)

REPOSITORY = Path(__file__).parents[1]
SCRIPT = """
import os, time
from mlip_jax import workers

def job(number):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    list(workers.run(job, [0, 1], 2))
"""


TWO_JOBS = """
from mlip_jax import workers
from tests.worker_jobs import square

if __name__ == "__main__":
    print(len(list(workers.run(square, [1, 2], 2))))
"""

UNGUARDED = """
from mlip_jax import workers
from tests.worker_jobs import square
list(workers.CALL)
"""


@pytest.fixture(autouse=True)
def light_main(monkeypatch):
    """Replace the main module, pytest, which every worker would import."""
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))


def test_each_job_runs_once():
    jobs = [5, 3, 3, -2, 0, 7]
    results = dict(run(square, jobs, 2))
    assert sorted(results) == list(range(6))
    assert [results[i][0] for i in range(6)] == [x * x for x in jobs]
    assert os.getpid() not in {pid for _, pid in results.values()}
    assert not multiprocessing.active_children()


def test_workers_import_nothing_from_the_current_folder(tmp_path):
    """A folder of other people can contain a file pickle.py, which a new interpreter would run."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/script.py").write_text(TWO_JOBS)
    for name in ("pickle", "struct", "signal"):
        (tmp_path / f"{name}.py").write_text(f"open('ran_{name}', 'w').close()\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "own/script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not list(tmp_path.glob("ran_*"))
    assert done.stdout == "2\n", done.stderr


def test_finished_jobs_come_first(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    results = run(wait_for, [str(tmp_path / "pipe"), "", "", ""], 2)
    assert sorted(next(results) for _ in range(3)) == [(1, ""), (2, ""), (3, "")]
    (tmp_path / "pipe").write_text("go")
    assert list(results) == [(0, "go")]


def test_one_process_runs_the_jobs_here_in_order():
    seen = []
    results = run(
        lambda x: seen.append(x) or os.getpid(),
        "abc",
        1,
        initializer=lambda: pytest.fail("called here"),
    )
    assert seen == []
    assert next(results) == (0, os.getpid()) and seen == ["a"]
    assert [index for index, _ in results] == [1, 2] and seen == ["a", "b", "c"]


def test_no_more_processes_than_jobs():
    assert list(run(lambda x: os.getpid(), ["only"], 8)) == [(0, os.getpid())]
    assert list(run(square, [], 8)) == [] == list(run(square, [], 1))


def test_default_is_one_process_per_core(monkeypatch):
    counts = []
    monkeypatch.setattr(workers, "_Executor", lambda n, *_: counts.append(n) or 1 / 0)
    monkeypatch.setattr(workers, "available_cores", lambda: 5)
    for jobs in (9, 3):
        with pytest.raises(ZeroDivisionError):
            list(run(square, range(jobs)))
    assert counts == [5, 3]
    monkeypatch.undo()
    assert 1 <= workers.available_cores() <= os.cpu_count()


def test_a_worker_is_single_threaded_and_initialized_and_ignores_ctrl_c(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    job = (*workers.SINGLE_THREADED, "MARK")
    ((index, (variables, ignores)),) = run(
        settings, [job], 1, initializer=mark, single_inline=False
    )
    assert index == 0 and ignores
    assert {name: variables[name] for name in workers.SINGLE_THREADED} == workers.SINGLE_THREADED
    assert variables["MARK"].startswith("of ") and variables["MARK"] != f"of {os.getpid()}"
    assert (
        os.environ["OMP_NUM_THREADS"] == "7"
        and "MKL_NUM_THREADS" not in os.environ
        and "MARK" not in os.environ
    )


def test_error_in_this_process_is_raised():
    seen = []
    with pytest.raises(JobError, match="job 3 failed"):
        for index, value in run(fail_at_three, range(50), 1):
            assert index == value
            seen.append(index)
    assert seen == [0, 1, 2]


def test_error_of_a_worker_is_raised():
    seen = []
    with pytest.raises(JobError, match="job 3 failed"):
        for index, value in run(fail_at_three, range(50), 2):
            assert index == value != 3
            seen.append(index)
    assert len(seen) < 50 and not multiprocessing.active_children()


def test_worker_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(run(die_at_negative, [0, -1, 2, 3], 2))
    assert not multiprocessing.active_children()


def test_abandoned_iterator_ends_the_workers():
    def first():
        for index, _ in run(time.sleep, [0, 60, 60], 2):
            assert len(multiprocessing.active_children()) == 2
            return index

    started = time.monotonic()
    first()  # the iterator is closed when it is garbage-collected, in the middle of two jobs
    assert not multiprocessing.active_children() and time.monotonic() - started < 15


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux reports the end of any process")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, number):
    """The workers are in the middle of a job of ten minutes."""
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
    ) as parent:
        ends = [os.pidfd_open(int(parent.stdout.readline())) for _ in range(2)]
        assert parent.poll() is None
        parent.send_signal(number)
    try:
        for end in ends:
            assert select.select([end], [], [], 10)[0], "a worker is still running"
    finally:
        for end in ends:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(end, signal.SIGKILL)
            os.close(end)


@pytest.mark.parametrize(
    "call", ["stream(square, [1, 2], 2, on_death=str)", "run(square, [1], single_inline=False)"]
)
def test_scripts_without_a_main_guard_are_not_taken_for_jobs_that_kill(tmp_path, call):
    """Data files were said to be corrupted, and RDKit to crash on each molecule."""
    (tmp_path / "script.py").write_text(UNGUARDED.replace("CALL", call))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode and 'put the calls of the script below `if __name__ == "__main__":`' in (
        done.stderr
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_stream_is_in_order(processes):
    assert list(stream(wait_if_first, iter(range(9)), processes)) == list(range(9))
    assert list(stream(square, iter([]), processes)) == [] and not multiprocessing.active_children()


def test_stream_takes_a_bounded_number_of_jobs_ahead():
    taken = []

    def jobs():
        for x in range(10**9):
            taken.append(x)
            yield x

    results = stream(square, jobs(), 2, ahead=5)
    assert taken == []
    for x in range(12):
        assert next(results)[0] == x * x
        assert len(taken) == x + 5
    results.close()
    assert not multiprocessing.active_children()


def test_stream_of_one_process_runs_here_and_takes_no_jobs_ahead():
    taken = []
    results = stream(lambda x: os.getpid(), (taken.append(x) or x for x in range(5)), 1)
    assert next(results) == os.getpid() and taken == [0]


def test_closed_stream_ends_running_jobs():
    results = stream(time.sleep, [0, 600, 600], 2)
    next(results)
    started = time.monotonic()
    results.close()
    assert not multiprocessing.active_children() and time.monotonic() - started < 10


def test_stream_raises_errors_of_jobs():
    results = stream(math.sqrt, [0.0, 1.0, -1.0, 4.0], 2)
    assert [next(results) for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError):
        next(results)
    assert not multiprocessing.active_children()


def test_stream_continues_after_deaths():
    jobs = [3, 4, -1, -2, 5, -3, 6, 7]
    results = list(stream(die_at_negative, jobs, 2, ahead=4, on_death=lambda job: f"died of {job}"))
    assert results == [f"died of {x}" if x < 0 else x * x for x in jobs]
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(stream(die_at_negative, jobs, 2))
    assert not multiprocessing.active_children()


def test_workers_of_a_stream_are_single_threaded():
    variables, ignores = next(stream(settings, [["OMP_NUM_THREADS"]], 2))
    assert variables == {"OMP_NUM_THREADS": "1"} and ignores


def test_a_deadline_in_a_thread():
    """Workers of dask run jobs in threads, where the time limit of a calculation had no effect."""

    def spin():
        start = time.monotonic()
        with workers.deadline(0.1):
            while time.monotonic() < start + 60:
                pass

    def finish():
        with workers.deadline(0.3):
            time.sleep(0.01)
        time.sleep(0.4)
        with workers.deadline(60), pytest.raises(TimeoutError, match="of the block"):
            raise TimeoutError("of the block")
        return "finished"

    with ThreadPoolExecutor(2) as executor:
        late, early = executor.submit(spin), executor.submit(finish)
        with pytest.raises(TimeoutError, match="took longer than 0.1 s"):
            late.result()
        assert early.result() == "finished"

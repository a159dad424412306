"""Jobs are done once each, errors come through, and no worker outlives its parent."""

import gc
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlip_jax import workers
from mlip_jax.workers import run, stream

REPOSITORY = Path(__file__).parents[1]
SCRIPT = """
import sys, time
from mlip_jax import workers

def job(number):
    import os
    open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
    time.sleep(600)

if __name__ == "__main__":
    list(workers.run(job, [0, 1, 2], 2))
"""


class JobError(Exception):
    pass


def square(x):
    return x * x, os.getpid()


def slow_when_first(x):
    time.sleep(0.4 if x == 0 else 0)
    return x


def fails_at_three(x):
    if x == 3:
        raise JobError(f"job {x} went wrong")
    return x


def dies_at_one(x):
    if x == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def environment(_):
    return {name: os.environ.get(name) for name in (*workers.SINGLE_THREADED, "MARK")}


def mark():
    os.environ["MARK"] = f"of {os.getpid()}"


def signals(_):
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def children():
    """Processes that this one started with multiprocessing, resource tracker aside."""
    import multiprocessing
    return multiprocessing.active_children()


def test_all_jobs_once_with_their_numbers():
    jobs = [5, 3, 3, -2, 0, 7]
    found = dict(run(square, jobs, 2))
    assert sorted(found) == list(range(6))
    assert [found[i][0] for i in range(6)] == [x * x for x in jobs]
    assert os.getpid() not in {pid for _, pid in found.values()}
    assert not children()


def test_what_is_done_first_comes_first():
    found = list(run(slow_when_first, range(4), 2))
    assert sorted(found) == [(i, i) for i in range(4)] and found[-1] == (0, 0)


def test_one_process_is_this_one_and_in_order():
    seen = []
    found = run(lambda x: seen.append(x) or os.getpid(), "abc", 1, initializer=lambda: pytest.fail("called here"))
    assert seen == []
    assert next(found) == (0, os.getpid()) and seen == ["a"]
    assert [index for index, _ in found] == [1, 2] and seen == ["a", "b", "c"]


def test_no_more_processes_than_jobs():
    assert list(run(lambda x: os.getpid(), ["only"], 8)) == [(0, os.getpid())]
    assert list(run(square, [], 8)) == [] == list(run(square, [], 1))


def test_one_process_elsewhere():
    (index, (value, pid)), = run(square, [3], 1, one_stays_here=False)
    assert (index, value) == (0, 9) and pid != os.getpid()


def test_default_is_a_process_for_each_core(monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda n, *_: asked.append(n) or 1 / 0)
    monkeypatch.setattr(workers, "available_cores", lambda: 5)
    for jobs in (9, 3):
        with pytest.raises(ZeroDivisionError):
            list(run(square, range(jobs)))
    assert asked == [5, 3]
    monkeypatch.undo()
    assert 1 <= workers.available_cores() <= os.cpu_count()


def test_workers_are_single_threaded_and_initialized(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    found = [e for _, e in run(environment, range(2), 2, initializer=mark)]
    for each in found:
        assert {name: each[name] for name in workers.SINGLE_THREADED} == workers.SINGLE_THREADED
        assert each["MARK"].startswith("of ") and each["MARK"] != f"of {os.getpid()}"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ and "MARK" not in os.environ


def test_workers_leave_ctrl_c_to_the_parent():
    assert [v for _, v in run(signals, range(2), 2)] == [True, True]


@pytest.mark.parametrize("processes", [1, 2])
def test_error_of_a_job_comes_through(processes):
    seen = []
    with pytest.raises(JobError, match="job 3 went wrong"):
        for index, value in run(fails_at_three, range(50), processes):
            assert index == value != 3
            seen.append(index)
    assert len(seen) < 50 and not children()
    if processes == 1:
        assert seen == [0, 1, 2]


def test_error_of_the_library_comes_through():
    with pytest.raises(ValueError, match="math domain"):
        list(run(math.sqrt, [1.0, -1.0, 4.0], 2))


def test_worker_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(run(dies_at_one, range(4), 2))
    assert not children()


def test_iterator_that_is_left_ends_the_workers():
    found = run(slow_when_first, [1] * 3 + [0] * 200, 2)
    next(found)
    assert len(children()) == 2
    started = time.monotonic()
    found.close()
    assert not children() and time.monotonic() - started < 10  # 200 jobs would take 40 s

    def first():
        for index, _ in run(slow_when_first, [1] * 3 + [0] * 200, 2):
            return index

    first()
    gc.collect()
    assert not children()


def test_results_are_arrays():
    found = dict(run(np.sqrt, [np.arange(4.0), np.ones((2, 2))], 2))
    np.testing.assert_array_equal(found[0] ** 2, np.sqrt(np.arange(4.0)) ** 2)
    assert found[1].shape == (2, 2)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells which processes run")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, how):
    """In the midst of a job of ten minutes."""
    (tmp_path / "pids").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tmp_path / "pids")],
                              env=dict(os.environ, PYTHONPATH=str(REPOSITORY)))
    deadline = time.monotonic() + 60
    while len(pids := [int(p.name) for p in (tmp_path / "pids").iterdir()]) < 2:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert all(running(pid) for pid in pids)
    parent.send_signal(how)
    parent.wait(60)
    deadline = time.monotonic() + 10
    try:
        while any(running(pid) for pid in pids):
            assert time.monotonic() < deadline, "workers are left behind"
            time.sleep(0.01)
    finally:
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


def dies_at_negative(x):
    if x < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def died(job):
    return f"died of {job}"


@pytest.mark.parametrize("processes", [1, 2])
def test_stream_is_in_order(processes):
    assert list(stream(slow_when_first, iter(range(9)), processes)) == list(range(9))
    assert list(stream(square, iter([]), processes)) == [] and not children()


def test_stream_takes_jobs_a_bounded_way_ahead():
    taken = []

    def jobs():
        for x in range(10**9):
            taken.append(x)
            yield x

    found = stream(square, jobs(), 2, ahead=5)
    assert taken == []
    for x in range(12):
        assert next(found)[0] == x * x
        assert len(taken) == x + 5
    found.close()
    assert not children()


def test_stream_of_one_process_is_here_and_takes_nothing_ahead():
    taken = []
    found = stream(lambda x: os.getpid(), (taken.append(x) or x for x in range(5)), 1)
    assert next(found) == os.getpid() and taken == [0]


def test_stream_that_is_left_ends_jobs_in_their_midst():
    found = stream(time.sleep, [0, 600, 600], 2)
    next(found)
    started = time.monotonic()
    found.close()
    assert not children() and time.monotonic() - started < 10


def test_stream_passes_errors_on():
    found = stream(fails_at_three, range(50), 2)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(JobError, match="job 3 went wrong"):
        next(found)
    assert not children()


def test_stream_goes_on_after_deaths():
    jobs = [3, 4, -1, -2, 5, 6, 7]
    expected = [died(x) if x < 0 else x * x for x in jobs]
    assert list(stream(dies_at_negative, jobs, 2, ahead=4, on_death=died)) == expected
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(stream(dies_at_negative, jobs, 2))
    assert not children()


def test_workers_of_a_stream_are_single_threaded():
    assert next(stream(environment, [0], 2))["OMP_NUM_THREADS"] == "1"

"""Tests for executors in place of worker processes: order, lost jobs, and machines that end."""

import os
import signal
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from ase.build import molecule

from mlip_jax import executors, workers
from mlip_jax.executors import JobLostError, use_executor
from mlip_jax.simulation.reference.oracle import Method, Oracle
from mlip_jax.simulation.reference.result_cache import ResultCache
from tests.worker_jobs import fail_at_three, square


class LosingExecutor(ThreadPoolExecutor):
    """Executor that loses the first submissions of some jobs.

    Args:
      losses: Number of lost submissions by job.
      error: Error of a lost job.
    """

    def __init__(self, losses, error=None):
        super().__init__(2)
        self.losses, self.submitted = dict(losses), []
        self.error = BrokenProcessPool("a machine ended") if error is None else error

    def submit(self, function, job):
        self.submitted.append(job)
        if self.losses and self.losses.get(job, 0):
            self.losses[job] -= 1
            future = Future()
            future.set_exception(self.error)
            return future
        return super().submit(function, job)


@pytest.mark.parametrize("error", [BrokenProcessPool("ended"), CancelledError()])
def test_lost_jobs_run_again(error):
    """Detects a result that is missing, twice, or at the place of another job."""
    jobs = [5, 3, -2, 7]
    with LosingExecutor({3: 1, 7: 2}, error) as executor, use_executor(executor):
        results = dict(workers.run(square, jobs, 2))
        assert [results[k][0] for k in range(4)] == [x * x for x in jobs]
        assert all(pid == os.getpid() for _, pid in results.values())
    with LosingExecutor({3: 1, 7: 2}, error) as executor, use_executor(executor):
        squares = [value for value, _ in workers.stream(square, iter(jobs), 2, ahead=2)]
        assert squares == [x * x for x in jobs] and executor.submitted.count(7) == 3
    assert executors.selected() is None


def test_a_single_core_leaves_its_jobs_to_the_executor(monkeypatch):
    """Detects a head node with one core that computes all labels itself."""
    monkeypatch.setattr(workers, "available_cores", lambda: 1)
    with LosingExecutor({}) as executor, use_executor(executor):
        list(workers.run(square, [1, 2]))
        list(workers.stream(square, [3, 4]))
        list(workers.run(square, [5, 6], 1))  # in this process, as its caller wants
    assert executor.submitted == [1, 2, 3, 4]


def test_a_job_that_is_lost_again_and_again_is_reported():
    with LosingExecutor({3: 9}) as executor, use_executor(executor):
        with pytest.raises(JobLostError, match="lost 3 times.*Check the memory"):
            list(workers.run(square, [1, 3], 2))
        died = list(workers.stream(square, [1, 3], on_death=lambda job: f"died of {job}"))
        assert died[1] == "died of 3" and died[0][0] == 1
        with pytest.raises(JobLostError):
            list(workers.stream(square, [3]))
    with use_executor(executor), pytest.raises(JobLostError, match="no more jobs"):
        list(workers.run(square, [1, 2], 2))  # the executor was shut down


def test_errors_of_jobs_are_not_losses():
    with LosingExecutor({}) as executor, use_executor(executor):
        with pytest.raises(Exception, match="job 3 failed"):
            list(workers.stream(fail_at_three, range(5)))
        with pytest.raises(Exception, match="job 3 failed"):
            list(workers.run(fail_at_three, range(5)))
        assert executor.submitted.count(3) == 2


def test_local_jobs_and_single_inline_jobs_stay_here():
    with LosingExecutor({}) as executor, use_executor(executor):
        assert list(workers.run(square, [2], 1)) == [(0, (4, os.getpid()))]
        assert list(workers.run(square, [2], 1, local=True)) == [(0, (4, os.getpid()))]
        assert list(workers.stream(square, [2], 1)) == [(4, os.getpid())]
    assert executor.submitted == []


def test_an_initializer_runs_once_per_process():
    calls = []

    def initialize():
        calls.append(os.getpid())

    with ThreadPoolExecutor(1) as executor, use_executor(executor):
        list(workers.run(square, range(4), 2, initializer=initialize, single_inline=False))
    assert calls == [os.getpid()]


def test_the_reference_method_takes_an_executor(tmp_path):
    """Detects a user of worker processes that ignores the executor."""
    method = Method("ase.calculators.emt:EMT")
    molecules = {name: molecule(name) for name in ("H2O", "N2", "CH4")}
    with LosingExecutor({}) as executor, use_executor(executor):
        results = Oracle(method, ResultCache(tmp_path / "cache"), progress=False).evaluate(
            molecules
        )
    assert len(executor.submitted) == 3 and list(results) == list(molecules)
    assert all(np.isfinite(r.energy) for r in results.values())


def test_other_objects_are_no_executors():
    with pytest.raises(ValueError, match="expected the address of a scheduler"), use_executor(3):
        pass


@pytest.mark.slow
def test_a_killed_worker_of_dask_loses_no_job(tmp_path):
    """One of two workers is killed while it runs a job; another one takes its jobs over."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        use_executor(cluster.scheduler_address),
    ):
        jobs = [(str(tmp_path), k) for k in range(12)]
        results = workers.stream(note_and_wait, jobs, ahead=12)
        first = [next(results) for _ in range(2)]
        victim = first[-1][1]
        os.kill(victim, signal.SIGKILL)
        values = [*first, *results]
    assert [k for k, _ in values] == list(range(12))
    assert victim not in {pid for _, pid in values[6:]}


def note_and_wait(job):
    """Return the number of a job and the process that ran it."""
    time.sleep(0.3)
    return job[1], os.getpid()

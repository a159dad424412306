"""Batches that are built ahead in a thread: order, errors and an early end."""

import threading
import time

import numpy as np
import pytest

from mlip_jax.graphs.pipeline import grouped, prefetch, stack


def worker_threads():
    return [t for t in threading.enumerate() if t.name == "batches" and t.is_alive()]


def test_order_is_kept():
    def build(n):
        time.sleep(0.002 * (n % 3))
        return n * n

    assert list(prefetch(iter(range(20)), build, depth=3)) == [(n, n * n) for n in range(20)]
    assert not worker_threads()


def test_nothing_to_build():
    assert list(prefetch(iter([]), lambda n: n)) == []


def test_error_comes_at_its_place():
    def build(n):
        if n == 4:
            raise ValueError("record 4 is damaged")
        return n

    seen = []
    with pytest.raises(ValueError, match="record 4 is damaged"):
        for item, _ in prefetch(iter(range(10)), build, depth=8):
            seen.append(item)
    assert seen == [0, 1, 2, 3]
    assert not worker_threads()


def test_error_of_the_source_comes_too():
    def source():
        yield 0
        raise KeyError("gone")

    batches = prefetch(source(), lambda n: n)
    assert next(batches) == (0, 0)
    with pytest.raises(KeyError):
        next(batches)


@pytest.mark.parametrize("error", [StopIteration, RuntimeError])
def test_stop_iteration_inside_build_is_no_silent_end(error):
    """An epoch must not become shorter because something below ran dry."""
    def build(n):
        if n == 1:
            raise error("inside")
        return n

    with pytest.raises(Exception):  # noqa: B017, PT011
        list(prefetch(iter(range(3)), build))


def test_stopping_early_does_not_hang():
    built = []

    def build(n):
        built.append(n)
        return np.zeros(10)

    start = time.monotonic()
    batches = prefetch(iter(range(10_000)), build, depth=2)
    for _ in range(3):
        next(batches)
    batches.close()
    assert time.monotonic() - start < 3.0
    assert not worker_threads()
    assert len(built) <= 3 + 2 + 2


def test_building_runs_ahead_but_only_so_far():
    built = []
    batches = prefetch(iter(range(100)), lambda n: built.append(n) or n, depth=3)
    next(batches)
    deadline = time.monotonic() + 2.0
    while len(built) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 4 <= len(built) <= 1 + 3 + 1
    batches.close()


def test_groups_of_one_batch_for_each_device():
    plan = [np.array([n]) for n in range(5)]
    assert [[b.tolist() for b in g] for g in grouped(plan, 2, drop_last=True)] == [[[0], [1]], [[2], [3]]]
    completed = grouped(plan, 2, drop_last=False)
    assert [[b.tolist() for b in g] for g in completed] == [[[0], [1]], [[2], [3]], [[4], []]]
    assert completed[-1][1].dtype == np.int64
    assert grouped([], 2, drop_last=False) == []


def test_the_only_group_is_never_dropped():
    assert [[b.tolist() for b in g] for g in grouped([np.array([7])], 4, drop_last=True)] == [[[7], [], [], []]]


def test_stack_adds_a_leading_axis():
    stacked = stack([{"a": np.zeros(3), "b": np.ones((2, 2))}] * 4)
    assert stacked["a"].shape == (4, 3) and stacked["b"].shape == (4, 2, 2)

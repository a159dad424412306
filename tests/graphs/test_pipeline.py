"""Tests for the pipeline: random order, batches built ahead, errors, and exact resumption."""

import contextlib
import json
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlip_jax.graphs.pipeline import Shuffle, Stream, stack

SEEDS = st.one_of(
    st.integers(0, 10_000), st.sampled_from([2**32 - 1, 2**32, -1, 7 * 1_000_003, 10**15])
)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 5000), seed=SEEDS, epoch=st.integers(0, 50), parts=st.integers(1, 7))
@example(n=1, seed=0, epoch=3, parts=1)
@example(n=2, seed=2**32 - 1, epoch=1, parts=2)
@example(n=5000, seed=1, epoch=0, parts=7)
def test_an_epoch_is_a_permutation_split_into_windows(n, seed, epoch, parts):
    shuffle = Shuffle(n, seed)
    whole = shuffle.window(epoch, 0, n)
    assert whole.dtype == np.int64 and whole.shape == (n,)
    np.testing.assert_array_equal(np.sort(whole), np.arange(n))
    # The last window may exceed the epoch. Windows are requested in any order from a new shuffle.
    size = -(-n // parts)
    again = Shuffle(n, seed)
    windows = [again.window(epoch, start, start + size) for start in reversed(range(0, n, size))]
    np.testing.assert_array_equal(np.concatenate(windows[::-1]), whole)


def test_epochs_and_seeds_differ():
    orders = [
        Shuffle(64, seed).window(epoch, 0, 64).tolist()
        for seed in (0, 1_000_003, 2_000_006)
        for epoch in range(4)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(64)) not in orders


def test_a_window_is_drawn_from_the_whole_epoch():
    n = 100_000
    window = Shuffle(n, 5).window(0, 0, 1000)
    # uniform values have a mean of n / 2 with a standard error of n / sqrt(12 000)
    assert abs(window.mean() - n / 2) < 5 * n / np.sqrt(12_000)
    counts = np.bincount(window // (n // 10), minlength=10)
    assert counts.min() > 50 and counts.max() < 160
    assert np.abs(np.corrcoef(window[:-1], window[1:])[0, 1]) < 0.2


def test_many_structures_take_neither_memory_nor_time():
    n = 10**8
    begin = time.process_time()
    tracemalloc.start()
    try:
        window = Shuffle(n, 3).window(4, n - 100, n + 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(np.unique(window)) == 100 and window.min() >= 0 and window.max() < n
    assert peak < 2**20 and time.process_time() - begin < 2


SIZES = [3, 0, 1, 4, 2, 0]  # groups of each window
GROUPS = [(w, i) for w, size in enumerate(SIZES) for i in range(size)]


def window(number):
    return [(number, i) for i in range(SIZES[number])]


def build(group):
    return {"batch": np.full(3, 100 * group[0] + group[1])}


def groups_of(stream):
    """Return the groups of the rest of a stream, and check its batches."""
    groups = []
    for group, batch in stream:
        np.testing.assert_array_equal(batch["batch"], build(group)["batch"])
        groups.append(group)
    return groups


def stream_threads():
    return [t for t in threading.enumerate() if "prefetch" in t.name]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 4, 50])
def test_order_is_kept_until_the_end(depth):
    with contextlib.closing(Stream(window, len(SIZES), build, depth=depth)) as stream:
        assert groups_of(stream) == GROUPS
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(stream)
    assert not stream_threads()


def test_empty_streams():
    for count, of in ((0, window), (3, lambda number: [])):
        with contextlib.closing(Stream(of, count, build)) as stream:
            assert list(stream) == []


def test_an_infinite_stream():
    with contextlib.closing(
        Stream(lambda number: [number, -number], None, lambda group: group)
    ) as stream:
        assert [next(stream)[0] for _ in range(401)] == [g for n in range(201) for g in (n, -n)][
            :401
        ]


@pytest.mark.parametrize("depth", [1, 3])
def test_batches_are_built_ahead_in_a_thread_but_not_many(depth):
    built, threads = [], set()

    def watched(group):
        threads.add(threading.get_ident())
        built.append(group)
        return group

    def watched_window(number):
        windows.append(number)
        return range(2 * number, 2 * number + 2)

    windows = []
    with contextlib.closing(Stream(watched_window, None, watched, depth=depth)) as stream:
        for taken in (1, 2, 9):
            while next(stream)[0] < taken - 1:
                pass
            wait_for(lambda: len(built) >= taken + depth)  # noqa: B023
            time.sleep(0.05)
            assert taken + depth <= len(built) <= taken + depth + 2
            assert len(windows) <= len(built) // 2 + 2
        assert built == list(range(len(built)))
    assert threading.get_ident() not in threads and len(threads) == 1


class Unreadable(ValueError):
    """Error with more than a message."""


@pytest.mark.parametrize("place", [0, 3, len(GROUPS) - 1])
def test_an_error_is_raised_unchanged_at_its_batch(place):
    error = Unreadable("structure 7 cannot be read", 7)

    def broken(group):
        if group == GROUPS[place]:
            raise error
        return build(group)

    with contextlib.closing(Stream(window, len(SIZES), broken)) as stream:
        for group in GROUPS[:place]:
            assert next(stream)[0] == group
        with pytest.raises(Unreadable, match="^structure 7 cannot be read$|structure 7") as caught:
            next(stream)
        assert caught.value.args == error.args
    assert not stream_threads()


def test_an_error_of_a_window_is_raised_at_its_batch():
    def broken(number):
        if number == 3:
            raise Unreadable("window 3")
        return window(number)

    with contextlib.closing(Stream(broken, len(SIZES), build)) as stream:
        for group in GROUPS[:4]:
            assert next(stream)[0] == group
        with pytest.raises(Unreadable, match="window 3"):
            next(stream)


@pytest.mark.parametrize("where", ["build", "window"])
def test_stop_iteration_inside_is_an_error(where):
    def broken(argument):
        next(iter(()))

    functions = {"build": build, "window": window} | {where: broken}
    with contextlib.closing(Stream(functions["window"], len(SIZES), functions["build"])) as stream:
        with pytest.raises(RuntimeError, match="StopIteration"):
            list(stream)


@pytest.mark.parametrize("taken", range(len(GROUPS) + 1))
def test_resumes_exactly_after_the_last_batch_taken(taken):
    """Between windows, inside of them and at both ends, whatever was built ahead."""
    for ahead in (False, True):
        built = []

        def watched(group):
            built.append(group)  # noqa: B023
            return build(group)

        with contextlib.closing(Stream(window, len(SIZES), watched, depth=3)) as stream:
            assert [next(stream)[0] for _ in range(taken)] == GROUPS[:taken]
            if ahead and taken:
                wait_for(lambda: len(built) >= min(taken + 3, len(GROUPS)))  # noqa: B023
            state = json.loads(json.dumps(stream.state))
            assert groups_of(stream) == GROUPS[taken:], "asking for the state must not disturb"
        built.clear()
        with contextlib.closing(Stream(window, len(SIZES), watched, state=state)) as resumed:
            assert json.loads(json.dumps(resumed.state)) == state
            assert groups_of(resumed) == GROUPS[taken:]
        assert built == GROUPS[taken:], "what was taken before is not built again"


def test_repeated_resumption():
    state, taken = None, []
    for _ in GROUPS:
        with contextlib.closing(Stream(window, len(SIZES), build, state=state)) as stream:
            taken.append(next(stream)[0])
            state = json.loads(json.dumps(stream.state))
    assert taken == GROUPS


def test_resuming_far_into_an_infinite_stream_plans_only_the_rest():
    planned = []

    def planning(number):
        planned.append(number)
        return [(number, i) for i in range(5)]

    with contextlib.closing(Stream(planning, None, lambda group: None)) as stream:
        while next(stream)[0] != (100, 2):
            pass
        state = stream.state
    planned.clear()
    with contextlib.closing(Stream(planning, None, lambda group: None, state=state)) as stream:
        assert next(stream)[0] == (100, 3)
    assert min(planned) == 100


def test_close_ends_the_thread():
    with contextlib.closing(
        Stream(lambda number: [number], None, lambda group: group, depth=2)
    ) as stream:
        assert not stream_threads(), "nothing is built before the first batch is asked for"
        next(stream)
        assert len(stream_threads()) == 1
    assert not stream_threads()
    stream.close()
    slow = threading.Event()
    stream = Stream(
        lambda number: [number], None, lambda group: slow.wait(0.3 if group else 0), depth=2
    )
    next(stream)
    stream.close()  # while a batch is being built
    assert not stream_threads()


def test_stacked_batches_have_an_axis_of_devices():
    stacked = stack([{"a": np.full((2, 3), i), "b": np.int32(i)} for i in range(4)])
    assert stacked["a"].shape == (4, 2, 3) and stacked["b"].shape == (4,)
    np.testing.assert_array_equal(stacked["a"][:, 1, 2], range(4))

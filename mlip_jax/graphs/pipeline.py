"""Batches to the devices through Grain: planned window by window, built ahead in threads, resumable at any batch.

A window is a few thousand structures of the global shuffle; it is planned when it is reached, so that neither memory
nor the time to the first batch grow with the data set.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np


def stack(batches: Sequence[Any]) -> Any:
    """Batches of the same shape -> one with a leading axis of devices."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


class Shuffle:
    """The global shuffle of n structures: a new permutation for every epoch, in no memory."""

    def __init__(self, n: int, seed: int):
        self._order = grain.MapDataset.range(n).shuffle(seed=seed % 2**32)
        self._n = n

    def window(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Places start:stop of the permutation of an epoch, int64."""
        first = epoch * self._n
        # The seed of Grain's shuffle goes up by one with each epoch.
        return np.array([self._order[first + i] for i in range(start, min(stop, self._n))], np.int64)


class _Flatten(grain.experimental.FlatMapTransform):
    max_fan_out = sys.maxsize

    def flat_map(self, element):
        return element


class Stream:
    """Iterator over (group, build(group)) for the groups of all windows in order.

    Args:
      window: Number of a window -> its groups.
      count: Of windows; None for no end.
      build: Makes the batch of a group; runs ahead in a thread.
      depth: Batches that wait ready.
      state: Of an earlier Stream with the same windows: goes on after the batch that was last taken from it.
    """

    def __init__(self, window: Callable[[int], list[Any]], count: int | None, build: Callable[[Any], Any], *,
                 depth: int = 4, state: dict[str, Any] | None = None):
        windows = grain.MapDataset.range(2**40 if count is None else count).map(_unstoppable(window))
        groups = grain.experimental.FlatMapIterDataset(
            windows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), _Flatten())
        built = groups.map(_unstoppable(lambda group: (group, build(group))))
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(built, prefetch_buffer_size=depth))
        if state is not None:
            self._iterator.set_state(state)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self

    def __next__(self) -> tuple[Any, Any]:
        return next(self._iterator)

    @property
    def state(self) -> dict[str, Any]:
        """Where the stream stands, ready for JSON: what was built ahead and not taken does not count."""
        return self._iterator.get_state()

    def close(self) -> None:
        """Stop the thread."""
        self._iterator.close()


def _unstoppable(function):
    """The function, but that StopIteration inside it does not end the stream in silence."""

    def call(argument):
        try:
            return function(argument)
        except StopIteration as error:
            raise RuntimeError("a batch cannot be made: StopIteration") from error

    return call

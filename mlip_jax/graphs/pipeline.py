"""Input pipeline on Grain: batches are planned per window, built ahead in threads and resumable.

A window is a few thousand structures of the global shuffle. It is planned when the stream reaches
it, so neither memory nor the time to the first batch grows with the data set.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np


def stack(batches: Sequence[Any]) -> Any:
    """Stack batches of the same shape along a new leading axis of devices."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


class Shuffle:
    """Global shuffle of n structures: a new permutation for every epoch.

    Permutations are computed element by element and need no memory.

    Args:
      n: Number of structures.
      seed: Random seed.
    """

    def __init__(self, n: int, seed: int):
        self._order = grain.MapDataset.range(n).shuffle(seed=seed % 2**32)
        self._n = n

    def window(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return elements start:stop of the permutation of an epoch, int64."""
        first = epoch * self._n
        # Grain increases the seed of its shuffle by one with each epoch.
        return np.array(
            [self._order[first + i] for i in range(start, min(stop, self._n))], np.int64
        )


class _Flatten(grain.experimental.FlatMapTransform):
    """Turn the lists of groups of all windows into one sequence of groups."""

    max_fan_out = sys.maxsize

    def flat_map(self, element):
        """Return the groups of a window."""
        return element


class Stream:
    """Iterator over (group, build(group)) for the groups of all windows in order.

    Args:
      window: Function that returns the groups of a window, given its index.
      count: Number of windows; None for an endless stream.
      build: Function that builds the batch of a group; runs ahead in a thread.
      depth: Maximum number of batches that are built ahead.
      state: State of an earlier Stream with the same windows. The new stream resumes after the last
        batch that was taken from the earlier one.
    """

    def __init__(
        self,
        window: Callable[[int], list[Any]],
        count: int | None,
        build: Callable[[Any], Any],
        *,
        depth: int = 4,
        state: dict[str, Any] | None = None,
    ):
        windows = grain.MapDataset.range(2**40 if count is None else count).map(
            _unstoppable(window)
        )
        groups = grain.experimental.FlatMapIterDataset(
            windows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
            _Flatten(),
        )
        built = groups.map(_unstoppable(lambda group: (group, build(group))))
        self._iterator = iter(
            grain.experimental.ThreadPrefetchIterDataset(built, prefetch_buffer_size=depth)
        )
        if state is not None:
            self._iterator.set_state(state)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self

    def __next__(self) -> tuple[Any, Any]:
        return next(self._iterator)

    @property
    def state(self) -> dict[str, Any]:
        """Position of the stream as a JSON-serializable dict.

        Batches that were built ahead but not taken are not counted.
        """
        return self._iterator.get_state()

    def close(self) -> None:
        """Stop the thread."""
        self._iterator.close()


def _unstoppable(function):
    """Wrap the function so that it raises RuntimeError in place of StopIteration.

    StopIteration would end the stream without an error.
    """

    def call(argument):
        try:
            return function(argument)
        except StopIteration as error:
            raise RuntimeError("cannot build a batch: StopIteration") from error

    return call

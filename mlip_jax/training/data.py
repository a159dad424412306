"""What a run trains on: parts of a store with their sizes, and the batches made of them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batching import Budget, Sizes, build_batch, plan_window
from mlip_jax.graphs.pipeline import Shuffle, Stream, grouped, stack

# Structures that are planned at a time, at least; and in batches of a step, so that little is lost at a window's end.
_WINDOW, _WINDOW_STEPS = 4096, 128


class Rows(Protocol):
    """What structures are read from: a Store, or Columns in memory."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, *, labels_only: bool = False) -> Columns: ...


@dataclasses.dataclass(frozen=True)
class Split:
    """One part of the data.

    Attributes:
      rows: Where its structures are. indices: Their numbers there, (S,) int64. sizes: Of them.
    """

    rows: Rows
    indices: np.ndarray
    sizes: Sizes

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, places: np.ndarray) -> Split:
        """The structures at `places` of this part."""
        return Split(self.rows, self.indices[places], self.sizes.take(places))

    def sample(self, most: int, seed: int) -> Split:
        """At most so many structures, drawn at random, in their order."""
        if len(self) <= most:
            return self
        return self.part(np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False)))

    def columns(self, places: np.ndarray | None = None, *, labels_only: bool = False) -> Columns:
        """The structures, all of them in memory, or those at `places`."""
        return self.rows.take(self.indices if places is None else self.indices[places], labels_only=labels_only)


class Group(NamedTuple):
    """What one step works on: places in the split, one array for each device of all hosts, and the epoch."""

    places: list[np.ndarray]
    epoch: int


@dataclasses.dataclass(frozen=True)
class Batches:
    """Makes the batches of all splits.

    Attributes:
      budget: Static shape of a batch. cutoff: Å. reference: (119,) eV. num_devices: Of this host.
      num_hosts, host: Each host plans all batches and reads those of its own devices.
      long_range_cutoff: Å, or None for batches without long-range pairs.
    """

    budget: Budget
    cutoff: float
    reference: np.ndarray
    num_devices: int
    num_hosts: int = 1
    host: int = 0
    long_range_cutoff: float | None = None

    def training(self, split: Split, seed: int, state: dict[str, Any] | None = None) -> Stream:
        """(group, stacked batches) without end, every epoch in another order: a function of split, budget and seed."""
        size = self._window_size(split)
        per_epoch = -(-len(split) // size)
        shuffle = Shuffle(len(split), seed * 1_000_003)

        def window(number):
            epoch, w = divmod(number, per_epoch)
            return self._plan(split, shuffle.window(epoch, w * size, (w + 1) * size), epoch)

        return Stream(window, None, self._builder(split), state=state)

    def in_order(self, split: Split) -> Stream:
        """(group, stacked batches) that hold every structure once."""
        size = self._window_size(split)

        def window(number):
            return self._plan(split, np.arange(number * size, min((number + 1) * size, len(split))), 0)

        return Stream(window, -(-len(split) // size), self._builder(split))

    def of_this_host(self, group: Group) -> list[np.ndarray]:
        """Places of the structures of each local device."""
        return group.places[self.host * self.num_devices:(self.host + 1) * self.num_devices]

    def _window_size(self, split: Split) -> int:
        return max(_WINDOW, _WINDOW_STEPS * self.num_devices * self.num_hosts * (self.budget.graphs - 1))

    def _plan(self, split: Split, places: np.ndarray, epoch: int) -> list[Group]:
        plan = plan_window(places, split.sizes, self.budget)
        return [Group(g, epoch) for g in grouped(plan, self.num_devices * self.num_hosts)]

    def _builder(self, split: Split):
        def build(group: Group):
            return stack([build_batch(split.columns(places, labels_only=True), self.budget, self.cutoff, self.reference,
                                      long_range_cutoff=self.long_range_cutoff)
                          for places in self.of_this_host(group)])

        return build

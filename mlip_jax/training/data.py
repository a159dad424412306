"""What a run trains on: parts of a store with their sizes, and the batches made of them.

One plan for all devices of all processes: an update takes as many micro-batches as the run was begun with, on however
many devices it goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax.datasets.columns import Columns, Rows
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.packing import plan_buckets
from mlip_jax.graphs.pipeline import Shuffle, Stream, stack
from mlip_jax.graphs.shapes import PaddingBudget, Sizes

# Structures that are planned at a time, at least; and in batches of a step, so that little is lost at a window's end.
_WINDOW, _WINDOW_STEPS = 4096, 128


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

    @property
    def periodic(self) -> bool:
        """Whether any structure of the rows is periodic."""
        rows = self.rows.take(self.indices[:1]) if len(self) else None
        return rows is not None and rows.pbc is not None

    def columns(self, places: np.ndarray | None = None, *, labels_only: bool = False) -> Columns:
        """The structures, all of them in memory, or those at `places`."""
        return self.rows.take(self.indices if places is None else self.indices[places], labels_only=labels_only)


class StepPlan(NamedTuple):
    """What one step works on.

    Attributes:
      places: In the split, one array for each micro-batch of all devices, device by device.
      epoch: Epochs that are over. progress: Share of this epoch's windows that are planned up to here.
      bucket: Whose budget holds every one of the micro-batches.
    """

    places: list[np.ndarray]
    epoch: int
    progress: float = 0.0
    bucket: int = 0


@dataclasses.dataclass(frozen=True)
class Batches:
    """Makes the batches of all splits.

    Attributes:
      budgets: Static shapes of a batch, ascending. cutoff: Å. reference: (119,) eV.
      num_devices: Of this process.
      micro_batches: Of an update, over all devices of all processes; None: one for each device.
      num_hosts, host: Each process plans all batches and reads those of its own devices.
      long_range_cutoff: Å, or None for batches without long-range pairs.
      resident: Training batches are the places of the structures alone, (D, 1, K, graphs - 1) int32, -1 where there
        is none: the graphs are built on the device.
      put: What brings a training batch to the devices, in the thread that builds ahead.
      properties: Names of properties that batches hold as labels, in globals and nodes (build_batch).
      displace: (structures, their numbers in the rows of the split, epoch, budget) -> structures as they are trained
        on in that epoch.
    """

    budgets: tuple[PaddingBudget, ...]
    cutoff: float
    reference: np.ndarray
    num_devices: int
    micro_batches: int | None = None
    num_hosts: int = 1
    host: int = 0
    long_range_cutoff: float | None = None
    resident: bool = False
    put: Callable[[Any], Any] = lambda batch: batch
    properties: tuple[str, ...] = ()
    displace: Callable[[Columns, np.ndarray, int, PaddingBudget], Columns] | None = None

    @property
    def per_device(self) -> int:
        """Micro-batches of a device in an update, K; the last ones may be empty."""
        return -(-self._of_an_update // self._all_devices)

    @property
    def _all_devices(self) -> int:
        return self.num_devices * self.num_hosts

    @property
    def _of_an_update(self) -> int:
        return self.micro_batches or self._all_devices

    def training(self, split: Split, seed: int, state: dict[str, Any] | None = None) -> Stream:
        """(group, batches with leading axes (D, 1, K)) without end, every epoch in another order: a function of split,
        budgets, micro_batches and seed."""
        size = self._window_size(split, self._of_an_update)
        per_epoch = -(-len(split) // size)
        shuffle = Shuffle(len(split), seed * 1_000_003)

        def window(number):
            epoch, w = divmod(number, per_epoch)
            groups = self._plan(split, shuffle.window(epoch, w * size, (w + 1) * size), self._of_an_update)
            return [g._replace(epoch=epoch, progress=(w + (i + 1) / len(groups)) / per_epoch)
                    for i, g in enumerate(groups)]

        return Stream(window, None, self._training_builder(split), state=state)

    def in_order(self, split: Split) -> Stream:
        """(group, batches with a leading axis D) that hold every structure once."""
        size = self._window_size(split, self._all_devices)

        def window(number):
            places = np.arange(number * size, min((number + 1) * size, len(split)))
            return self._plan(split, places, self._all_devices)

        def build(group):
            return stack([self._batch(split, places, group.bucket) for places in self._share(group, 1)])

        return Stream(window, -(-len(split) // size), build)

    def of_this_host(self, group: StepPlan) -> list[np.ndarray]:
        """Places of the structures of each local device, for a group of `in_order`."""
        return self._share(group, 1)

    def num_groups(self, split: Split, most: int = 20_000) -> float:
        """Updates of an epoch, estimated from the plan of at most `most` structures."""
        size, wanted = self._window_size(split, self._of_an_update), self._of_an_update
        whole = len(split) <= most or size <= most
        count = len(split) if len(split) <= most else most // size * size if whole else most
        order = np.random.default_rng(0).permutation(len(split))[:count]  # mixed, as in training
        if whole:  # each window ends in groups that are not full
            groups = sum(len(self._plan(split, order[start:start + size], wanted)) for start in range(0, count, size))
        else:
            groups = len(plan_buckets(order, split.sizes, self.budgets)) / wanted
        return groups * len(split) / max(count, 1)

    def _share(self, group: StepPlan, per_device: int) -> list[np.ndarray]:
        """The places of this process's devices; a group of too few micro-batches is completed with empty ones."""
        mine = range(self.host * self.num_devices * per_device, (self.host + 1) * self.num_devices * per_device)
        return [group.places[i] if i < len(group.places) else np.zeros(0, np.int64) for i in mine]

    def _window_size(self, split: Split, wanted: int) -> int:
        return max(_WINDOW, _WINDOW_STEPS * wanted * (self.budgets[0].n_graph - 1))

    def _plan(self, split: Split, places: np.ndarray, wanted: int) -> list[StepPlan]:
        """Batches in groups of `wanted` of the same bucket, in the order in which they are complete."""
        waiting: list[list[np.ndarray]] = [[] for _ in self.budgets]
        groups = []
        for bucket, batch in plan_buckets(places, split.sizes, self.budgets):
            waiting[bucket].append(batch)
            if len(waiting[bucket]) == wanted:
                groups.append(StepPlan(waiting[bucket], 0, bucket=bucket))
                waiting[bucket] = []
        return groups + [StepPlan(rest, 0, bucket=bucket) for bucket, rest in enumerate(waiting) if rest]

    def _batch(self, split: Split, places: np.ndarray, bucket: int, epoch: int | None = None):
        columns, budget = split.columns(places, labels_only=True), self.budgets[bucket]
        if epoch is not None and self.displace is not None and len(places):
            columns = self.displace(columns, split.indices[places], epoch, budget)
        return build_batch(columns, budget, self.cutoff, self.reference, long_range_cutoff=self.long_range_cutoff,
                           properties=self.properties)

    def _training_builder(self, split: Split):
        def one(places, bucket, epoch):
            if not self.resident:
                return self._batch(split, places, bucket, epoch)
            unused = self.budgets[bucket].n_graph - 1 - len(places)
            return np.concatenate([places, np.full(unused, -1)]).astype(np.int32)

        def build(group: StepPlan):
            made = stack([one(places, group.bucket, group.epoch) for places in self._share(group, self.per_device)])
            shape = (self.num_devices, 1, self.per_device)
            return self.put(jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), made))

        return build

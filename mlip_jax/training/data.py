"""Splits of a data store, and the streams of batches that a run trains and validates on.

All devices of all processes share one plan. The number of micro-batches per step is fixed when a
run is started, so a run resumes with the same steps on another number of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax.datasets import unseen_elements
from mlip_jax.datasets.columns import Columns, Rows
from mlip_jax.datasets.stress import STRESS, complete_stress
from mlip_jax.datasets.unseen_elements import UnseenElements
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.bonds import build_bond_batch
from mlip_jax.graphs.packing import plan_buckets
from mlip_jax.graphs.pipeline import Shuffle, Stream, stack
from mlip_jax.graphs.shapes import PaddingBudget, Sizes

# A window is the set of structures that are planned together. It has at least _WINDOW structures
# and enough for about _WINDOW_STEPS steps, so that few incomplete steps occur at its end.
_WINDOW, _WINDOW_STEPS = 4096, 128


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of the data: training, validation or test.

    Attributes:
      rows: Rows of the store that contains the structures.
      indices: Row indices of the structures of this split, (S,) int64.
      sizes: Numbers of atoms, edges and long-range pairs of these structures.
    """

    rows: Rows
    indices: np.ndarray
    sizes: Sizes

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, members: np.ndarray) -> Split:
        """Return the structures with the indices `members` within this split as a split."""
        return Split(self.rows, self.indices[members], self.sizes.take(members))

    def separate(self, elements: Collection[int]) -> tuple[Split, Split, UnseenElements]:
        """Separate the structures whose elements are all among `elements` (atomic numbers).

        Returns:
          These structures, the other structures, and the numbers of the latter by element.
        """
        unseen = unseen_elements.of_rows(self.rows, self.indices, elements)
        if not len(unseen):
            return self, self.subset(np.zeros(0, np.int64)), unseen
        known, others = np.flatnonzero(unseen.known), np.flatnonzero(~unseen.known)
        return self.subset(known), self.subset(others), unseen

    def sample(self, max_size: int, seed: int) -> Split:
        """Return a random subset of at most `max_size` structures in the original order."""
        if len(self) <= max_size:
            return self
        rng = np.random.default_rng(seed)
        return self.subset(np.sort(rng.choice(len(self), max_size, replace=False)))

    @property
    def periodic(self) -> bool:
        """Return whether any structure of the rows is periodic."""
        rows = self.rows.take(self.indices[:1]) if len(self) else None
        return rows is not None and rows.pbc is not None

    @property
    def has_spin(self) -> bool:
        """Return whether the rows contain numbers of unpaired electrons."""
        return bool(len(self)) and self.rows.take(self.indices[:1]).spin is not None

    def columns(self, members: np.ndarray | None = None, *, labels_only: bool = False) -> Columns:
        """Load all structures, or those with the indices `members`, into memory."""
        indices = self.indices if members is None else self.indices[members]
        return self.rows.take(indices, labels_only=labels_only)


class StepPlan(NamedTuple):
    """Structures of one training step.

    Attributes:
      members: Indices of the structures within the split: one array per micro-batch, device by
        device.
      epoch: Number of finished epochs.
      progress: Fraction of the current epoch that is planned up to and including this step.
      bucket: Index of the size bucket, whose budget every micro-batch fits into.
    """

    members: list[np.ndarray]
    epoch: int
    progress: float = 0.0
    bucket: int = 0


@dataclasses.dataclass(frozen=True)
class Batches:
    """Factory of the batches of all splits.

    Dimensions: D local devices, K micro-batches per device and step.

    Attributes:
      budgets: Padded sizes of a micro-batch (size buckets), in ascending order.
      cutoff: Cutoff radius (Å).
      reference: Reference energy of each element (eV), (119,).
      num_devices: Number of devices of this process.
      micro_batches: Number of micro-batches per step over all processes. None: one per device.
      num_hosts: Number of processes. Each plans all batches, but builds those of its own devices.
      host: Index of this process.
      long_range_cutoff: Cutoff of long-range pairs (Å), or None for batches without such pairs.
      resident: Whether graphs are built on the device. A training batch then contains only the
        indices of its structures within the split, (D, 1, K, graphs - 1) int32, padded with -1.
      put: Function that transfers a training batch to the devices. The prefetching thread calls it.
      properties: Names of the properties that batches contain as labels (see `build_batch`).
      displace: Function (structures, their row indices, epoch, budget) -> structures to train on in
        that epoch.
      bonds: Whether batches are molecular graphs of bonds (graphs/bonds.py).
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
    bonds: bool = False

    @property
    def per_device(self) -> int:
        """Number of micro-batches per device and step, K. The last ones may be empty."""
        return -(-self.num_micro_batches // self._total_devices)

    @property
    def _total_devices(self) -> int:
        """Number of devices of all processes."""
        return self.num_devices * self.num_hosts

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches per step over all devices."""
        return self.micro_batches or self._total_devices

    def training(self, split: Split, seed: int, state: dict[str, Any] | None = None) -> Stream:
        """Return an endless stream of (plan of a step, its batch with leading axes (D, 1, K)).

        Every epoch has another order. The stream is a pure function of `split`, `budgets`,
        `micro_batches` and `seed`.

        Args:
          split: Training split.
          seed: Seed of the order.
          state: State of an earlier stream to resume from.
        """
        size = self.window_size(split, self.num_micro_batches)
        per_epoch = -(-len(split) // size)
        shuffle = Shuffle(len(split), seed * 1_000_003)

        def window(number):
            epoch, w = divmod(number, per_epoch)
            members = shuffle.window(epoch, w * size, (w + 1) * size)
            plans = self._plan(split, members, self.num_micro_batches)
            return [
                plan._replace(epoch=epoch, progress=(w + (i + 1) / len(plans)) / per_epoch)
                for i, plan in enumerate(plans)
            ]

        return Stream(window, None, self._training_builder(split), state=state)

    def in_order(self, split: Split) -> Stream:
        """Return a stream of (plan, batch with leading axis (D,)) with every structure once."""
        size = self.window_size(split, self._total_devices)

        def window(number):
            members = np.arange(number * size, min((number + 1) * size, len(split)))
            return self._plan(split, members, self._total_devices)

        def build(plan):
            return stack(
                [self._batch(split, members, plan.bucket) for members in self.local_members(plan)]
            )

        return Stream(window, -(-len(split) // size), build)

    def local_members(self, plan: StepPlan, per_device: int = 1) -> list[np.ndarray]:
        """Return the structures of each micro-batch of the local devices, as indices of the split.

        Micro-batches that the plan lacks are empty.

        Args:
          plan: Plan of a step; one of `in_order` has one micro-batch per device.
          per_device: Number of micro-batches per device.
        """
        count = self.num_devices * per_device
        empty = np.zeros(0, np.int64)
        return [
            plan.members[i] if i < len(plan.members) else empty
            for i in range(self.host * count, (self.host + 1) * count)
        ]

    def steps_per_epoch(self, split: Split, max_structures: int = 20_000) -> float:
        """Estimate the number of steps per epoch from a plan of at most `max_structures`."""
        per_step = self.num_micro_batches
        size = self.window_size(split, per_step)
        whole = len(split) <= max_structures or size <= max_structures
        count = min(len(split), max_structures)
        if count < len(split) and whole:
            count = count // size * size
        order = np.random.default_rng(0).permutation(len(split))[:count]  # shuffled, as in training
        if whole:  # plan whole windows, because each ends with incomplete steps
            steps = sum(
                len(self._plan(split, order[start : start + size], per_step))
                for start in range(0, count, size)
            )
        else:
            steps = len(plan_buckets(order, split.sizes, self.budgets)) / per_step
        return steps * len(split) / max(count, 1)

    def window_size(self, split: Split, per_step: int) -> int:
        """Return the number of structures that are planned together."""
        return max(_WINDOW, _WINDOW_STEPS * per_step * (self.budgets[0].n_graph - 1))

    def _plan(self, split: Split, members: np.ndarray, per_step: int) -> list[StepPlan]:
        """Return steps of `per_step` micro-batches of one bucket, in the order of their completion.

        Each bucket may end with a step of fewer micro-batches.
        """
        pending: list[list[np.ndarray]] = [[] for _ in self.budgets]
        plans = []
        for bucket, batch in plan_buckets(members, split.sizes, self.budgets):
            pending[bucket].append(batch)
            if len(pending[bucket]) == per_step:
                plans.append(StepPlan(pending[bucket], 0, bucket=bucket))
                pending[bucket] = []
        return plans + [
            StepPlan(rest, 0, bucket=bucket) for bucket, rest in enumerate(pending) if rest
        ]

    def _batch(self, split: Split, members: np.ndarray, bucket: int, epoch: int | None = None):
        """Build the padded graph of a micro-batch, displaced if it is for training in `epoch`."""
        needs_texts = self.bonds or STRESS in self.properties
        columns, budget = split.columns(members, labels_only=not needs_texts), self.budgets[bucket]
        if STRESS in self.properties:
            columns = complete_stress(columns)
        if epoch is not None and self.displace is not None and len(members):
            limit = None if self.bonds else budget  # bonds do not depend on positions
            columns = self.displace(columns, split.indices[members], epoch, limit)
        if self.bonds:
            return build_bond_batch(columns, budget, properties=self.properties)
        return build_batch(
            columns,
            budget,
            self.cutoff,
            self.reference,
            long_range_cutoff=self.long_range_cutoff,
            properties=self.properties,
        )

    def _training_builder(self, split: Split):
        """Return the function that builds the batch of a step, with leading axes (D, 1, K)."""

        def build_one(members, bucket, epoch):
            if not self.resident:
                return self._batch(split, members, bucket, epoch)
            unused = self.budgets[bucket].n_graph - 1 - len(members)  # the last graph is padding
            return np.concatenate([members, np.full(unused, -1)]).astype(np.int32)  # (graphs - 1,)

        def build(plan: StepPlan):
            micro_batches = stack(
                [
                    build_one(members, plan.bucket, plan.epoch)
                    for members in self.local_members(plan, self.per_device)
                ]
            )
            # (D * K, ...) -> (D, 1, K, ...); a dispatch concatenates its steps along axis 1
            shape = (self.num_devices, 1, self.per_device)
            return self.put(jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), micro_batches))

        return build

"""What a run trains on: the splits with their sizes, batch budget and reference energies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batching import Budget, Sizes, build_batch, plan_epoch
from mlip_jax.graphs.pipeline import grouped, prefetch, stack


@dataclasses.dataclass(frozen=True)
class Split:
    """Structures of one part with their sizes."""

    columns: Columns
    sizes: Sizes

    def take(self, indices: np.ndarray) -> Split:
        """The structures `indices`."""
        return Split(self.columns.take(indices), Sizes(*(s[indices] for s in self.sizes)))


@dataclasses.dataclass(frozen=True)
class Batches:
    """Makes the batches of all splits.

    Attributes:
      budget: Static shape of a batch. cutoff: Å. reference: (119,) eV. num_devices: Batches in a step.
    """

    budget: Budget
    cutoff: float
    reference: np.ndarray
    num_devices: int

    def epoch(self, split: Split, seed: int, epoch: int) -> list[list[np.ndarray]]:
        """The steps of an epoch: groups of one list of structures for each device."""
        plan = plan_epoch(split.sizes, self.budget, seed=seed, epoch=epoch, source=split.columns.source)
        return grouped(plan, self.num_devices, drop_last=True)

    def in_order(self, split: Split) -> list[list[np.ndarray]]:
        """Groups that hold every structure once."""
        plan = plan_epoch(split.sizes, self.budget, shuffle=False, source=split.columns.source)
        return grouped(plan, self.num_devices, drop_last=False)

    def stream(self, split: Split, groups: list[list[np.ndarray]]) -> Iterator[tuple[list[np.ndarray], Any]]:
        """(group, stacked batches), built ahead in a thread."""

        def build(group):
            return stack([build_batch(split.columns, indices, self.budget, self.cutoff, self.reference)
                          for indices in group])

        return prefetch(iter(groups), build)

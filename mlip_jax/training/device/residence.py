"""Training data that stay on the device, if they need little of its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mlip_jax import distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs import resident
from mlip_jax.graphs.neighbor_slots import add_neighbor_slots, choose_capacity, max_neighbors
from mlip_jax.training.data import Batches, Split

log = logging.getLogger(__name__)

# Steps per dispatch if the data stay on the device.
STEPS_PER_DISPATCH = 25
# Maximum fraction of the memory of the device that the data may take up.
_MAX_MEMORY_FRACTION = 0.2
_PIECE_SIZE = 4096  # structures that are read at a time


def load(
    train: Split,
    batches: Batches,
    wanted: bool | None,
    unsupported: str = "",
    model: nn.Module | None = None,
) -> tuple[Callable[[Any, Any, int], Any] | None, Any]:
    """Return `build` and `data` of `Trainer` for data on the device, or (None, ()).

    Args:
      train: Training split.
      batches: Factory of the batches.
      wanted: Whether the data should stay on the device; None decides by its memory.
      unsupported: Config field that requires batches of the host, or empty.
      model: Model, which determines whether batches have neighbor slots; None for none.

    Raises:
      ConfigError: `wanted` is set, but not supported.
    """
    if unsupported and wanted:
        raise ConfigError(f"train.resident cannot be combined with {unsupported}. Unset one.")
    if unsupported:
        wanted = False
    # All processes must run the same program, but the memory of their devices may differ.
    if not distributed.broadcast(bool(_fit(train) if wanted is None else wanted)):
        return None, ()
    data = resident.collect(
        _pieces(train),
        batches.cutoff,
        batches.reference,
        long_range_cutoff=batches.long_range_cutoff,
        properties=batches.properties,
    )
    log.info("training data on the device: %.1f MB", resident.nbytes(data) / 1e6)

    capacity = choose_capacity(
        model,
        max_neighbors(data.receivers, data.first_edge),
        len(data.receivers) / len(data.numbers),
    )
    if capacity:
        log.info("training data on the device: %d neighbor slots per atom", capacity)

    def build(data, members, bucket):
        graph = resident.gather(data, members, batches.budgets[bucket])
        return add_neighbor_slots(graph, capacity)

    return build, data


def _fit(train: Split) -> bool:
    """Return whether the data need little memory of the device, which is not a CPU."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return (
        jax.default_backend() != "cpu"
        and resident.indexable(train.sizes)
        and resident.estimate_bytes(train.sizes, periodic=train.periodic, spin=train.has_spin)
        < _MAX_MEMORY_FRACTION * memory
    )


def _pieces(train: Split) -> Iterator[Columns]:
    """Yield the structures of the split in pieces."""
    for start in range(0, len(train), _PIECE_SIZE):
        members = np.arange(start, min(start + _PIECE_SIZE, len(train)))
        yield train.columns(members, labels_only=True)

"""Batches to the devices: built ahead in a thread, one for each device, stacked."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

_END = object()


def stack(batches: Sequence[Any]) -> Any:
    """Batches of the same shape -> one with a leading axis of devices."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def grouped(plan: list[np.ndarray], size: int, drop_last: bool) -> list[list[np.ndarray]]:
    """Batches of a plan in groups of one for each device; the last is completed with empty ones or dropped."""
    groups = [plan[i:i + size] for i in range(0, len(plan), size)]
    if groups and len(groups[-1]) < size:
        if drop_last and len(groups) > 1:
            groups.pop()
        else:
            groups[-1] = groups[-1] + [np.zeros(0, np.int64)] * (size - len(groups[-1]))
    return groups


def prefetch(items: Iterator[Any], build: Callable[[Any], Any], depth: int = 2) -> Iterator[tuple[Any, Any]]:
    """(item, build(item)) with `build` running ahead in a thread.

    An error in the thread is raised here, at its place in the order. Leaving the iterator stops the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in items:
                if not put((item, build(item), None)):
                    return
            put(_END)
        except Exception as error:  # handed over to the consumer
            put((None, None, error))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            entry = ready.get()
            if entry is _END:
                return
            item, value, error = entry
            if isinstance(error, StopIteration):  # would end the epoch in silence
                raise RuntimeError("a batch cannot be built: StopIteration") from error
            if error is not None:
                raise error
            yield item, value
    finally:
        stopped.set()
        thread.join(timeout=5.0)

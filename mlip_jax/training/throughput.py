"""What a run did since the last line of its log, and what its time went into."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mlip_jax.graphs.shapes import Sizes
from mlip_jax.training.data import StepPlan

# Float32 multiply-adds of the vector units, as two operations, per second: what a model without products of lower
# precision can reach. From the makers' data sheets.
PEAK_FLOPS = {"H200": 67e12, "H100": 67e12, "GH200": 67e12, "B200": 75e12, "A100": 19.5e12, "L40S": 91.6e12,
              "L4": 30.3e12, "A10G": 31.2e12, "V100": 15.7e12, "T4": 8.1e12, "RTX 4090": 82.6e12, "RTX 3090": 35.6e12}

PARTS = ("input", "checkpoint", "validation")


class ThroughputMeter:
    """Counts work and time.

    Attributes:
      seconds: Spent by the main thread in each of PARTS since the start, of the input only what the devices may have
        waited for; the rest is training.
    """

    def __init__(self, sizes: Sizes, flops_per_update: float | None = None):
        self._sizes = sizes
        self._flops = flops_per_update
        self.start()

    class _LogLine:
        """What has come since the last line."""

        def __init__(self, begin: float, seconds: dict[str, float]):
            self.begin, self.seconds = begin, seconds
            self.sums: list[Any] = []
            self.updates = self.finite = self.structures = self.atoms = self.edges = 0

    @contextlib.contextmanager
    def clock(self, part: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Counts the time of the body as that of `part`; not if `unless` holds after it, of what the devices do."""
        begin = time.monotonic()
        try:
            yield
        finally:
            if not unless():
                self.seconds[part] += time.monotonic() - begin

    def start(self) -> None:
        """Time begins to count."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._begin = time.monotonic()
        self._line = self._LogLine(self._begin, dict(self.seconds))

    def add(self, groups: Sequence[StepPlan], sums: Any, finite: np.ndarray) -> None:
        """Updates that are done: their groups, their sums (leading axis of updates) on the host, and which count."""
        line = self._line
        places = np.concatenate([p for g in groups for p in g.places])
        line.sums.append(jax.tree.map(lambda x: float(np.asarray(x, np.float64)[:len(groups)][finite].sum()), sums))
        line.updates += len(groups)
        line.finite += int(np.sum(finite))
        line.structures += len(places)
        line.atoms += int(self._sizes.n_node[places].sum())
        line.edges += int(self._sizes.n_edge[places].sum())

    def next_line(self) -> tuple[Any, dict[str, float]]:
        """Sums of the updates since the last line, NaN if none was finite, None if there was none; their rates per
        second of training, validation and checkpoints not counted, and the shares of time that went into input and
        checkpoints. Starts a new line."""
        line, now = self._line, time.monotonic()
        spent = {k: self.seconds[k] - line.seconds[k] for k in PARTS}
        elapsed = max(now - line.begin, 1e-9)
        training = max(elapsed - spent["validation"] - spent["checkpoint"], 1e-9)
        row = {"structures_per_second": line.structures / training, "atoms_per_second": line.atoms / training,
               "edges_per_second": line.edges / training, "input_share": spent["input"] / elapsed,
               "checkpoint_share": spent["checkpoint"] / elapsed}
        peak = peak_flops()
        if peak and self._flops:
            row["mfu"] = self._flops * line.updates / training / peak
        # nothing at all would look like no error
        sums = jax.tree.map(lambda *x: float(np.sum(x)) if line.finite else float("nan"), *line.sums or [None])
        self._line = self._LogLine(now, dict(self.seconds))
        return sums, row

    def summary(self) -> dict[str, float]:
        """Shares of the whole time in each of PARTS."""
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        return {k: v / elapsed for k, v in self.seconds.items()}


def peak_flops() -> float | None:
    """Of all devices of this process; None where it is not known, as of CPUs."""
    kind = jax.local_devices()[0].device_kind
    for name, flops in PEAK_FLOPS.items():
        if name in kind:
            return flops * jax.local_device_count()
    return None

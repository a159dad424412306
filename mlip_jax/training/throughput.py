"""Throughput and time breakdown of a training run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mlip_jax.graphs.shapes import Sizes
from mlip_jax.training.data import StepPlan

# PEAK_FLOPS: float32 operations of the vector units per second (a multiply-add is two operations),
# from the manufacturers' data sheets. A model without lower-precision products cannot exceed it.
PEAK_FLOPS = {
    "H200": 67e12,
    "H100": 67e12,
    "GH200": 67e12,
    "B200": 75e12,
    "A100": 19.5e12,
    "L40S": 91.6e12,
    "L4": 30.3e12,
    "A10G": 31.2e12,
    "V100": 15.7e12,
    "T4": 8.1e12,
    "RTX 4090": 82.6e12,
    "RTX 3090": 35.6e12,
}

# Activities of the main thread that are not training.
ACTIVITIES = ("input", "checkpoint", "validation")


class ThroughputMeter:
    """Meter of the work and the time of a run.

    Args:
      sizes: Sizes of the structures of the training split.
      flops_per_step: FLOPs of a step on the local devices, or None if unknown.

    Attributes:
      seconds: Time of the main thread in each of ACTIVITIES since the start (s). The rest is
        training. Input counts only if the devices may have waited for it.
    """

    def __init__(self, sizes: Sizes, flops_per_step: float | None = None):
        self._sizes = sizes
        self._flops = flops_per_step
        self.start()

    class _LogLine:
        """Work since the last line of the log."""

        def __init__(self, begin: float, seconds: dict[str, float]):
            self.begin, self.seconds = begin, seconds
            self.sums: list[Any] = []
            self.steps = self.finite = self.structures = self.atoms = self.edges = 0

    @contextlib.contextmanager
    def clock(self, activity: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Count the time of the body for `activity`, unless `unless()` is true after it.

        `unless` is a condition under which the devices did not wait.
        """
        begin = time.monotonic()
        try:
            yield
        finally:
            if not unless():
                self.seconds[activity] += time.monotonic() - begin

    def start(self) -> None:
        """Start the clock."""
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._begin = time.monotonic()
        self._line = self._LogLine(self._begin, dict(self.seconds))

    def add(self, plans: Sequence[StepPlan], sums: Any, finite: np.ndarray) -> None:
        """Count finished steps.

        Args:
          plans: Plans of the steps.
          sums: Loss sums on the host, with a leading axis of steps.
          finite: Whether each step was finite. The sums of the others are ignored.
        """
        line = self._line
        members = np.concatenate([m for plan in plans for m in plan.members])
        line.sums.append(
            jax.tree.map(
                lambda x: float(np.asarray(x, np.float64)[: len(plans)][finite].sum()), sums
            )
        )
        line.steps += len(plans)
        line.finite += int(np.sum(finite))
        line.structures += len(members)
        line.atoms += int(self._sizes.n_node[members].sum())
        line.edges += int(self._sizes.n_edge[members].sum())

    def next_line(self) -> tuple[Any, dict[str, float]]:
        """Return the loss sums and the rates since the last line, and start a new line.

        Returns:
          The sums over the finite steps: NaN if no step was finite, None if there was no step. And
          the rates per second of training, without validation and checkpoints, with the fractions
          of the time spent on input and checkpoints.
        """
        line, now = self._line, time.monotonic()
        spent = {k: self.seconds[k] - line.seconds[k] for k in ACTIVITIES}
        elapsed = max(now - line.begin, 1e-9)
        training = max(elapsed - spent["validation"] - spent["checkpoint"], 1e-9)
        row = {
            "structures_per_second": line.structures / training,
            "atoms_per_second": line.atoms / training,
            "edges_per_second": line.edges / training,
            "input_share": spent["input"] / elapsed,
            "checkpoint_share": spent["checkpoint"] / elapsed,
        }
        peak = peak_flops()
        if peak and self._flops:
            row["mfu"] = self._flops * line.steps / training / peak
        # NaN if no step was finite, because a sum of zero would look like no error
        sums = jax.tree.map(
            lambda *x: float(np.sum(x)) if line.finite else float("nan"), *line.sums or [None]
        )
        self._line = self._LogLine(now, dict(self.seconds))
        return sums, row

    def summary(self) -> dict[str, float]:
        """Return the fraction of the total time in each of ACTIVITIES."""
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        return {k: v / elapsed for k, v in self.seconds.items()}


def peak_flops() -> float | None:
    """Return the peak FLOPS of all devices of this process, or None if unknown, as for CPUs."""
    kind = jax.local_devices()[0].device_kind
    for name, flops in PEAK_FLOPS.items():
        if name in kind:
            return flops * jax.local_device_count()
    return None

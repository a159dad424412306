"""Dispatches: training steps that are sent to the devices together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax.graphs.pipeline import Stream
from mlip_jax.training.data import StepPlan
from mlip_jax.training.step import DispatchResult


class Dispatch(NamedTuple):
    """Steps that were dispatched to the devices together.

    Attributes:
      step: Number of steps of the run after them.
      plans: Plan of each of these steps.
      result: Their result, which the devices may still be computing.
    """

    step: int
    plans: list[StepPlan]
    result: DispatchResult


class DispatchSource:
    """Source of the inputs of dispatches, which takes batches from a stream.

    Args:
      stream: Stream of (plan, batch) per step; see `Batches.training`.
      max_steps: Maximum number of steps per dispatch, S.
      put: Function that transfers the input of several steps to the devices.

    Attributes:
      stream: Stream of the batches.
    """

    def __init__(self, stream: Stream, max_steps: int, put: Callable[[Any], Any]):
        self.stream = stream
        self._max_steps, self._put = max_steps, put
        self._held: tuple[StepPlan, Any] | None = None

    @property
    def holds_batch(self) -> bool:
        """Return whether a batch was taken from the stream, but is not in a dispatch yet.

        The state of the stream is past this batch. A checkpoint would lose it.
        """
        return self._held is not None

    def discard_batch(self) -> None:
        """Discard the batch that is held back, if there is one."""
        self._held = None

    def next(self, limit: int) -> tuple[list[StepPlan], Any]:
        """Take the batches of at most `limit` steps from the stream.

        The steps share one size bucket. The first batch of another bucket is held back for the next
        dispatch.

        Returns:
          The plans of the steps, and their input on the devices with leading axes (D, S, K).
        """
        taken: list[tuple[StepPlan, Any]] = []
        while len(taken) < min(limit, self._max_steps):
            plan, batch = self._held or next(self.stream)
            self._held = None
            if taken and plan.bucket != taken[0][0].bucket:
                self._held = plan, batch
                break
            taken.append((plan, batch))
        inputs = [batch for _, batch in taken]
        if self._max_steps == 1:
            return [taken[0][0]], inputs[0]
        # The number of batches is static, so the last one fills up the steps that are not done.
        inputs += inputs[-1:] * (self._max_steps - len(inputs))
        # S arrays (D, 1, K, ...) -> (D, S, K, ...)
        return [plan for plan, _ in taken], self._put(
            jax.tree.map(lambda *x: np.concatenate(x, 1), *inputs)
        )

"""Profiler trace of a few dispatches of a run, for TensorBoard, Perfetto or xprof."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

log = logging.getLogger(__name__)

# Number of dispatches before the trace begins, in which programs are compiled and memory allocated.
_WARM_UP = 3


def _options() -> jax.profiler.ProfileOptions:
    """Return options without the tracer of Python functions.

    It makes short steps several times as slow, and with Python 3.11 the interpreter sometimes loops
    forever at the first function that is called after the start of the trace.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


class Trace:
    """Context manager that writes a trace of `steps` dispatches to a directory; none for 0."""

    def __init__(self, directory: Path, steps: int):
        self._directory, self._steps, self._dispatches = directory, steps, 0

    def __enter__(self) -> Trace:
        return self

    def step(self, result: Any) -> None:
        """Count a dispatch with this result. Starts or stops the trace when it is time."""
        if not self._steps or self._dispatches > _WARM_UP + self._steps:
            return
        self._dispatches += 1
        if self._dispatches == _WARM_UP:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self._directory), profiler_options=_options())
        elif self._dispatches == _WARM_UP + self._steps:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        """Write the trace and log where it is."""
        jax.profiler.stop_trace()
        dispatches = self._dispatches - _WARM_UP
        self._dispatches = _WARM_UP + self._steps + 1
        log.info(
            "trace of %d dispatches written to %s. View it with tensorboard --logdir or "
            "ui.perfetto.dev.",
            dispatches,
            self._directory,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _WARM_UP <= self._dispatches < _WARM_UP + self._steps:
            self._stop()
        elif self._steps and self._dispatches < _WARM_UP:
            log.warning(
                "no trace: it begins after %d dispatches, but there were only %d",
                _WARM_UP,
                self._dispatches,
            )

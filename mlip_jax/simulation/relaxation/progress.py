"""Progress of a relaxation: a bar on a terminal, otherwise a log line from time to time."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from rich import progress

from mlip_jax import distributed
from mlip_jax.simulation.relaxation.journal import FAILURES

log = logging.getLogger(__name__)

_SHOW_SECONDS, _LOG_SECONDS = 0.2, 15.0


class RelaxationProgressBar:
    """Context manager that shows a progress bar for the molecules of this process.

    Only the leader shows a bar.

    Attributes:
      done: Number of molecules so far, including those of earlier starts.
    """

    def __init__(
        self,
        total: int,
        done: int,
        verb: str = "relaxing",
        *,
        noun: str = "molecules",
        failed: int = 0,
        failed_label: str = "failed or diverged",
    ):
        """Create a progress bar.

        Args:
          total: Total number of molecules.
          done: Number of molecules of earlier starts.
          verb: Label of the bar.
          noun: Name of what is counted.
          failed: Number of failed molecules of earlier starts.
          failed_label: Label of the number of failures.
        """
        self._noun, self._failed_label = noun, failed_label
        self.done, self._total, self._failed, self._before = done, total, failed, done
        self._lock = threading.Lock()
        self._begin = self._shown = self._logged = time.monotonic()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            disable=not distributed.leader(),
        )
        share = (
            verb if distributed.count() == 1 else f"{verb} (one of {distributed.count()} processes)"
        )
        self._task = self._bar.add_task(share, total=total, completed=done, text="compiling")

    def __enter__(self) -> RelaxationProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show()
        self._bar.stop()

    def add(self, status: str, count: int = 1) -> None:
        """Count `count` finished molecules. Threads may share the bar."""
        with self._lock:
            self.done += count
            self._failed += count * (status in FAILURES)
        now = time.monotonic()
        if now - self._shown >= _SHOW_SECONDS:
            self._shown = now
            self._show()
        if now - self._logged >= _LOG_SECONDS and not self._bar.console.is_terminal:
            self._logged = now
            log.info("%d of %d %s: %s", self.done, self._total, self._noun, self.text())

    def _show(self) -> None:
        """Redraw the bar."""
        self._bar.update(self._task, completed=self.done, text=self.text())

    def text(self) -> str:
        """Return speed and number of failures as text."""
        speed = (self.done - self._before) / max(time.monotonic() - self._begin, 1e-9)
        return f"{speed:.3g} {self._noun}/s  {self._failed} {self._failed_label}"

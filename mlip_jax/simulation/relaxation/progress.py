"""What a run shows while it relaxes: a bar on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from rich import progress

from mlip_jax import distributed

log = logging.getLogger(__name__)

_SHOW_SECONDS, _LOG_SECONDS = 0.2, 15.0


class RelaxationProgressBar:
    """Context manager around the bar of the molecules of this process, of which the leader alone shows one.

    Attributes:
      done: Molecules so far, those of earlier starts among them.
    """

    def __init__(self, total: int, done: int, verb: str = "relaxing"):
        self.done, self._total, self._failed, self._before = done, total, 0, done
        self._lock = threading.Lock()
        self._begin = self._shown = self._logged = time.monotonic()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"), progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
            disable=not distributed.leader())
        share = verb if distributed.count() == 1 else f"{verb}, of {distributed.count()} processes this one"
        self._task = self._bar.add_task(share, total=total, completed=done, text="")

    def __enter__(self) -> RelaxationProgressBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._show()
        self._bar.stop()

    def add(self, status: str) -> None:
        """One more molecule has come to its end. Threads may share it."""
        with self._lock:
            self.done += 1
            self._failed += status in ("failed", "diverged")
        now = time.monotonic()
        if now - self._shown >= _SHOW_SECONDS:
            self._shown = now
            self._show()
        if now - self._logged >= _LOG_SECONDS and not self._bar.console.is_terminal:
            self._logged = now
            log.info("%d of %d molecules  %s", self.done, self._total, self._text())

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, text=self._text())

    def _text(self) -> str:
        speed = (self.done - self._before) / max(time.monotonic() - self._begin, 1e-9)
        return f"{speed:.3g} molecules/s  {self._failed} failed or diverged"

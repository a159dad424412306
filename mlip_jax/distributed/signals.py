"""The wish to stop, as a scheduler or a user sends it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)

# sysexits.h: a temporary failure; try again later
EXIT_REQUEUE = 75
# After which a signal that was lost is sent again: where it was lost must be left by then, on a busy machine as well.
_AGAIN_SECONDS = 0.3


class Stopped(RuntimeError):
    """A signal ended the run. What it did is saved; started again, it goes on."""


class InterruptedTwice(KeyboardInterrupt):
    """A user will not wait for the step to be saved, nor see the run started again."""


class _End(SystemExit):
    """A signal asks for the end."""

    def __init__(self, number: int):
        super().__init__(EXIT_REQUEUE)
        self.number = number


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """While it is entered, SIGTERM and SIGUSR1 raise SystemExit with EXIT_REQUEUE: a scheduler wants the place.

    For the parts of a program that have nothing to save. In another thread than the main one this does nothing.
    """

    def end(number, frame):
        raise _End(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with _lost_ones_again():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _lost_ones_again() -> Iterator[None]:
    """A signal whose exception comes to nothing is sent again, a little later.

    Python prints and forgets what is raised within a garbage collection, where JAX has it call Python each time.
    """
    show, timers = sys.unraisablehook, []

    def hook(about):
        if not issubclass(about.exc_type, _End | KeyboardInterrupt):
            return show(about)
        number = about.exc_value.number if isinstance(about.exc_value, _End) else signal.SIGINT
        timers.append(threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = show
        for timer in timers:
            timer.cancel()


class StopSignal:
    """While it is entered, the first SIGTERM, SIGINT or SIGUSR1 is remembered in place of ending the process.

    A second SIGINT raises InterruptedTwice. A second SIGTERM ends the process at once, with exit code 75
    (EXIT_REQUEUE). What was set before is put back on leaving. Signals come to the main thread only: entered in
    another, this does nothing. Python sees a signal when a call into compiled code returns, such as a step or a
    compilation.

    Attributes:
      received: The name of the first signal; None until then.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._counts: dict[int, int] = {}
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            # None: set by code that is not Python's, which cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _receive(self, number: int, frame) -> None:
        self._counts[number] = self._counts.get(number, 0) + 1
        name = signal.Signals(number).name
        if self.received is None:
            self.received = name
            # a handler must not log: it may have interrupted the very same stream within a write
            text = "%s: stopping after this step; the same signal again ends the run at once"
            threading.Thread(target=log.warning, args=(text, name), daemon=True).start()
        if self._counts[number] < 2:
            return
        if number == signal.SIGINT:
            raise InterruptedTwice
        if number == signal.SIGTERM:
            os._exit(EXIT_REQUEUE)

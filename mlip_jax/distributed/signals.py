"""Stop requests: the signals that a scheduler or a user sends to end a run."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)

# Exit code of a run that should be requeued: EX_TEMPFAIL of sysexits.h, a temporary failure.
EXIT_REQUEUE = 75
# Time after which a lost signal is sent again (s). The garbage collection that lost it must be over
# by then, also on a busy machine.
_RESEND_SECONDS = 0.3


class Stopped(RuntimeError):
    """A signal stopped the run. Its progress is saved, and a rerun resumes from there."""


class ForcedInterrupt(KeyboardInterrupt):
    """A user has interrupted the run twice: it ends without saving and must not be requeued."""


class ReportedInterrupt(KeyboardInterrupt):
    """An interrupt after which the log already says how to resume the run."""


@contextlib.contextmanager
def report_end(message: str) -> Iterator[None]:
    """Log a message if a signal or a user ends the body.

    It replaces the general message of the command, so that one Ctrl-C prints one message.

    Args:
      message: What is saved, and how to resume.
    """
    try:
        yield
    except ForcedInterrupt:
        raise
    except KeyboardInterrupt as error:
        log.warning("%s", message)
        raise ReportedInterrupt from error
    except SystemExit:
        log.warning("%s", message)
        raise


class _End(SystemExit):
    """Exit because of a signal, with its number."""

    def __init__(self, number: int):
        super().__init__(EXIT_REQUEUE)
        self.number = number


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise SystemExit with EXIT_REQUEUE on SIGTERM and SIGUSR1 in the body.

    A scheduler sends these signals to reclaim the machine. SIGINT raises KeyboardInterrupt, as
    always. This is for parts of a program that have nothing to save. It does nothing outside of the
    main thread.

    Compiled code can replace the exception of a signal by another one: NumPy raises TypeError if a
    signal arrives while it compares structured arrays. An exception that leaves the body after a
    signal is therefore logged and counts as the end by this signal.
    """
    ends: list[BaseException] = []

    def end(number, frame):
        ends.append(KeyboardInterrupt() if number == signal.SIGINT else _End(number))
        raise ends[-1]

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in the background of a script
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        with _resend_lost_signals():
            yield
    except Exception as error:
        if not ends:
            raise
        log.warning("while the run was being stopped: %s: %s", type(error).__name__, error)
        raise ends[-1] from error
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _resend_lost_signals() -> Iterator[None]:
    """Send a signal again shortly after Python has discarded its exception.

    Python prints and discards an exception that is raised during a garbage collection. JAX
    registers a Python callback for collections, so a signal handler can run and raise there.
    """
    show, timers = sys.unraisablehook, []

    def hook(about):
        if not issubclass(about.exc_type, _End | KeyboardInterrupt):
            return show(about)
        number = about.exc_value.number if isinstance(about.exc_value, _End) else signal.SIGINT
        timers.append(threading.Timer(_RESEND_SECONDS, os.kill, (os.getpid(), number)))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = show
        for timer in timers:
            timer.cancel()


class StopSignal:
    """Context manager that records the first SIGTERM, SIGINT or SIGUSR1; the process continues.

    A second SIGINT raises ForcedInterrupt. A second SIGTERM ends the process at once, with exit
    code 75 (EXIT_REQUEUE). The previous handlers are restored on exit. Only the main thread
    receives signals, so this does nothing in other threads. Python handles a signal when a call
    into compiled code returns, such as a training step or a compilation.

    Attributes:
      received: Name of the first signal, None until then.
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
            # None: a handler that was not set from Python, which cannot be restored
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _receive(self, number: int, frame) -> None:
        """Record a signal. Its second occurrence interrupts or ends the process."""
        self._counts[number] = self._counts.get(number, 0) + 1
        name = signal.Signals(number).name
        if self.received is None:
            self.received = name
            # A handler must not log itself: it may have interrupted a write to the same stream.
            text = "%s: stopping after this step; the same signal again ends the run immediately"
            threading.Thread(target=log.warning, args=(text, name), daemon=True).start()
        if self._counts[number] < 2:
            return
        if number == signal.SIGINT:
            raise ForcedInterrupt
        if number == signal.SIGTERM:
            os._exit(EXIT_REQUEUE)

"""The log on the console: lines of this package, without the noise of the libraries below it."""

from __future__ import annotations

import logging
import sys


def log_to_console() -> None:
    """Send the log to the console, with times; silence JAX's details and absl, which orbax logs through."""
    from absl import logging as absl_logging
    from rich.logging import RichHandler
    absl_logging.use_absl_handler()
    root = logging.getLogger()
    root.handlers = [RichHandler(show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S")]
    root.setLevel(logging.INFO)
    logging.getLogger("jax").setLevel(logging.WARNING)
    # orbax logs every file it opens, and every error with its traceback, which it also raises
    absl_logging.set_verbosity(absl_logging.FATAL)
    _hide_closed_loops()


def _hide_closed_loops() -> None:
    """Hide "Event loop is closed" of orbax's threads, which follows a failed write that was reported already."""

    def closed_loop(error):
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    show, show_unraisable = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: None if closed_loop(error) else show(kind, error, trace)
    sys.unraisablehook = lambda about: None if closed_loop(about.exc_value) else show_unraisable(about)

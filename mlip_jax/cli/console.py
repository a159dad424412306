"""Console log with the messages of this package, without those of its libraries."""

from __future__ import annotations

import logging
import sys
import warnings

from mlip_jax.foreign_text import printable

log = logging.getLogger(__name__)


def replace_unknown_characters() -> None:
    """Replace characters that the encoding of the terminal lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks replace the streams
            stream.reconfigure(errors="replace")


def log_to_console() -> None:
    """Send the log to the console, with times.

    Messages of JAX below the level of a warning are hidden, and so are those of absl, which orbax
    logs through.
    """
    from absl import logging as absl_logging

    replace_unknown_characters()
    absl_logging.use_absl_handler()
    root = logging.getLogger()
    root.handlers = [_handler()]
    root.setLevel(logging.INFO)
    logging.getLogger("jax").setLevel(logging.WARNING)
    # orbax logs every file that it opens, and the traceback of every error, which it raises anyway
    absl_logging.set_verbosity(absl_logging.FATAL)
    _hide_closed_loops()
    log_warnings()


def log_warnings() -> None:
    """Log warnings for the user instead of printing them with a line of source code."""
    show = warnings.showwarning

    def log_warning(message, category, *place, **options):
        if issubclass(category, UserWarning):
            log.warning("%s", message)
        else:
            show(message, category, *place, **options)

    warnings.showwarning = log_warning


def _handler() -> logging.Handler:
    """Return the handler of the log: colors in terminals; whole lines in files and pipes.

    Programs that the sweeps start write to a pipe, whose text a terminal shows.
    """
    from rich.logging import RichHandler

    if sys.stdout.isatty():
        handler = RichHandler(
            show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(PrintableFormatter("%(message)s"))
        return handler
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        PrintableFormatter("%(asctime)s %(levelname)-8s %(message)s", datefmt="%H:%M:%S")
    )
    return handler


class PrintableFormatter(logging.Formatter):
    """Formatter that removes escape sequences, since names in files could control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _hide_closed_loops() -> None:
    """Hide "Event loop is closed" errors of orbax's threads.

    They follow a failed write, which is reported separately.
    """

    def closed_loop(error):
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    show, show_unraisable = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: (
        None if closed_loop(error) else show(kind, error, trace)
    )
    sys.unraisablehook = lambda about: (
        None if closed_loop(about.exc_value) else show_unraisable(about)
    )

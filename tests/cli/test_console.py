"""Tests for the log of the command."""

import io
import logging
import sys
import warnings

import pytest

from mlip_jax import distributed, main
from mlip_jax.cli import console
from mlip_jax.distributed import report_end
from mlip_jax.simulation.calculators.conservation import NonConservativeWarning

LONG = "a message " * 30 + "that ends"


@pytest.fixture
def lines(monkeypatch):
    """A function that returns the lines of the log of the command in a file."""
    root, stream = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.INFO)
    for module, name in ((sys, "excepthook"), (sys, "unraisablehook"), (warnings, "showwarning")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(sys, "stdout", stream)
    console.log_to_console()
    return lambda: stream.getvalue().splitlines()


def test_lines_in_files_are_not_wrapped(lines):
    """Lines used to be cut at 80 characters, which hides them from a search in the file."""
    logging.getLogger("mlip_jax.tests").warning(LONG)
    (line,) = lines()
    assert line.endswith(f"WARNING  {LONG}")


def test_warnings_for_the_user_are_log_lines(lines):
    """Detects lines of source code below the warnings of a command."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        console.log_warnings()  # pytest has replaced the function that prints warnings
        warnings.warn("not the gradient", NonConservativeWarning, stacklevel=1)
    (line,) = lines()
    assert line.endswith("WARNING  not the gradient")


@pytest.mark.parametrize("message", ["", "stopped; rerun to resume"])
def test_one_interrupt_prints_one_message(lines, monkeypatch, message):
    """Detects the general message of the command after that of the task."""

    def interrupted(arguments):
        if message:
            with report_end(message):
                raise KeyboardInterrupt
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_dispatch", interrupted)
    monkeypatch.setattr(console, "log_to_console", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main.run_command([])
    assert ended.value.code == distributed.EXIT_REQUEUE
    (line,) = lines()
    assert (message or "interrupted; rerun") in line

"""Configuration of the tests: threads, compilation, signals and precision."""

import contextlib
import fcntl
import gc
import os
import signal

# Set before NumPy is imported. With a pytest-xdist worker on each core, more threads of BLAS would
# only spin.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import hypothesis
import jax
import pytest

from tests import compilation, drawing

compilation.configure()

# Tracing creates many objects that live long. With the default thresholds, garbage collection takes
# a sixth of the time of the tests.
gc.set_threshold(50_000, 50, 100)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Collect no doctests from the tests, which have none: inspecting each function takes long."""
    return [collector for collector in (yield) if isinstance(collector, pytest.Module)]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Import a test file in one process at a time.

    The first process compiles it, which takes ten times as long as its import, and the others read
    the result.
    """
    if not isinstance(collector, pytest.Module):
        return (yield)
    with open(collector.path) as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


def pytest_collection_finish():
    """Simplify figures: tests and modules that draw have imported Matplotlib by now."""
    drawing.simplify()


def pytest_unconfigure():
    """Exempt all objects from garbage collection: pytest collects ten times at the end.

    After thousands of tests, each of these collections takes seconds.
    """
    gc.freeze()


# Tests start and interrupt programs, which inherit ignored signals. The background jobs of a shell
# ignore signals, so restore their handlers.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


# The fast suite draws examples from a fixed seed, so that an unrelated change cannot fail by
# chance. `make test-slow` and MLIP_JAX_TEST_COMPILATION=optimized draw new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
if compilation.is_quick():
    hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def blank_figures():
    """Embed blank images in pages, for whole runs whose pages tests/reports covers."""
    drawing.simplify(blank=True)
    yield
    drawing.simplify()


@pytest.fixture
def optimized_compilation():
    """Compile with optimization, for tests whose programs run for a long time."""
    before = jax.config.jax_disable_most_optimizations
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def double_precision():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield

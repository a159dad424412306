"""How tests compile and compute."""

import signal

import jax
import pytest

# Programs that tests start and interrupt inherit what is ignored, as in a shell's background.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture
def quick_compilation():
    """Compiles without optimisation, which is quicker for what runs few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def double_precision(quick_compilation):
    """Float64, compiled quickly."""
    with jax.enable_x64(True):
        yield

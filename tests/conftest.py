"""How tests compile and compute."""

import jax
import pytest


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

"""Compiler settings of the tests.

Most programs of the tests run only a few times, so compiling them takes far longer than running
them. The suite therefore compiles without optimization and, if XLA still has them, with the old
emitters. Together this takes a fifth of the time. `MLIP_JAX_TEST_COMPILATION=optimized` runs the
tests with the default settings of users, as `make test-slow` does.

Compiled programs are kept in a folder of the system's temporary directory, which all processes of
this and later runs share. JAX's own variable JAX_COMPILATION_CACHE_DIR selects another folder.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import jax

VARIABLE = "MLIP_JAX_TEST_COMPILATION"
# JAX 0.11 removed these emitters, and ends the process if a flag is unknown.
_QUICK_FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
_OPTION = "jax_disable_most_optimizations"
_LOCATIONS = "jax_traceback_in_locations_limit"


def is_quick() -> bool:
    """Return whether the suite trades run time for compile time."""
    chosen = os.environ.get(VARIABLE, "quick")
    if chosen not in ("quick", "optimized"):
        raise ValueError(f"{VARIABLE}={chosen!r}: expected 'quick' or 'optimized'")
    return chosen == "quick"


def xla_flags(*flags: str) -> str:
    """Return XLA_FLAGS for a child process: those of this suite and `flags`."""
    quick = is_quick() and jax.__version_info__ < (0, 11)
    return " ".join([*(_QUICK_FLAGS if quick else ()), *flags])


def configure() -> None:
    """Configure this process and, through the environment, its children.

    It must be called before JAX compiles anything.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs",
        float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
    )
    # Locations in compiled programs serve error messages of XLA; without them, lowering a program
    # takes three quarters of the time.
    if hasattr(jax.config, _LOCATIONS):
        os.environ[_LOCATIONS.upper()] = "0"
        jax.config.update(_LOCATIONS, 0)
    if not is_quick():
        return
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS", ""), xla_flags()]))
    os.environ[_OPTION.upper()] = "true"
    jax.config.update(_OPTION, True)


def cache_directory() -> Path:
    """Return the folder of compiled programs of this user."""
    return Path(tempfile.gettempdir()) / f"mlip_jax_tests_{os.getuid()}"

"""Cache of compiled programs on disk, which the command and all force fields share.

The module imports only the standard library before it is used, because the command imports it
within milliseconds of its start.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

_MIN_COMPILE_SECONDS = 0.1  # JAX's default of 1 s leaves out half of the time of a first energy


def keep_compiled_programs() -> None:
    """Keep XLA's compiled programs for later processes, in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR selects another folder; an empty value turns the cache off. A folder
    that the program has set in jax.config is kept. A program compiled for a CPU runs only on CPUs
    of the same kind, so each kind has its own folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import hashlib

    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    kind = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        kind = next(
            (
                line
                for line in cpuinfo.read_text(encoding="utf-8").splitlines()
                if line.startswith(("flags", "Features"))
            ),
            kind,
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{jax.__version__}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    jax.config.update("jax_compilation_cache_dir", str(cache / "mlip_jax" / name))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)

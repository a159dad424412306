"""Cache of compiled programs on disk, which the command and all force fields share.

The module imports only the standard library before it is used, because the command imports it
within milliseconds of its start.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import stat
from pathlib import Path

log = logging.getLogger(__name__)

# Environment variable that chooses kernels compiled outside of XLA. Programs refer to them by numbers
# that are valid only in one process.
EXTERNAL_KERNELS = "MLIP_JAX_TENSOR_PRODUCTS"
_MIN_COMPILE_SECONDS = 0.1  # JAX's default of 1 s leaves out half of the time of a first energy
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def keep_compiled_programs() -> None:
    """Keep XLA's compiled programs for later processes, in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR selects another folder; an empty value turns the cache off. A folder
    that the program has set in jax.config is kept. A program compiled for a CPU runs only on CPUs
    of the same kind, so each kind has its own folder.

    Compiled programs are code that JAX runs unchecked. A folder that others can write to is
    therefore not used, with a warning, and new folders are accessible only to the user.

    With EXTERNAL_KERNELS, nothing is kept.
    """
    if os.environ.get(EXTERNAL_KERNELS, "jax") not in ("", "jax"):
        import jax

        _turn_off(jax.config.jax_compilation_cache_dir)
        return
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        chosen = os.environ["JAX_COMPILATION_CACHE_DIR"]
        if chosen and "://" not in chosen and not _is_private(chosen):
            _turn_off(chosen)
        return
    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "mlip_jax" / f"{jax.__version__}-{_kind_of_processor()}"
    if not _is_private(str(folder)):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


@functools.cache
def _is_private(path: str) -> bool:
    """Return whether only the user can write to a folder, which is created if it is missing."""
    folder = Path(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status, parent = folder.stat(), folder.parent.stat()
        link = folder.lstat()
    except OSError as error:
        log.warning("%s: compiled programs are not kept: %s", folder, error)
        return False
    allowed = {os.geteuid(), 0}
    if not {status.st_uid, link.st_uid} <= allowed:
        problem = "belongs to another user"
    elif status.st_mode & _BY_OTHERS:
        problem = "is writable by others"
    # In a folder such as /tmp, only the owner of an entry can replace it.
    elif parent.st_mode & _BY_OTHERS and not parent.st_mode & stat.S_ISVTX:
        problem = f"can be replaced by others, who can write to {folder.parent}"
    else:
        return True
    log.warning(
        "%s: %s; compiled programs in it are not used, because they could run code of others. Remove "
        "the folder, or set JAX_COMPILATION_CACHE_DIR to a folder of your own",
        folder,
        problem,
    )
    return False


def _turn_off(folder: str) -> None:
    """Stop JAX from using a folder."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir == folder:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def _kind_of_processor() -> str:
    """Return a short digest of the kind of CPU."""
    import hashlib

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
    return hashlib.sha256(kind.encode()).hexdigest()[:8]

"""Cache of compiled programs on disk, which the command and all force fields share.

The module imports only the standard library before it is used, because the command imports it
within milliseconds of its start.
"""

from __future__ import annotations

import contextlib
import errno
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
_MAX_PARTS = 1000  # folders and links on the way to a folder, to end loops of links


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
    folder = Path(path).absolute()
    try:
        for each in reversed([folder, *folder.parents]):
            if not each.exists():
                with contextlib.suppress(FileExistsError):
                    each.mkdir(mode=0o700)
        problem = next(filter(None, map(_problem, *_passed(folder))), None)
    except OSError as error:
        log.warning("%s: compiled programs are not kept: %s", folder, error)
        return False
    if problem is None:
        return True
    log.warning(
        "%s: %s; compiled programs in it are not used, because they could run code of others. Remove "
        "the folder, or set JAX_COMPILATION_CACHE_DIR to a folder of your own",
        folder,
        problem,
    )
    return False


def _passed(folder: Path) -> tuple[list[Path], list[bool]]:
    """Return the folders and symbolic links on the way to a folder, and which one is the folder.

    Whoever can rename one of them can replace the folder.
    """
    passed, left = [], list(reversed(folder.parts))
    while left:
        part = left.pop()  # an absolute target of a link begins at the root
        passed.append(passed[-1] / part if passed and part != folder.anchor else Path(part))
        if passed[-1].is_symlink():
            if len(passed) > _MAX_PARTS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
            left += reversed(passed[-1].readlink().parts)
            passed.append(passed[-1].parent)
    return passed, [False] * (len(passed) - 1) + [True]


def _problem(path: Path, is_cache: bool) -> str | None:
    """Return how others could replace a folder, a folder above it, or a link to one."""
    status = path.lstat()
    # Root belongs to a number without a name in containers without privileges.
    if status.st_uid not in (os.geteuid(), 0) and (
        is_cache or status.st_uid != os.stat("/").st_uid
    ):
        return f"{path} belongs to another user"
    others = 0 if stat.S_ISLNK(status.st_mode) else status.st_mode & _BY_OTHERS
    if others & stat.S_IWGRP and _is_own_group(status.st_gid):
        others &= ~stat.S_IWGRP
    if not others:
        return None
    if is_cache:
        return "is writable by others"
    # In a folder such as /tmp, only the owner of an entry can replace it.
    return (
        None
        if status.st_mode & stat.S_ISVTX
        else f"can be replaced by others who can write to {path}"
    )


def _is_own_group(number: int) -> bool:
    """Return whether a group is that of the user only, which many systems create for each user."""
    import grp
    import pwd

    try:
        group, name = grp.getgrgid(number), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == name and {name}.issuperset(group.gr_mem)


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

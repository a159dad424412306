"""Directory of a run, which is locked and belongs to one config, and atomic writing of files."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mlip_jax.config import differences, with_current_names

log = logging.getLogger(__name__)


class WorkdirError(RuntimeError):
    """The workdir belongs to another run, or cannot be used."""


@contextlib.contextmanager
def claimed(
    workdir: str | Path, config: Mapping[str, Any], extendable: Sequence[str] = ()
) -> Iterator[Path]:
    """Lock a workdir for this process and yield its path. It is created if it is missing.

    The lock is released when the process ends, even if it is killed.

    Args:
      workdir: Directory of the run.
      config: Identity of the run, as plain dictionaries.
      extendable: Dotted names of numbers that may be larger than at the first start, such as the
        number of steps. The run then continues, and config.json has the new value.

    Raises:
      WorkdirError: Another process is using the workdir, it belongs to another config (the message
        lists the differences), or it cannot be written.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise WorkdirError(f"{workdir}: cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise WorkdirError(
                f"{workdir}: in use by another run (process {lock.read().strip() or 'unknown'}). "
                "Wait for it to finish, or choose another --workdir."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        fresh = not (workdir / "config.json").exists()
        _check_config(workdir, config, extendable)
        try:
            yield workdir
        except BaseException:  # also SystemExit and KeyboardInterrupt, from signals
            # If the run ended before it wrote results (for example because of a mistyped path),
            # release the workdir for the corrected run.
            if fresh and all(
                p.name in (".lock", "config.json") or _is_log(p) for p in workdir.iterdir()
            ):
                (workdir / "config.json").unlink(missing_ok=True)
            raise


def _is_log(path: Path) -> bool:
    """Return whether a file is the log of a process that a launcher started."""
    return path.name.startswith("process_") and path.suffix == ".log"


def _check_config(workdir: Path, config: Mapping[str, Any], extendable: Sequence[str] = ()) -> None:
    """Write config.json, or raise WorkdirError if the existing one differs from `config`.

    Fields in `extendable` may increase.
    """
    path = workdir / "config.json"
    if not path.exists():
        write_json(path, config)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise WorkdirError(
            f"{path}: not valid JSON ({error}). Choose another --workdir."
        ) from error
    old = with_current_names(old)
    # convert tuples to lists, as in the file
    changed = differences(old, json.loads(json.dumps(config)))
    extended = [name for name in extendable if _number(old, name) < _number(config, name)]
    if changed and len(changed) == len(extended):
        log.info("continuing the run with %s", ", ".join(changed))
        write_json(path, config)
        return
    if changed:
        raise WorkdirError(
            f"{workdir}: contains a run of another config:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --workdir, or use the config that the run was started with."
        )


def _number(config: Mapping[str, Any], name: str) -> float:
    """Return the number with a dotted name, or NaN if there is none."""
    for key in name.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, int | float) else math.nan


def check_origin(path: Path, origin: Mapping[str, Any], content: str) -> None:
    """Store the origin of a run when it starts, or compare it with the stored one when it resumes.

    Args:
      path: JSON file of the origin.
      origin: Input of the run, as plain dictionaries.
      content: Description of the results in the workdir, for the message: "relaxations of other
        molecules".

    Raises:
      WorkdirError: The origin has changed, or the file is corrupted.
    """
    if not path.exists():
        write_json(path, origin)
        return
    try:
        changed = differences(json.loads(path.read_text(encoding="utf-8")), origin)
    except (ValueError, AttributeError) as error:
        raise WorkdirError(f"{path}: corrupted ({error}). Choose another --workdir.") from error
    if changed:
        raise WorkdirError(
            f"{path.parent}: contains {content}:\n  "
            + "\n  ".join(changed)
            + "\nChoose another --workdir, or restore the files."
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically.

    Raises:
      WorkdirError: The file cannot be written.
    """
    try:
        with atomic_open(path, "w") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
    except OSError as error:
        raise WorkdirError(f"{path}: cannot be written: {error}") from error


def write_text(path: Path, content: str, *, shared: bool = False) -> None:
    """Write text as UTF-8, atomically; see `atomic_path`."""
    with atomic_open(path, "w", shared=shared, encoding="utf-8") as file:
        file.write(content)


@contextlib.contextmanager
def atomic_open(
    path: Path, mode: str = "wb", *, shared: bool = False, **options: Any
) -> Iterator[IO]:
    """Open a file whose content replaces `path` when the block ends without an error.

    Text is written as UTF-8, whatever the locale.

    Args:
      path: File to replace.
      mode: Mode of `open`.
      shared: Whether several processes may write `path` at the same time; see `atomic_path`.
      **options: Further arguments of `open`.
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    with atomic_path(path, shared=shared) as temporary, open(temporary, mode, **options) as file:
        yield file


@contextlib.contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `path` when the block ends without an error.

    The temporary file is in the same folder. Its content is flushed to disk before it replaces
    `path`, so a crash leaves either the old file or the new one.

    Args:
      path: File to replace.
      shared: Whether several processes may write `path` at the same time. The name of the temporary
        file is then unique. Otherwise it is fixed, so killed processes leave at most one such file,
        which the next process replaces.

    Raises:
      OSError: The file cannot be written. The old one is unchanged, and the temporary one is
        removed.
    """
    # with the name of the machine, because several machines may share the folder
    writer = f".{socket.gethostname()}.{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    if shared:
        _remove_leftovers(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # on a read-only file system, even the removal of a missing file raises
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `atomic_path` that killed processes of this machine have left."""
    prefix, suffix = f".{path.name}.{socket.gethostname()}.", ".tmp"
    for file in path.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
        process = file.name[len(prefix) : -len(suffix)]
        if process.isdecimal() and not _is_running(int(process)):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Return whether there is a process with this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

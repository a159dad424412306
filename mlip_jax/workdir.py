"""The folder of a run: one run at a time, of one config; and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mlip_jax.config import differences


class WorkdirError(RuntimeError):
    """The folder belongs to another run, or cannot be used."""


@contextlib.contextmanager
def claimed(workdir: str | Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """The workdir, made if missing, locked for this process, and of this config (plain dictionaries).

    The lock goes with the process, however it ends.

    Raises:
      WorkdirError: Another process runs there, another config has run there (the differences are shown), or the
        folder cannot be written.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")
    except OSError as error:
        raise WorkdirError(f"{workdir}: cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise WorkdirError(f"{workdir}: another run (process {lock.read().strip() or 'unknown'}) is at work there. "
                               "Wait for it, or give another --workdir.") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        fresh = not (workdir / "config.json").exists()
        _check_config(workdir, config)
        try:
            yield workdir
        except Exception:
            # A run that came to nothing, by a mistyped path for instance, leaves the folder to the corrected one.
            if fresh and all(p.name in (".lock", "config.json") or _is_log(p) for p in workdir.iterdir()):
                (workdir / "config.json").unlink(missing_ok=True)
            raise


def _is_log(path: Path) -> bool:
    """Whether a launcher keeps the output of a process there."""
    return path.name.startswith("process_") and path.suffix == ".log"


def _check_config(workdir: Path, config: Mapping[str, Any]) -> None:
    path = workdir / "config.json"
    if not path.exists():
        write_json(path, config)
        return
    try:
        old = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WorkdirError(f"{path}: is not valid JSON ({error}); give another --workdir") from error
    # as JSON sees it: tuples are lists there
    changed = differences(old, json.loads(json.dumps(config)))
    if changed:
        raise WorkdirError(f"{workdir} holds a run of another config:\n  " + "\n  ".join(changed)
                           + "\nGive another --workdir, or the config that it was started with.")


def check_origin(path: Path, origin: Mapping[str, Any], what: str) -> None:
    """Write down what a run is begun with, or compare it with what the run was begun with.

    Args:
      path: Of the file. origin: Plain. what: Of the results, for the message: "relaxations of other molecules".

    Raises:
      WorkdirError: It is something else now, or the file is damaged.
    """
    if not path.exists():
        write_json(path, origin)
        return
    try:
        changed = differences(json.loads(path.read_text()), origin)
    except (ValueError, AttributeError) as error:
        raise WorkdirError(f"{path}: is damaged ({error}); give another --workdir") from error
    if changed:
        raise WorkdirError(f"{path.parent} holds {what}:\n  " + "\n  ".join(changed)
                           + "\nGive another --workdir, or the files as they were.")


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
    """Write a text as UTF-8, atomically; see `atomic_path`."""
    with atomic_open(path, "w", shared=shared, encoding="utf-8") as file:
        file.write(content)


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "wb", *, shared: bool = False, **options: Any) -> Iterator[IO]:
    """Open a file whose content replaces `path` when the block ends without an error; see `atomic_path`.

    Args:
      mode, options: Passed to `open`.
    """
    with atomic_path(path, shared=shared) as temporary, open(temporary, mode, **options) as file:
        yield file


@contextlib.contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; the file written there replaces `path` when the block succeeds.

    The content reaches the disk before it replaces `path`: a crash leaves the old file or the new one.

    Args:
      shared: Whether several processes may write `path` at the same time. The name of the temporary file is then
        unique. Otherwise it is fixed, so killed processes leave at most one such file, and the next one replaces it.

    Raises:
      OSError: The file cannot be written. The old one is unchanged and the temporary one is removed.
    """
    # the machine's name, because several machines may share the folder
    writer = f".{socket.gethostname()}.{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # a read-only file system refuses even the removal of a file that is not there
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise

"""Directory of a run, which is locked and belongs to one config."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlip_jax.config import differences, with_current_names
from mlip_jax.files import atomic_open, atomic_path, open_lock, replace_content, write_text

__all__ = [
    "WorkdirError",
    "atomic_open",
    "atomic_path",
    "check_origin",
    "claimed",
    "write_json",
    "write_text",
]

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
        lock = open_lock(workdir / ".lock")
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
        replace_content(lock, str(os.getpid()))
        fresh = not (workdir / "config.json").exists()
        _check_config(workdir, config, extendable)
        try:
            yield workdir
        except Exception:
            # If the run failed before it wrote results (for example because of a mistyped path),
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

"""Directory of a run, which is locked and belongs to one config."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlip_jax.config import differences, with_current_names
from mlip_jax.files import (
    atomic_open,
    atomic_path,
    check_regular_files,
    open_lock,
    replace_content,
    write_text,
)
from mlip_jax.foreign_files.texts import open_regular, read_object

__all__ = [
    "WorkdirError",
    "atomic_open",
    "atomic_path",
    "check_origin",
    "claimed",
    "workdir_or_temporary",
    "write_json",
    "write_text",
]

log = logging.getLogger(__name__)


# Files that a run writes before its first result. A workdir that contains nothing else is reused.
_PREPARATIONS = frozenset(
    {"config.json", "origin.json", "splits.npz", "splits.json", "left_out.csv"}
)
# The lock, and the inputs of `mlip_jax.train` and `mlip_jax.active_learning`.
_KEPT = frozenset({".lock", "structures.traj", "molecules.smi"})
_LONGEST_HEADER = 2**20  # bytes of the first line of a table


class WorkdirError(RuntimeError):
    """The workdir belongs to another run, or cannot be used."""


@contextlib.contextmanager
def workdir_or_temporary(workdir: str | Path | None) -> Iterator[Path]:
    """Yield the workdir, or a temporary folder that is removed at the end."""
    if workdir is not None:
        yield Path(workdir)
        return
    with tempfile.TemporaryDirectory(prefix="mlip_jax-") as folder:
        yield Path(folder) / "run"


def unused_workdir(
    base: str | Path, config: Mapping[str, Any], extendable: Sequence[str] = ()
) -> Path:
    """Return the first of the folders NAME, NAME-2, NAME-3, ... that this run can use.

    A folder can be used if it contains a run of the same config, which then resumes, or no results
    of a run of this task.

    Args:
      base: Folder NAME.
      config: Identity of the run, as plain dictionaries.
      extendable: As for `claimed`.
    """
    base = Path(base)
    names = itertools.chain([base.name], (f"{base.name}-{k}" for k in itertools.count(2)))
    return next(
        path
        for path in map(base.with_name, names)
        if not _belongs_to_another_run(path, config, extendable)
    )


def _belongs_to_another_run(
    path: Path, config: Mapping[str, Any], extendable: Sequence[str]
) -> bool:
    """Return whether a folder contains another run of the same task, or one that is starting."""
    try:
        old = read_object(path / "config.json")
    except (OSError, ValueError):
        return False  # no run, or one that `claimed` rejects with a message
    if old.get("task") != config.get("task") or not _changes(old, config, extendable):
        return False
    return has_results(path) or _is_locked(path)


def _is_locked(path: Path) -> bool:
    """Return whether a process has claimed the folder."""
    try:
        with open_lock(path / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def has_results(path: str | Path) -> bool:
    """Return whether a folder contains more than the preparations of a run."""
    files = (file for file in Path(path).rglob("*") if not file.is_dir())
    return any(not _is_preparation(file) for file in files)


def _is_preparation(file: Path) -> bool:
    """Return whether a run writes this file before its first result."""
    if file.name in _PREPARATIONS | _KEPT or _is_log(file) or file.name.endswith(".tmp"):
        return True
    if file.parent.name == "tensorboard":  # created when training starts
        return True
    if any("orbax-checkpoint-tmp" in folder.name for folder in file.parents):  # not complete
        return True
    try:
        if file.suffix == ".csv":  # a table without rows; one line without commas is a value
            with open_regular(file) as lines:
                head, more = lines.readline(_LONGEST_HEADER), lines.read(1)
            return not head or not more and b"," in head
        return file.stat().st_size == 0
    except OSError:
        return False


def _remove_preparations(path: Path, kept: Collection[Path] = ()) -> None:
    """Remove what a run without results has written, except the lock and the input.

    Args:
      path: Folder without results.
      kept: Files that the run has not written.
    """
    for file in _files(path):
        if file not in kept and file.name not in _KEPT and not _is_log(file):
            file.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    """Return all files in a folder and its subfolders."""
    return [file for file in path.rglob("*") if not file.is_dir()]


@contextlib.contextmanager
def claimed(
    workdir: str | Path, config: Mapping[str, Any], extendable: Sequence[str] = ()
) -> Iterator[Path]:
    """Lock a workdir for this process and yield its path. It is created if it is missing.

    The lock is released when the process ends, even if it is killed. The folder of a run that
    stopped before its first result is reused, whatever the config of that run was.

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
        check_regular_files(workdir)
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
        # The folder may contain files of the user, which look like preparations.
        had_results = has_results(workdir)
        found = () if had_results else frozenset(_files(workdir))
        _check_config(workdir, config, extendable)
        try:
            yield workdir
        except Exception:
            # If the run failed before it wrote results (for example because of a mistyped path),
            # release the workdir for the corrected run. After a signal, `_check_config` does.
            if not had_results and not has_results(workdir):
                _remove_preparations(workdir, kept=found)
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
        old = read_object(path)
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{path}: not valid JSON ({error}). Choose another --workdir."
        ) from error
    changed = differences(with_current_names(old), _as_json(config))
    if not changed:
        return
    if not _changes(old, config, extendable):
        log.info("continuing the run with %s", ", ".join(changed))
        write_json(path, config)
    elif "task" in old and not has_results(workdir):
        log.info("%s: an earlier run stopped before its first result; replacing it", workdir)
        _remove_preparations(workdir)
        write_json(path, config)
    else:
        free = unused_workdir(workdir, config, extendable)
        other = free if free != workdir else workdir.with_name(f"{workdir.name}-2")
        raise WorkdirError(
            f"{workdir}: contains a run of another config:\n  "
            + "\n  ".join(changed)
            + f"\nChoose another workdir, such as --workdir={other}, or use the config that the run "
            "was started with."
        )


def _changes(
    old: Mapping[str, Any], config: Mapping[str, Any], extendable: Sequence[str]
) -> list[str]:
    """Return the differences of a config from an old one that make it the config of another run.

    Fields in `extendable` may increase.
    """
    old = with_current_names(old)
    changed = differences(old, _as_json(config))
    extended = [name for name in extendable if _number(old, name) < _number(config, name)]
    return [] if len(changed) == len(extended) else changed


def _as_json(config: Mapping[str, Any]) -> Any:
    """Return a plain config as it is read from a file, with lists instead of tuples."""
    return json.loads(json.dumps(config))


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
        changed = differences(read_object(path), origin)
    except (OSError, ValueError) as error:
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

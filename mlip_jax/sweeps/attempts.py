"""Attempts to run a variant: the state in its folder, and the lock that admits one process.

The state of a variant is one of

    waiting   not started, or completed with another config
    running   a process is running it
    stopped   a signal stopped it, or its process was killed; the next attempt resumes it
    failed    ended with an error
    done      complete with this config

The locks are fcntl locks, which the system releases when their process ends. A library for lock
files wraps the same call and would not shorten this module.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlip_jax import config as configs
from mlip_jax.files import open_lock
from mlip_jax.foreign_files.texts import open_regular, read_object
from mlip_jax.sweeps.child_process import COMMAND_PREFIX
from mlip_jax.sweeps.overrides import to_text
from mlip_jax.sweeps.variants import Variant
from mlip_jax.workdir import WorkdirError, write_json

LOCK = ".sweep.lock"
_TAIL_LINES = 15  # shown of the log of a failed variant
_TAIL_BYTES = 20_000
_ATTEMPT = {"state": str, "host": str, "process": int}
_OWN_FILES = ("log.txt", "attempt.json", "done.json", LOCK)


class VariantFolder:
    """Folder of a variant within the folder of its sweep.

    Attributes:
      path: Workdir of the variant.
      log: Log file with the output of all attempts.
    """

    def __init__(self, path: Path, variant: Variant):
        self.path, self._variant = path, variant
        self.log = path / "log.txt"

    def log_of_process(self, process: int) -> Path:
        """Return the log file of one of several processes that run the variant together."""
        return self.path / f"log_{socket.gethostname()}_{process}.txt"

    def state(self) -> str:
        """Return the state of the variant as listed in the module docstring."""
        attempt = self._attempt() or {"state": "waiting"}
        running = attempt["state"] == "running"
        if running and (_is_alive(attempt) or self._is_locked(attempt)):
            return "running"
        if self.is_done():
            return "done"
        if attempt["state"] == "done":  # with another config
            return "waiting"
        return "stopped" if running else attempt["state"]

    def _attempt(self) -> dict[str, Any]:
        """Return the content of attempt.json, {} if there is no such file."""
        path = self.path / "attempt.json"
        attempt = _read_json(path)
        if attempt is None:
            return {}
        if any(not isinstance(attempt.get(name), kind) for name, kind in _ATTEMPT.items()):
            raise WorkdirError(f"{path}: not of an attempt. Delete it to rerun the variant.")
        return attempt

    def _is_locked(self, attempt: dict[str, Any]) -> bool:
        """Return whether a process of another machine, which runs the variant, holds its lock.

        A machine that has been switched off holds none.
        """
        if attempt["host"] == socket.gethostname():
            return False
        try:
            with open_regular(self.path / LOCK) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def is_done(self) -> bool:
        """Return whether the variant is complete with its current config."""
        done = _read_json(self.path / "done.json")
        if done is None or not isinstance(done.get("config"), dict):
            return False
        config = configs.with_current_names(done["config"])
        # compare as text, in which nan equals nan
        return _sorted_json(config) == _sorted_json(self._identity())

    def seconds(self) -> float:
        """Return the wall time of all attempts that have ended, in seconds."""
        seconds = self._attempt().get("seconds")
        return seconds if isinstance(seconds, float | int) else 0.0

    def record_attempt(self, state: str, seconds: float, code: int | None = None) -> None:
        """Write attempt.json for the attempt of this process; if "done", write done.json first."""
        if state == "done":
            write_json(
                self.path / "done.json",
                {
                    "name": self._variant.name,
                    "overrides": to_text(self._variant.overrides),
                    "config": self._identity(),
                    "seconds": seconds,
                },
            )
        write_json(
            self.path / "attempt.json",
            {
                "state": state,
                "overrides": to_text(self._variant.overrides),
                "host": socket.gethostname(),
                "process": os.getpid(),
                "seconds": seconds,
            }
            | ({} if code is None else {"code": code}),
        )

    def release_config(self) -> None:
        """Remove config.json if the run wrote no results.

        A run that failed early, e.g. because of a mistyped path, thus releases its folder for the
        corrected config.
        """
        if {p.name for p in self.path.iterdir()} <= {".lock", "config.json", *_OWN_FILES}:
            (self.path / "config.json").unlink(missing_ok=True)

    def log_tail(self) -> str:
        """Return the last lines that the last attempt logged."""
        if not self.log.exists():
            return "(no log)"
        with open_regular(self.log) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
        start = (
            max((i for i, line in enumerate(lines) if line.startswith(COMMAND_PREFIX)), default=-1)
            + 1
        )
        return "\n".join([line.rstrip() for line in lines[start:] if line.strip()][-_TAIL_LINES:])

    def _identity(self) -> dict[str, Any]:
        return configs.identity(self._variant.config)


@contextlib.contextmanager
def lock_folder(folder: Path, wait: bool) -> Iterator[bool]:
    """Lock a folder for this process and yield whether the lock was acquired.

    With `wait`, the process blocks until it has the lock, so it always yields True.

    Raises:
      WorkdirError: The folder cannot be written.
    """
    try:
        file = open_lock(folder / LOCK)
    except OSError as error:
        raise WorkdirError(f"{folder}: cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _is_alive(attempt: dict[str, Any]) -> bool:
    """Return whether the process of an attempt exists on this machine."""
    if attempt["host"] != socket.gethostname():
        return False
    try:
        os.kill(attempt["process"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sorted_json(content: Any) -> str:
    return json.dumps(content, sort_keys=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, None if there is no such file."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkdirError(
            f"{path}: not valid JSON ({error}). Delete it to rerun the variant."
        ) from error

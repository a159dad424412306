"""Recorder of the metrics of a run, in metrics.csv and for TensorBoard.

When a run is resumed, rows of later steps than its checkpoint are dropped.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from mlip_jax.files import make_subfolder, open_in_place
from mlip_jax.workdir import WorkdirError, atomic_open

_PROGRESS = ("step", "epoch", "seconds", "learning_rate", "beta")
_RATES = (
    "structures_per_second",
    "atoms_per_second",
    "edges_per_second",
    "input_share",
    "checkpoint_share",
    "mfu",
)
# Characters that TensorBoard does not allow in the tag of a series.
_NOT_IN_TAGS = re.compile(r"[^-/\w.]")
# Minimum time between two flushes of TensorBoard's file (s).
_FLUSH_SECONDS = 30.0


def columns(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of metrics.csv for an objective with these metrics, without prefix."""
    return (
        *_PROGRESS,
        *(f"{split}_{name}" for split in ("train", "valid") for name in metrics),
        *_RATES,
    )


class Recorder:
    """Writer of rows of metrics, in the order of steps.

    Args:
      workdir: Directory of the run.
      step: Step to resume from. Stored rows of later steps are dropped.
      columns: Columns of metrics.csv.

    Raises:
      WorkdirError: Raised by any method if a file cannot be written.
    """

    def __init__(self, workdir: Path, step: int, columns: Sequence[str]):
        self._columns = columns
        self.path = workdir / "metrics.csv"
        with writing(self.path):
            kept = [row for row in self._read() if int(row["step"]) <= step]
            with atomic_open(self.path, "w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(kept)
        self._board = _Board(workdir / "tensorboard", step)

    def _read(self) -> list[dict[str, str]]:
        """Return the complete rows of metrics.csv."""
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            # a row is incomplete if the run was killed while writing it
            return [
                row
                for row in csv.DictReader(file)
                if row.get("step", "").isdecimal() and None not in row.values()
            ]

    def write(self, row: dict[str, float]) -> None:
        """Append one row. Columns that are missing in it stay empty."""
        with writing(self.path), open_in_place(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(
                {k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()}
            )
        # skip NaN, the error of a quantity without labels
        self._board.write(
            int(row["step"]), {k: v for k, v in row.items() if k != "step" and np.isfinite(v)}
        )

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self._board.close()


class _Board:
    """Event file of TensorBoard, written by the calling thread.

    tensorboardX.SummaryWriter writes in its own thread, which dies if the disk is full; its caller
    then waits forever. The writers of clu require TensorFlow or PyTorch. That of TensorBoard
    requires a web server and gRPC.
    """

    def __init__(self, directory: Path, step: int):
        self._directory = directory
        with writing(directory):
            make_subfolder(directory)
            # TensorBoard reads files in the order of their names, so the time is first. The last
            # part makes the names of files unique that a run creates within one second.
            process = f"{socket.gethostname()}.{os.getpid()}"
            name = f"events.out.tfevents.{int(time.time())}.{process}.{time.monotonic_ns()}"
            self._file = RecordWriter(str(directory / name))
            self._add(file_version="brain.Event:2")
            if step:  # makes TensorBoard drop later steps in older files
                self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self._flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one event per value, and flush the file from time to time."""
        with writing(self._directory):
            for name, value in values.items():
                tag = _NOT_IN_TAGS.sub("_", name)
                self._add(
                    step=step,
                    summary=Summary(value=[Summary.Value(tag=tag, simple_value=float(value))]),
                )
            if time.monotonic() > self._flushed + _FLUSH_SECONDS:
                self._flush()

    def _add(self, **fields: Any) -> None:
        self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        with writing(self._directory):
            self._flush()
            self._file.close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError of the body to a WorkdirError whose message contains `path`.

    The message of an OSError does not always contain the path.
    """
    try:
        yield
    except FileNotFoundError:  # a file to be read is missing; its message contains the path
        raise
    except OSError as error:
        raise WorkdirError(
            f"{path}: cannot be written: {error}. Checkpoints are unchanged. Free up disk space or "
            "fix the problem above, then rerun."
        ) from error

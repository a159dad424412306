"""Metrics of a run to metrics.csv and TensorBoard; rows after the step that a run resumes from are dropped."""

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

from mlip_jax.workdir import WorkdirError, atomic_open

_POSITION = ("step", "epoch", "seconds", "learning_rate", "beta")
_RATES = ("structures_per_second", "atoms_per_second", "edges_per_second", "input_share", "checkpoint_share", "mfu")
# Characters that TensorBoard does not allow in the tag of a series.
_NOT_IN_TAGS = re.compile(r"[^-/\w.]")
# Between two times that TensorBoard's file is brought to the disk.
_FLUSH_SECONDS = 30.0


def columns(of_objective: Sequence[str]) -> tuple[str, ...]:
    """Of metrics.csv, for an objective with these columns."""
    return (*_POSITION, *(f"{part}_{name}" for part in ("train", "valid") for name in of_objective), *_RATES)


class Recorder:
    """Writes rows of metrics with `columns`, in the order of steps.

    Raises:
      WorkdirError: From any method, if a file cannot be written.
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
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            # a row that a killed run left half-written has too few fields
            return [row for row in csv.DictReader(file) if row.get("step", "").isdigit() and None not in row.values()]

    def write(self, row: dict[str, float]) -> None:
        """Append one row; columns that are not in it stay empty."""
        with writing(self.path), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(
                {k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})
        # NaN where the data have no such label
        self._board.write(int(row["step"]), {k: v for k, v in row.items() if k != "step" and np.isfinite(v)})

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self._board.close()


class _Board:
    """Event file of TensorBoard, written by the calling thread.

    tensorboardX.SummaryWriter writes in a thread of its own, which dies when the disk is full; its caller then waits
    for ever. The writers of clu require TensorFlow or PyTorch; that of TensorBoard requires a web server and gRPC.
    """

    def __init__(self, directory: Path, step: int):
        self._directory = directory
        with writing(directory):
            directory.mkdir(exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names: the time comes first, and the last
            # part tells files apart that a run begins within one second.
            self._file = RecordWriter(str(directory / (
                f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}")))
            self._add(file_version="brain.Event:2")
            if step:  # TensorBoard drops the later steps of older files
                self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self._flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        with writing(self._directory):
            for name, value in values.items():
                tag = _NOT_IN_TAGS.sub("_", name)
                self._add(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=float(value))]))
            if time.monotonic() > self._flushed + _FLUSH_SECONDS:
                self._flush()

    def _add(self, **fields: Any) -> None:
        self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with writing(self._directory):
            self._flush()
            self._file.close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises WorkdirError that names `path` where the body cannot write: what the system says does not always."""
    try:
        yield
    except FileNotFoundError:  # of one that is to be read; the system names it
        raise
    except OSError as error:
        raise WorkdirError(f"{path}: cannot be written: {error}. Checkpoints are untouched; free some space, or mend "
                           "what is named here, and start again") from error

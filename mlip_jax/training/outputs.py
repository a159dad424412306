"""Checkpoint and metric files of a training run. Only the leader process writes them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlip_jax import distributed
from mlip_jax.checkpoint import CheckpointStore, Restored
from mlip_jax.potential import BEST
from mlip_jax.training.recorder import Recorder

LATEST = "checkpoints"


def restore(workdir: Path, kind: str = LATEST) -> Restored | None:
    """Return the newest checkpoint of a run, or None if there is none.

    The leader reads it and sends it to all processes.
    """
    checkpoint = None
    if distributed.leader() and (workdir / kind).is_dir():
        store = CheckpointStore(workdir / kind, read_only=True)
        checkpoint = store.restore()
        store.close()
    if distributed.count() == 1:
        return checkpoint
    header = distributed.broadcast(
        None if checkpoint is None else {"step": checkpoint.step, "metadata": checkpoint.metadata}
    )
    arrays = distributed.broadcast({} if checkpoint is None else checkpoint.arrays)
    return None if header is None else Restored(header["step"], arrays, header["metadata"])


class TrainingOutputs:
    """Writer of checkpoints, in the background of the training, and of metrics.

    Args:
      workdir: Directory of the run.
      active: Whether to write. If False, all methods do nothing.
      columns: Columns of the metrics.

    Raises:
      CheckpointError: Raised by any method if a file cannot be written, or if an earlier write in
        the background has failed.
    """

    def __init__(self, workdir: Path, active: bool, columns: Sequence[str]):
        self._workdir, self._active, self._recorder, self._columns = workdir, active, None, columns
        if active:
            self._latest = CheckpointStore(workdir / LATEST, keep=2)
            self._best = CheckpointStore(workdir / BEST, keep=2)
            self._best_step = max(self._best.steps(), default=0)

    def begin(self, step: int) -> None:
        """Begin to record metrics after `step`. Rows of later steps are dropped."""
        if self._active:
            self._close_recorder()
            self._recorder = Recorder(self._workdir, step, self._columns)

    def write(self, row: dict[str, float]) -> None:
        """Append a row of metrics."""
        if self._active:
            self._recorder.write(row)

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Begin to write a checkpoint to resume from. The arrays of `tree` must not change."""
        if self._active:
            # a resumed run must find the best checkpoint that `metadata` refers to
            self._best.wait()
            self._latest.save_in_background(step, tree, metadata)

    def save_best(self, step: int, params: Any, metadata: dict[str, Any]) -> None:
        """Begin to write the best checkpoint, which force fields are loaded from.

        It contains only the averaged parameters. After a rollback, best checkpoints of later steps
        are removed, because a force field is loaded from the newest one.
        """
        if not self._active:
            return
        self._best.save_in_background(step, {"params": params}, metadata)
        if step < self._best_step:
            self._best.wait()
            for later in self._best.steps():
                if later > step:
                    shutil.rmtree(self._best.directory / str(later))
        self._best_step = step

    def check(self) -> None:
        """Raise the error of a finished write that has failed, without waiting for other writes."""
        if self._active:
            for store in (self._latest, self._best):
                if not store.busy:
                    store.wait()

    def wait(self) -> None:
        """Wait until all checkpoints are written."""
        if self._active:
            self._latest.wait()
            self._best.wait()

    def close(self) -> None:
        """Wait until all files are written, and close them."""
        if self._active:
            with contextlib.ExitStack() as stack:  # an error in one close does not skip the others
                stack.callback(self._best.close)
                stack.callback(self._latest.close)
                self._close_recorder()

    def _close_recorder(self) -> None:
        """Close the recorder of metrics, if there is one."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

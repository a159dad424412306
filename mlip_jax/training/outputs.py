"""What a run writes while it trains: checkpoints and metrics. One process of a run writes, the others nothing."""

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
    """The newest checkpoint of a run, the same for all processes: the leader reads it. None if there is none."""
    found = None
    if distributed.leader() and (workdir / kind).is_dir():
        store = CheckpointStore(workdir / kind, read_only=True)
        found = store.restore()
        store.close()
    if distributed.count() == 1:
        return found
    about = distributed.broadcast(None if found is None else {"step": found.step, "metadata": found.metadata})
    arrays = distributed.broadcast({} if found is None else found.arrays)
    return None if about is None else Restored(about["step"], arrays, about["metadata"])


class TrainingOutputs:
    """Writes beside the training; with `active` False, nothing. `columns`: of the metrics.

    Raises:
      CheckpointError: From any method, if something cannot be written or could not be.
    """

    def __init__(self, workdir: Path, active: bool, columns: Sequence[str]):
        self._workdir, self._active, self._recorder, self._columns = workdir, active, None, columns
        if active:
            self._latest = CheckpointStore(workdir / LATEST, keep=2)
            self._best = CheckpointStore(workdir / BEST, keep=2)
            self._best_step = max(self._best.steps(), default=0)

    def begin(self, step: int) -> None:
        """Metrics go on after `step`; what was recorded of later ones is dropped."""
        if self._active:
            self._close_recorder()
            self._recorder = Recorder(self._workdir, step, self._columns)

    def write(self, row: dict[str, float]) -> None:
        """Append a row of metrics."""
        if self._active:
            self._recorder.write(row)

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Begin to write a checkpoint to go on from. Nobody may change the arrays of `tree` any more."""
        if self._active:
            self._best.wait()  # a run that goes on from here must find the best that `metadata` tells of
            self._latest.save_in_background(step, tree, metadata)

    def save_best(self, step: int, params: Any, metadata: dict[str, Any]) -> None:
        """Begin to write the checkpoint that a force field is loaded from: the averaged parameters alone.

        Those of later steps, from before the run went back, are removed: the newest one is what is loaded.
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
        """Learn of an error in what has been written by now, without waiting for what has not."""
        if self._active:
            for store in (self._latest, self._best):
                if not store.busy:
                    store.wait()

    def wait(self) -> None:
        """Until all is written."""
        if self._active:
            self._latest.wait()
            self._best.wait()

    def close(self) -> None:
        """Wait, and give everything back."""
        if self._active:
            with contextlib.ExitStack() as stack:  # what cannot be closed keeps nothing else open
                stack.callback(self._best.close)
                stack.callback(self._latest.close)
                self._close_recorder()

    def _close_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

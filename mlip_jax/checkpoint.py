"""Checkpoints of arrays and JSON metadata, written atomically by orbax."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import shutil
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mlip_jax import limits
from mlip_jax.files import check_regular_files, make_subfolder

log = logging.getLogger(__name__)

_REPLACED = ".replaced"
_UNFINISHED = ocp.utils.TMP_DIR_SUFFIX  # orbax writes <step><suffix> and renames it to <step>
_WRITING = threading.Lock()  # one save at a time: orbax numbers saves in one counter of the process


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written, or does not fit the model."""


class Restored(NamedTuple):
    """Content of a checkpoint.

    Attributes:
      step: Step of the checkpoint.
      arrays: Arrays by path in the pytree.
      metadata: Metadata, as read from JSON.
    """

    step: int
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


def to_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a pytree by path, on the host."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))
    return {_path(path): np.asarray(leaf) for path, leaf in leaves}


def from_arrays(template: Any, arrays: dict[str, np.ndarray], prefix: str = "") -> Any:
    """Return a pytree like `template` with the leaves under `prefix` in `arrays`.

    Raises:
      CheckpointError: Leaves are missing, left over, or have another shape. The message lists all
        of them.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    stored = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    expected = {_path(path): leaf for path, leaf in leaves}
    problems = [f"missing: {k} {np.shape(v)}" for k, v in expected.items() if k not in stored]
    problems += [
        f"not in the model: {k} {np.shape(v)}" for k, v in stored.items() if k not in expected
    ]
    problems += [
        f"{k}: stored {np.shape(stored[k])}, expected {np.shape(v)}"
        for k, v in expected.items()
        if k in stored and np.shape(stored[k]) != np.shape(v)
    ]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(structure, [stored[k] for k in expected])


def _path(path) -> str:
    """Format a path of jax.tree_util: "params/embedding/kernel"."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


class CheckpointStore:
    """Directory of checkpoints of one kind; only the newest are kept.

    A checkpoint is a folder named by its step, and is complete once it has that name. An older one
    is removed only after the newer one is on disk (fsync). With several processes, only process 0
    writes. Every process may read on its own. No method waits for another process. A store must be
    used by a single thread.

    Close a store (`contextlib.closing`) before the interpreter exits. At its exit, the interpreter
    shuts down the thread pools that orbax writes in. A save in progress then fails, and the error
    is logged.

    Args:
      directory: Directory of the checkpoints. It is created if missing, unless `read_only` is set.
      keep: Maximum number of checkpoints to keep.
      read_only: Whether the store is only for reading.

    Attributes:
      directory: Absolute path of the directory.
      keep: Maximum number of checkpoints. Those that `restore` found corrupted are removed first.

    Raises:
      CheckpointError: `read_only` is set and the directory does not exist, or `read_only` is not
        set and this is not process 0.
    """

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False):
        self.directory = Path(directory).absolute()
        self.keep, self._read_only = keep, read_only
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: contains no checkpoints")
        if not read_only and jax.process_index() != 0:
            raise CheckpointError(
                f"{self.directory}: opened for writing by process {jax.process_index()} of "
                f"{jax.process_count()}, but only process 0 writes. Open it with read_only=True."
            )
        self._corrupted: set[int] = set()
        self._pending: Future | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._orbax = _checkpointer()
        if not read_only:
            make_subfolder(self.directory)
            self._recover()
            self._worker.submit(int)  # starts the thread, which would delay the first save

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending. Waits for a save in progress."""
        if self._pending is not None:
            wait([self._pending])  # its error is left for a later call to raise
        return self._steps()

    def _steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, including those that are being replaced."""
        names = {p.name.removesuffix(_REPLACED) for p in self.directory.iterdir() if p.is_dir()}
        return sorted(int(name) for name in names if name.isdecimal())

    @property
    def busy(self) -> bool:
        """Return whether a save in the background is in progress."""
        return self._pending is not None and not self._pending.done()

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Write a checkpoint, replacing one of the same step. On return it is on disk.

        Args:
          step: Step of the checkpoint.
          tree: Pytree of arrays, on the host or on devices of this process.
          metadata: Metadata that JSON can represent.

        Raises:
          CheckpointError: The checkpoint cannot be written (disk full, no permission); older ones
            are unchanged. Or an earlier save in the background failed, and this one is not started.
        """
        self._before_saving()
        self._write(int(step), tree, json.loads(json.dumps(metadata)))

    def save_in_background(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Write a checkpoint like `save`, but in the background.

        The thread of the store waits for the arrays, fetches them and writes them. If another save
        is in progress, this method first waits for it.

        Args:
          step: Step of the checkpoint.
          tree: Pytree as for `save`. It is not copied: its arrays must not be changed or donated
            before `wait`.
          metadata: Metadata that JSON can represent. It is copied before this method returns.

        Raises:
          CheckpointError: The previous save in the background failed, and this one is not started.
            An error of this save is raised once, by the next call of `save`, `save_in_background`,
            `wait` or `close`.
        """
        self._before_saving()
        self._pending = self._worker.submit(
            self._write, int(step), tree, json.loads(json.dumps(metadata))
        )
        _unfinished_stores.add(self)

    def _before_saving(self) -> None:
        """Check that the store is writable, and wait for a save in progress."""
        if self._read_only:
            raise CheckpointError(
                f"{self.directory}: opened with read_only=True. Open it without to save."
            )
        self.wait()

    def wait(self) -> None:
        """Block until the save in the background is on disk.

        Raises:
          CheckpointError: It could not be written. Older checkpoints are unchanged.
        """
        if self._pending is None:
            return
        error = self._pending.exception()
        self._pending = None
        _unfinished_stores.discard(self)
        if error is not None:
            raise error

    def _write(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Write a checkpoint to disk and remove old ones. On an error, restore the replaced one."""
        aside, written = None, False
        try:
            arrays = to_arrays(tree)
            metadata = {**metadata, "step": step}
            metadata["checksum"] = _checksum(arrays, metadata)
            self._remove_unfinished()
            aside = self._put_aside(step)
            with _WRITING:
                self._orbax.save(
                    self.directory / str(step),
                    args=ocp.args.Composite(
                        arrays=ocp.args.StandardSave(arrays), metadata=ocp.args.JsonSave(metadata)
                    ),
                )
            _sync(self.directory / str(step))
            written = True
        except Exception as error:  # a full disk raises various types, and devices may fail as well
            reason = str(error).partition(" [tensorstore_spec")[0]  # without a page of settings
            raise CheckpointError(
                f"{self.directory}: checkpoint of step {step} cannot be written: {reason}. Older "
                "checkpoints are unchanged. Free up disk space or fix the problem, then rerun."
            ) from error
        finally:
            if not written:
                self._put_back(aside)
                self._remove_unfinished()
        self._remove_old(step, aside)

    def _put_aside(self, step: int) -> Path | None:
        """Rename an existing checkpoint of `step` until its successor is written.

        Returns the new path, or None if there is no such checkpoint.
        """
        folder, aside = self.directory / str(step), self.directory / f"{step}{_REPLACED}"
        if not folder.exists():
            return None
        if aside.exists():  # it had been replaced, but could not be removed
            shutil.rmtree(aside)
        return folder.rename(aside)

    @staticmethod
    def _put_back(aside: Path | None) -> None:
        """Undo `_put_aside`."""
        if aside is not None:
            folder = aside.with_name(aside.name.removesuffix(_REPLACED))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)

    def _recover(self) -> None:
        """Clean up after a run that ended while replacing a checkpoint."""
        for aside in self.directory.glob(f"*{_REPLACED}"):
            folder = aside.with_name(aside.name.removesuffix(_REPLACED))
            shutil.rmtree(aside) if folder.exists() else aside.rename(folder)

    def _remove_unfinished(self) -> None:
        """Remove the temporary folders of saves that did not finish."""
        for folder in self.directory.glob(f"*{_UNFINISHED}"):
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)

    def _remove_old(self, step: int, aside: Path | None) -> None:
        """Remove all checkpoints but the newest `keep`, those known to be corrupted first.

        The one of `step`, which was just written, is always kept.
        """
        self._corrupted.discard(step)
        ranked = sorted(self._steps(), key=lambda s: (s == step, s not in self._corrupted, s))
        old = [self.directory / str(s) for s in ranked[: -self.keep]]
        for folder in [*old, *([aside] if aside else [])]:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                log.warning("%s: old checkpoint cannot be removed, delete it: %s", folder, error)

    def restore(self) -> Restored | None:
        """Return the newest intact checkpoint, or None if there are no checkpoints.

        Waits for a save in progress. Corrupted checkpoints are skipped with a warning.

        Raises:
          CheckpointError: There are checkpoints, but all are corrupted.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read_step(step)
            except Exception as error:  # orbax raises various types for a corrupted file
                self._corrupted.add(step)
                log.warning(
                    "%s/%d: corrupted checkpoint (%s: %s); trying the previous one",
                    self.directory,
                    step,
                    type(error).__name__,
                    str(error)[:200],
                )
        if steps:
            raise CheckpointError(
                f"{self.directory}: all checkpoints are corrupted, steps {steps}. Restore one from "
                "a backup, or choose another --workdir."
            )
        return None

    def read_step(self, step: int) -> Restored:
        """Read a checkpoint and verify its checksum."""
        folder = self.directory / str(step)
        if not folder.exists():  # a run is replacing it, or ended while replacing it
            folder = self.directory / f"{step}{_REPLACED}"
        check_regular_files(folder)
        _check_expansion(folder, self._orbax)
        restored = self._orbax.restore(
            folder,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(), metadata=ocp.args.JsonRestore()
            ),
        )
        arrays = {k: np.asarray(v) for k, v in restored["arrays"].items()}
        metadata = restored["metadata"]
        if metadata.pop("checksum", None) != _checksum(arrays, metadata):
            raise CheckpointError("the checksum does not match")
        return Restored(step, arrays, metadata)

    def close(self) -> None:
        """Wait for a save in progress, and release the thread and the resources of orbax.

        Raises:
          CheckpointError: The save in the background failed, as for `wait`.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()


def _checkpointer() -> ocp.Checkpointer:
    """Return a checkpointer for this process only, which never waits for other processes."""
    index = jax.process_index()
    this_process = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=this_process,
            # Otherwise, if a folder cannot be created, threads wait for ten minutes and the process
            # cannot end.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        ),
        arrays=ocp.StandardCheckpointHandler(multiprocessing_options=this_process),
        metadata=ocp.JsonCheckpointHandler(multiprocessing_options=this_process),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=this_process)


def _check_expansion(folder: Path, checkpointer: ocp.Checkpointer) -> None:
    """Raise CheckpointError if arrays, such as zeros, are far larger than the files of a checkpoint."""
    described = checkpointer.metadata(folder)
    arrays = getattr(described, "item_metadata", described)["arrays"]
    leaves = jax.tree.leaves(getattr(arrays, "tree", arrays))
    size = sum(math.prod(each.shape) * np.dtype(each.dtype).itemsize for each in leaves)
    stored = sum(path.stat().st_size for path in folder.rglob("*"))
    limits.check_expansion(size, stored, folder, CheckpointError)


def _sync(folder: Path) -> None:
    """Flush a folder, its content and its name to disk (fsync). Orbax flushes only the arrays."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> int:
    """Compute the CRC-32 of the metadata and the arrays."""
    total = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for key in sorted(arrays):
        # A view of bytes, because some dtypes (bfloat16) have no buffer interface. A copy would
        # keep other threads from running.
        content = np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8)
        total = zlib.crc32(content, zlib.crc32(key.encode(), total))
    return total


_unfinished_stores: set[CheckpointStore] = set()


@atexit.register
def _log_lost_saves() -> None:
    """Log the errors of saves in the background that no call has raised."""
    for store in list(_unfinished_stores):
        try:
            store.wait()
        except CheckpointError as error:  # at shutdown there is no caller to raise to
            log.error("%s", error)

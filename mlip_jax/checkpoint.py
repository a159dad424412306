"""Checkpoints: arrays and JSON metadata, written atomically by orbax; a damaged one gives way to the one before."""

from __future__ import annotations

import atexit
import json
import logging
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

log = logging.getLogger(__name__)

_REPLACED = ".replaced"
_UNFINISHED = ocp.utils.TMP_DIR_SUFFIX  # orbax writes <step><suffix> and renames it to <step>
_WRITING = threading.Lock()  # orbax numbers its saves in one counter of the process: one at a time


class CheckpointError(RuntimeError):
    """No checkpoint can be read or written, or it does not fit what it is to be loaded into."""


class Restored(NamedTuple):
    """What a checkpoint holds: the arrays by path, and the metadata."""

    step: int
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]


def to_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of a pytree by their path, on the host."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))
    return {_path(path): np.asarray(leaf) for path, leaf in leaves}


def from_arrays(template: Any, arrays: dict[str, np.ndarray], prefix: str = "") -> Any:
    """A pytree like `template` with the leaves that stand under `prefix` in `arrays`.

    Raises:
      CheckpointError: Leaves are missing, left over, or of another shape; all of them are named.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    found = {k[len(prefix):]: v for k, v in arrays.items() if k.startswith(prefix)}
    wanted = {_path(path): leaf for path, leaf in leaves}
    problems = [f"missing: {k} {np.shape(v)}" for k, v in wanted.items() if k not in found]
    problems += [f"not in the model: {k} {np.shape(v)}" for k, v in found.items() if k not in wanted]
    problems += [f"{k}: stored {np.shape(found[k])}, expected {np.shape(v)}"
                 for k, v in wanted.items() if k in found and np.shape(found[k]) != np.shape(v)]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(structure, [found[k] for k in wanted])


def _path(path) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


class CheckpointStore:
    """The checkpoints of one kind in one directory, the newest `keep` of them.

    A checkpoint is a folder named by its step, complete as soon as it has that name. An older one is removed only
    after the newer one is on the disk (fsync). With several processes, process 0 alone writes; each process may
    read for itself. Nothing here waits for another process. Methods are for one thread, the caller's.

    Close a store (`contextlib.closing`) before the interpreter exits, which shuts down the thread pools that orbax
    writes in: a save in the background that is still under way then fails, and the error is logged.

    Attributes:
      directory: Made if it is missing, unless `read_only`.
      keep: How many stay. Those found damaged by `restore` go before whole ones.

    Raises:
      CheckpointError: `read_only` and there is no such directory; or another process than 0 would write.
    """

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False):
        self.directory = Path(directory).absolute()
        self.keep, self._read_only = keep, read_only
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no checkpoints there")
        if not read_only and jax.process_index() != 0:
            raise CheckpointError(f"{self.directory}: process {jax.process_index()} of {jax.process_count()} would "
                                  "write checkpoints, which process 0 alone does; open it with read_only=True")
        self._damaged: set[int] = set()
        self._pending: Future | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._orbax = _checkpointer()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._recover()
            self._worker.submit(int)  # starts the thread, which would hold up the first save

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; a save that is under way is waited for."""
        self._settle()
        return self._steps()

    def _steps(self) -> list[int]:
        names = {p.name.removesuffix(_REPLACED) for p in self.directory.iterdir() if p.is_dir()}
        return sorted(int(name) for name in names if name.isdecimal())

    @property
    def busy(self) -> bool:
        """Whether a save in the background is still under way."""
        return self._pending is not None and not self._pending.done()

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Write a checkpoint; one of the same step is replaced. On return it is on the disk.

        Args:
          tree: Pytree of arrays, on the host or on devices of this process.
          metadata: What JSON can hold.

        Raises:
          CheckpointError: It cannot be written (disk full, no permission), and older ones are untouched; or the save
            in the background before it could not be, in which case this one is not begun.
        """
        self._before_saving()
        self._write(int(step), tree, _as_json(metadata))

    def save_in_background(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """As `save`, but returns at once; the arrays are waited for, fetched and written by the store's thread.

        One save at a time: one that is still under way is waited for first.

        Args:
          tree: As for `save`. It is not copied: nobody may change its arrays, or donate them, before `wait`.
          metadata: Copied before this returns.

        Raises:
          CheckpointError: The save in the background before this one failed; this one is not begun. What befalls
            this one is raised by the next call of `save`, `save_in_background`, `wait` or `close`, once.
        """
        self._before_saving()
        self._pending = self._worker.submit(self._write, int(step), tree, _as_json(metadata))
        _unfinished_stores.add(self)

    def _before_saving(self) -> None:
        if self._read_only:
            raise CheckpointError(f"{self.directory}: opened with read_only=True; open it without to save")
        self.wait()

    def wait(self) -> None:
        """Block until what was begun in the background is on the disk.

        Raises:
          CheckpointError: It could not be written; older checkpoints are untouched.
        """
        if self._pending is None:
            return
        error = self._pending.exception()
        self._pending = None
        _unfinished_stores.discard(self)
        if error is not None:
            raise error

    def _settle(self) -> None:
        """Wait, and leave an error for the call that raises it."""
        if self._pending is not None:
            wait([self._pending])

    def _write(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        aside, written = None, False
        try:
            arrays = to_arrays(tree)
            metadata = {**metadata, "step": step}
            metadata["checksum"] = _checksum(arrays, metadata)
            self._remove_unfinished()
            aside = self._put_aside(step)
            with _WRITING:
                self._orbax.save(self.directory / str(step), args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), metadata=ocp.args.JsonSave(metadata)))
            _sync(self.directory / str(step))
            written = True
        except Exception as error:  # a full disk comes as any of several types, and devices may fail as well
            raise CheckpointError(
                f"{self.directory}: checkpoint of step {step} cannot be written: {_short(error)}. Older checkpoints "
                "are untouched; free some space, or mend what is named here, and start again.") from error
        finally:
            if not written:
                self._put_back(aside)
                self._remove_unfinished()
        self._remove_old(step, aside)

    def _put_aside(self, step: int) -> Path | None:
        """Another name for the checkpoint of `step`, if there is one, until its successor is written."""
        place, aside = self.directory / str(step), self.directory / f"{step}{_REPLACED}"
        if not place.exists():
            return None
        if aside.exists():  # could not be removed when it had been replaced
            shutil.rmtree(aside)
        return place.rename(aside)

    @staticmethod
    def _put_back(aside: Path | None) -> None:
        if aside is not None:
            place = aside.with_name(aside.name.removesuffix(_REPLACED))
            shutil.rmtree(place, ignore_errors=True)
            aside.rename(place)

    def _recover(self) -> None:
        """Finish what a run left that ended while replacing a checkpoint."""
        for aside in self.directory.glob(f"*{_REPLACED}"):
            place = aside.with_name(aside.name.removesuffix(_REPLACED))
            shutil.rmtree(aside) if place.exists() else aside.rename(place)

    def _remove_unfinished(self) -> None:
        for folder in self.directory.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_old(self, step: int, aside: Path | None) -> None:
        """Remove all but the newest; those known to be damaged first, `step` (just written) never."""
        self._damaged.discard(step)
        ranked = sorted(self._steps(), key=lambda s: (s == step, s not in self._damaged, s))
        old = [self.directory / str(s) for s in ranked[:-self.keep]] + ([] if aside is None else [aside])
        for folder in old:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                log.warning("%s: the old checkpoint cannot be removed (%s); it takes up space", folder, error)

    def restore(self) -> Restored | None:
        """The newest checkpoint that is whole; None if there is none at all. A save that is under way is waited for.

        Raises:
          CheckpointError: There are checkpoints but every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._read(step)
            except Exception as error:  # whatever orbax meets in a damaged file
                self._damaged.add(step)
                log.warning("checkpoint %s/%d is damaged (%s: %s); trying the one before it",
                            self.directory, step, type(error).__name__, str(error)[:200])
        if steps:
            raise CheckpointError(f"{self.directory}: none of the checkpoints {steps} can be read")
        return None

    def _read(self, step: int) -> Restored:
        folder = self.directory / str(step)
        if not folder.exists():  # a run ended while replacing it, or is at it
            folder = self.directory / f"{step}{_REPLACED}"
        restored = self._orbax.restore(folder, args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore(), metadata=ocp.args.JsonRestore()))
        arrays = {k: np.asarray(v) for k, v in restored["arrays"].items()}
        metadata = restored["metadata"]
        if metadata.pop("checksum", None) != _checksum(arrays, metadata):
            raise CheckpointError("checksum does not match")
        return Restored(step, arrays, metadata)

    def close(self) -> None:
        """Wait for the save under way, and release the thread and orbax's resources.

        Raises:
          CheckpointError: As `wait`.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()


def _checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone: it waits for no other, though there be some."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=alone,
            # else folders that cannot be made keep threads waiting for ten minutes, and the process from its end
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)),
        arrays=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        metadata=ocp.JsonCheckpointHandler(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _sync(folder: Path) -> None:
    """Have `folder`, all that is in it and its name on the disk. Orbax does so for arrays alone, not for metadata."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _as_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy as it will be read back (tuples are lists)."""
    return json.loads(json.dumps(metadata))


def _short(error: BaseException) -> str:
    """What tensorstore says, without the page of its settings."""
    return str(error).partition(" [tensorstore_spec")[0]


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> int:
    total = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for key in sorted(arrays):
        # as bytes, because not every type (bfloat16) has a buffer; a copy would keep other threads from running
        content = np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8)
        total = zlib.crc32(content, zlib.crc32(key.encode(), total))
    return total


_unfinished_stores: set[CheckpointStore] = set()


@atexit.register
def _log_lost_saves() -> None:
    """Log the saves in the background that failed and that nobody waited for."""
    for store in list(_unfinished_stores):
        try:
            store.wait()
        except CheckpointError as error:  # at shutdown there is no caller to raise to
            log.error("%s", error)

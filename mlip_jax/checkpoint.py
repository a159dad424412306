"""Checkpoints: arrays and JSON metadata, written atomically by orbax; a damaged one gives way to the one before."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

log = logging.getLogger(__name__)

_REPLACED = ".replaced"


class CheckpointError(RuntimeError):
    """No checkpoint can be read, or it does not fit what it is to be loaded into."""


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

    Attributes:
      directory: Made if it is missing, unless `read_only`.
    """

    def __init__(self, directory: str | Path, keep: int = 2, read_only: bool = False):
        self.directory = Path(directory).absolute()
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no checkpoints there")
        for aside in () if read_only else self.directory.glob(f"*{_REPLACED}"):  # a run ended while replacing
            place = aside.with_name(aside.name.removesuffix(_REPLACED))
            shutil.rmtree(aside) if place.exists() else aside.rename(place)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, create=not read_only, read_only=read_only,
            enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Write a checkpoint; one of the same step is replaced.

        Raises:
          CheckpointError: It cannot be written (disk full, no permission); older ones are untouched.
        """
        arrays = to_arrays(tree)
        metadata = {**metadata, "step": int(step)}
        metadata["checksum"] = _checksum(arrays, metadata)
        replaced = self._put_aside(step)
        try:
            self._manager.save(step, args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), metadata=ocp.args.JsonSave(metadata)), force=True)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            self._put_back(replaced)
            raise CheckpointError(f"{self.directory}: checkpoint of step {step} cannot be written: {error}. Older "
                                  "checkpoints are untouched; free some space and start again.") from error
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)

    def _put_aside(self, step: int) -> Path | None:
        """Another name for the checkpoint of `step`, if there is one, until its successor is written."""
        if step not in self._manager.all_steps():
            return None
        aside = self.directory / f"{step}{_REPLACED}"
        (self.directory / str(step)).rename(aside)
        self._manager.reload()
        return aside

    def _put_back(self, aside: Path | None) -> None:
        if aside is not None:
            place = aside.with_name(aside.name.removesuffix(_REPLACED))
            shutil.rmtree(place, ignore_errors=True)
            aside.rename(place)
            self._manager.reload()

    def restore(self) -> Restored | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Raises:
          CheckpointError: There are checkpoints but every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._read(step)
            except Exception as error:  # whatever orbax meets in a damaged file
                log.warning("checkpoint %s/%d is damaged (%s: %s); trying the one before it",
                            self.directory, step, type(error).__name__, str(error)[:200])
        if steps:
            raise CheckpointError(f"{self.directory}: none of the checkpoints {steps} can be read")
        return None

    def _read(self, step: int) -> Restored:
        restored = self._manager.restore(step, args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore(), metadata=ocp.args.JsonRestore()))
        arrays = {k: np.asarray(v) for k, v in restored["arrays"].items()}
        metadata = restored["metadata"]
        if metadata.pop("checksum", None) != _checksum(arrays, metadata):
            raise CheckpointError("checksum does not match")
        return Restored(step, arrays, metadata)

    def close(self) -> None:
        """Release orbax's resources."""
        self._manager.close()


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> int:
    # through JSON once, so that what is written and what is read back are the same
    total = zlib.crc32(json.dumps(json.loads(json.dumps(metadata)), sort_keys=True).encode())
    for key in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[key]).tobytes(), zlib.crc32(key.encode(), total))
    return total

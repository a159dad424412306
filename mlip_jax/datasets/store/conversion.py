"""Conversion of a data file to a store (store.py), in parallel and resumable.

1. Plan the record range of each shard and save the plan as conversion.json.
2. Convert the first shard and check units and signs.
3. Convert the other shards in worker processes. Each has metadata in a JSON file of the same name.
4. Write the index and the manifest (finalize.py).

A shard contains a fixed range of records, so its bytes depend only on the source and the settings:
neither the number of processes nor interruptions change them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich import progress as bars

from mlip_jax import workers
from mlip_jax.datasets.isolation.files import is_large_native
from mlip_jax.datasets.quality import checks
from mlip_jax.datasets.quality.diagnosis import diagnose
from mlip_jax.datasets.quality.problems import EARLY
from mlip_jax.datasets.reader import DatasetError, Reader
from mlip_jax.datasets.store.conversion_plan import ConversionSpec, make_plan
from mlip_jax.datasets.store.finalize import (
    FinishedShard,
    finalize,
    reject_if_invalid,
    with_options,
)
from mlip_jax.datasets.store.shard_conversion import ShardJob, convert_shard
from mlip_jax.datasets.store.shards import checksum
from mlip_jax.datasets.store.store import MANIFEST, is_store, read_manifest
from mlip_jax.files import open_lock
from mlip_jax.workdir import WorkdirError

log = logging.getLogger(__name__)


def convert(
    spec: ConversionSpec,
    folder: str | Path,
    *,
    num_processes: int | None = None,
    reject_invalid: bool = True,
    confirm_units: bool = False,
    progress: bool = True,
) -> Path:
    """Convert a source to a store, or resume an interrupted conversion, and return the folder.

    Args:
      spec: Source and settings.
      folder: Folder of the store. An intact finished store is returned unchanged; corrupted or
        missing shards are rebuilt.
      num_processes: Number of worker processes; None for one per core.
      reject_invalid: Whether to raise if the checks (checks.py) find errors. Otherwise they are
        only recorded in the manifest, as warnings are; the user of the store logs them.
      confirm_units: Whether the user has confirmed the units (data.confirm_units).
      progress: Whether to show a progress bar.

    Raises:
      ConfigError: Unknown reader or option.
      DatasetError: The source cannot be read, is rejected by the checks or has changed since the
        conversion started, or the folder cannot be written. Finished shards are kept.
    """
    folder = Path(folder)
    if spec.dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', received {spec.dtype!r}")
    with spec.open() as source:
        spec = dataclasses.replace(spec, reader=source.format)
        try:
            with lock_folder(folder):
                plan = make_plan(spec, source, folder)
                if is_store(folder) and not _is_corrupted(folder):
                    return folder
                (folder / MANIFEST).unlink(missing_ok=True)
                jobs = [
                    ShardJob(spec, folder, number, *bounds)
                    for number, bounds in enumerate(plan["ranges"])
                ]
                check_first = (
                    functools.partial(_check_first_shard, jobs, source, confirm_units)
                    if reject_invalid
                    else lambda: None
                )
                _convert_missing(
                    [job for job in jobs if not job.is_done()],
                    source,
                    plan["records"],
                    num_processes=1 if source.sequential else num_processes,
                    progress=progress,
                    after_first=check_first,
                )
                shards = [
                    FinishedShard(
                        job.shard, {k: v for k, v in job.read_metadata().items() if k != "removed"}
                    )
                    for job in jobs
                ]
                removed = (entry for job in jobs for entry in job.read_metadata()["removed"])
                finalize(
                    folder,
                    source,
                    plan["recipe"],
                    num_records=plan["records"],
                    shards=shards,
                    removed=removed,
                    reject_invalid=reject_invalid,
                    confirm_units=confirm_units,
                )
                return folder
        except (OSError, WorkdirError) as error:
            raise DatasetError(
                f"{folder}: cannot write the store ({error}). Fix the problem and rerun. Finished "
                "shards are kept."
            ) from error


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other conversions. The lock ends with the process, even on a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / ".conversion.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is converting the source; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert_missing(
    jobs: list[ShardJob],
    source: Reader,
    num_records: int,
    *,
    num_processes: int | None,
    progress: bool,
    after_first: Callable[[], None],
) -> None:
    """Convert the missing shards in ascending order, and call `after_first` after the first one."""
    if not jobs:
        return
    bar = bars.Progress(
        bars.TextColumn("converting"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("records"),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        disable=not progress,
    )
    with bar:
        completed = num_records - sum(job.stop - job.start for job in jobs)
        task = bar.add_task("", total=num_records, completed=completed)
        # Convert one shard first: most errors of a source already occur in its first records.
        convert_shards = _convert_isolated if _is_isolated(source) else _convert_here
        try:
            for job in convert_shards(jobs, num_processes, source):
                bar.update(task, advance=job.stop - job.start)
                if job is jobs[0]:
                    after_first()
        except BrokenProcessPool as error:
            raise _death(jobs) from error


def _is_isolated(source: Reader) -> bool:
    """Return whether only worker processes read a source, because it might crash its parser."""
    return any(file.is_file() and is_large_native(file) for file in source.files())


def _convert_here(
    jobs: list[ShardJob], num_processes: int | None, source: Reader
) -> Iterator[ShardJob]:
    """Convert shards, the first one in this process. Yield each finished one."""
    in_this_process = functools.partial(convert_shard, source=source)
    in_this_process(jobs[0])
    yield jobs[0]
    function = in_this_process if num_processes == 1 else convert_shard
    for index, _ in workers.run(function, jobs[1:], num_processes, local=True):
        yield jobs[1 + index]


def _convert_isolated(
    jobs: list[ShardJob], num_processes: int | None, source: Reader
) -> Iterator[ShardJob]:
    """Convert all shards in worker processes. Yield each finished one."""
    for index, _ in workers.run(
        convert_shard, jobs, num_processes, single_inline=False, first_alone=True, local=True
    ):
        yield jobs[index]


def _death(jobs: list[ShardJob]) -> DatasetError:
    """Return the error of a worker process that died: the first shard that ends its process."""
    for job in [job for job in jobs if not job.is_done()][: workers.available_cores()]:
        try:
            list(workers.run(convert_shard, [job], 1, single_inline=False, local=True))
        except BrokenProcessPool:
            return DatasetError(
                f"{job.spec.path}: a process that read the records {job.start} to {job.stop - 1} "
                "crashed, or took too long. The file is corrupted; download it again or recreate "
                "it. Or the memory is too small; reduce the number of processes."
            )
    return DatasetError(
        f"{jobs[0].spec.path}: a process that read the file ended. Is the memory too small? Rerun "
        "to continue. Finished shards are kept."
    )


def _check_first_shard(jobs: list[ShardJob], source: Reader, confirm_units: bool) -> None:
    """Check units and signs, for which the first shard suffices.

    A resumed conversion may start with a later shard. The check still uses the first one, so that
    the diagnosis of a source does not depend on interruptions.
    """
    problems = diagnose(checks.Findings.from_json(jobs[0].read_metadata()["findings"]))
    early = with_options([p for p in problems if p.what in EARLY], source)
    reject_if_invalid(early, jobs[0].spec.path, confirm_units)


def _is_corrupted(folder: Path) -> bool:
    """Return whether a finished store has a corrupted manifest or a missing or corrupted shard."""
    try:
        shards = read_manifest(folder)["shards"]
        checksums = {folder / "shards" / s["file"]: s["sha256"] for s in shards}
    except (DatasetError, KeyError, TypeError):
        log.warning("%s is corrupted; rebuilding it", folder / MANIFEST)
        return True
    for file, expected in checksums.items():
        if not file.is_file() or checksum(file) != expected:
            log.warning("%s is corrupted; rebuilding it", file)
            return True
    return False

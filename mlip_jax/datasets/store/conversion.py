"""Conversion of a data file to a store (store.py), in parallel and resumable.

1. Plan the record range of each shard and save the plan as conversion.json.
2. Convert the first shard and check units and signs.
3. Convert the other shards in worker processes. Each has metadata in a JSON file of the same name.
4. Write the index and the manifest (finalize.py).

A shard contains a fixed range of records, so its bytes depend only on the source and the settings:
neither the number of processes nor interruptions change them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress as bars

from mlip_jax import workers
from mlip_jax.config import differences
from mlip_jax.datasets import readers
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.identity import stable_ids
from mlip_jax.datasets.quality import checks, geometry
from mlip_jax.datasets.quality.diagnosis import EARLY, diagnose
from mlip_jax.datasets.quality.filters import Filters, force_rms_per_structure, identities
from mlip_jax.datasets.reader import DatasetError, Reader, ReadReport
from mlip_jax.datasets.store.finalize import FinishedShard, finalize, refuse_if
from mlip_jax.datasets.store.shards import checksum, encode, write_shard
from mlip_jax.datasets.store.store import MANIFEST, VERSION, Store, is_store
from mlip_jax.workdir import WorkdirError, write_json

log = logging.getLogger(__name__)

_BLOCK = 2048  # maximum number of structures in memory as Python objects
_SAMPLE = 32  # number of records that are read to estimate the record size of a source
_MOST_RECORDS = 65_536  # maximum number of records per shard, even if the sampled ones are small
# With at most _FEW_FILES files, the first and last _END bytes of each are part of the identity.
_FEW_FILES, _END = 64, 2**20


@dataclasses.dataclass(frozen=True)
class ConversionSpec:
    """Settings that determine the content of a store.

    Attributes:
      path: Path of the source.
      reader: Name of the reader, or "auto" to detect the format.
      options: Options of the reader.
      filters: Fields of Filters.
      dtype: Data type of positions, forces and atom properties, "float32" or "float64".
      atoms_per_shard: Approximate number of atoms per shard.
    """

    path: str
    reader: str = "auto"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    filters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"require": "none"})
    dtype: str = "float32"
    atoms_per_shard: int = 1_000_000

    def open(self) -> Reader:
        """Open the source."""
        return readers.open_data(self.path, self.reader, **self.options)


def convert(
    recipe: ConversionSpec,
    folder: str | Path,
    *,
    num_processes: int | None = None,
    refuse: bool = True,
    progress: bool = True,
) -> Path:
    """Convert a source to a store, or resume an interrupted conversion, and return the folder.

    Args:
      recipe: Source and settings.
      folder: Folder of the store. An intact finished store is returned unchanged; corrupted or
        missing shards are rebuilt.
      num_processes: Number of worker processes; None for one per core.
      refuse: Whether to raise if the checks (checks.py) find errors. Otherwise they are logged as
        warnings.
      progress: Whether to show a progress bar.

    Raises:
      ConfigError: Unknown reader or option.
      DatasetError: The source cannot be read, is rejected by the checks or has changed since the
        conversion started, or the folder cannot be written. Finished shards are kept.
    """
    folder = Path(folder)
    if recipe.dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', received {recipe.dtype!r}")
    with recipe.open() as source:
        recipe = dataclasses.replace(recipe, reader=source.format)
        try:
            with _locked(folder):
                plan = _plan(recipe, source, folder)
                if is_store(folder) and not _damaged(folder):
                    return folder
                (folder / MANIFEST).unlink(missing_ok=True)
                jobs = [
                    _Job(recipe, folder, number, *bounds)
                    for number, bounds in enumerate(plan["ranges"])
                ]
                waiting = [job for job in jobs if not job.is_done()]
                _run(
                    waiting,
                    source,
                    plan["records"],
                    1 if source.sequential else num_processes,
                    progress,
                    functools.partial(_judge_first, jobs) if refuse else lambda: None,
                )
                parts = [
                    FinishedShard(
                        job.shard, {k: v for k, v in job.tell().items() if k != "removed"}
                    )
                    for job in jobs
                ]
                finalize(
                    folder, source, plan["recipe"], plan["records"], parts, _removed(jobs), refuse
                )
                return folder
        except (OSError, WorkdirError) as error:
            raise DatasetError(
                f"{folder}: the store cannot be written ({error}). What is done stays; run it again "
                "when the cause is mended."
            ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other conversions. The lock ends with the process, even on a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".conversion.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is at this conversion; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _plan(recipe: ConversionSpec, source: Reader, folder: Path) -> dict[str, Any]:
    """Return the plan in conversion.json or create it. An existing plan must match the settings."""
    settings = {
        "recipe": json.loads(
            json.dumps(dataclasses.asdict(recipe) | {"path": Path(recipe.path).name})
        ),
        "source": identify(source),
        "version": VERSION,
    }
    path = folder / "conversion.json"
    if path.exists():
        try:
            plan = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{path}: is damaged ({error}). Give another folder, or delete that one."
            ) from error
        changed = differences({k: plan.get(k, {}) for k in settings}, settings)
        only_times = len(changed) == 1 and changed[0].startswith("source.modified:")
        if changed and not (only_times and _same_content(source, folder)):
            raise DatasetError(
                f"{folder} holds the conversion of another source or with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive another folder, or delete that one."
            )
        return plan
    if folder.exists() and any(p.suffix == ".safetensors" for p in folder.rglob("*")):
        raise DatasetError(f"{folder}: holds shards but no conversion.json; give another folder")
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    (folder / "index").mkdir(exist_ok=True)
    plan = settings | {"records": len(source), "ranges": _ranges(source, recipe.atoms_per_shard)}
    write_json(path, plan)
    return plan


def identify(source: Reader) -> dict[str, Any]:
    """Return the identity of the files of a source without reading them completely.

    It consists of names, sizes, modification times and, if the files are few, the first and last
    bytes of each.

    Raises:
      DatasetError: A file cannot be read.
    """
    files, digest, times, total = source.files(), hashlib.sha256(), hashlib.sha256(), 0
    try:
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            times.update(f"{path.stat().st_mtime_ns}\0".encode())
            total += size
            if len(files) <= _FEW_FILES:
                with open(path, "rb") as file:
                    digest.update(file.read(_END))
                    file.seek(max(size - _END, 0))
                    digest.update(file.read(_END))
    except OSError as error:
        raise DatasetError(f"{source.path}: cannot be read ({error})") from error
    return {
        "files": len(files),
        "bytes": total,
        "digest": digest.hexdigest()[:16],
        "modified": times.hexdigest()[:16],
    }


def _same_content(source: Reader, folder: Path) -> bool:
    """Return whether the files have the checksums of the finished store in `folder`.

    This allows for files that differ only in modification time.
    """
    if not is_store(folder):
        return False
    before = [
        (f["name"], f["bytes"], f["sha256"]) for f in Store(folder).manifest["source"]["files"]
    ]
    return before == [(f.name, f.stat().st_size, checksum(f)) for f in source.files()]


def _ranges(source: Reader, atoms_per_shard: int) -> list[tuple[int, int]]:
    """Return the record range of each shard, with about `atoms_per_shard` atoms each.

    The number of atoms per record is estimated from a sample; empty records are ignored.
    """
    count = len(source)
    places = (
        range(min(count, _SAMPLE))
        if source.sequential
        else np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)).tolist()
    )
    atoms = [sum(len(s) for s in source.read(range(r, r + 1), ReadReport())) for r in places]
    filled = [n for n in atoms if n] or [1]
    step = min(max(1, int(atoms_per_shard / np.mean(filled))), _MOST_RECORDS)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


@dataclasses.dataclass(frozen=True)
class _Job:
    """Conversion of the records start:stop to a shard, with metadata in a JSON file next to it."""

    recipe: ConversionSpec
    folder: Path
    number: int
    start: int
    stop: int

    @property
    def shard(self) -> Path:
        return self.folder / "shards" / f"{self.number:05d}.safetensors"

    @property
    def told(self) -> Path:
        return self.shard.with_suffix(".json")

    def is_done(self) -> bool:
        try:
            told = self.tell()
            return checksum(self.shard) == told["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def tell(self) -> dict[str, Any]:
        return json.loads(self.told.read_text())


def _run(
    waiting: list[_Job], source: Reader, records: int, num_processes, progress: bool, judge
) -> None:
    """Convert the missing shards in ascending order, and call `judge` after the first one."""
    if not waiting:
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
        task = bar.add_task(
            "", total=records, completed=records - sum(j.stop - j.start for j in waiting)
        )
        for first in (True, False):
            # Convert one shard first: most errors of a source already occur in its first records.
            part = waiting[:1] if first else waiting[1:]
            here = functools.partial(_convert, source=source)
            for index, _ in workers.run(
                here if first or num_processes == 1 else _convert,
                part,
                1 if first else num_processes,
            ):
                bar.update(task, advance=part[index].stop - part[index].start)
            if first:
                judge()


def _judge_first(jobs: list[_Job]) -> None:
    """Check units and signs on the first shard, which a part of the data suffices for.

    A resumed conversion may start with a later shard. The check still uses the first one, so that
    the diagnosis of a source does not depend on interruptions.
    """
    problems = diagnose(checks.Findings.from_json(jobs[0].tell()["findings"]))
    refuse_if([p for p in problems if p.what in EARLY], jobs[0].recipe.path)


@functools.lru_cache(maxsize=1)
def _opened(path, reader, options) -> Reader:
    return readers.open_data(path, reader, **dict(options))


def _convert(job: _Job, source: Reader | None = None) -> None:
    """Convert the records of one shard, and write the shard and its metadata."""
    recipe = job.recipe
    if source is None:
        source = _opened(
            recipe.path,
            recipe.reader,
            tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in recipe.options.items()),
        )
    report, filters = ReadReport(), Filters(**recipe.filters)
    blocks, removed, block = [], [], []

    def flush():
        columns = Columns.from_structures(block)
        block.clear()
        reasons = filters.reasons(columns)
        removed.extend(identities(columns, reasons))
        blocks.append(columns if not reasons.any() else columns.take(np.flatnonzero(reasons == 0)))

    try:
        for structure in source.read(range(job.start, job.stop), report):
            block.append(structure)
            if len(block) == _BLOCK:
                flush()
    except OSError as error:
        raise DatasetError(f"{recipe.path}: cannot be read ({error})") from error
    flush()
    columns = Columns.concatenate(blocks)
    shortest = geometry.shortest_distances(columns)
    findings = checks.examine(columns, shortest=shortest)
    arrays = encode(columns, np.dtype(recipe.dtype)) | _derived(columns, shortest)
    sha256 = write_shard(job.shard, arrays)
    write_json(
        job.told,
        {
            "totals": {
                "structures": len(columns),
                "atoms": len(columns.numbers),
                "read": report.structures,
            },
            "bytes": job.shard.stat().st_size,
            "sha256": sha256,
            "skipped": report.skipped,
            "filtered": dict(collections.Counter(reason for _, reason in removed)),
            "removed": [
                list(r)
                for r in (*removed, *((source, reason) for reason, source in report.identities))
            ],
            "periodic": columns.pbc is not None,
            "findings": findings.to_json(),
            "properties": {n: list(v.shape[1:]) for n, v in columns.properties.items()},
            "atom_properties": {n: list(v.shape[1:]) for n, v in columns.atom_properties.items()},
        },
    )


def _derived(columns: Columns, shortest: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of the index that are computed from the structures."""
    size = np.abs(columns.forces).max(1, initial=0.0) if len(columns.numbers) else np.zeros(0)
    filled = columns.n_atoms > 0
    max_force = np.full(len(columns), np.nan)
    if filled.any():
        max_force[filled] = np.maximum.reduceat(size, columns.offsets[:-1][filled])
    return {
        "index.molecule": stable_ids(columns.molecule),
        "index.max_force": max_force.astype(np.float32),
        "index.force_rms": force_rms_per_structure(columns).astype(np.float32),
        "index.shortest_distance": shortest.astype(np.float32),
        "index.fingerprint": geometry.fingerprints(columns),
    }


def _removed(jobs: list[_Job]) -> Iterator[list[str]]:
    for job in jobs:
        yield from job.tell()["removed"]


def _damaged(folder: Path) -> bool:
    """Return whether a finished store has a corrupted manifest or a missing or corrupted shard."""
    try:
        shards = json.loads((folder / MANIFEST).read_text())["shards"]
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged and is made anew", folder / MANIFEST)
        return True
    for s in shards:
        file = folder / "shards" / s["file"]
        if not file.is_file() or checksum(file) != s["sha256"]:
            log.warning("%s is damaged and is made anew", file)
            return True
    return False

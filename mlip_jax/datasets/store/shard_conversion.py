"""Conversion of a range of records to a shard, in a worker process."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import workers
from mlip_jax.datasets import readers
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.identity import stable_ids
from mlip_jax.datasets.quality import checks, geometry
from mlip_jax.datasets.quality.filters import Filters, force_rms_per_structure, identities
from mlip_jax.datasets.reader import DatasetError, Reader, ReadReport
from mlip_jax.datasets.store.conversion_plan import ConversionSpec
from mlip_jax.datasets.store.shards import checksum, encode, write_shard
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.structure import Structure
from mlip_jax.workdir import write_json

_SECONDS = 600.0  # limit for reading one structure, in worker processes
_TIMED, _TIMED_SECONDS = 256, 1.0  # structures, or time (s), between two starts of the timer
_BLOCK = 2048  # maximum number of structures in memory as Python objects


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Conversion of the records start:stop to a shard, with metadata in a JSON file next to it."""

    spec: ConversionSpec
    folder: Path
    number: int
    start: int
    stop: int

    @property
    def shard(self) -> Path:
        """Path of the shard."""
        return self.folder / "shards" / f"{self.number:05d}.safetensors"

    @property
    def metadata_path(self) -> Path:
        """Path of the JSON file with the metadata."""
        return self.shard.with_suffix(".json")

    def is_done(self) -> bool:
        """Return whether the shard exists and has the checksum in its metadata."""
        try:
            return checksum(self.shard) == self.read_metadata()["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def read_metadata(self) -> dict[str, Any]:
        """Return the metadata of the finished shard."""
        return parse_json(read_bytes(self.metadata_path))


@functools.lru_cache(maxsize=1)
def _open_cached(path, reader, options) -> Reader:
    """Open a source once per worker process."""
    return readers.open_data(path, reader, **dict(options))


def convert_shard(job: ShardJob, source: Reader | None = None) -> None:
    """Convert the records of one shard, and write the shard and its metadata."""
    spec = job.spec
    if source is None:
        source = _open_cached(
            spec.path,
            spec.reader,
            tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in spec.options.items()),
        )
    report, filters = ReadReport(), Filters(**spec.filters)
    blocks, removed, block = [], [], []

    def flush():
        """Filter the collected structures and append them as a block."""
        columns = Columns.from_structures(block)
        block.clear()
        reasons = filters.reasons(columns)
        removed.extend(identities(columns, reasons))
        blocks.append(columns if not reasons.any() else columns.take(np.flatnonzero(reasons == 0)))

    try:
        for structure in _with_time_limit(source.read(range(job.start, job.stop), report)):
            block.append(structure)
            if len(block) == _BLOCK:
                flush()
    except OSError as error:
        raise DatasetError(f"{spec.path}: cannot be read ({error})") from error
    flush()
    columns = Columns.concatenate(blocks)
    # Used by the checks and stored in the index.
    shortest = geometry.shortest_distances(columns)
    findings = checks.examine(columns, shortest=shortest)
    arrays = encode(columns, np.dtype(spec.dtype)) | _index_columns(columns, shortest)
    sha256 = write_shard(job.shard, arrays)
    write_json(
        job.metadata_path,
        {
            "totals": {
                "structures": len(columns),
                "atoms": len(columns.numbers),
                "read": report.structures,
            },
            "bytes": job.shard.stat().st_size,
            "sha256": sha256,
            "skipped": report.skipped,
            "unread": report.unread,
            "remarks": report.remarks,
            "filtered": dict(collections.Counter(reason for _, reason in removed)),
            "removed": [
                list(r)
                for r in (*removed, *((source, reason) for reason, source in report.identities))
            ],
            "periodic": columns.pbc is not None,
            "spin": columns.spin is not None,
            "findings": findings.to_json(),
            "properties": {n: list(v.shape[1:]) for n, v in columns.properties.items()},
            "atom_properties": {n: list(v.shape[1:]) for n, v in columns.atom_properties.items()},
        },
    )


def _with_time_limit(structures: Iterator[Structure]) -> Iterator[Structure]:
    """Yield structures. A worker process ends if one of them takes too long."""
    while True:
        with workers.time_limit(_SECONDS):
            block = list(_until(time.monotonic() + _TIMED_SECONDS, structures))
        if not block:
            return
        yield from block


def _until(end: float, structures: Iterator[Structure]) -> Iterator[Structure]:
    """Yield structures until a time of the monotonic clock, at least one and at most _TIMED."""
    for structure in itertools.islice(structures, _TIMED):
        yield structure
        if time.monotonic() > end:
            return


def _index_columns(columns: Columns, shortest: np.ndarray) -> dict[str, np.ndarray]:
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

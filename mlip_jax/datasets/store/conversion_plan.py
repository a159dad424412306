"""Settings of a conversion, and its plan: the range of records of each shard.

The plan is saved as conversion.json. It identifies the source, so that a conversion is resumed only
with the same source and settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.config import differences
from mlip_jax.datasets import readers
from mlip_jax.datasets.reader import DatasetError, Reader, ReadReport
from mlip_jax.datasets.store.shards import checksum
from mlip_jax.datasets.store.store import VERSION, Store, is_store
from mlip_jax.files import make_subfolder
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.workdir import write_json

_SAMPLE = 32  # number of records that are read to estimate the record size of a source
_MAX_RECORDS = 65_536  # maximum number of records per shard, even if the sampled ones are small
# With at most _MAX_HASHED_FILES files, the first and last _END bytes of each are part of the
# identity.
_MAX_HASHED_FILES, _END = 64, 2**20


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


def make_plan(spec: ConversionSpec, source: Reader, folder: Path) -> dict[str, Any]:
    """Return the plan in conversion.json or create it. An existing plan must match the settings."""
    settings = {
        "recipe": json.loads(json.dumps(dataclasses.asdict(spec) | {"path": Path(spec.path).name})),
        "source": identify(source),
        "version": VERSION,
    }
    path = folder / "conversion.json"
    if path.exists():
        try:
            plan = dict(parse_json(read_bytes(path)))
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{path}: is corrupted ({error}). Choose another folder, or delete this one."
            ) from error
        changed = differences({k: plan.get(k, {}) for k in settings}, settings)
        # A copied file has another modification time but the same content.
        only_times = len(changed) == 1 and changed[0].startswith("source.modified:")
        if changed and not (only_times and _same_content(source, folder)):
            raise DatasetError(
                f"{folder} contains a conversion of another source or with other settings:\n  "
                + "\n  ".join(changed)
                + "\nChoose another folder, or delete this one."
            )
        return plan
    if folder.exists() and any(p.suffix == ".safetensors" for p in folder.rglob("*")):
        raise DatasetError(
            f"{folder}: contains shards but no conversion.json. Choose another folder."
        )
    make_subfolder(folder / "shards")
    make_subfolder(folder / "index")
    plan = settings | {"records": len(source), "ranges": _ranges(source, spec.atoms_per_shard)}
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
            if len(files) <= _MAX_HASHED_FILES:
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
    sample = (
        range(min(count, _SAMPLE))
        if source.sequential
        else np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)).tolist()
    )
    atoms = [sum(len(s) for s in source.read(range(r, r + 1), ReadReport())) for r in sample]
    filled = [n for n in atoms if n] or [1]
    step = min(max(1, int(atoms_per_shard / np.mean(filled))), _MAX_RECORDS)
    return [(start, min(start + step, count)) for start in range(0, count, step)]

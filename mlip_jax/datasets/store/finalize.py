"""Last stage of a conversion: turn a folder of shards into a store.

1. Combine the findings of all shards, and raise if the checks of the data find errors.
2. Apply the filters that compare all conformations of a molecule.
3. Write the index and the list of removed structures.
4. Write the manifest, which marks the store as finished.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.identity import group
from mlip_jax.datasets.quality import checks
from mlip_jax.datasets.quality.diagnosis import Problem, diagnose
from mlip_jax.datasets.quality.filters import REASONS, Filters, count_reasons
from mlip_jax.datasets.reader import DatasetError, Reader
from mlip_jax.datasets.store.shards import Shard, checksum
from mlip_jax.datasets.store.store import FORMAT, INDEX, MANIFEST, VERSION
from mlip_jax.workdir import atomic_open, write_json

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FinishedShard:
    """A finished shard.

    Attributes:
      shard: Path of the shard.
      told: Metadata from its conversion, without the list of removed structures.
    """

    shard: Path
    told: Mapping[str, Any]


def finalize(
    folder: Path,
    source: Reader,
    settings: Mapping[str, Any],
    num_records: int,
    parts: list[FinishedShard],
    removed: Iterable[Iterable[str]],
    refuse: bool,
) -> None:
    """Write the index and the manifest of a store whose shards are finished.

    Args:
      folder: Folder of the store.
      source: Open reader of the source.
      settings: Fields of the ConversionSpec.
      num_records: Number of records in the source.
      parts: All shards in order.
      removed: (structure, reason) of everything that was skipped or removed before the shards were
        written.
      refuse: Whether to raise if the checks find errors.

    Raises:
      DatasetError: The checks reject the data, or no structure is left.
      OSError: The folder cannot be written.
    """
    total, skipped, filtered = (
        _sum(p.told[k] for p in parts) for k in ("totals", "skipped", "filtered")
    )
    if not total["structures"]:
        raise DatasetError(
            f"{source.path}: no structure is left of {total['read']} read (left out: "
            f"{filtered or 'none'}; skipped: {skipped or 'none'}). Change the filters."
        )
    findings = checks.combine(checks.Findings.from_json(p.told["findings"]) for p in parts)
    duplicates, _ = checks.count_duplicates(_gather(parts, "fingerprint"))
    problems = diagnose(findings, duplicates=duplicates)
    if refuse:
        refuse_if(problems, source.path)
    reasons = _outliers(settings["filters"], parts)
    kept = np.flatnonzero(reasons == 0) if reasons.any() else None
    if kept is not None and not len(kept):
        raise DatasetError(
            f"{source.path}: the filters leave no structure: {count_reasons(reasons)}"
        )
    molecules = _write_index(folder, source, parts, kept)
    _write_removed(folder / "removed.csv", removed, _identities(parts, reasons))
    official = source.official_split()
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "structures": total["structures"] if kept is None else len(kept),
            "molecules": molecules,
            "filtered": kept is not None,
            "periodic": any(p.told["periodic"] for p in parts),
            "source": _about(source, settings, num_records),
            "dtype": settings["dtype"],
            "units": {"positions": "Å", "energy": "eV", "forces": "eV/Å", "charge": "e"},
            "level_of_theory": source.level_of_theory,
            "notes": source.notes,
            "atom_energies": dict(source.atom_energies) if source.atom_energies else None,
            "official_split": sorted(official) if official else None,
            "counts": {
                "read": total["read"],
                "skipped": skipped,
                "removed": _sum([filtered, count_reasons(reasons)]),
            },
            "filters": settings["filters"],
            "properties": _union(p.told["properties"] for p in parts),
            "atom_properties": _union(p.told["atom_properties"] for p in parts),
            "findings": findings.to_json(),
            "problems": [p._asdict() for p in problems],
            "shards": [
                {
                    "file": p.shard.name,
                    **p.told["totals"],
                    "bytes": p.told["bytes"],
                    "sha256": p.told["sha256"],
                }
                for p in parts
            ],
        },
    )
    for problem in problems:
        log.warning("%s: %s", folder, problem.message)


def refuse_if(problems: list[Problem], path: Path | str) -> None:
    """Raise DatasetError if any of the problems is an error."""
    errors = [p.message for p in problems if p.severity == "error"]
    if errors:
        raise DatasetError(
            f"{path}: refused by the checks of the data:\n  - "
            + "\n  - ".join(errors)
            + "\nIf it is right all the same, give --config.data.refuse=False."
        )


def _about(source: Reader, settings, num_records: int) -> dict[str, Any]:
    files = source.files()
    log.info("checksums of %d source file(s)", len(files))
    return {
        "path": str(source.path),
        "reader": source.format,
        "options": settings["options"],
        "files": [
            {"name": f.name, "bytes": f.stat().st_size, "sha256": checksum(f)} for f in files
        ],
        "units": dict(source.UNITS),
        "records": num_records,
    }


def _gather(parts: list[FinishedShard], name: str) -> np.ndarray:
    """Concatenate a column of the index over all shards, (S,)."""
    values = np.empty(sum(p.told["totals"]["structures"] for p in parts), INDEX[name])
    start = 0
    for part in parts:
        arrays = Shard(part.shard).arrays
        here = (
            np.diff(arrays["offsets"])
            if name == "n_atoms"
            else arrays.get(name, arrays.get(f"index.{name}"))
        )
        values[start : start + len(here)] = here
        start += len(here)
    return values


def _outliers(filters: Mapping[str, Any], parts: list[FinishedShard]) -> np.ndarray:
    """Apply the filters that compare the conformations of a molecule.

    Returns the codes of the reasons for exclusion, (S,) int8; 0 to keep.
    """
    filters = Filters(**filters)
    if filters.compares_conformations:
        return filters.molecule_outliers(
            *(_gather(parts, n) for n in ("molecule", "energy", "force_rms", "n_atoms"))
        )
    return np.zeros(sum(p.told["totals"]["structures"] for p in parts), np.int8)


def _identities(parts: list[FinishedShard], reasons: np.ndarray) -> Iterable[tuple[str, str]]:
    start = 0
    for part in parts:
        count = part.told["totals"]["structures"]
        out = np.flatnonzero(reasons[start : start + count])
        if len(out):
            shard = Shard(part.shard)
            sources = shard.texts("source", shard.arrays["text.source.code"][out])
            for s, c, o in zip(sources, shard.arrays["conformer"][out], out):
                yield f"{s}#{c}", REASONS[reasons[start + o]]
        start += count


def _write_index(
    folder: Path, source: Reader, parts: list[FinishedShard], kept: np.ndarray | None
) -> int:
    """Write one file per index column, one column at a time, and return the number of molecules."""
    molecules = 0
    for name in INDEX:
        values = _gather(parts, name)
        values = values if kept is None else values[kept]
        if name == "molecule":
            molecules = group(values)[1]
        _save(folder, name, values)
    if kept is not None:
        _save(folder, "physical", kept)
    for name, records in (source.official_split() or {}).items():
        _save(folder, f"official_{name}", np.asarray(records, np.int64))
    return molecules


def _save(folder: Path, name: str, values: np.ndarray) -> None:
    with atomic_open(folder / "index" / f"{name}.npy") as file:
        np.save(file, values)


def _write_removed(path: Path, *removed: Iterable[Iterable[str]]) -> None:
    with atomic_open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["structure", "reason"])
        for rows in removed:
            writer.writerows(rows)


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _union(shapes: Iterable[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    return {name: shape for each in shapes for name, shape in each.items()}

"""Last stage of a conversion: turn a folder of shards into a store.

1. Combine the findings of all shards, and raise if the checks of the data find errors.
2. Apply the filters that compare all conformations of a molecule.
3. Write the index and the list of removed structures.
4. Write the manifest, which marks the store as finished.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.identity import AS_WRITTEN, group, method
from mlip_jax.datasets.options import as_flag
from mlip_jax.datasets.quality import checks
from mlip_jax.datasets.quality.diagnosis import diagnose
from mlip_jax.datasets.quality.filters import REASONS, Filters, count_reasons
from mlip_jax.datasets.quality.problems import UNCONFIRMED, Problem
from mlip_jax.datasets.reader import DatasetError, Reader, ReadReport
from mlip_jax.datasets.store.shards import Shard, checksum
from mlip_jax.datasets.store.store import FORMAT, INDEX, MANIFEST, VERSION
from mlip_jax.foreign_text import TableWriter
from mlip_jax.workdir import atomic_open, write_json

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FinishedShard:
    """A finished shard.

    Attributes:
      path: Path of the shard.
      metadata: Metadata from its conversion, without the list of removed structures.
    """

    path: Path
    metadata: Mapping[str, Any]


def finalize(
    folder: Path,
    source: Reader,
    settings: Mapping[str, Any],
    *,
    num_records: int,
    shards: list[FinishedShard],
    removed: Iterable[Iterable[str]],
    reject_invalid: bool,
    confirm_units: bool = False,
) -> None:
    """Write the index and the manifest of a store whose shards are finished.

    Args:
      folder: Folder of the store.
      source: Open reader of the source.
      settings: Fields of the ConversionSpec.
      num_records: Number of records in the source.
      shards: All shards in order.
      removed: (structure, reason) of everything that was skipped or removed before the shards were
        written.
      reject_invalid: Whether to raise if the checks find errors.
      confirm_units: Whether the user has confirmed the units, see `reject_if_invalid`.

    Raises:
      DatasetError: The checks reject the data, or no structure is left.
      OSError: The folder cannot be written.
    """
    total, skipped, filtered = (
        _sum_counts(s.metadata[k] for s in shards) for k in ("totals", "skipped", "filtered")
    )
    if not total["structures"]:
        raise DatasetError(
            f"{source.path}: all {total['read']} structures are excluded (filtered: "
            f"{filtered or 'none'}; skipped: {skipped or 'none'}). Change the filters."
        )
    findings = checks.combine(checks.Findings.from_json(s.metadata["findings"]) for s in shards)
    duplicates, _ = checks.count_duplicates(_gather(shards, "fingerprint"))
    problems = with_options(diagnose(findings, duplicates=duplicates), source)
    problems = with_unread_labels(problems, _report_notes(source, shards))
    if reject_invalid:
        reject_if_invalid(problems, source.path, confirm_units)
    reasons = _outliers(settings["filters"], shards)
    kept = np.flatnonzero(reasons == 0) if reasons.any() else None
    if kept is not None and not len(kept):
        raise DatasetError(
            f"{source.path}: the filters exclude all structures: {count_reasons(reasons)}"
        )
    molecules = _write_index(folder, source, shards, kept)
    _write_removed(folder / "removed.csv", removed, _excluded_structures(shards, reasons))
    official = source.official_split()
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "structures": total["structures"] if kept is None else len(kept),
            "molecules": molecules,
            "filtered": kept is not None,
            "periodic": any(s.metadata["periodic"] for s in shards),
            "spin": any(s.metadata.get("spin", False) for s in shards),
            "reads_stress": True,  # earlier versions did not, and stores cannot show it
            "source": _source_metadata(source, settings, num_records),
            "dtype": settings["dtype"],
            "units": {"positions": "Å", "energy": "eV", "forces": "eV/Å", "charge": "e"},
            "level_of_theory": source.level_of_theory,
            "molecule_identity": method(),
            "notes": [*source.notes, *_report_notes(source, shards)],
            "atom_energies": dict(source.atom_energies) if source.atom_energies else None,
            "official_split": sorted(official) if official else None,
            "counts": {
                "read": total["read"],
                "skipped": skipped,
                "removed": _sum_counts([filtered, count_reasons(reasons)]),
            },
            "filters": settings["filters"],
            "properties": _union(s.metadata["properties"] for s in shards),
            "atom_properties": _union(s.metadata["atom_properties"] for s in shards),
            "findings": findings.to_json(),
            "problems": [p._asdict() for p in problems],
            "shards": [
                {
                    "file": s.path.name,
                    **s.metadata["totals"],
                    "bytes": s.metadata["bytes"],
                    "sha256": s.metadata["sha256"],
                }
                for s in shards
            ],
        },
    )


def reject_if_invalid(
    problems: list[Problem], path: Path | str, confirm_units: bool = False
) -> None:
    """Raise DatasetError if any of the problems is an error.

    Args:
      problems: Problems that the checks found.
      path: Path of the data, for the message.
      confirm_units: Whether the user has confirmed the units, which answers the questions about
        them. Clear errors remain errors.
    """
    errors = [
        p.message
        for p in problems
        if p.severity == "error" and not (confirm_units and p.what == UNCONFIRMED)
    ]
    if errors:
        raise DatasetError(
            f"{path}: rejected by the data checks:\n  - "
            + "\n  - ".join(errors)
            + "\nIf the data are correct, set --config.data.reject_invalid=False."
        )


def with_options(problems: list[Problem], source: Reader) -> list[Problem]:
    """Return the problems, with the option of the reader that corrects each in its message."""
    return [
        p._replace(
            message=f"{p.message}. Set it, {as_flag(*source.PROBLEM_OPTIONS[p.what].split('='))}"
        )
        if p.what in source.PROBLEM_OPTIONS
        else p
        for p in problems
    ]


def with_unread_labels(problems: list[Problem], notes: list[str]) -> list[Problem]:
    """Return the problems, with the remarks on the data if they are rejected without labels."""
    return [
        p._replace(message="\n    ".join([f"{p.message}.", *notes]))
        if notes and (p.severity, p.what) == ("error", "no labels")
        else p
        for p in problems
    ]


def _report_notes(source: Reader, shards: list[FinishedShard]) -> list[str]:
    """Return the remarks on structures and unread labels of all shards.

    Shards of earlier versions have none.
    """
    notes = []
    if method() == AS_WRITTEN:
        notes.append(
            "RDKit is missing: molecules are identified by their SMILES as written, so one molecule "
            "can be in two splits. Install it, pip install 'mlip-flax[data]', and convert again"
        )
    return notes + ReadReport(
        unread=_sum_counts(s.metadata.get("unread", {}) for s in shards),
        remarks=_sum_counts(s.metadata.get("remarks", {}) for s in shards),
    ).notes(source)


def _source_metadata(source: Reader, settings, num_records: int) -> dict[str, Any]:
    """Return the description of the source for the manifest, with checksums of its files."""
    files = source.files()
    log.info("computing checksums of %d source files", len(files))
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


def _gather(shards: list[FinishedShard], name: str) -> np.ndarray:
    """Concatenate a column of the index over all shards, (S,)."""
    values = np.empty(sum(s.metadata["totals"]["structures"] for s in shards), INDEX[name])
    start = 0
    for shard in shards:
        arrays = Shard(shard.path).arrays
        column = (
            np.diff(arrays["offsets"])
            if name == "n_atoms"
            else arrays.get(name, arrays.get(f"index.{name}"))
        )
        values[start : start + len(column)] = column
        start += len(column)
    return values


def _outliers(filters: Mapping[str, Any], shards: list[FinishedShard]) -> np.ndarray:
    """Apply the filters that compare the conformations of a molecule.

    Returns the codes of the reasons for exclusion, (S,) int8; 0 to keep.
    """
    filters = Filters(**filters)
    if filters.compares_conformations:
        return filters.molecule_outliers(
            *(_gather(shards, n) for n in ("molecule", "energy", "force_rms", "n_atoms"))
        )
    return np.zeros(sum(s.metadata["totals"]["structures"] for s in shards), np.int8)


def _excluded_structures(
    shards: list[FinishedShard], reasons: np.ndarray
) -> Iterable[tuple[str, str]]:
    """Yield (structure, reason) for each structure excluded by filters over conformations."""
    start = 0
    for shard in shards:
        count = shard.metadata["totals"]["structures"]
        out = np.flatnonzero(reasons[start : start + count])
        if len(out):
            content = Shard(shard.path)
            sources = content.texts("source", content.arrays["text.source.code"][out])
            for s, c, o in zip(sources, content.arrays["conformer"][out], out):
                yield f"{s}#{c}", REASONS[reasons[start + o]]
        start += count


def _write_index(
    folder: Path, source: Reader, shards: list[FinishedShard], kept: np.ndarray | None
) -> int:
    """Write one file per index column, one column at a time, and return the number of molecules."""
    molecules = 0
    # One column at a time keeps the memory small.
    for name in INDEX:
        values = _gather(shards, name)
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
    """Write a column of the index atomically."""
    with atomic_open(folder / "index" / f"{name}.npy") as file:
        np.save(file, values)


def _write_removed(path: Path, *removed: Iterable[Iterable[str]]) -> None:
    """Write the CSV file of removed structures atomically."""
    with atomic_open(path, "w", newline="") as file:
        writer = TableWriter(file)
        writer.writerow(["structure", "reason"])
        for rows in removed:
            writer.writerows(rows)


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums of counts by name."""
    total: collections.Counter[str] = collections.Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _union(shapes: Iterable[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    """Return the union of the properties of all shards with their shapes."""
    return {name: shape for each in shapes for name, shape in each.items()}

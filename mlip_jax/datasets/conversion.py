"""From any readable source to a store (store.py): in shards, by several processes, resumable.

A shard holds a fixed range of the source's records, so that its bytes depend on the source and the settings alone:
neither on the number of processes nor on how often the conversion was killed.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress as bars

from mlip_jax import workers
from mlip_jax.datasets import checks, geometry, readers
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.filters import REASONS, Filters, force_rms_per_structure, identities
from mlip_jax.datasets.reader import DatasetError, Reader, ReadReport
from mlip_jax.datasets.shards import Shard, checksum, encode, write_shard
from mlip_jax.datasets.store import FORMAT, INDEX, MANIFEST, VERSION, is_store
from mlip_jax.datasets.subsets import stable_ids
from mlip_jax.datasets.verdict import verdict
from mlip_jax.workdir import WorkdirError, write_json

log = logging.getLogger(__name__)

_BLOCK = 2048  # structures that are held as objects at a time
_SAMPLE = 32  # records that tell how large the records of a source are


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the content of a store.

    Attributes:
      path: Of the source. reader: Its name. options: Of the reader.
      filters: Fields of Filters. dtype: Of positions, forces and atom properties, "float32" or "float64".
      atoms_per_shard: About.
    """

    path: str
    reader: str = "auto"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    filters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"require": "none"})
    dtype: str = "float32"
    atoms_per_shard: int = 1_000_000

    def open(self) -> Reader:
        """The source, open."""
        return readers.open_data(self.path, self.reader, **self.options)


def convert(recipe: Recipe, folder: str | Path, *, num_processes: int | None = None, refuse: bool = True,
            progress: bool = True) -> Path:
    """Make a store of a source, or go on where making it was stopped; returns its folder.

    Args:
      recipe: What to convert, and how.
      folder: Of the store. One that is finished already is returned as it is.
      num_processes: None for one per core.
      refuse: Stop when the checks (checks.py) find errors; else warn.
      progress: Show a progress bar.

    Raises:
      ConfigError: Unknown reader or option.
      DatasetError: The source cannot be read, is refused by the checks, has changed since the conversion was begun,
        or the folder cannot be written. What is done already stays.
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
                jobs = [_Job(recipe, folder, number, *bounds) for number, bounds in enumerate(plan["ranges"])]
                waiting = [job for job in jobs if not job.is_done()]
                _run(waiting, source, plan["records"], 1 if source.sequential else num_processes, progress,
                     functools.partial(_judge_first, jobs) if refuse else lambda: None)
                return _finish(recipe, source, plan, jobs, folder, refuse)
        except (OSError, WorkdirError) as error:
            raise DatasetError(f"{folder}: the store cannot be written ({error}). What is done stays; run it again "
                               "when the cause is mended.") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One conversion into a folder at a time; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".conversion.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is at this conversion; waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _plan(recipe: Recipe, source: Reader, folder: Path) -> dict[str, Any]:
    """What is to be done, as conversion.json says it; a plan that stands there already must be the same."""
    files = [{"name": f.name, "bytes": f.stat().st_size, "modified": f.stat().st_mtime_ns} for f in source.files()]
    settings = {"recipe": json.loads(json.dumps(dataclasses.asdict(recipe) | {"path": Path(recipe.path).name})),
                "files": files, "version": VERSION}
    path = folder / "conversion.json"
    if path.exists():
        try:
            plan = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise DatasetError(f"{path}: is damaged ({error}). Give another folder, or delete that one.") from error
        changed = [k for k in settings if plan.get(k) != settings[k]]
        if changed:
            raise DatasetError(f"{folder} holds the conversion of another source or with other settings ({changed[0]}: "
                               f"{plan.get(changed[0])} there, {settings[changed[0]]} now). Give another folder, or "
                               "delete that one.")
        return plan
    if folder.exists() and any(p.suffix == ".safetensors" for p in folder.rglob("*")):
        raise DatasetError(f"{folder}: holds shards but no conversion.json; give another folder")
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    (folder / "index").mkdir(exist_ok=True)
    plan = settings | {"records": len(source), "ranges": _ranges(source, recipe.atoms_per_shard)}
    write_json(path, plan)
    return plan


def _ranges(source: Reader, atoms_per_shard: int) -> list[tuple[int, int]]:
    """Records of each shard: as many as hold about `atoms_per_shard` atoms, judged by a few of them."""
    count = len(source)
    places = range(min(count, _SAMPLE)) if source.sequential else np.unique(
        np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)).tolist()
    atoms = sum(len(s) for r in places for s in source.read(range(r, r + 1), ReadReport()))
    step = max(1, int(atoms_per_shard / max(atoms / max(len(places), 1), 1)))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


@dataclasses.dataclass(frozen=True)
class _Job:
    """Records start:stop of the source into one shard, and what there was to say about it beside it as JSON."""

    recipe: Recipe
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
        except (OSError, ValueError, KeyError):
            return False

    def tell(self) -> dict[str, Any]:
        return json.loads(self.told.read_text())


def _run(waiting: list[_Job], source: Reader, records: int, num_processes, progress: bool, judge) -> None:
    """Make the shards that are waited for, ascending; `judge` is called when the first one is there."""
    if not waiting:
        return
    bar = bars.Progress(bars.TextColumn("converting"), bars.BarColumn(), bars.MofNCompleteColumn(),
                        bars.TextColumn("records"), bars.TimeElapsedColumn(), bars.TimeRemainingColumn(),
                        disable=not progress)
    with bar:
        task = bar.add_task("", total=records, completed=records - sum(j.stop - j.start for j in waiting))
        for first in (True, False):
            # One shard alone at first: what is wrong with a source is mostly wrong from its beginning on.
            part = waiting[:1] if first else waiting[1:]
            here = functools.partial(_convert, source=source)
            for index, _ in workers.run(here if first or num_processes == 1 else _convert, part,
                                        1 if first else num_processes):
                bar.update(task, advance=part[index].stop - part[index].start)
            if first:
                judge()


def _judge_first(jobs: list[_Job]) -> None:
    """Refuse by the first shard. A later one is not judged alone, though a killed conversion may go on with it: whether
    a source is refused must not depend on that."""
    told = jobs[0].tell()
    if told["structures"]:  # filters may leave none of this shard, and enough of others
        _refuse(verdict(checks.Findings.from_json(told["findings"])), jobs[0].recipe.path)


def _refuse(problems, path) -> None:
    errors = [p.message for p in problems if p.severity == "error"]
    if errors:
        raise DatasetError(f"{path}: refused by the checks of the data:\n  - " + "\n  - ".join(errors)
                           + "\nIf it is right all the same, give --config.data.refuse=False.")


@functools.lru_cache(maxsize=1)
def _opened(path, reader, options) -> Reader:
    return readers.open_data(path, reader, **dict(options))


def _convert(job: _Job, source: Reader | None = None) -> None:
    """Make one shard."""
    recipe = job.recipe
    if source is None:
        source = _opened(recipe.path, recipe.reader, tuple((k, tuple(v) if isinstance(v, list) else v)
                                                           for k, v in recipe.options.items()))
    report, filters = ReadReport(), Filters(**recipe.filters)
    blocks, removed, block = [], [], []

    def flush():
        columns = Columns.from_structures(block)
        block.clear()
        reasons = filters.reasons(columns)
        removed.extend(identities(columns, reasons))
        blocks.append(columns if not reasons.any() else columns.take(np.flatnonzero(reasons == 0)))

    for structure in source.read(range(job.start, job.stop), report):
        block.append(structure)
        if len(block) == _BLOCK:
            flush()
    flush()
    columns = Columns.concatenate(blocks)
    shortest = geometry.shortest_distances(columns)
    findings = checks.examine(columns, shortest=shortest)
    arrays = encode(columns, np.dtype(recipe.dtype)) | _derived(columns, shortest)
    sha256 = write_shard(job.shard, arrays)
    write_json(job.told, {
        "structures": len(columns), "atoms": len(columns.numbers), "bytes": job.shard.stat().st_size, "sha256": sha256,
        "records": report.records, "read": report.structures, "skipped": report.skipped,
        "removed": [list(r) for r in (*removed, *((source, reason) for reason, source in report.identities))],
        "periodic": columns.pbc is not None, "findings": findings.to_json(),
        "properties": {n: list(v.shape[1:]) for n, v in columns.properties.items()},
        "atom_properties": {n: list(v.shape[1:]) for n, v in columns.atom_properties.items()}})


def _derived(columns: Columns, shortest: np.ndarray) -> dict[str, np.ndarray]:
    """What the index has beyond the labels themselves."""
    size = np.abs(columns.forces).max(1, initial=0.0) if len(columns.numbers) else np.zeros(0)
    filled = columns.n_atoms > 0
    max_force = np.full(len(columns), np.nan)
    if filled.any():
        max_force[filled] = np.maximum.reduceat(size, columns.offsets[:-1][filled])
    return {"index.molecule": stable_ids(columns.molecule), "index.max_force": max_force.astype(np.float32),
            "index.force_rms": force_rms_per_structure(columns).astype(np.float32),
            "index.shortest_distance": shortest.astype(np.float32),
            "index.fingerprint": geometry.fingerprints(columns)}


def _finish(recipe: Recipe, source: Reader, plan, jobs: list[_Job], folder: Path, refuse: bool) -> Path:
    """Index, filters over all conformations of a molecule, verdict, manifest."""
    told = [job.tell() for job in jobs]
    total = sum(t["structures"] for t in told)
    removed = [r for t in told for r in t["removed"]]
    skipped = _sum(t["skipped"] for t in told)
    left_out = _sum(_count(t["removed"]) for t in told)
    if not total:
        raise DatasetError(f"{recipe.path}: no structure is left of {sum(t['read'] for t in told)} read (left out: "
                           f"{left_out or 'none'}). Change the filters.")
    findings = checks.combine([checks.Findings.from_json(t["findings"]) for t in told])
    index = {name: _gather(jobs, told, name) for name in INDEX}
    problems = verdict(findings, duplicates=checks.count_duplicates(index["fingerprint"])[0])
    if refuse:
        _refuse(problems, recipe.path)
    kept = _keep(recipe, index, jobs, told, removed)
    filtered = {reason: n - skipped.get(reason, 0) for reason, n in _count(removed).items()
                if n > skipped.get(reason, 0)}
    for name, values in index.items():
        _save_index(folder, name, values if kept is None else values[kept])
    if kept is not None:
        _save_index(folder, "physical", kept)
    official = source.official_split()
    for name, records in (official or {}).items():
        _save_index(folder, f"official_{name}", np.asarray(records, np.int64))
    _write_removed(folder / "removed.csv", removed)
    log.info("checksums of %d source file(s)", len(source.files()))
    write_json(folder / MANIFEST, {
        "format": FORMAT, "version": VERSION, "structures": total if kept is None else len(kept),
        "molecules": int(len(np.unique(index["molecule"] if kept is None else index["molecule"][kept]))),
        "filtered": kept is not None, "periodic": any(t["periodic"] for t in told),
        "source": {"path": recipe.path, "reader": recipe.reader, "options": plan["recipe"]["options"],
                   "files": [{"name": f.name, "bytes": f.stat().st_size, "sha256": checksum(f)}
                             for f in source.files()], "units": dict(source.UNITS), "records": plan["records"]},
        "units": {"positions": "Å", "energy": "eV", "forces": "eV/Å", "charge": "e"}, "dtype": recipe.dtype,
        "level_of_theory": source.level_of_theory, "notes": source.notes,
        "atom_energies": dict(source.atom_energies) if source.atom_energies else None,
        "official_split": sorted(official) if official else None,
        "counts": {"read": sum(t["read"] for t in told), "skipped": skipped, "removed": filtered},
        "filters": plan["recipe"]["filters"],
        "properties": _union(t["properties"] for t in told),
        "atom_properties": _union(t["atom_properties"] for t in told),
        "findings": findings.to_json(), "problems": [p._asdict() for p in problems],
        "shards": [{"file": job.shard.name} | {k: t[k] for k in ("structures", "atoms", "bytes", "sha256")}
                   for job, t in zip(jobs, told)]})
    for problem in problems:
        log.warning("%s: %s", folder, problem.message)
    return folder


def _gather(jobs, told, name) -> np.ndarray:
    """A column of the index over all shards."""
    values = np.empty(sum(t["structures"] for t in told), INDEX[name])
    start = 0
    for job in jobs:
        arrays = Shard(job.shard).arrays
        part = np.diff(arrays["offsets"]) if name == "n_atoms" else arrays.get(name, arrays.get(f"index.{name}"))
        values[start:start + len(part)] = part
        start += len(part)
    return values


def _keep(recipe: Recipe, index, jobs, told, removed) -> np.ndarray | None:
    """Numbers of the structures that pass the filters which look at more than one; None if all do."""
    reasons = Filters(**recipe.filters).molecule_outliers(index["molecule"], index["energy"], index["force_rms"],
                                                          index["n_atoms"])
    if not reasons.any():
        return None
    start = 0
    for job, t in zip(jobs, told):
        out = np.flatnonzero(reasons[start:start + t["structures"]])
        if len(out):
            shard = Shard(job.shard)
            sources = shard.texts("source", shard.arrays["text.source.code"][out])
            removed.extend([f"{s}#{c}", REASONS[reasons[start + o]]]
                           for s, c, o in zip(sources, shard.arrays["conformer"][out], out))
        start += t["structures"]
    kept = np.flatnonzero(reasons == 0)
    if not len(kept):
        raise DatasetError(f"{recipe.path}: the filters leave no structure ({_count(removed)})")
    return kept


def _save_index(folder: Path, name: str, values: np.ndarray) -> None:
    path = folder / "index" / f"{name}.npy"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_removed(path: Path, removed) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["structure", "reason"])
        writer.writerows(removed)
    os.replace(temporary, path)


def _damaged(folder: Path) -> bool:
    """Whether a finished store has a damaged manifest, lacks a shard or has one of another checksum; it is then
    mended."""
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


def _count(removed) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, reason in removed:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _sum(counts) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for reason, count in each.items():
            total[reason] = total.get(reason, 0) + count
    return total


def _union(shapes) -> dict[str, list[int]]:
    return {name: shape for each in shapes for name, shape in each.items()}

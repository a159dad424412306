"""Store: any number of structures on disk, read by random access in a bounded amount of memory.

    manifest.json             source, checksums, units, level of theory, counts, filters, findings
                              of the checks, list of shards
    shards/00000.safetensors  structures in the order of the source (shards.py)
    shards/00000.json         metadata from the conversion of that shard
    index/NAME.npy            one value per structure, for splits, filters and batch plans
    removed.csv               identity of each skipped or removed structure, and the reason

Stores are written by conversion.py. The manifest is written last, so a folder without a manifest is
not a finished store.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError, check_regular
from mlip_jax.datasets.store.shards import Shard, checksum
from mlip_jax.files import NUMPY_ERRORS
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.structure import Structure

MANIFEST = "manifest.json"
FORMAT, VERSION = "mlip_jax store", 1
# Data types of the index columns, each (S,). Units are eV and Å; unknown values are NaN.
INDEX = {
    "n_atoms": np.int32,
    "energy": np.float64,
    "charge": np.float32,
    "molecule": np.uint64,
    "record": np.int64,
    "conformer": np.int32,
    "max_force": np.float32,
    "force_rms": np.float32,
    "shortest_distance": np.float32,
    "fingerprint": np.uint64,
}
_OPEN_SHARDS = 256


def is_store(path: str | Path) -> bool:
    """Return whether a folder contains a finished store."""
    return (Path(path) / MANIFEST).is_file()


class Store:
    """A store, open for reading.

    Structures are numbered from 0. Structures that filters removed have no number.

    Attributes:
      path: Folder of the store.
      manifest: Content of manifest.json.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        sizes = [s["structures"] for s in self.manifest["shards"]]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, Shard] = collections.OrderedDict()
        self._index: dict[str, np.ndarray] = {}
        physical = self.path / "index" / "physical.npy"
        self._physical = _load_index(physical) if self.manifest["filtered"] else None
        for s in self.manifest["shards"]:
            file = self.path / "shards" / s["file"]
            if not file.is_file() or file.stat().st_size != s["bytes"]:
                state = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
                raise DatasetError(
                    f"{file}: {state}, expected {s['bytes']} bytes. Convert the source again into "
                    "this folder; only missing or corrupted files are rebuilt."
                )

    def __len__(self) -> int:
        return self.manifest["structures"]

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.__init__(state["path"])

    @property
    def _has_spin(self) -> bool:
        """Whether any structure has unpaired electrons. All columns then contain spins."""
        return self.manifest.get("spin", False)

    @property
    def level_of_theory(self) -> str:
        """Level of theory of the labels."""
        return self.manifest["level_of_theory"]

    def digest(self) -> str:
        """Return a hash of the structures, 12 hexadecimal digits, for names of cached arrays."""
        # Filters that compare several structures remove them only from the index, not from the
        # shards, so the checksums of the shards are not enough.
        content = json.dumps(
            [[s["sha256"] for s in self.manifest["shards"]], self.manifest["filters"], len(self)]
        )
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def index(self, name: str) -> np.ndarray:
        """Return a column of the index, (S,), as a memory map. The names are the keys of INDEX.

        The column "molecule" is a hash of the name of the molecule (identity.stable_ids).
        """
        if name not in self._index:
            self._index[name] = _load_index(self.path / "index" / f"{name}.npy")
        return self._index[name]

    def official_split(self) -> dict[str, np.ndarray] | None:
        """Return the record numbers of the splits that the data set comes with, or None."""
        names = self.manifest["official_split"]
        return (
            {n: _load_index(self.path / "index" / f"official_{n}.npy") for n in names}
            if names
            else None
        )

    def take(self, indices: np.ndarray, *, labels_only: bool = False) -> Columns:
        """Return the structures `indices`, in that order.

        If `labels_only`, texts and properties are not read.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"{self.path}: structures are numbered 0 to {len(self) - 1}; requested "
                f"{indices.min()} to {indices.max()}"
            )
        physical = indices if self._physical is None else np.asarray(self._physical[indices])
        # Shard of each structure, and the number of its first structure, both (S,).
        where = np.searchsorted(self._ends, physical, side="right")
        first = np.concatenate([[0], self._ends])[where]
        if labels_only:
            return self._labels(indices, where, physical - first)
        # Read each run of consecutive structures in one shard at once.
        order = np.argsort(physical, kind="stable")
        parts = []
        cuts = np.flatnonzero((np.diff(where[order]) != 0) | (np.diff(physical[order]) != 1)) + 1
        for run in np.split(order, cuts):
            if len(run):
                start = int(physical[run[0]] - first[run[0]])
                parts.append(self._shard(where[run[0]]).columns(start, start + len(run)))
        joined = Columns.concatenate(parts) if len(parts) > 1 else [*parts, _NOTHING][0]
        # Cells and spins do not depend on the shards, so that all batches have the same arrays.
        num = len(joined)
        if self.manifest["periodic"] and joined.cell is None:
            cell, pbc = np.zeros((num, 3, 3)), np.zeros((num, 3), bool)
            joined = dataclasses.replace(joined, cell=cell, pbc=pbc)
        if self._has_spin and joined.spin is None:
            joined = dataclasses.replace(joined, spin=np.zeros(num))
        return (
            joined
            if (order == np.arange(len(order))).all()
            else joined.take(np.argsort(order, kind="stable"))
        )

    def __getitem__(self, s: int) -> Structure:
        return self.take(np.array([s]))[0]

    def chunks(
        self, indices: np.ndarray | None = None, size: int = 4096, *, labels_only: bool = False
    ) -> Iterator[tuple[np.ndarray, Columns]]:
        """Yield (indices, columns) in blocks of `size` structures; None yields all structures."""
        count = len(self) if indices is None else len(indices)
        for start in range(0, count, size):
            block = (
                np.arange(start, min(start + size, count))
                if indices is None
                else indices[start : start + size]
            )
            yield block, self.take(block, labels_only=labels_only)

    def texts(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return a text column ("molecule", "smiles", "subset" or "source") as codes and texts.

        Structure s has the text texts[codes[s]], with codes (S,) int32. The texts are distinct.
        """
        table: dict[str, int] = {}
        codes = np.empty(int(self._ends[-1]) if len(self._ends) else 0, np.int32)
        start = 0
        for number in range(len(self._ends)):
            shard = self._shard(number)
            code = shard.arrays[f"text.{name}.code"]
            distinct = shard.texts(name, np.arange(int(code.max(initial=-1)) + 1)).tolist()
            # Map the codes of the shard to codes of the whole store.
            code_of = np.array([table.setdefault(text, len(table)) for text in distinct], np.int32)
            codes[start : start + len(code)] = code_of[code]
            start += len(code)
        return codes if self._physical is None else codes[self._physical], list(table)

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
          DatasetError: Some shards are corrupted. The message lists all of them.
        """
        corrupted = [
            s["file"]
            for s in self.manifest["shards"]
            if checksum(self.path / "shards" / s["file"]) != s["sha256"]
        ]
        if corrupted:
            raise DatasetError(
                f"{self.path}: {len(corrupted)} of {len(self.manifest['shards'])} shards differ "
                f"from their checksums: {', '.join(corrupted)}. Convert the source again into this "
                "folder; only the corrupted shards are rebuilt."
            )

    def _labels(self, indices, where, local) -> Columns:
        """Return columns without texts and properties, read from the index and in small pieces."""
        n = len(indices)
        counts = np.asarray(self.index("n_atoms")[indices], np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        numbers = np.empty(offsets[-1], np.int32)
        positions, forces = np.empty((offsets[-1], 3)), np.full((offsets[-1], 3), np.nan)
        periodic = self.manifest["periodic"]
        cell, pbc = (np.zeros((n, 3, 3)), np.zeros((n, 3), bool)) if periodic else (None, None)
        spin = np.zeros(n) if self._has_spin else None
        for i, (w, s) in enumerate(zip(where.tolist(), local.tolist())):
            shard = self._shard(w)
            a = int(shard.rows("offsets", s, s + 1)[0])  # first atom within the shard
            rows, b = slice(offsets[i], offsets[i + 1]), a + int(counts[i])
            numbers[rows] = shard.rows("numbers", a, b)
            positions[rows] = shard.rows("positions", a, b)
            if "forces" in shard.arrays:
                forces[rows] = shard.rows("forces", a, b)
            if "cell" in shard.arrays:
                cell[i], pbc[i] = shard.rows("cell", s, s + 1)[0], shard.rows("pbc", s, s + 1)[0]
            if "spin" in shard.arrays:
                spin[i] = shard.rows("spin", s, s + 1)[0]
        empty = np.full(n, "", object)
        return Columns(
            numbers,
            positions,
            forces,
            offsets,
            np.array(self.index("energy")[indices]),
            np.asarray(self.index("charge")[indices], np.float64),
            empty,
            empty,
            np.asarray(self.index("conformer")[indices], np.int64),
            np.array(self.index("record")[indices]),
            empty,
            empty,
            cell,
            pbc,
            spin,
        )

    def _shard(self, number: int) -> Shard:
        """Return an open shard and close the least recently used one if too many are open."""
        with self._lock:  # batches are built in a thread while another reads for validation
            shard = self._open.get(number)
            if shard is None:
                shard = Shard(self.path / "shards" / self.manifest["shards"][number]["file"])
                self._open[number] = shard
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return shard


_NOTHING = Columns.from_structures([])


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest. Raise DatasetError if it is missing, corrupted or too new."""
    file = path / MANIFEST
    if not file.is_file():
        raise DatasetError(
            f"{path}: no {MANIFEST}: not a store, or an unfinished conversion. Run the same "
            "conversion again to resume it."
        )
    try:
        manifest = parse_json(read_bytes(file))
        if manifest["format"] != FORMAT or manifest["version"] > VERSION:
            raise DatasetError(
                f"{file}: format {manifest['format']!r} version {manifest['version']}, expected "
                f"{FORMAT!r} version {VERSION} or earlier. Update mlip_jax."
            )
        _check_manifest(manifest)
    except DatasetError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise DatasetError(
            f"{file}: is corrupted ({error}). Delete it and convert again; existing shards are "
            "kept."
        ) from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise an error if fields that name or count files are invalid.

    Names with a folder would lead to files outside of the store.
    """
    names = [shard["file"] for shard in manifest["shards"]]
    for name in (*names, *(manifest["official_split"] or ())):
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} is not a plain file name")
    counts = [shard[key] for shard in manifest["shards"] for key in ("structures", "bytes")]
    for count in (manifest["structures"], *counts):
        if not isinstance(count, int) or not 0 <= count < 2**62:
            raise ValueError(f"{count!r} is not a number of structures or bytes")
    for name in ("periodic", "filtered"):
        if not isinstance(manifest[name], bool):
            raise TypeError(f"{name} is {manifest[name]!r}")
    if not all(isinstance(shard["sha256"], str) for shard in manifest["shards"]):
        raise TypeError("a checksum is not a text")
    manifest["level_of_theory"], manifest["filters"]  # raises KeyError


def _load_index(path: Path) -> np.ndarray:
    """Return a column of the index as a memory map. Raise DatasetError if it is corrupted."""
    check_regular(path)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except NUMPY_ERRORS as error:
        raise DatasetError(
            f"{path}: the file is missing or corrupted ({error}). Delete {MANIFEST} and convert "
            "again; existing shards are kept."
        ) from error

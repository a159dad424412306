"""Results that took long, kept by key in one file that grows: what is in it is not computed again.

Each line is a CRC-32 in hexadecimal, a space, and JSON [key, result]. A line is written at once and brought to disk, so
that a process that is killed loses the result at hand alone; lines that are cut off or damaged are not read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

log = logging.getLogger(__name__)


def key_of(settings: Mapping[str, Any], atoms: Atoms) -> str:
    """A hash of the settings (ready for JSON) and of all that a result can depend on: elements, positions to the last
    bit, cell, `atoms.info["charge"]` and `atoms.info["num_unpaired_electrons"]`."""
    # an invalid charge gets a key as well: it is an error of this one molecule, raised when it is evaluated
    state = [settings, float(atoms.info.get("charge", 0.0)), atoms.info.get("num_unpaired_electrons"),
             atoms.pbc.tolist(), atoms.cell.tolist() if atoms.pbc.any() else None]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=float).encode())
    digest.update(np.asarray(atoms.numbers, "<i8").tobytes())
    digest.update((np.asarray(atoms.positions, "<f8") + 0.0).tobytes())  # -0.0 is 0.0
    return digest.hexdigest()


class ResultCache:
    """Results by key: dictionaries of numbers, texts, None and lists of them (NaN is allowed).

    Several processes may add to one file; each knows what was there when it opened it, and what it adds itself.

    Raises:
      OSError: The file cannot be read or written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[int, int]] = {}
        self._file = open(self.path, "a+b")
        self._read()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, Any]:
        start, length = self._places[key]
        return _parse(os.pread(self._file.fileno(), length, start))[1]

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep a result; it is on disk when this returns."""
        text = json.dumps([key, dict(result)], separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            end = self._file.seek(0, os.SEEK_END)
            if end and os.pread(self._file.fileno(), 1, end - 1) != b"\n":  # a writer was killed within its line
                self._file.write(b"\n")
                end += 1
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._places[key] = end, len(line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ResultCache:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self) -> None:
        self._file.seek(0)
        start = damaged = 0
        for line in self._file:
            found = _parse(line)
            if found is not None:
                self._places[found[0]] = start, len(line)
            elif line != b"\n":
                damaged += 1
            start += len(line)
        if damaged:
            log.warning("%s: %d of %d results are damaged or cut off and will be computed again", self.path, damaged,
                        damaged + len(self._places))


def _parse(line: bytes) -> tuple[str, dict[str, Any]] | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    key, result = json.loads(text)
    return key, result

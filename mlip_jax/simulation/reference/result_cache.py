"""Cache of expensive results by key, in one append-only file.

Each line is a CRC-32 in hexadecimal, a space, and JSON [key, result]. A line is written and synced
immediately, so a killed process loses only its current result. Truncated or corrupted lines are
ignored.
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

from mlip_jax.files import open_in_place
from mlip_jax.foreign_files.texts import parse_json
from mlip_jax.structure import electronic_state

log = logging.getLogger(__name__)


def key_of(settings: Mapping[str, Any], atoms: Atoms) -> str:
    """Return a hash of everything that a result can depend on.

    This is the settings (serializable as JSON), elements, exact positions, cell,
    `atoms.info["charge"]` and `atoms.info["num_unpaired_electrons"]` (both also under their other
    usual names).
    """
    # Invalid states get a key as well. Evaluating the molecule raises the error, for it only.
    try:
        electronic = electronic_state(atoms)
    except ValueError:
        electronic = {name: str(value) for name, value in atoms.info.items()}
    charge = electronic.get("charge", 0.0)
    state = [
        settings,
        charge if isinstance(charge, str) else float(charge),
        electronic.get("num_unpaired_electrons"),
        atoms.pbc.tolist(),
        atoms.cell.tolist() if atoms.pbc.any() else None,
    ]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=float).encode())
    digest.update(np.asarray(atoms.numbers, "<i8").tobytes())
    digest.update((np.asarray(atoms.positions, "<f8") + 0.0).tobytes())  # -0.0 is 0.0
    return digest.hexdigest()


class ResultCache:
    """Results by key: dictionaries of numbers (including NaN), strings, None, and lists of them.

    Several processes may add to one file. Each knows the results that the file contained on opening
    and those that it adds itself.

    Raises:
      OSError: If the file cannot be read or written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._locations: dict[str, tuple[int, int]] = {}
        self._file = open_in_place(self.path, "a+b")
        self._read()

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, key: str) -> bool:
        return key in self._locations

    def __getitem__(self, key: str) -> dict[str, Any]:
        start, length = self._locations[key]
        return _parse(os.pread(self._file.fileno(), length, start))[1]

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Store a result. It is on disk when the method returns."""
        text = json.dumps([key, dict(result)], separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            end = self._file.seek(0, os.SEEK_END)
            # the last line is incomplete: a writer was killed
            if end and os.pread(self._file.fileno(), 1, end - 1) != b"\n":
                self._file.write(b"\n")
                end += 1
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._locations[key] = end, len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ResultCache:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self) -> None:
        """Index the valid lines of the file."""
        self._file.seek(0)
        start = num_invalid = 0
        for line in self._file:
            entry = _parse(line)
            if entry is not None:
                self._locations[entry[0]] = start, len(line)
            elif line != b"\n":
                num_invalid += 1
            start += len(line)
        if num_invalid:
            log.warning(
                "%s: recomputing %d of %d results, which are corrupted or truncated",
                self.path,
                num_invalid,
                num_invalid + len(self._locations),
            )


def _parse(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """Return the key and the result of a line, or None if it is truncated or corrupted."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        entry = parse_json(text)
    except ValueError:
        return None
    is_result = isinstance(entry, list) and list(map(type, entry)) == [str, dict]
    return (entry[0], entry[1]) if is_result else None

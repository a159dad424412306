"""Shards: Columns in one safetensors file, read by random access.

Any safetensors library can open a shard. A text column is stored as three arrays:
`text.NAME.code` (S,) is an index into a table of distinct texts, `text.NAME.bytes` has the UTF-8
bytes of the table, and `text.NAME.ends` the end of each text in the bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.near_origin import is_far
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.foreign_files.texts import parse_json
from mlip_jax.workdir import atomic_open

TEXTS = ("molecule", "smiles", "subset", "source")
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "U64": np.uint64,
}
_NEEDED = {
    "numbers",
    "positions",
    "offsets",
    "energy",
    "charge",
    "conformer",
    "record",
    *(f"text.{name}.{part}" for name in TEXTS for part in ("code", "ends", "bytes")),
}


def encode(columns: Columns, dtype=np.float32) -> dict[str, np.ndarray]:
    """Return the arrays of a shard.

    Args:
      columns: Structures.
      dtype: Data type of positions, forces and atom properties. Energies stay float64, as do the
        positions of a shard that contains structures far from the origin.
    """
    arrays = {
        "numbers": columns.numbers.astype(np.uint8),
        "positions": columns.positions.astype(np.float64 if is_far(columns.positions) else dtype),
        "offsets": columns.offsets,
        "energy": columns.energy,
        "charge": columns.charge,
        "conformer": columns.conformer,
        "record": columns.record,
    }
    if np.isfinite(columns.forces).any():
        arrays["forces"] = columns.forces.astype(dtype)
    if columns.pbc is not None:
        arrays["cell"], arrays["pbc"] = columns.cell, columns.pbc.astype(np.uint8)
    if columns.spin is not None:
        arrays["spin"] = columns.spin
    for name in TEXTS:
        arrays |= _encode_text(name, getattr(columns, name).tolist())
    arrays |= {f"property.{name}": values for name, values in columns.properties.items()}
    arrays |= {
        f"atom_property.{name}": values.astype(dtype)
        for name, values in columns.atom_properties.items()
    }
    return {name: np.ascontiguousarray(values) for name, values in arrays.items()}


def _encode_text(name: str, texts: list[str]) -> dict[str, np.ndarray]:
    """Return the three arrays of a text column."""
    codes: dict[str, int] = {}
    code = np.array([codes.setdefault(text, len(codes)) for text in texts], np.int32)
    encoded = [text.encode() for text in codes]
    return {
        f"text.{name}.code": code,
        f"text.{name}.ends": np.cumsum([len(e) for e in encoded], dtype=np.int64),
        f"text.{name}.bytes": np.frombuffer(b"".join(encoded), np.uint8),
    }


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Write a shard atomically and return its SHA-256.

    Raises:
      OSError: The shard cannot be written. No partial file remains.
    """
    content = save(arrays)
    with atomic_open(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shard:
    """A shard, open for reading.

    Attributes:
      path: Path of the file.
      arrays: Columns by name, memory-mapped. For random access use `rows` and `columns` instead.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "rb")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._file.read(8), "little")
            header = parse_json(self._file.read(min(length, len(self._map))))
            header.pop("__metadata__", None)
            self._offsets: dict[str, int] = {}
            self.arrays = {
                name: self._array(name, 8 + length, entry) for name, entry in header.items()
            }
            if missing := _NEEDED - self.arrays.keys():
                raise ValueError(f"no column {', '.join(sorted(missing))}")
        except FileNotFoundError as error:
            raise DatasetError(
                f"{path}: the shard is missing. Convert the source again."
            ) from error
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            MemoryError,
        ) as error:
            raise DatasetError(
                f"{path}: the shard is corrupted ({error}). Delete it and its .json file, and "
                "convert again; only missing shards are rebuilt."
            ) from error

    def _array(self, name: str, start: int, entry: dict) -> np.ndarray:
        """Return an array as a view of the memory map and store its offset in the file."""
        first, last = entry["data_offsets"]
        self._offsets[name] = start + first
        if not 0 <= first <= last:
            raise ValueError(f"data_offsets {first}, {last}")
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        return np.frombuffer(
            self._map, dtype, (last - first) // dtype.itemsize, start + first
        ).reshape(entry["shape"])

    def __len__(self) -> int:
        return len(self.arrays["energy"])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read the rows start:stop of a column from the file.

        Random access through the memory map would read ahead about a megabyte for each structure.
        """
        array = self.arrays[name]
        if not 0 <= start <= stop <= len(array):  # numbers of rows come from other columns
            raise self._corruption(f"rows {start} to {stop} of the {len(array)} of {name}")
        values = np.empty((stop - start, *array.shape[1:]), array.dtype)
        if values.nbytes:
            width = values.nbytes // (stop - start)
            if (
                os.preadv(self._file.fileno(), [values], self._offsets[name] + start * width)
                != values.nbytes
            ):
                raise DatasetError(
                    f"{self.path}: the shard has been truncated. Convert the source again."
                )
        return values

    def texts(self, name: str, codes: np.ndarray) -> np.ndarray:
        """Return the texts of the column `name` with these codes, an object array like `codes`."""
        distinct, inverse = np.unique(codes, return_inverse=True)
        texts = []
        for c in distinct.tolist():
            ends = self.rows(f"text.{name}.ends", max(c - 1, 0), c + 1)
            content = self.rows(f"text.{name}.bytes", int(ends[0]) if c else 0, int(ends[-1]))
            try:
                texts.append(content.tobytes().decode())
            except UnicodeDecodeError as error:
                raise self._corruption(f"a text of {name}: {error}") from error
        return np.array(texts, object)[inverse]

    def _corruption(self, problem: str) -> DatasetError:
        """Return the error of a corrupted shard."""
        return DatasetError(
            f"{self.path}: the shard is corrupted ({problem}). Delete it and its .json file, and "
            "convert again."
        )

    def columns(self, start: int, stop: int) -> Columns:
        """Read the structures start:stop."""
        ends = self.rows("offsets", start, stop + 1)
        a, b = int(ends[0]), int(ends[-1])  # range of atoms
        names = self.arrays.keys()
        return Columns(
            numbers=self.rows("numbers", a, b).astype(np.int32),
            positions=self.rows("positions", a, b).astype(np.float64),
            forces=self.rows("forces", a, b).astype(np.float64)
            if "forces" in names
            else np.full((b - a, 3), np.nan),
            offsets=ends - a,
            **{
                name: self.rows(name, start, stop)
                for name in ("energy", "charge", "conformer", "record")
            },
            **{
                name: self.texts(name, self.rows(f"text.{name}.code", start, stop))
                for name in TEXTS
            },
            cell=self.rows("cell", start, stop) if "cell" in names else None,
            pbc=self.rows("pbc", start, stop).astype(bool) if "pbc" in names else None,
            spin=self.rows("spin", start, stop) if "spin" in names else None,
            properties={
                name[9:]: self.rows(name, start, stop)
                for name in names
                if name.startswith("property.")
            },
            atom_properties={
                name[14:]: self.rows(name, a, b).astype(np.float64)
                for name in names
                if name.startswith("atom_property.")
            },
        )

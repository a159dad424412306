"""Split files: official splits of data sets, and the split saved with a run.

Official splits are lists of record numbers from 0 in one of these formats:
  JSON: {"train": [0, 2, ...], "valid": [...], "test": [...]} (Molecule3D);
  npz: arrays train_idx, val_idx, test_idx (SchNetPack), idx_train, ... (TorchMD-Net), or train,
    valid, test;
  text: a file per split with one number per line (index_train_01.csv and index_test_01.csv of
    rMD17).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.reader import DatasetError, check_regular
from mlip_jax.datasets.selection.splits import check_parts
from mlip_jax.files import NUMPY_ERRORS
from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.foreign_files.texts import parse_json
from mlip_jax.workdir import atomic_open, write_json

_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
_HOW = "write it as train=FILE, valid=FILE or test=FILE"


def read_split_files(
    files: str | Mapping[str, str | Path], num_records: int | None = None
) -> dict[str, np.ndarray]:
    """Read the record numbers of each split from the files in `config.data.split_files`.

    Args:
      files: One JSON or npz file, or one text file per split. The splits of text files are inferred
        from their names ("index_train_01.csv,index_test_01.csv") or stated explicitly
        ("train=a.csv,test=b.csv", or a mapping).
      num_records: Number of records in the data file, to validate the numbers. None skips this.

    Returns:
      Record numbers of "train" and, if present, "valid" and "test": int64, in the order of the
      file.

    Raises:
      DatasetError: A file is missing or corrupted, or its numbers are not a valid split. The
        message gives the location.
    """
    if isinstance(files, Mapping):
        named = [(str(name), Path(path)) for name, path in files.items()]
    else:
        items = [item.strip() for item in files.split(",") if item.strip()]
        pairs = [item.partition("=") if "=" in item else ("", "", item) for item in items]
        named = [(name.strip(), Path(path.strip())) for name, _, path in pairs]
    parts: dict[str, np.ndarray] = {}
    for name, path in named:
        if name and name not in _WORDS:
            raise DatasetError(f"data.split_files: unknown split {name!r}; {_HOW}")
        splits = {_WORDS[name]: _numbers(path)} if name else read_split_file(path)
        for part, numbers in splits.items():
            if part in parts:
                raise DatasetError(f"data.split_files: {path} is a second file for {part!r}")
            parts[part] = numbers
    where = ", ".join(str(path) for _, path in named)
    if "train" not in parts:
        raise DatasetError(
            f"data.split_files: no training split in {where or 'an empty list'}; {_HOW}"
        )
    return _validate(parts, where, num_records)


def read_split_file(path: str | Path, num_records: int | None = None) -> dict[str, np.ndarray]:
    """Read the record numbers of each split from one file.

    A text or npy file is a single split, which is inferred from the file name.

    Raises:
      DatasetError: As in `read_split_files`.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        parts = _by_name(_read_json(path), path)
    elif path.suffix.lower() == ".npz":
        parts = _by_name(_read_npz(path), path)
    else:
        parts = {_split_in_name(path): _numbers(path)}
    return _validate(parts, str(path), num_records)


def save_split(path: str | Path, parts: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
    """Save a split: indices as npz, and `meta` with the numbers of structures as JSON next to it.

    Each file is written atomically.

    Args:
      path: Path of the npz file, such as workdir / "splits.npz".
      parts: Indices by split.
      meta: Metadata: method, seed, requested and actual counts, molecules per split.

    Raises:
      OSError, WorkdirError: The folder is not writable.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"a split is saved as .npz; received {path}")
    arrays = {name: np.asarray(indices, np.int64) for name, indices in parts.items()}
    with atomic_open(path) as file:
        np.savez(file, **arrays)
    # The JSON file is written last and has a checksum of the indices, which reveals an interruption
    # between the two writes.
    write_json(
        path.with_suffix(".json"),
        {
            **meta,
            "structures": {name: len(a) for name, a in arrays.items()},
            "checksum": _checksum(arrays),
        },
    )
    return path


def load_split(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Load the splits and the metadata that `save_split` wrote.

    Raises:
      DatasetError: A file is missing or corrupted, or the two files do not belong together.
    """
    path = Path(path)
    arrays, meta = _read_npz(path), _read_json(path.with_suffix(".json"))
    parts = _validate(arrays, str(path), None)
    if meta.get("checksum") != _checksum(parts):
        raise DatasetError(
            f"{path} and {path.with_suffix('.json').name} do not belong together: writing them was "
            "interrupted, or one was changed. Remove both and split again."
        )
    return parts, meta


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a hash of the indices of all splits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name}:{len(arrays[name])};".encode())
        digest.update(np.ascontiguousarray(arrays[name], "<i8").data)
    return digest.hexdigest()


def _validate(
    parts: Mapping[str, Any], source: str, num_records: int | None
) -> dict[str, np.ndarray]:
    """Return splits as int64. Raise DatasetError if they are invalid or exceed the records."""
    try:
        checked = check_parts(parts, source)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    for name, numbers in checked.items():
        beyond = numbers[numbers >= num_records] if num_records is not None else numbers[:0]
        if len(beyond):
            # Numbers from 1 to num_records instead of 0 to num_records - 1 are a common mistake.
            from_one = (
                numbers.max() == num_records
                and min(p.min() for p in checked.values() if len(p)) >= 1
            )
            hint = (
                " They seem to be counted from 1; records are counted from 0." if from_one else ""
            )
            raise DatasetError(
                f"{source}: split {name!r} has {len(beyond)} numbers beyond the last record "
                f"{num_records - 1}, the first {beyond[0]}.{hint} Check whether the split belongs "
                "to this file."
            )
    return checked


def _split_in_name(path: Path) -> str:
    """Return the split that a file name indicates."""
    words = {_WORDS[w] for w in re.split(r"[^a-z]+", path.name.lower()) if w in _WORDS}
    if len(words) != 1:
        raise DatasetError(
            f"{path}: cannot infer the split (train, valid or test) from the file name; {_HOW}"
        )
    return words.pop()


def _by_name(members: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the arrays of a file by split, from names such as "train" or "val_idx"."""
    parts: dict[str, Any] = {}
    for key, numbers in members.items():
        words = [_WORDS[w] for w in re.split(r"[^a-z]+", key.lower()) if w in _WORDS]
        if len(words) != 1 or words[0] in parts:
            raise DatasetError(
                f"{path}: expected a list for each of train, valid (or val) and test; found "
                f"{', '.join(map(repr, members))}"
            )
        parts[words[0]] = numbers
    if not parts:
        raise DatasetError(f"{path}: contains no split")
    return parts


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, after checking that the splits are lists of integers."""
    try:
        content = parse_json(_read_bytes(path))
    except ValueError as error:
        raise DatasetError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path}: expected a JSON object with train, valid and test; found a "
            f"{type(content).__name__}"
        )
    for key, numbers in content.items():
        for index, number in enumerate(
            numbers if isinstance(numbers, list) and key.lower() in _WORDS else ()
        ):
            if type(number) is not int or abs(number) >= 2**63:
                raise DatasetError(
                    f"{path}: number {index} of {key!r} must be an integer; found {number!r:.80}"
                )
    return content


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file."""
    _read_bytes(path, 0)
    try:
        with open_npz(path) as file:
            return {name: file[name] for name in file.files}
    except NUMPY_ERRORS as error:
        raise DatasetError(f"{path}: cannot be read as npz arrays of integers ({error})") from error


def _numbers(path: Path) -> np.ndarray:
    """Read one split: an npy file, or text with one number per line and an optional header line."""
    if path.suffix.lower() == ".npy":
        _read_bytes(path, 0)
        try:
            numbers = np.load(path, allow_pickle=False)
            if not isinstance(numbers, np.ndarray):
                raise ValueError("an archive of arrays, whose name must end in .npz")
            return numbers
        except NUMPY_ERRORS as error:
            raise DatasetError(
                f"{path}: cannot be read as an array of integers ({error})"
            ) from error
    try:
        lines = _read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not text ({error})") from error
    numbers = []
    for line_number, line in enumerate(lines, 1):
        line = line.strip()
        if re.fullmatch(r"[+-]?[0-9]{1,18}", line):
            numbers.append(int(line))
        elif (
            line
            and not line.startswith("#")
            and not (line_number == 1 and re.fullmatch(r"[A-Za-z_ ]+", line))
        ):
            raise DatasetError(
                f"{path}, line {line_number}: expected one integer per line; found {line!r:.80}"
            )
    if not numbers:
        raise DatasetError(f"{path}: contains no numbers")
    return np.array(numbers, np.int64)


def _read_bytes(path: Path, limit: int = -1) -> bytes:
    """Return the first `limit` bytes of a file, all by default."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read: {error.strerror}. Give the file of a split, as "
            "data.split_files = 'split.json' or 'train.csv,test.csv'."
        ) from error

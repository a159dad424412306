"""Files that torch.save wrote, read without PyTorch and without running any code in them.

Since torch 1.6 such a file is a zip archive with a pickle, data.pkl, and the numbers of each storage
in a member data/KEY. A package of torch.package is similar. Older files are a series of pickles
followed by the numbers. Pickles are loaded with the restricted unpickler: tensors become arrays of
NumPy, ordered dictionaries and arrays of NumPy are created, and every other object becomes an inert
`Record` of its class, arguments and state. TorchScript programs inside a file remain bytes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.formats import safe_pickle
from mlip_jax.datasets.formats.pickle_arrays import Array
from mlip_jax.datasets.formats.pickle_opcodes import read_opcodes
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.files import NUMPY_ERRORS
from mlip_jax.importers.formats.torch_records import Record, record_classes
from mlip_jax.importers.formats.torch_tensors import (
    Storage,
    Tensors,
    as_storage,
    item_size,
    storage_type,
)
from mlip_jax.importers.formats.weights import HOW_TO_SAVE, WeightsError

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # its pickle
_MAX_OPCODES = 4_000_000
_MAX_MEMBERS = 100_000
_CONTAINERS = (dict, list, tuple, Record)


def read(path: str | Path) -> Any:
    """Return the content of a file; tensors are read-only arrays of NumPy, other objects records.

    Raises:
      FileNotFoundError: No such file.
      WeightsError: The file was not written by torch.save or torch.package, is corrupted, is a
        TorchScript archive, or contains tensors without a counterpart in NumPy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a file that torch.save wrote is expected")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_archive(archive, path)
        return _read_series(path)
    except (DatasetError, *NUMPY_ERRORS) as error:
        if isinstance(error, WeightsError | FileNotFoundError):
            raise
        reason = str(error) or repr(error)
        raise WeightsError(f"{path}: cannot be read as a file of torch.save: {reason}") from error


def is_torch_file(path: str | Path) -> bool:
    """Return whether a file seems to be one of torch.save or torch.package, by its content."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        start = file.read(len(_MAGIC_START))
    if start == _MAGIC_START:
        return True
    if not start.startswith(b"PK\x03\x04"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(_indices(archive.namelist()))
    except NUMPY_ERRORS:
        return False


def _indices(names: list[str]) -> list[str]:
    """Return the names of the pickles of an archive of torch.save or torch.package.

    A package of NequIP has one model for each mode of compilation, with the same weights.
    """
    index = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if index or not any(name.count("/") == 2 and "/.data/" in name for name in names):
        return index
    models = sorted(name for name in names if name.endswith("model.pkl") and name.count("/") == 2)
    return [name for name in models if name.endswith("/eager_model.pkl")] or models


class _StoredMembers:
    """Members of an archive. Together they may have as many bytes as the archive."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self._archive, self._path, self.size = archive, path, path.stat().st_size
        self._left = self.size
        if len(archive.infolist()) > _MAX_MEMBERS:
            raise WeightsError(f"{path}: an archive of more than {_MAX_MEMBERS} members")

    def read(self, name: str) -> bytes:
        """Return the content of a member."""
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(
                f"{self._path}: member {name} is compressed, and torch.save does not compress. "
                "Unpack the archive and pack it without compression (zip -0)."
            )
        self._left -= info.file_size
        if self._left < 0:
            raise WeightsError(f"{self._path}: the members are larger than the archive")
        return self._archive.read(info)


def _read_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    """Return the content of a zip archive."""
    index, names = _indices(archive.namelist()), frozenset(archive.namelist())
    if len(index) != 1:
        raise WeightsError(
            f"{path}: not an archive of torch.save: expected one data.pkl, found {len(index)}"
        )
    root = index[0].partition("/")[0]
    if f"{root}/constants.pkl" in names:
        raise WeightsError(
            f"{path}: a TorchScript archive, a program instead of weights. Give the checkpoint or the "
            "model from which it was exported."
        )
    folder = f"{root}/data/" if index[0].endswith("/data.pkl") else f"{root}/.data/"
    members = _StoredMembers(archive, path)
    if f"{root}/byteorder" in names and members.read(f"{root}/byteorder")[:6] == b"big":
        raise WeightsError(f"{path}: big-endian numbers are not supported")
    storages: dict[tuple[str, str], Storage] = {}

    def storage(kind: str, key: str) -> Storage:
        if (kind, key) not in storages:
            name = f"{folder}{key}"
            name = name if name in names or folder.endswith("/data/") else f"{name}.storage"
            storages[kind, key] = as_storage(members.read(name), kind)
        return storages[kind, key]

    return _unpickle(members.read(index[0]), path, members.size, storage)


def _unpickle(data: bytes, path: Path, size: int, storage: Callable[[str, str], Any]) -> Any:
    """Load a pickle of a file of `size` bytes; `storage` returns a storage, given type and key."""

    def persistent(pid: Any):
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # files before torch 1.0 add the source of classes
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            return Record(pid) if isinstance(pid, tuple) else _refuse_id(pid)
        if type(pid[2]) not in (str, int):  # packages number their storages
            return _refuse_id(pid)
        whole = storage(storage_type(pid[1]), str(pid[2]))
        return whole.part(pid[5]) if len(pid) > 5 and pid[5] is not None else whole

    content = safe_pickle.loads(
        data,
        allowed=_allowed() | Tensors(size).functions(),
        source=str(path),
        persistent=persistent,
        foreign=record_classes(str(path)),
    )
    return _without_subclasses(content)


def _refuse_id(pid: Any):
    raise pickle.UnpicklingError(f"a persistent id {safe_pickle.short_repr(pid)}")


def _read_series(path: Path) -> Any:
    """Return the content of a file of torch before 1.6, without archive."""
    data = path.read_bytes()
    if not data.startswith(_MAGIC_START):
        kind = "a tar archive of torch before 0.1.10" if data[257:262] == b"ustar" else "no archive"
        raise WeightsError(
            f"{path}: cannot be read as a file of torch.save: {kind}, and it does not begin as the "
            f"files of torch before 1.6. {HOW_TO_SAVE}"
        )
    parts, start = [], 0
    for _ in range(5):  # magic number, version, sizes of numbers, content, keys
        end = _end_of_pickle(data, start)
        parts.append(data[start:end])
        start = end
    known = {n: safe_pickle.loads(parts[n], allowed={}, source=str(path)) for n in (0, 1, 2, 4)}
    if known[0] != _MAGIC or not isinstance(known[2], dict) or not known[2].get("little_endian"):
        raise WeightsError(f"{path}: not a little-endian file of torch.save")
    storages = _numbers_after(data, start, known[4], _types(parts[3], path), path)

    def storage(kind: str, key: str) -> Storage:
        return storages[key]

    return _unpickle(parts[3], path, len(data), storage)


def _types(data: bytes, path: Path) -> dict[str, str]:
    """Return the type of each storage that a pickle names."""
    types: dict[str, str] = {}

    def persistent(pid: Any):
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage":
            types[str(pid[2])[:100]] = storage_type(pid[1])
        return Record(pid)

    allowed = _allowed() | {name: Record for name in Tensors(0).functions()}
    safe_pickle.loads(
        data,
        allowed=allowed,
        source=str(path),
        persistent=persistent,
        foreign=record_classes(str(path)),
    )
    return types


def _numbers_after(data: bytes, start: int, keys: Any, types: dict[str, str], path: Path):
    """Return the storages that follow the pickles, in the order of `keys`."""
    storages: dict[str, Storage] = {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in types:
            raise WeightsError(f"{path}: the file contains numbers of an unused storage")
        count = int.from_bytes(data[start : start + 8], "little")
        end = start + 8 + count * item_size(types[key])
        if end > len(data):
            raise WeightsError(
                f"{path}: truncated: expected {count} numbers of storage {key[:40]}, found fewer"
            )
        storages[key] = as_storage(data[start + 8 : end], types[key])
        start = end
    if len(storages) < len(types):
        raise WeightsError(f"{path}: truncated: {len(types) - len(storages)} storages are missing")
    return storages


def _end_of_pickle(data: bytes, start: int) -> int:
    """Return the position after the pickle that begins at `start`."""
    stream = io.BytesIO(data)
    stream.seek(start)
    for count, _ in enumerate(read_opcodes(stream)):
        if count > _MAX_OPCODES:
            raise WeightsError(f"a pickle of more than {_MAX_OPCODES} values, not that of a model")
    return stream.tell()


class _OrderedDict(dict):
    """Replacement for collections.OrderedDict, without attributes."""

    def __setstate__(self, state):
        """Ignore the metadata of a state dict."""


def _ordered_dict(*items) -> _OrderedDict:
    """Return an ordered dictionary; old pickles give its items as a list of pairs."""
    pairs = items[0] if len(items) == 1 and isinstance(items[0], list) else ()
    if len(items) > 1 or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise pickle.UnpicklingError(f"an ordered dictionary of {safe_pickle.short_repr(items)}")
    return _OrderedDict((key, value) for key, value in pairs)


def _device(*parts) -> str:
    """Return the name of a device."""
    return ":".join(str(part)[:20] for part in parts if isinstance(part, str | int))


def _allowed() -> dict:
    return safe_pickle.NUMPY | {
        ("collections", "OrderedDict"): _ordered_dict,
        ("torch", "device"): _device,
    }


def _without_subclasses(content: Any) -> Any:
    """Return the content with plain arrays in all dictionaries and lists.

    Containers can contain themselves; each is visited once.
    """
    top: list[Any] = [content]
    waiting: list[Any] = [top]
    visited: set[int] = set()
    while waiting:
        container = waiting.pop()
        if id(container) in visited:
            continue
        visited.add(id(container))
        if isinstance(container, Record):
            parts = (container.arguments, container.state, container.values, container.entries)
            waiting += [part for part in parts if isinstance(part, _CONTAINERS)]
            continue
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(items):
            if isinstance(value, Array) and not isinstance(container, tuple):
                container[key] = np.asarray(value)
            elif isinstance(value, _CONTAINERS):
                waiting.append(value)
    return top[0]


def describe(content: Any) -> str:
    """Describe the content of a file for messages."""
    if isinstance(content, Record):
        return f"an object of class {content.kind}"
    if isinstance(content, dict):
        return f"a dict with {', '.join(sorted(safe_pickle.short_repr(k) for k in content)[:8])}"
    return f"a {type(content).__name__}"

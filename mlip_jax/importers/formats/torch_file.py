"""Files that torch.save wrote, read without PyTorch and without running any code in them.

Such a file is a zip archive with a pickle, data.pkl, and the numbers of each tensor in a member
data/KEY. The pickle is loaded with the restricted unpickler. Tensors, ordered dictionaries and
arrays of NumPy are all that it may create; other names are rejected, except devices, which become
text.
"""

from __future__ import annotations

import functools
import math
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.formats import safe_pickle
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.importers.formats.weights import WeightsError

_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def read(path: str | Path) -> Any:
    """Return the content of a file; tensors are arrays of NumPy.

    Raises:
      FileNotFoundError: No such file.
      WeightsError: The file is not an archive of torch.save, is corrupted, or asks for more than
        plain values and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a file that torch.save wrote is expected")
    try:
        with zipfile.ZipFile(path) as archive:
            index = [
                name
                for name in archive.namelist()
                if name.count("/") == 1 and name.endswith("/data.pkl")
            ]
            if len(index) != 1:
                raise WeightsError(
                    f"{path}: not an archive of torch.save: expected one data.pkl, found {len(index)}"
                )
            storages = _Storages(archive, index[0].removesuffix("data.pkl"))
            return _plain(
                safe_pickle.loads(
                    archive.read(index[0]),
                    allowed=_allowed(),
                    source=str(path),
                    persistent=storages.read,
                )
            )
    except (DatasetError, zipfile.BadZipFile, zlib.error, OSError, KeyError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise WeightsError(f"{path}: cannot be read as a file of torch.save: {error}") from error


class _Storages:
    """Numbers of the tensors in an archive; each member is read once."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        self._archive, self._folder, self._known = archive, folder, {}

    def read(self, pid: Any) -> np.ndarray:
        """Return the numbers of a storage, given its persistent id."""
        if (
            not isinstance(pid, tuple)
            or len(pid) < 3
            or pid[0] != "storage"
            or not isinstance(pid[2], str)
        ):
            raise pickle.UnpicklingError(f"a persistent id {safe_pickle.short_repr(pid)}")
        # the name of the type stands for a function without arguments, see _allowed
        kind, key = pid[1]() if callable(pid[1]) else None, pid[2]
        if not isinstance(kind, np.dtype):
            raise pickle.UnpicklingError(f"a storage of type {safe_pickle.short_repr(pid[1])}")
        if key not in self._known:
            self._known[key] = np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), kind)
        return self._known[key]


class _OrderedDict(dict):
    """Replacement for collections.OrderedDict, without attributes."""

    def __setstate__(self, state):
        """Ignore the metadata of a state dict."""


def _rebuild_tensor(storage, offset, size, stride, *_) -> np.ndarray:
    """Return a tensor as an array."""
    numbers = (
        (offset, *size, *stride)
        if isinstance(size, tuple) and isinstance(stride, tuple)
        else (None,)
    )
    if (
        not isinstance(storage, np.ndarray)
        or not all(type(n) is int and 0 <= n < 2**40 for n in numbers)
        or len(size) != len(stride)
    ):
        raise pickle.UnpicklingError(f"a tensor of shape {safe_pickle.short_repr(size)}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if math.prod(size) else offset
    if last >= max(storage.size, 1) or math.prod(size) > storage.size:
        raise pickle.UnpicklingError(f"a tensor of shape {size} beyond its {storage.size} numbers")
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False).copy()


def _allowed() -> dict:
    return (
        safe_pickle.NUMPY
        | {
            ("collections", "OrderedDict"): _OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch", "device"): lambda *parts: ":".join(map(str, parts)),
        }
        | {("torch", name): functools.partial(np.dtype, dtype) for name, dtype in _DTYPES.items()}
    )


def _plain(value: Any) -> Any:
    """Return dictionaries and arrays of their own types."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return np.asarray(value) if isinstance(value, np.ndarray) else value

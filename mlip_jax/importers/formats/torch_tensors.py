"""Storages and tensors in files of torch.save, as arrays of NumPy."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from mlip_jax.datasets.formats import safe_pickle
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.importers.formats.torch_records import Record, kind_of

# Stored numbers by the type of their storage. NumPy has no bfloat16: see `to_float32`.
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "ComplexFloatStorage": "<c8",
    "ComplexDoubleStorage": "<c16",
    "UntypedStorage": "u1",
}
_DTYPES = {
    "float32": "<f4",
    "float64": "<f8",
    "float16": "<f2",
    "bfloat16": "<u2",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
    "complex64": "<c8",
    "complex128": "<c16",
}
_EXTRA_NUMBERS = 2**22  # numbers that tensors may repeat: expanded, or views of each other
_MAX_DIMENSIONS = 32


class Storage:
    """Numbers of a storage.

    Attributes:
      numbers: The numbers, read-only; bfloat16 as integers of 16 bits.
      is_bfloat16: Whether they are bfloat16.
    """

    __slots__ = ("is_bfloat16", "numbers")

    def __init__(self, numbers: np.ndarray, is_bfloat16: bool = False):
        self.numbers, self.is_bfloat16 = numbers, is_bfloat16

    def part(self, view: Any) -> Storage:
        """Return a part of the storage, given (key, offset, size), as in files of old versions."""
        if not isinstance(view, tuple) or [type(n) for n in view[1:]] != [int, int]:
            raise pickle.UnpicklingError(f"a part {_short(view)} of a storage")
        _, offset, size = view
        if min(offset, size) < 0 or offset + size > self.numbers.size:
            raise pickle.UnpicklingError(
                f"a part {_short(view)} beyond {self.numbers.size} numbers"
            )
        return Storage(self.numbers[offset : offset + size], self.is_bfloat16)


def storage_type(value: Any) -> str:
    """Return the name of the type of a storage, such as "FloatStorage".

    Raises:
      DatasetError: Another type, or one that NumPy cannot represent.
    """
    module, _, name = kind_of(value).rpartition(".")
    if module not in ("torch", "torch.storage") or name not in _STORAGES:
        raise DatasetError(
            f"a storage of type {kind_of(value) or _short(value)}, which is not supported"
        )
    return name


def as_storage(content: bytes, kind: str) -> Storage:
    """Return the numbers of a storage of type `kind`."""
    dtype = np.dtype(_STORAGES[kind])
    if len(content) % dtype.itemsize:
        raise pickle.UnpicklingError(f"{len(content)} bytes of numbers of {dtype.itemsize} bytes")
    return Storage(np.frombuffer(content, dtype), kind == "BFloat16Storage")


def item_size(kind: str) -> int:
    """Return the bytes of a number in a storage of type `kind`."""
    return np.dtype(_STORAGES[kind]).itemsize


class Tensors:
    """Functions that create the tensors of one file.

    Tensors are read-only views of their storages. `size` limits the numbers of all of them.
    """

    def __init__(self, size: int):
        """Create the functions for a file of `size` bytes."""
        self._left = size + _EXTRA_NUMBERS

    def functions(self) -> dict[tuple[str, str], Callable]:
        """Return the functions by module and name."""
        functions = {
            "_rebuild_tensor": self.tensor,
            "_rebuild_tensor_v2": self.tensor,
            "_rebuild_tensor_v3": self._typed_tensor,
            "_rebuild_parameter": _parameter,
            "_rebuild_parameter_with_state": _parameter,
        }
        refused = {
            name: _refuse(name, kind)
            for name, kind in {
                "_rebuild_sparse_tensor": "sparse",
                "_rebuild_sparse_csr_tensor": "sparse",
                "_rebuild_qtensor": "quantized",
                "_rebuild_nested_tensor": "nested",
                "_rebuild_meta_tensor_no_storage": "empty (meta)",
            }.items()
        }
        return {("torch._utils", name): f for name, f in (functions | refused).items()}

    def tensor(self, storage, offset, size, stride, *_) -> np.ndarray:
        """Return a tensor as a view of its storage."""
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError(f"a tensor of {_short(storage)}")
        array = self._view(storage.numbers, offset, _sizes(size), stride)
        return to_float32(array) if storage.is_bfloat16 else array

    def _typed_tensor(self, storage, offset, size, stride, _grad, _hooks, dtype, *_) -> np.ndarray:
        """Return a tensor of a storage without type."""
        name = kind_of(dtype).removeprefix("torch.")
        if not isinstance(storage, Storage) or name not in _DTYPES:
            raise pickle.UnpicklingError(f"a tensor of type {name or _short(dtype)}")
        numbers, dtype = storage.numbers, np.dtype(_DTYPES[name])
        if (
            numbers.dtype.itemsize != dtype.itemsize
            and numbers.size * numbers.itemsize % dtype.itemsize
        ):
            raise pickle.UnpicklingError(f"a tensor of type {name} from {numbers.nbytes} bytes")
        array = self._view(numbers.view(dtype), offset, _sizes(size), stride)
        return to_float32(array) if name == "bfloat16" else array

    def _view(self, numbers, offset, size, stride) -> np.ndarray:
        """Return a strided view that lies within the numbers."""
        layout = (offset, *size, *stride) if isinstance(stride, tuple) else (None,)
        valid = all(type(n) is int and 0 <= n < 2**40 for n in layout)
        if not valid or len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
            raise pickle.UnpicklingError(f"a tensor of shape {_short(size)}")
        total = math.prod(size)
        self._left -= total
        if self._left < 0:
            raise pickle.UnpicklingError(f"a tensor of shape {size}: more numbers than in the file")
        if not total:
            return np.zeros(size, numbers.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride))
        if last >= numbers.size:
            raise pickle.UnpicklingError(
                f"a tensor of shape {size} beyond its {numbers.size} numbers"
            )
        strides = [s * numbers.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(numbers[offset:], size, strides, writeable=False)


def to_float32(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 numbers, given as integers of 16 bits, in float32."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def _sizes(size) -> tuple:
    """Return the shape of a tensor, which torch.Size may wrap."""
    if isinstance(size, Record) and size.kind == "torch.Size" and len(size.arguments) == 1:
        size = size.arguments[0]
    if not isinstance(size, tuple):
        raise pickle.UnpicklingError(f"a tensor of shape {_short(size)}")
    return size


def _parameter(array, *_) -> np.ndarray:
    """Return the numbers of a parameter."""
    if not isinstance(array, np.ndarray):
        raise pickle.UnpicklingError(f"a parameter of {_short(array)}")
    return array


def _refuse(name: str, kind: str) -> Callable:
    def refuse(*_):
        raise DatasetError(f"a {kind} tensor ({name}), which is not supported")

    return refuse


def _short(value: Any) -> str:
    return safe_pickle.short_repr(value)

"""Serialization of plain values and NumPy arrays. Unlike pickle, reading cannot execute code."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

_ARRAY = "__array__"


def encode(value: Any) -> bytes:
    """Convert a JSON-like value that may contain NumPy arrays and scalars to bytes.

    Args:
      value: Numbers, text, None, lists, tuples, dictionaries with text as keys, and NumPy arrays.

    Raises:
      TypeError: The value contains another type. The message says where.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_without_arrays(value, arrays, "value")).encode()
    buffer = io.BytesIO()
    buffer.write(len(text).to_bytes(8, "big") + text)
    for array in arrays:
        np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode(data: bytes) -> Any:
    """Return the value that was encoded by `encode`. Tuples are returned as lists."""
    buffer = io.BytesIO(data)
    tree = json.loads(buffer.read(int.from_bytes(buffer.read(8), "big")))
    return _with_arrays(tree, buffer)


def _without_arrays(value, arrays, path):
    """Return `value` with placeholders for arrays, which are appended to the list `arrays`."""
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise TypeError(f"{path}: an array of Python objects; expected numbers or text")
        arrays.append(array)
        return {_ARRAY: isinstance(value, np.generic)}
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str) or key == _ARRAY]
        if wrong:
            raise TypeError(
                f"{path}: the key {wrong[0]!r}; expected text keys other than {_ARRAY!r}"
            )
        return {key: _without_arrays(v, arrays, f"{path}[{key!r}]") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_arrays(v, arrays, f"{path}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{path}: {type(value).__name__}; expected numbers, text, lists, dictionaries or NumPy "
        "arrays"
    )


def _with_arrays(tree, buffer):
    """Return `tree` with the arrays of `buffer` for the placeholders, in the order of writing."""
    if isinstance(tree, dict):
        if _ARRAY in tree:
            array = np.lib.format.read_array(buffer, allow_pickle=False)
            return array[()] if tree[_ARRAY] else array
        return {key: _with_arrays(value, buffer) for key, value in tree.items()}
    return [_with_arrays(value, buffer) for value in tree] if isinstance(tree, list) else tree

"""JSON and YAML of other people.

JSON that is nested too deeply raises errors that readers do not expect. A YAML file of 300 bytes can
refer to its own parts so often that a copy or a message takes all memory.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

MAX_YAML = 2**20  # bytes, and values after the expansion of references
_LONGEST_NUMBER = 1000  # characters; the time of "1:59:59:..." is quadratic in the length


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file.

    Raises:
      OSError: The file cannot be read, or is a pipe or a device, whose reading may never end.
    """
    with open_regular(path) as file:
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raise ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      ValueError: The file contains something else.
      OSError: As for `read_bytes`.
    """
    content = parse_json(read_bytes(path))
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}")
    return content


def read_yaml(path: str | Path) -> Any:
    """Return the value of a YAML file; see `parse_yaml`.

    Raises:
      ValueError: The file is invalid.
      OSError: As for `read_bytes`.
    """
    return parse_yaml(read_bytes(path))


def parse_yaml(text: bytes) -> Any:
    """Return the value of a YAML text that consists of plain values.

    Raises:
      ValueError: The text is invalid, too long, nested too deeply, or expands to too many values.
    """
    import yaml

    if len(text) > MAX_YAML:
        raise ValueError(f"{len(text):,} bytes of YAML, expected at most {MAX_YAML:,}")
    try:
        loader = yaml.SafeLoader(text.decode("utf-8-sig"))
        try:
            # The nodes share what the text refers to. Merge keys would already copy it.
            node = loader.get_single_node()
            if node is None:
                return None
            if _size(node, {}) > MAX_YAML:
                raise ValueError(f"references that expand to more than {MAX_YAML:,} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("the YAML is nested too deeply, or refers to itself") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not plain YAML: {error}") from error
    except (AttributeError, LookupError) as error:  # tagged values of another form, "!!bool x"
        raise ValueError(f"YAML with a value of another type than its tag ({error!r})") from error


def _size(node: Any, sizes: dict[int, int]) -> int:
    """Return the number of values of a node of YAML after the expansion of references."""
    if id(node) not in sizes:
        if node.tag.endswith((":int", ":float")) and len(node.value) > _LONGEST_NUMBER:
            raise ValueError(f"a number of {len(node.value):,} characters")
        children = node.value if isinstance(node.value, list) else ()
        parts = (p for child in children for p in (child if isinstance(child, tuple) else (child,)))
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file for reading bytes. Raise OSError if it is a pipe, a device or a folder."""
    return open(path, "rb", opener=_descriptor)


def _descriptor(path: str, flags: int) -> int:
    """Return a descriptor of a regular file, for the argument `opener` of `open`."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: expected a file, found a pipe, a device or a folder")
    return descriptor

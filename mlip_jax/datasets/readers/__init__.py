"""Readers by name: `config.data.reader = "spice"` is the file spice.py here, with a class `Reader`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets.reader import DatasetError, Reader


def names() -> list[str]:
    """All readers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


@functools.cache
def get(name: str) -> type[Reader]:
    """The class of a reader.

    Raises:
      ConfigError: No such reader; the nearest name is given.
    """
    if name not in names():
        raise ConfigError(unknown_name("reader", name, names()))
    return importlib.import_module(f"{__name__}.{name}").Reader


def detect(path: str | Path) -> str:
    """Name of the reader that a file or folder looks made for.

    Raises:
      DatasetError: The path does not exist, or no reader or several know it.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder. Give the path of the data as config.data.path.")
    found = [name for name in names() if get(name).matches(path)]
    special = [name for name in found if not get(name).GENERAL]
    found = special or found
    if len(found) != 1:
        problem = f"could be any of {', '.join(found)}" if found else "has the layout of no known data set"
        raise DatasetError(f"{path}: {problem}. Name the format as config.data.reader: {', '.join(names())}.")
    return found[0]


def open_data(path: str | Path, name: str = "auto", **options) -> Reader:
    """Open a data file.

    Args:
      path: File or folder.
      name: Of the reader; "auto" recognises the format.
      options: Keyword arguments of that reader's class.

    Raises:
      ConfigError: No such reader, or an option that it does not have.
      DatasetError: The file is missing, damaged or of unknown format.
    """
    name = detect(path) if name == "auto" else name
    reader = get(name)
    known = [p for p in inspect.signature(reader).parameters if p != "path"]
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f"option of reader {name!r}", option, known)
                              if known else f"reader {name!r} has no options; received {option!r}")
    return reader(path, **options)

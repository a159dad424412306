"""Readers by name: `config.data.reader = "spice"` is the file spice.py here, with a class `Reader`."""

from __future__ import annotations

import functools
import glob
import importlib
import inspect
import pkgutil
from pathlib import Path

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets.reader import DatasetError, MultiFileReader, Reader


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
    if (path / "manifest.json").is_file():
        raise DatasetError(f"{path}: is a store already; train on it or inspect it as it is.")
    found = [name for name in names() if get(name).matches(path)]
    special = [name for name in found if not get(name).GENERAL]
    found = special or found
    if len(found) != 1:
        problem = f"could be any of {', '.join(found)}" if found else "has the layout of no known data set"
        raise DatasetError(f"{path}: {problem}. Name the format as config.data.reader: {', '.join(names())}.")
    return found[0]


def open_data(path: str | Path, name: str = "auto", **options) -> Reader:
    """Open a data file, or several of one format as one.

    Args:
      path: File or folder; or several as "a.hdf5,b.hdf5" or "*.hdf5", in this order (a pattern: sorted).
      name: Of the reader; "auto" recognises the format.
      options: Keyword arguments of that reader's class.

    Raises:
      ConfigError: No such reader, or an option that it does not have.
      DatasetError: A file is missing, damaged or of unknown format, or the files are of different formats.
    """
    paths = _expand(str(path))
    found = {detect(p) for p in paths} if name == "auto" else {name}
    if len(found) > 1:
        raise DatasetError(f"{path}: these files are of different formats ({', '.join(sorted(found))}). Convert each "
                           "to a store of its own.")
    name = found.pop()
    reader = get(name)
    known = [p for p in inspect.signature(reader).parameters if p != "path"]
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f"option of reader {name!r}", option, known)
                              if known else f"reader {name!r} has no options; received {option!r}")
    readers = [reader(p, **options) for p in paths]
    return readers[0] if len(readers) == 1 else MultiFileReader(readers)


def _expand(path: str) -> list[str]:
    """The paths that a text of config.data.path stands for."""
    if Path(path).exists():
        return [path]
    paths = []
    for part in path.split(","):
        matched = sorted(glob.glob(part.strip(), recursive=True)) if glob.has_magic(part) else [part.strip()]
        if not matched:
            raise DatasetError(f"{part.strip()}: no file fits this pattern. Give the path of the data as "
                               "config.data.path.")
        paths += matched
    return list(dict.fromkeys(paths))  # what two patterns fit is still one file

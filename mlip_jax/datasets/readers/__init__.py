"""Readers by name: `config.data.reader = "spice"` selects the class `Reader` of spice.py."""

from __future__ import annotations

import functools
import glob
import importlib
import inspect
import pkgutil
from pathlib import Path

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets.isolation import files as isolated_files
from mlip_jax.datasets.reader import DatasetError, MultiFileReader, Reader, check_regular


def names() -> list[str]:
    """Return the names of all readers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


@functools.cache
def get(name: str) -> type[Reader]:
    """Return the class of a reader.

    Raises:
      ConfigError: The reader does not exist. The message suggests the closest name.
    """
    if name not in names():
        raise ConfigError(unknown_name("reader", name, names()))
    return importlib.import_module(f"{__name__}.{name}").Reader


def detect(path: str | Path) -> str:
    """Return the name of the reader whose format a file or folder has.

    Raises:
      DatasetError: The path does not exist, or no reader or more than one recognizes it.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(
            f"{path}: no such file or folder. Give the path of the data as config.data.path."
        )
    check_regular(path)
    isolated_files.check(path)
    if (path / "manifest.json").is_file():
        raise DatasetError(f"{path}: is already a store. Use it directly.")
    matching = [name for name in names() if get(name).matches(path)]
    specific = [name for name in matching if not get(name).GENERAL]
    matching = specific or matching
    if len(matching) != 1:
        problem = (
            f"could be any of {', '.join(matching)}"
            if matching
            else "is corrupted or does not have the layout of any known data set"
        )
        raise DatasetError(
            f"{path}: {problem}. Set config.data.reader to one of {', '.join(names())}."
        )
    return matching[0]


def open_data(path: str | Path, name: str = "auto", **options) -> Reader:
    """Open one data file, or several files of one format as a single data set.

    Args:
      path: File or folder. Several are given as "a.hdf5,b.hdf5", read in this order, or as a
        pattern such as "*.hdf5", read in sorted order.
      name: Name of the reader; "auto" detects the format.
      options: Keyword arguments of the reader's class.

    Raises:
      ConfigError: The reader or one of the options does not exist.
      DatasetError: A file is missing, corrupted or of unknown format, or the formats differ.
    """
    paths = _expand(str(path))
    name = _format_of(path, paths, name)
    reader = get(name)
    options = {reader.RENAMED_OPTIONS.get(option, option): v for option, v in options.items()}
    known = [p for p in inspect.signature(reader).parameters if p != "path"]
    for option in options:
        if option not in known:
            raise ConfigError(
                unknown_name(f"option of reader {name!r}", option, known)
                if known
                else f"reader {name!r} has no options; received {option!r}"
            )
    readers = [reader(p, **options) for p in paths]
    return readers[0] if len(readers) == 1 else MultiFileReader(readers)


def format_of(path: str | Path, name: str = "auto") -> str:
    """Return the name of the reader of data; the arguments and errors are those of `open_data`."""
    return _format_of(path, _expand(str(path)), name)


def _format_of(path: str | Path, paths: list[str], name: str) -> str:
    formats = {detect(p) for p in paths} if name == "auto" else {name}
    if len(formats) > 1:
        raise DatasetError(
            f"{path}: the files have different formats ({', '.join(sorted(formats))}). Convert "
            "each to its own store."
        )
    return formats.pop()


def _expand(path: str) -> list[str]:
    """Return the paths that an entry of config.data.path refers to."""
    if Path(path).exists():
        return [path]
    paths = []
    for part in path.split(","):
        matched = (
            sorted(glob.glob(part.strip(), recursive=True))
            if glob.has_magic(part)
            else [part.strip()]
        )
        if not matched:
            raise DatasetError(
                f"{part.strip()}: no file matches this pattern. Give the path of the data as "
                "config.data.path."
            )
        paths += matched
    return list(dict.fromkeys(paths))  # a file that matches two patterns is read once

"""Reading of a file by ASE, whose parsers must not open other files of the user.

Input files of Octopus, ONETEP, Gaussian and ACE-Molecule contain the names of further files, which
ASE opens. A malicious file could thus copy private files into a store that is later shared. While
ASE reads a file, this process may open only this file and regular files in the same folder, such as
the POTCAR of VASP, and the code of Python. It starts no programs and opens no connections.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase
from ase import Atoms

from mlip_jax.datasets.reader import DatasetError

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = {
    *("pickle.find_class", "socket.connect", "socket.getaddrinfo", "sqlite3.connect"),
    *("os.exec", "os.posix_spawn", "os.system", "subprocess.Popen"),
}
_CODE = (".py", ".pyc", ".so", ".pyd")  # suffixes of modules that a parser imports
_BYTECODE = re.compile(r"\.pyc\.\d+$")  # temporary names of compiled modules
# Options of parsers that would otherwise open other files. The reader of CASTEP's cells would start
# CASTEP for a list of its keywords.
_OPTIONS = {"castep-cell": {"calculator_args": {"keyword_tolerance": 3}}}
_guarded = threading.local()
_installation = threading.Lock()
_installed = False


def read_frames(path: Path, format: str | None = None) -> Iterator[Atoms]:
    """Yield the structures of a file with `ase.io`.

    Args:
      path: Path of the file.
      format: ASE's name of the format; None detects it.

    Raises:
      DatasetError: The file refers to another file outside of its folder.
      Exception: ASE's parsers raise exceptions of any type.
    """
    from ase.io import iread
    from ase.io.formats import filetype

    with only(path):
        format = format or filetype(str(path))
    frames = iread(path, index=":", format=format, **_OPTIONS.get(format, {}))
    while True:
        with only(path):
            atoms = next(frames, None)
        if atoms is None:
            return
        yield atoms


@contextlib.contextmanager
def only(path: Path) -> Iterator[None]:
    """Forbid this thread to open other files than `path` and those in its folder."""
    global _installed
    with _installation:
        if not _installed:
            sys.addaudithook(_audit)
            _installed = True
    outer = getattr(_guarded, "path", None)
    _guarded.path = Path(os.path.abspath(path))
    try:
        yield
    finally:
        _guarded.path = outer


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise DatasetError if the event is forbidden while a file is read."""
    path = getattr(_guarded, "path", None)
    if path is None:
        return
    if event == "open":
        name, _, flags = arguments
        if isinstance(name, str | bytes | os.PathLike) and not _may_open(name, flags, path):
            raise DatasetError(_refusal(os.fsdecode(name), path))
    elif event in _FORBIDDEN:
        raise DatasetError(f"{path}: its parser requires {event}, which is not allowed")


def _may_open(name: str | bytes | os.PathLike, flags: Any, path: Path) -> bool:
    """Return whether a parser of `path` may open a file."""
    name = os.fsdecode(name)
    if isinstance(flags, int) and flags & _WRITING:
        return name == os.devnull or _BYTECODE.search(name) is not None
    target = os.path.realpath(name)
    if target == os.path.realpath(path):
        return True
    # the file that the user names can be a link
    if os.path.dirname(target) in _folders(path):
        return os.path.isfile(target) or not os.path.exists(target)
    return target.endswith(_CODE) or target.startswith(_code_folders())


def _folders(path: Path) -> tuple[str, str]:
    """Return the folder of a file and, if the file is a link, that of its target."""
    return os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path))


def _refusal(name: str, path: Path) -> str:
    """Return the message about a file that a parser of `path` may not open."""
    target = os.path.realpath(name)
    if os.path.realpath(os.path.dirname(os.path.abspath(name))) in _folders(path):
        kind = "not a regular file"
        if os.path.islink(name):
            kind = f"a link out of its folder, to {target!r}"
        return (
            f"{path}: its parser reads {name!r}, {kind}, which was not opened, because it may lead to "
            "a private file of yours. If you trust it, replace it by a copy of the file."
        )
    return (
        f"{path}: refers to another file, {name!r}, which may be a private file of yours and was not "
        "opened. If you trust both, convert the file: ase convert FILE FILE.extxyz"
    )


def _code_folders() -> tuple[str, ...]:
    """Return the folders of Python and its packages, which also have tables of data."""
    packages = (p for p in sys.path if p.endswith(("site-packages", "dist-packages")))
    folders = [sys.base_prefix, sys.prefix, os.path.dirname(ase.__file__), *packages]
    return tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in folders)

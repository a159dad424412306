"""Functions that write files and folders atomically, and never through a symbolic link.

An output folder may come from an archive of other people, whose links would redirect what a run
writes to any file of the user. Every file that the package writes is opened here:

    atomic_open, atomic_path, write_text    replace a whole file
    write_joined                            join files of an output folder
    open_in_place                           append to a file, or change it
    open_lock, replace_content              lock files
    make_subfolder                          folders within an output folder
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import lzma
import os
import secrets
import shutil
import socket
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

# Exceptions of `np.load` for missing and corrupted files. NumPy parses headers as Python literals.
NUMPY_ERRORS = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError),
    *(MemoryError, OverflowError, SyntaxError, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
# Exceptions of code that receives values of other types or sizes than those that were written.
VALUE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def write_text(path: Path, content: str, *, shared: bool = False) -> None:
    """Write text as UTF-8, atomically; see `atomic_path`."""
    with atomic_open(path, "w", shared=shared, encoding="utf-8") as file:
        file.write(content)


def write_joined(path: Path, parts: Sequence[Path]) -> None:
    """Write the content of those of several files that exist into one file, atomically.

    Raises:
      OSError: A file cannot be read or written. A part that is a symbolic link is not read: it
        would copy any file of the user to the output.
    """
    with atomic_open(path) as file:
        for part in parts:
            if part.exists():
                with open_in_place(part, "rb") as source:
                    shutil.copyfileobj(source, file)


@contextlib.contextmanager
def atomic_open(
    path: Path, mode: str = "wb", *, shared: bool = False, **options: Any
) -> Iterator[IO]:
    """Open a file whose content replaces `path` when the block ends without an error.

    Text is written as UTF-8, whatever the locale.

    Args:
      path: File to replace.
      mode: Mode of `open`.
      shared: Whether several processes may write `path` at the same time; see `atomic_path`.
      **options: Further arguments of `open`.
    """
    with (
        atomic_path(path, shared=shared) as temporary,
        open_in_place(temporary, mode, **options) as file,
    ):
        yield file


@contextlib.contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield the path of a new, empty file, which replaces `path` when the block ends without error.

    The temporary file is in the same folder. Its content is flushed to disk before it replaces
    `path`, so a crash leaves either the old file or the new one. If `path` is a symbolic link, the
    link is replaced and not its target.

    Args:
      path: File to replace.
      shared: Whether several processes may write `path` at the same time. The name of the temporary
        file is then random. Otherwise it is fixed, so killed processes leave at most one such file,
        which the next process replaces. In both cases the file must not exist when it is opened.

    Raises:
      OSError: The file cannot be written. The old one is unchanged, and the temporary one is
        removed.
    """
    # with the name of the machine, because several machines may share the folder
    token = f".{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}" if shared else ""
    temporary = path.with_name(f".{path.name}{token}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed process
    if shared:
        _remove_leftovers(path)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NEVER_FOLLOW, 0o666))
        yield temporary
        with open_in_place(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # on a read-only file system, even the removal of a missing file raises
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `atomic_path` that killed processes of this machine have left."""
    prefix = f".{path.name}.{socket.gethostname()}."
    for file in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        process = file.name[len(prefix) :].partition(".")[0]
        if process.isdecimal() and not _is_running(int(process)):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Return whether there is a process with this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# O_NONBLOCK: the opening of a named pipe returns at once.
_NEVER_FOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def open_in_place(path: str | Path, mode: str, **options: Any) -> IO:
    """Open a regular file for appending or for changes in place.

    Text is UTF-8, whatever the locale.

    Args:
      path: File to open. Modes with "a" and "w" create it if it is missing.
      mode: Mode of `open`.
      **options: Further arguments of `open`.

    Raises:
      OSError: The file cannot be opened, or is a symbolic link, a pipe or a device.
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    return open(path, mode, opener=open_descriptor, **options)


def open_descriptor(path: str | Path, flags: int) -> int:
    """Return a descriptor of a regular file, for the argument `opener` of `open`.

    Raises:
      OSError: The file cannot be opened, or is a symbolic link, a pipe or a device.
    """
    truncate, flags = flags & os.O_TRUNC, flags & ~os.O_TRUNC
    try:
        descriptor = os.open(path, flags | _NEVER_FOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refusal(path, "a symbolic link") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refusal(path, "not a regular file")
        if truncate:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_lock(path: Path) -> IO[str]:
    """Open a lock file for reading and writing. Its content is kept.

    Raises:
      OSError: As for `open_in_place`.
    """
    return open_in_place(path, "a+")


def replace_content(lock: IO[str], content: str) -> None:
    """Replace the content of an open lock file.

    A file of another user, or one with a second name, may be more than a lock, so it is left unchanged.
    """
    status = os.fstat(lock.fileno())
    if status.st_uid == os.geteuid() and status.st_nlink == 1:
        lock.truncate(0)
        lock.write(content)
        lock.flush()


def make_subfolder(path: Path, top: Path | None = None) -> Path:
    """Create a folder within an output folder, if it is missing, and return its path.

    Args:
      path: Folder to create.
      top: Output folder, if there are further folders between it and `path`.

    Raises:
      OSError: It cannot be created; or it, or a folder between it and `top`, is a symbolic link.
    """
    path.mkdir(parents=True, exist_ok=True)
    between = itertools.takewhile(lambda folder: folder != top, path.parents) if top else ()
    for folder in (path, *between):
        if folder.is_symlink():
            raise _refusal(folder, "a symbolic link to a folder")
    return path


def check_regular_files(folder: Path) -> None:
    """Raise OSError if a folder contains a pipe or a device, whose opening may never end."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                check_regular_files(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                path = Path(entry.path)
                if path.exists() and not (path.is_file() or path.is_dir()):
                    raise OSError(errno.EINVAL, "is a pipe or a device", entry.path)


def _refusal(path: str | Path, kind: str) -> OSError:
    """Return the error of a path that must not be written."""
    return OSError(errno.ELOOP, f"is {kind}, which is never written to. Remove it", str(path))

"""Downloads into a cache folder: resumed after an interruption, and verified before use."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from mlip_jax.files import open_in_place

log = logging.getLogger(__name__)

CACHE = "MLIP_JAX_FORCE_FIELDS"  # environment variable with the cache folder
_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without any data
_SECONDS_BETWEEN_REPORTS = 5.0


class DownloadError(OSError):
    """Error for a file that cannot be downloaded completely. Nothing incomplete is used."""


def cache_folder() -> Path:
    """Return the folder of downloaded force fields."""
    if given := os.environ.get(CACHE):
        return Path(given)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mlip_jax" / "force_fields"


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, target: Path, size: int | None = None, sha256: str | None = None) -> Path:
    """Download a file once; return its path.

    An interrupted download is kept as a file ".part" and resumed by the next call. The file gets
    its name only after its size and its checksum, if known, have been verified.

    Args:
      url: URL of the file.
      target: Path of the file.
      size: Size (bytes), or None.
      sha256: Checksum, or None.

    Raises:
      DownloadError: No connection, a full disk, an incomplete file or a wrong checksum.
    """
    if target.is_file():
        return target
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        expected = _fetch(url, part, size)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise DownloadError(
            f"{url}: cannot be downloaded ({error}). {_resume_note(part)}To work without a network, "
            f"copy the file to {target} from another computer."
        ) from error
    except OSError as error:
        raise DownloadError(
            f"{target}: cannot be written ({error}). Free up disk space, or set {CACHE} to another "
            f"folder. {_resume_note(part)}"
        ) from error
    _verify(url, part, expected, sha256)
    part.replace(target)
    return target


def _resume_note(part: Path) -> str:
    """Return the sentence about the part that will be resumed."""
    kept = part.stat().st_size if part.is_file() else 0
    return f"The next attempt resumes after {kept:,} bytes. " if kept else ""


def _fetch(url: str, part: Path, size: int | None) -> int | None:
    """Append the rest of a file to its part; return the expected size, or None if unknown."""
    start = part.stat().st_size if part.is_file() else 0
    if size is not None and start == size:
        return size
    if not url.startswith(("https://", "http://")):
        raise urllib.error.URLError("expected a URL that begins with https:// or http://")
    request = urllib.request.Request(url, headers={"User-Agent": "mlip_jax"})  # noqa: S310
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is not shorter than the file
            raise
        part.unlink()
        return _fetch(url, part, size)
    with response:
        resumed = response.status == 206
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else size
        if size is not None and total is not None and total != size:
            raise DownloadError(f"{url}: has {total:,} bytes, expected {size:,}")
        _check_space(part, (total or 0) - start)
        with open_in_place(part, "ab" if resumed else "wb") as file:
            _copy(response, file, start, total, url)
    return total


def _check_space(part: Path, needed: int) -> None:
    """Raise OSError if the file does not fit on the disk."""
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise OSError(f"needs {needed:,} bytes, {free:,} are free")


def _copy(response, file, done: int, total: int | None, url: str) -> None:
    """Copy a response to a file and report the progress."""
    reported = time.monotonic()
    log.info("downloading %s%s", url, f" ({total / 1e6:.1f} MB)" if total else "")
    while block := response.read(_BLOCK):
        file.write(block)
        done += len(block)
        if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            log.info("%.1f MB%s", done / 1e6, f" of {total / 1e6:.1f} MB" if total else "")


def _verify(url: str, part: Path, size: int | None, sha256: str | None) -> None:
    """Raise DownloadError if the file is incomplete or has another checksum."""
    received = part.stat().st_size
    if size is not None and received < size:
        raise DownloadError(
            f"{url}: the connection ended after {received:,} of {size:,} bytes. {_resume_note(part)}"
        )
    if (size is not None and received > size) or (sha256 and checksum(part) != sha256):
        part.unlink()
        raise DownloadError(
            f"{url}: the file differs from the published one (size or SHA-256) and was deleted. "
            "Try again later. If it happens again, the file was replaced or altered."
        )

"""Published force fields by name: taken from an installed package, or downloaded once into a cache.

`catalog/published_list.py` lists them. The cache is the folder MLIP_JAX_FORCE_FIELDS, by default
~/.cache/mlip_jax/force_fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import logging
from pathlib import Path

from mlip_jax.importers.catalog.downloads import DownloadError, cache_folder, checksum, download
from mlip_jax.importers.catalog.published_list import PublishedForceField, find, is_known
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.potential import Potential

log = logging.getLogger(__name__)
_logged: set[str] = set()  # names of the force fields whose terms this process has logged


def load(name: str, modality: str | None = None, head: str | None = None) -> Potential:
    """Load a published force field. The first load of a process logs its terms of use.

    Args:
      name: Name in the list of published force fields, such as "sevennet-0".
      modality: Reference method, for force fields of SevenNet that were trained on several.
      head: Head, for force fields of MACE with several.

    Raises:
      ValueError: Unknown name, or the file is not the published one.
      DownloadError (an OSError): The file is not in the cache and cannot be downloaded.
    """
    entry = find(name)
    read = importlib.import_module(f"mlip_jax.importers.{entry.importer}").load
    given = {"modality": modality, "head": head}
    options = {option: value for option, value in given.items() if value is not None}
    if unknown := sorted(options.keys() - inspect.signature(read).parameters.keys()):
        raise ValueError(f"{entry.name} has no option {', '.join(unknown)}")
    path = locate(entry)
    if entry.name not in _logged:
        method = f"{entry.method}; " if entry.method else ""
        log.warning("force field %s: %s%s", entry.name, method, terms_of_use(entry))
        _logged.add(entry.name)
    return _with_method(read(path, **options), modality or entry.method)


def _with_method(potential: Potential, method: str | None) -> Potential:
    """Return the force field with its reference method, which reports state."""
    statistics = potential.metadata.get("statistics", {})
    if not method or statistics.get("level_of_theory"):
        return potential
    statistics = {**statistics, "level_of_theory": method}
    return dataclasses.replace(potential, metadata={**potential.metadata, "statistics": statistics})


def locate(entry: PublishedForceField) -> Path:
    """Return the path of the file: in the cache, in an installed package, or downloaded.

    Raises:
      WeightsError: The file has another checksum.
      DownloadError: There is no such file and it cannot be downloaded.
    """
    name = Path(entry.url or entry.file).name
    cached = cache_folder() / entry.name / name
    path = cached if cached.is_file() else in_package(entry)
    if path is not None:
        if entry.sha256 and checksum(path) != entry.sha256:
            raise WeightsError(
                f"{path}: not the published file of {entry.name}: its SHA-256 differs. Delete it, "
                "and load the force field again."
            )
        return path
    if entry.url is None:
        raise DownloadError(
            f"{entry.name}: install the Python package {entry.package}, which contains the file "
            f"{entry.file} ({entry.source}), or copy the file to {cached}"
        )
    return download(entry.url, cached, entry.size, entry.sha256)


def own_folder(name: str) -> Path | None:
    """Return the folder of a force field that comes with this package; None for other names.

    A file or folder with that name comes first, as for `importers.load_force_field`.
    """
    if not is_known(name) or Path(name).exists():
        return None
    entry = find(name)
    return locate(entry).parent if entry.package == __package__.partition(".")[0] else None


def in_package(entry: PublishedForceField) -> Path | None:
    """Return the file in an installed package, without importing the package; None if not there."""
    spec = importlib.util.find_spec(entry.package) if entry.package else None
    folders = spec.submodule_search_locations if spec else None
    paths = [Path(folder) / entry.file for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)


def terms_of_use(entry: PublishedForceField) -> str:
    """Return the license, the note and the citation of a force field."""
    parts = [f"license {entry.license or 'unknown: ask the authors'}"]
    parts += [entry.note] if entry.note else []
    parts += [f"cite {entry.citation}"] if entry.citation else []
    return "; ".join(parts)

"""Task `published`: list the published force fields, and download one of them."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_collections
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.importers import published
from mlip_jax.importers.catalog.downloads import DownloadError
from mlip_jax.importers.catalog.published_list import FORCE_FIELDS, PublishedForceField, find

log = logging.getLogger(__name__)

_COLUMNS = (
    "name",
    "elements",
    "reference method",
    "license",
    "remarks",
    "citation",
    "source",
    "MB",
)
_FITTING = 5  # columns that fit on a terminal


def run(config: ml_collections.ConfigDict, workdir: str | Path | None = None) -> Path | None:
    """Print the list, or download a force field and return the path of its file.

    Terminals show the columns that fit; files and pipes get all columns as Markdown. Nothing is written to `workdir`.

    Raises:
      ConfigError, ValueError: The message explains how to fix the problem.
    """
    config = configs.complete(config, defaults.published_defaults())
    if not config.download:
        print_list(FORCE_FIELDS, Console())
        return None
    entry = find(config.download)
    try:
        path = published.locate(entry)
    except DownloadError as error:
        raise ConfigError(str(error)) from error
    log.info("%s: %s", entry.name, published.terms_of_use(entry))
    log.info("%s", path)
    return path


def print_list(entries: tuple[PublishedForceField, ...], console: Console) -> None:
    """Print a table of force fields, without citations, sources and sizes on a terminal."""
    if not console.is_terminal:
        print(markdown(entries), file=console.file)
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption="For citations, sources and sizes, append: | cat",
    )
    for column in _COLUMNS[:_FITTING]:
        table.add_column(column, no_wrap=column == "name")
    for entry in entries:
        table.add_row(*map(Text, _row(entry)[:_FITTING]))
    console.print(table)


def markdown(entries: tuple[PublishedForceField, ...]) -> str:
    """Return a table of force fields in Markdown."""
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *map(_row, entries)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(entry: PublishedForceField) -> tuple[str, ...]:
    """Return the cells of a force field."""
    unknown = "unknown"
    source = entry.url or (f"package {entry.package}" if entry.package else unknown)
    return (
        entry.name,
        entry.elements or unknown,
        entry.method or unknown,
        entry.license or unknown,
        entry.note,
        entry.citation or unknown,
        source,
        f"{entry.size / 1e6:.1f}" if entry.size else unknown,
    )

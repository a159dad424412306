"""Report of a list of results: `report.html` with the counts as cards, and `metrics.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlip_jax.reports import html_page as page
from mlip_jax.reports import sections
from mlip_jax.workdir import write_text


def write_summary(
    workdir: str | os.PathLike,
    title: str,
    counts: Mapping[str, int],
    body: Iterable[str],
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str],
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      title: Headline of the page.
      counts: Numbers of results, for the cards and metrics.json.
      body: Sections between the cards and the provenance.
      info: Sections of names and values.
      files: Names of further files in the workdir, to list on the page.

    Returns:
      Path of `report.html`.
    """
    workdir = Path(workdir)
    write_text(workdir / "metrics.json", json.dumps(counts, indent=2) + "\n")
    parts = [
        page.heading(title, 1),
        page.cards([(name.replace("_", " "), str(n), "", "") for name, n in counts.items()]),
        *body,
        *sections.provenance(info, files),
    ]
    write_text(workdir / "report.html", page.render(title, parts))
    return workdir / "report.html"

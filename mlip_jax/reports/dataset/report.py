"""Report of a data set: `dataset.md`, `dataset.png` and `dataset.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mlip_jax.reports.dataset.figure import dataset_figure
from mlip_jax.reports.dataset.summary import DatasetSummary
from mlip_jax.reports.dataset.tables import markdown
from mlip_jax.workdir import atomic_open, write_text


def write_dataset_report(folder: str | os.PathLike, summary: DatasetSummary) -> Path:
    """Write `dataset.json`, `dataset.png` and `dataset.md` to `folder`, each atomically.

    Args:
      folder: Folder of the report; created if missing.
      summary: Summary of the data set. The report skips missing values.

    Returns:
      Path of `dataset.md`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Write the JSON file first, so that it exists even if the figure fails.
    text = json.dumps(summary.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / "dataset.json", text, shared=True)
    figure = dataset_figure(summary)
    with atomic_open(folder / "dataset.png", shared=True) as file:
        figure.savefig(file, format="png", dpi=150)
    write_text(folder / "dataset.md", markdown(summary), shared=True)
    return folder / "dataset.md"

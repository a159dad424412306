"""Table of a sweep: `sweep.csv`, `sweep.md`, `sweep.png`; `sweep_seeds.csv` for several seeds."""

from __future__ import annotations

import io
import logging
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax.foreign_files.texts import read_object
from mlip_jax.foreign_text import TableWriter
from mlip_jax.workdir import atomic_open, write_text

log = logging.getLogger(__name__)

# Columns of scores: {column: (part, key)} in metrics.json.
SCORES = {
    f"{part}_{key}": (part, key)
    for part in ("test", "valid")
    for key in (
        "energy_mae_mev_per_atom",
        "force_mae_mev_per_ang",
        "energy_slope_mev_per_atom",
        "energy_rmse_mev_per_atom",
        "force_rmse_mev_per_ang",
    )
}
# Columns in the Markdown table: {column: heading}. The CSV file has all columns.
_SHOWN = {
    "test_energy_mae_mev_per_atom": "test energy MAE (meV/atom)",
    "test_force_mae_mev_per_ang": "test force MAE (meV/Å)",
    "test_energy_slope_mev_per_atom": "test slope (meV/atom)",
    "valid_energy_mae_mev_per_atom": "valid. energy MAE (meV/atom)",
    "valid_force_mae_mev_per_ang": "valid. force MAE (meV/Å)",
    "test_unseen_structures": "test structures excluded (unseen elements)",
    "valid_unseen_structures": "valid. structures excluded (unseen elements)",
    "training_seconds": "training (s)",
    "best_step": "best step",
}
# Columns of structures with elements that the training split of the variant lacks. Its errors are
# without them, so errors of variants with different numbers are not of the same structures.
_UNSEEN = {f"{part}_unseen_structures": part for part in ("test", "valid")}
_DRAWN = ("test_energy_mae_mev_per_atom", "test_force_mae_mev_per_ang")
_SEED = "seed"
_CELL = 60  # maximum number of characters of a cell in the Markdown table


class Row(NamedTuple):
    """Row of the table: a variant of a sweep.

    Attributes:
      name: Name of the folder of the variant.
      values: Overrides that are not the same in all variants, by dotted name. All rows have the
        same keys.
      state: "done", "running", "failed", "stopped" or "waiting".
      seconds: Wall time of all attempts in seconds, None before the first one ended.
      scores: Values by column: the keys of SCORES, the numbers of structures with unseen
        elements, training_seconds and best_step. Values are None if unknown; empty if there are no
        scores yet.
    """

    name: str
    values: dict[str, Any]
    state: str
    seconds: float | None = None
    scores: dict[str, float | None] = {}


class SeedAverage(NamedTuple):
    """Average over rows that differ only in their seed.

    Attributes:
      values: Overrides of the rows without the seed.
      num_done: Number of rows that are done.
      num_rows: Number of rows.
      scores: {column: (mean, sample standard deviation)} over the rows that are done. The standard
        deviation (divided by n - 1) is None for a single value.
    """

    values: dict[str, Any]
    num_done: int
    num_rows: int
    scores: dict[str, tuple[float, float | None]]


def read_scores(workdir: str | os.PathLike, best: str = "best") -> dict[str, float | None]:
    """Read the scores of a completed run from its metrics.json; return {} if there is no such file.

    Args:
      workdir: Workdir of the run.
      best: Folder of the best checkpoints in `workdir`. The scores belong to the newest checkpoint.
    """
    path = Path(workdir) / "metrics.json"
    try:
        metrics = read_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning("%s: not valid JSON (%s); its scores are missing in the table", path, error)
        return {}
    scores = {column: _number(metrics, *keys) for column, keys in SCORES.items()}
    scores |= {
        column: _number(metrics, "unseen_elements", part, "num_structures")
        for column, part in _UNSEEN.items()
    }
    steps = [int(p.name) for p in (Path(workdir) / best).glob("*") if p.name.isdecimal()]
    return scores | {
        "training_seconds": _number(metrics, "seconds"),
        "best_step": max(steps, default=None),
    }


def _number(values: Any, *keys: str) -> float | None:
    """Return a number of nested objects of a JSON file, or None if there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, int | float) else None


def over_seeds(rows: Sequence[Row]) -> list[SeedAverage]:
    """Average rows that are the same except for the value `seed`; [] if no two rows are."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr({k: v for k, v in row.values.items() if k != _SEED}), []).append(row)
    if all(len(group) < 2 for group in groups.values()):
        return []
    return [_group(group) for group in groups.values()]


def _group(rows: Sequence[Row]) -> SeedAverage:
    """Average the rows of one group over those that are done."""
    done = [row for row in rows if row.state == "done"]
    scores = {}
    for column in (*SCORES, *_UNSEEN, "training_seconds"):
        known = [row.scores[column] for row in done if row.scores.get(column) is not None]
        if known:
            scores[column] = (
                statistics.fmean(known),
                statistics.stdev(known) if len(known) > 1 else None,
            )
    return SeedAverage(
        {k: v for k, v in rows[0].values.items() if k != _SEED}, len(done), len(rows), scores
    )


def write_table(folder: str | os.PathLike, rows: Sequence[Row], title: str) -> None:
    """Write sweep.csv and sweep.md, and, if there are data, sweep.png and sweep_seeds.csv.

    Each file is written atomically.

    Raises:
      OSError: A file cannot be written.
    """
    folder, groups = Path(folder), over_seeds(rows)
    write_text(folder / "sweep.csv", _csv(rows), shared=True)
    if groups:
        write_text(folder / "sweep_seeds.csv", _seeds_csv(groups), shared=True)
    write_text(folder / "sweep.md", _markdown(rows, groups, title), shared=True)
    if any(row.scores.get(column) is not None for row in rows for column in _DRAWN):
        with atomic_open(folder / "sweep.png", shared=True) as file:
            draw(rows).savefig(file, format="png", dpi=150)


def _csv(rows: Sequence[Row]) -> str:
    """Return the text of sweep.csv."""
    columns = [*SCORES, *_UNSEEN, "training_seconds", "best_step"]
    text = io.StringIO()
    writer = TableWriter(text, lineterminator="\n")
    writer.writerow(["name", *rows[0].values, "state", "seconds", *columns])
    for row in rows:
        writer.writerow(
            [row.name, *row.values.values(), row.state, row.seconds, *map(row.scores.get, columns)]
        )
    return text.getvalue()


def _seeds_csv(groups: Sequence[SeedAverage]) -> str:
    """Return the text of sweep_seeds.csv."""
    columns = [*SCORES, "training_seconds"]
    text = io.StringIO()
    writer = TableWriter(text, lineterminator="\n")
    writer.writerow(
        [
            *groups[0].values,
            "num_done",
            "num_seeds",
            *(f"{column}_{statistic}" for column in columns for statistic in ("mean", "std")),
        ]
    )
    for group in groups:
        scores = [x for column in columns for x in group.scores.get(column, (None, None))]
        writer.writerow([*group.values.values(), group.num_done, group.num_rows, *scores])
    return text.getvalue()


def _markdown(rows: Sequence[Row], groups: Sequence[SeedAverage], title: str) -> str:
    """Return the text of sweep.md."""
    count = {
        state: sum(row.state == state for row in rows)
        for state in dict.fromkeys(row.state for row in rows)
    }
    lines = [f"# {title}", "", ", ".join(f"{n} {state}" for state, n in count.items()) + ".", ""]
    shown = {
        k: heading
        for k, heading in _SHOWN.items()
        if any(row.scores.get(k) is not None for row in rows)
    }
    lines += _pipes(
        ["variant", *rows[0].values, "state", "time", *shown.values()],
        [
            [
                row.name,
                *map(cell, row.values.values()),
                row.state,
                duration(row.seconds),
                *(_figure(k, row.scores.get(k)) for k in shown),
            ]
            for row in rows
        ],
    )
    if groups:
        shown = {
            k: heading
            for k, heading in _SHOWN.items()
            if any(k in group.scores for group in groups)
        }
        lines += [
            "",
            "## Over seeds",
            "",
            "Mean ± sample standard deviation over the completed runs.",
            "",
        ]
        lines += _pipes(
            [*groups[0].values, "done", *shown.values()],
            [
                [
                    *map(cell, group.values.values()),
                    f"{group.num_done} of {group.num_rows}",
                    *(_spread(k, *group.scores.get(k, (None, None))) for k in shown),
                ]
                for group in groups
            ],
        )
    return "\n".join(lines) + "\n"


def _pipes(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    escaped = [
        [text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (heading, *rows)
    ]
    return [
        "| " + " | ".join(row) + " |" for row in (escaped[0], ["---"] * len(heading), *escaped[1:])
    ]


def cell(value: Any) -> str:
    """Format the value of an override, shortened for a table."""
    text = "-" if value is None else str(value)
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def duration(seconds: float | None) -> str:
    """Format a time as h:mm:ss, or "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _figure(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    whole = column in ("best_step", "training_seconds", *_UNSEEN)
    return f"{value:.0f}" if whole else f"{value:.2f}"


def _spread(column: str, mean: float | None, std: float | None) -> str:
    return (
        _figure(column, mean)
        if std is None
        else f"{_figure(column, mean)} ± {_figure(column, std)}"
    )


def draw(rows: Sequence[Row]):
    """Draw the test errors of the variants as dots with their mean, one line per variant.

    Variants that differ only in their seed share a line.

    Returns:
      A matplotlib `Figure`.
    """
    from mlip_jax.reports import figures  # import matplotlib only if there are scores

    lines: dict[str, list[Row]] = {}
    has_seeds = bool(over_seeds(rows))
    for row in rows:
        values = {k: v for k, v in row.values.items() if k != _SEED}
        lines.setdefault(
            ", ".join(map(cell, values.values())) or "all" if has_seeds else row.name, []
        ).append(row)
    titles = [_SHOWN[column] for column in _DRAWN]
    fig, axes = figures.figure(*titles, size=(9.2, 1.4 + 0.32 * len(lines)))
    for ax, column in zip(axes, _DRAWN):
        largest = max((row.scores.get(column) or 0.0 for row in rows), default=0.0)
        for y, members in enumerate(lines.values()):
            known = [row.scores[column] for row in members if row.scores.get(column) is not None]
            if known:
                ax.plot(known, [y] * len(known), "o", color=figures.BLUE, alpha=0.6, markersize=6)
                ax.plot(
                    statistics.fmean(known),
                    y,
                    "|",
                    color=figures.VERMILLION,
                    markersize=16,
                    markeredgewidth=2,
                )
        ax.set_yticks(range(len(lines)), list(lines))
        ax.set_ylim(len(lines) - 0.5, -0.5)
        ax.set_xlim(0, 1.05 * largest or 1.0)
    axes[1].set_yticklabels([])
    return fig

"""Tables of a data set as Markdown and on the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlip_jax.reports.dataset.figure import format_charge
from mlip_jax.reports.dataset.summary import DatasetSummary
from mlip_jax.reports.html_page import number

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_FEW_QUANTILES = (0.05, 0.5, 0.95)  # for consoles with 80 columns
_TEXT_COLUMNS = ("data set", "level of theory", "elements", "label", "", "shape", "unit")


def markdown(summary: DatasetSummary) -> str:
    """Return the text of `dataset.md`."""
    lines = [f"# {_inline(summary.title)}", ""]
    lines += [f"> **Problem:** {_inline(problem)}\n" for problem in summary.problems]
    lines += [
        *_table(*_overview(summary)),
        "",
        f"Source: {', '.join(map(_inline, summary.files)) or 'unknown'}",
        "",
        "![Distributions](dataset.png)",
        "",
    ]
    for title, (header, rows) in _sections(summary).items():
        lines += [f"## {title}", "", *_table(header, rows), ""]
    if summary.notes:
        lines += ["## Notes", "", *(f"- {_inline(note)}" for note in summary.notes), ""]
    return "\n".join(lines)


def print_summary(summary: DatasetSummary, console: Console | None = None) -> None:
    """Print the tables of the report on the console."""
    if console is None:
        console = Console()
        if not console.is_terminal:  # files have no width
            console = Console(width=160)
    sections = {summary.title: _overview(summary), **_sections(summary, brief=True)}
    for title, (header, rows) in sections.items():
        # Use Text: names from data files must not be interpreted as markup.
        table = Table(
            title=Text(title, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for column, name in enumerate(header):
            table.add_column(
                Text(name),
                justify="left" if column == 0 or name in _TEXT_COLUMNS else "right",
                no_wrap=name == "",
            )
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        console.print(table)
    for kind, texts in (("Note", summary.notes), ("Problem", summary.problems)):
        for text in texts:
            console.print(Text(f"{kind}: {text}", style="bold red" if kind == "Problem" else ""))


def _overview(summary: DatasetSummary) -> tuple[Sequence[str], list[Sequence[Any]]]:
    return ("data set", "n_s", "n_c", "N", "level of theory", "elements"), [
        (
            summary.title,
            summary.num_molecules,
            f"{summary.mean_conformers:.1f}",
            summary.num_structures,
            summary.level_of_theory,
            ", ".join(summary.symbols()),
        )
    ]


def _sections(
    summary: DatasetSummary, brief: bool = False
) -> dict[str, tuple[Sequence[str], list[Sequence[Any]]]]:
    """Return {title: (header, rows)} of all tables that have rows."""
    atoms = sum(summary.elements.values())
    elements = [
        (
            s,
            summary.elements[s],
            _percent(summary.elements[s] / max(atoms, 1)),
            _exact(summary.reference_energies.get(s)),
        )
        for s in summary.symbols()
    ]
    header = ["element", "atoms", "share", "reference (eV)"]
    if not summary.reference_energies:
        header, elements = header[:-1], [row[:-1] for row in elements]
    sections = {
        "Labels": (
            ("label", "structures with it"),
            [(k, _percent(v)) for k, v in summary.labels.items()],
        ),
        "Distributions": _distribution_table(summary, brief),
        "Elements": (header, elements),
        "Total charge": (
            ("charge (e)", "structures", "share"),
            [
                (format_charge(charge), count, _percent(count / max(summary.num_structures, 1)))
                for charge, count in sorted(summary.charges.items())
            ],
        ),
        "Further labels": (
            ("label", "shape", "unit", "structures with it", "min", "max"),
            [
                (
                    name,
                    "×".join(map(str, p.shape)) or "scalar",
                    p.unit or "unknown",
                    _percent(p.labelled),
                    float(p.minimum),
                    float(p.maximum),
                )
                for name, p in summary.properties.items()
            ],
        ),
        "Counts": (("", "number"), list(summary.counts.items())),
    }
    return {title: (header, rows) for title, (header, rows) in sections.items() if rows}


def _distribution_table(
    summary: DatasetSummary, brief: bool
) -> tuple[Sequence[str], list[Sequence[Any]]]:
    """Return header and rows of the table of quantiles, with fewer columns if `brief`."""
    quantiles = _FEW_QUANTILES if brief else QUANTILES
    header = ("values", "missing", "mean", "min", *(f"{100 * q:g} %" for q in quantiles), "max")
    rows = []
    for title, (_, unit, _, h) in summary.distributions().items():
        values = [h.minimum, *(h.quantile(q) for q in quantiles), h.maximum]
        whole = h.has_integer_bins and all(value == round(value) for value in values)
        row = [h.known, h.missing, h.mean, *(int(value) if whole else value for value in values)]
        rows.append((f"{title} ({unit})" if unit else title, *(row[3:] if brief else row)))
    return ("", *(header[3:] if brief else header)), rows


def _exact(energy: float | None) -> str | None:
    """Format a reference energy with six decimals, since users may copy it."""
    return None if energy is None else f"{energy:.6f}"


def _percent(share: float) -> str:
    """Format a fraction in percent; only exactly 1 becomes "100 %" and only exactly 0 "0 %"."""
    if 0.9995 <= share < 1 or 0 < share < 0.0005:
        return "> 99.9 %" if share > 0.5 else "< 0.1 %"
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    return number(value) if value is None or isinstance(value, int | float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    align = [
        "---" if column == 0 or name in _TEXT_COLUMNS else "---:"
        for column, name in enumerate(header)
    ]
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (header, align, *([_inline(_cell(value)) for value in row] for row in rows))
    ]


def _inline(text: str) -> str:
    """Return text from data as one line of Markdown, with special characters escaped."""
    text = " ".join(str(text).encode("utf-8", "replace").decode().split())
    for character in "\\`*_[]<>|":
        text = text.replace(character, "\\" + character)
    return text

"""Report of a data set: `dataset.md`, `dataset.png` and `dataset.json` from counts and histograms.

The symbols n_s, n_c and N are those of the literature: number of molecules, mean number of
conformations per molecule, and total number of conformations.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlip_jax.datasets.quality.histogram import Histogram
from mlip_jax.reports import figures
from mlip_jax.reports.html_page import number
from mlip_jax.workdir import atomic_open, write_text

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_FEW_QUANTILES = (0.05, 0.5, 0.95)  # for consoles with 80 columns
_TEXT_COLUMNS = ("data set", "level of theory", "elements", "label", "", "shape", "unit")

# (field, title, axis label, unit, counted objects)
DISTRIBUTIONS = (
    ("n_atoms", "Atoms per structure", "number of atoms", "", "structures"),
    ("conformers", "Conformers per molecule", "number of conformations", "", "molecules"),
    (
        "energy_per_atom",
        "Energy less reference",
        "energy less reference of elements",
        "eV/atom",
        "structures",
    ),
    ("total_energy_per_atom", "Total energy", "total energy", "eV/atom", "structures"),
    ("force", "Force on an atom", "|F|", "eV/Å", "atoms"),
    (
        "shortest_distance",
        "Shortest distance",
        "shortest distance in a structure",
        "Å",
        "structures",
    ),
)


@dataclasses.dataclass(frozen=True)
class PropertySummary:
    """Summary of a further label.

    Attributes:
      minimum: Minimum of the known values.
      maximum: Maximum of the known values.
      labelled: Fraction of structures with this label, from 0 to 1.
      unit: Unit, "" if unknown.
      shape: Shape of the label of one structure.
    """

    minimum: float
    maximum: float
    labelled: float
    unit: str = ""
    shape: tuple[int, ...] = ()


@dataclasses.dataclass
class DatasetSummary:
    """Summary of a data set for its report.

    Histograms may also be given as (edges, counts). The report skips those that are None.

    Attributes:
      title: Name of the data set.
      level_of_theory: Level of theory of the labels.
      files: Names of the source files.
      elements: Number of atoms by symbol.
      num_structures: Number of structures, N.
      num_molecules: Number of molecules, n_s.
      n_atoms: Histogram of the number of atoms per structure.
      conformers: Histogram of the number of conformations per molecule.
      energy_per_atom: Histogram of the energy minus the per-element reference, divided by the
        number of atoms (eV/atom).
      total_energy_per_atom: Histogram of the total energy divided by the number of atoms (eV/atom).
      force: Histogram of the norms of the forces on atoms (eV/Å), with logarithmic bins.
      shortest_distance: Histogram of the shortest distance between two atoms of a structure (Å).
      charges: Number of structures by total charge in e.
      labels: Fraction of structures with a label, from 0 to 1: {"energy": 1.0, "forces": 0.98}.
      properties: Further labels by name.
      reference: Name of the reference that is subtracted in `energy_per_atom`.
      reference_energies: Reference energies in eV by symbol.
      counts: Further counts, such as numbers of skipped structures by reason.
      notes: Notes for the reader.
      problems: Problems of the data.
    """

    title: str
    level_of_theory: str
    files: Sequence[str]
    elements: Mapping[str, int]
    num_structures: int
    num_molecules: int
    n_atoms: Histogram | None = None
    conformers: Histogram | None = None
    energy_per_atom: Histogram | None = None
    total_energy_per_atom: Histogram | None = None
    force: Histogram | None = None
    shortest_distance: Histogram | None = None
    charges: Mapping[float, int] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    properties: Mapping[str, PropertySummary] = dataclasses.field(default_factory=dict)
    reference: str = "per-element least squares"
    reference_energies: Mapping[str, float] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()

    def __post_init__(self):
        for name, *_ in DISTRIBUTIONS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, Histogram):
                setattr(self, name, Histogram.of_counts(*value))
        unknown = [symbol for symbol in self.elements if symbol not in atomic_numbers]
        if unknown:
            raise ValueError(f"elements: {unknown[0]!r} is not the symbol of an element")
        for name, share in [
            *self.labels.items(),
            *((n, p.labelled) for n, p in self.properties.items()),
        ]:
            if not 0 <= share <= 1:
                raise ValueError(
                    f"the share of structures with {name!r} must be between 0 and 1, received {share}"
                )

    @property
    def mean_conformers(self) -> float:
        """Mean number of conformations per molecule, n_c; NaN without molecules."""
        return self.num_structures / self.num_molecules if self.num_molecules else math.nan

    def symbols(self) -> list[str]:
        """Return the symbols of the elements in the order of atomic numbers."""
        return sorted(self.elements, key=atomic_numbers.__getitem__)

    def distributions(self) -> dict[str, tuple[str, str, str, Histogram]]:
        """Return {title: (axis label, unit, counted objects, histogram)} of all non-empty ones."""
        given = ((title, *texts, getattr(self, name)) for name, title, *texts in DISTRIBUTIONS)
        return {title: (*texts, h) for title, *texts, h in given if h is not None and h.known}

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values, ready for JSON; NaN and infinity become None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {
            "mean_conformers": self.mean_conformers
        }
        return _plain(fields)


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


def markdown(summary: DatasetSummary) -> str:
    """Return the text of `dataset.md`."""
    lines = [f"# {_inline(summary.title)}", ""]
    lines += [f"> **Problem:** {_inline(problem)}\n" for problem in summary.problems]
    lines += [
        *_table(*_overview(summary)),
        "",
        f"Source: {', '.join(map(_inline, summary.files)) or 'not told'}",
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
    console = console or Console()
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
        for place, name in enumerate(header):
            table.add_column(
                Text(name),
                justify="left" if place == 0 or name in _TEXT_COLUMNS else "right",
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
            ("label", "structures that have it"),
            [(k, _percent(v)) for k, v in summary.labels.items()],
        ),
        "Distributions": _distribution_table(summary, brief),
        "Elements": (header, elements),
        "Total charge": (
            ("charge (e)", "structures", "share"),
            [
                (_charge(charge), count, _percent(count / max(summary.num_structures, 1)))
                for charge, count in sorted(summary.charges.items())
            ],
        ),
        "Further labels": (
            ("label", "shape", "unit", "structures that have it", "min", "max"),
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
        whole = h.of_whole_numbers and all(value == round(value) for value in values)
        row = [h.known, h.missing, h.mean, *(int(value) if whole else value for value in values)]
        rows.append((f"{title} ({unit})" if unit else title, *(row[3:] if brief else row)))
    return ("", *(header[3:] if brief else header)), rows


def _charge(charge: float) -> str:
    return f"{charge:+g}".replace("-", "−") if charge else "0"


def _exact(energy: float | None) -> str | None:
    """Format a reference energy with six decimals, since users may copy it."""
    return None if energy is None else f"{energy:.6f}"


def dataset_figure(summary: DatasetSummary):
    """Return a matplotlib `Figure` with a panel per distribution, and for elements and charges."""
    distributions = summary.distributions()
    bars = {}
    elements = {s: summary.elements[s] for s in summary.symbols() if summary.elements[s]}
    charges = {_charge(c): n for c, n in sorted(summary.charges.items()) if n}
    if elements:
        bars["Elements"] = (elements, sum(elements.values()), "element", "share of atoms (%)")
    if len(charges) > 1:
        bars["Total charge"] = (
            charges,
            summary.num_structures,
            "total charge (e)",
            "share of structures (%)",
        )
    titles = [*distributions, *bars] or ["No data"]
    fig, axes = figures.figure(*titles, size=(9.2, 2.75 * math.ceil(len(titles) / 2) + 0.2))
    axes = dict(zip(titles, np.atleast_1d(axes)))
    for title, (label, unit, counted, histogram) in distributions.items():
        _draw_histogram(axes[title], histogram, f"{label} ({unit})" if unit else label, counted)
    for title, (counts, total, label, share) in bars.items():
        _draw_bars(axes[title], counts, total, label, share)
    return fig


def _draw_histogram(ax, h: Histogram, label: str, counted: str) -> None:
    """Draw a histogram with its median; the x axis is logarithmic if the bins are."""
    ax.set(xlabel=label, ylabel=counted)
    edges, counts = _shown(h)
    beyond = h.known - int(counts.sum())
    median = h.quantile(0.5)
    note = f"median {number(int(median) if h.of_whole_numbers else median)}"
    note += f" · {figures.format_tick(beyond)} outside" if beyond else ""
    ax.set_title(note, loc="right", fontsize=8.5, color=figures.VERMILLION)
    if not len(counts):
        ax.text(
            0.5,
            0.5,
            "all values outside",
            transform=ax.transAxes,
            ha="center",
            va="center",
            color=figures.GREY,
        )
        return
    widths = np.diff(edges)
    logarithmic = edges[0] > 0 and widths[-1] > 3 * widths[0]
    ax.stairs(counts, edges, fill=True, color=figures.BLUE, alpha=0.85, linewidth=0)
    if logarithmic:
        ax.set_xscale("log")
        if edges[-1] < 300 * edges[0]:
            ax.xaxis.set_major_locator(figures.LogLocator(subs=(1, 2, 5), numticks=12))
        ax.xaxis.set_major_formatter(figures.FuncFormatter(figures.format_tick))
        ax.xaxis.set_minor_formatter(figures.NullFormatter())
    else:
        ax.xaxis.set_major_locator(figures.MaxNLocator(7, integer=label.startswith("number")))
    pad = 0.0 if len(counts) > 8 else 1.0 if h.of_whole_numbers else 0.0
    ax.set_xlim(edges[0] - pad, edges[-1] + pad)
    ax.set_ylim(0, 1.06 * max(counts.max(), 1))
    ax.yaxis.set_major_locator(figures.MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(figures.FuncFormatter(figures.format_tick))
    ax.axvline(h.quantile(0.5), color=figures.VERMILLION, linewidth=1.4)


def _shown(h: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Return edges and counts of the bins to draw, without outliers that compress the plot."""
    filled = np.flatnonzero(h.counts)
    if not len(filled):
        return h.edges[:0], h.counts[:0]
    first, last = filled[0], filled[-1]
    if h.known >= 200:
        low, high = np.searchsorted(h.edges, [h.quantile(q) for q in (5e-4, 0.9995)])
        first, last = max(first, min(low - 2, last)), min(last, max(high + 1, first))
    return _coarser(h.edges[first : last + 2], h.counts[first : last + 1], 80)


def _coarser(edges: np.ndarray, counts: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge neighboring bins to at most `most` bins; the last one may be narrower."""
    step = math.ceil(len(counts) / most)
    return np.append(edges[:-1:step], edges[-1]), np.add.reduceat(
        counts, np.arange(0, len(counts), step)
    )


def _draw_bars(ax, counts: Mapping[str, int], total: int, label: str, share: str) -> None:
    """Draw bars on a log axis, so that rare elements are visible, with percentages on top."""
    values = 100 * np.array(list(counts.values()), float) / max(total, 1)
    x = np.arange(len(values))
    ax.bar(x, values, width=0.68, color=figures.GREEN)
    fine = len(values) <= 14
    for place, value in zip(x, values):
        if fine:
            ax.annotate(
                f"{value:.2g}" if value < 99.95 else "100",
                (place, value),
                (0, 2),
                ha="center",
                textcoords="offset points",
                fontsize=8,
                color=figures.GREY,
            )
    ax.set_xticks(x, [figures.escape_label(name) for name in counts], fontsize=9 if fine else 6)
    bottom = min(10 ** math.floor(math.log10(values.min()) - 0.3), 1.0)
    ax.set(
        xlabel=label,
        ylabel=share,
        yscale="log",
        ylim=(bottom, 400),
        xlim=(-0.7, max(len(values), 4) - 0.3),
    )
    ax.yaxis.set_major_locator(figures.LogLocator(numticks=6))
    ax.yaxis.set_major_formatter(figures.FuncFormatter(figures.format_tick))
    ax.minorticks_off()
    ax.grid(visible=False, axis="x")


def _plain(value: Any) -> Any:
    """Convert to plain values for JSON; NaN and infinity become None."""
    if isinstance(value, Histogram):
        return _plain(value.to_json())
    if dataclasses.is_dataclass(value):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        "---" if place == 0 or name in _TEXT_COLUMNS else "---:"
        for place, name in enumerate(header)
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

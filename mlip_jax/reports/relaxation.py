"""Report of relaxations: `report.html`, a self-contained page, and `metrics.json`."""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlip_jax.reports import figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.reports.molecules import Picture, molecule_figure
from mlip_jax.workdir import write_text

STATUSES = ("converged", "step limit", "diverged", "failed")
_NUMBERS = {
    "steps": "steps",
    "energy_start": "energy_start_ev",
    "energy": "energy_ev",
    "rmsd": "rmsd_ang",
    "fmax_start": "fmax_start_ev_per_ang",
    "fmax": "fmax_ev_per_ang",
    "n_atoms": "n_atoms",
}
_MAX_REASONS = 25


@dataclasses.dataclass(frozen=True)
class Relaxations:
    """Columns of results.csv, each (M,); unknown numbers are NaN.

    Attributes:
      index: Index of the molecule.
      status: Index in STATUSES.
      steps: Number of steps.
      n_atoms: Number of atoms.
      energy_start: Energy of the start geometry in eV.
      energy: Energy of the relaxed geometry in eV.
      fmax_start: Largest force on an atom of the start geometry in eV/Å.
      fmax: Largest force on an atom of the relaxed geometry in eV/Å.
      rmsd: Root mean square distance between start and relaxed geometry after alignment in Å.
      outside: 1 if the relaxed geometry is outside of the domain of the force field, otherwise 0.
      reasons: {(status, kind of reason): (count, an example with the name of its molecule)}.
    """

    index: np.ndarray
    status: np.ndarray
    steps: np.ndarray
    n_atoms: np.ndarray
    energy_start: np.ndarray
    energy: np.ndarray
    fmax_start: np.ndarray
    fmax: np.ndarray
    rmsd: np.ndarray
    outside: np.ndarray
    reasons: Mapping[tuple[str, str], tuple[int, str]]

    def __len__(self) -> int:
        return len(self.status)

    def count(self, status: str) -> int:
        """Return the number of molecules with a status."""
        return int((self.status == STATUSES.index(status)).sum())

    def of(self, *statuses: str) -> np.ndarray:
        """Return which molecules have one of the given statuses, (M,) bool."""
        return np.isin(self.status, [STATUSES.index(s) for s in statuses])

    @property
    def gained(self) -> np.ndarray:
        """Energy at the start minus energy at the end in eV, (M,)."""
        return self.energy_start - self.energy


def read_results(path: Path) -> Relaxations:
    """Read a results.csv; reasons of failures are counted by kind, with one example each."""
    index, status, outside, numbers = [], [], [], {name: [] for name in _NUMBERS}
    reasons: dict[tuple[str, str], tuple[int, str]] = collections.OrderedDict()
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            index.append(int(row["index"]))
            status.append(STATUSES.index(row["status"]))
            for name, column in _NUMBERS.items():
                numbers[name].append(float(row[column] or "nan"))
            outside.append(
                float(row.get("outside_domain") or "nan")
            )  # tables of earlier runs do not have it
            if row["reason"] or row["status"] != "converged":
                key = row["status"], kind_of_reason(row["reason"])
                who = row["name"] or row["smiles"] or f"molecule {row['index']}"
                count, example = reasons.get(
                    key, (0, f"{who}: {row['reason']}" if row["reason"] else who)
                )
                reasons[key] = count + 1, example
    return Relaxations(
        np.array(index, np.int64),
        np.array(status, np.int8),
        outside=np.array(outside, np.float64),
        **{k: np.array(v, np.float64) for k, v in numbers.items()},
        reasons=reasons,
    )


def kind_of_reason(reason: str) -> str:
    """Return the reason without details of one molecule: location in a file, quoted texts, numbers.

    >>> kind_of_reason("a.smi line 12: RDKit cannot read the SMILES 'C1CC'")
    'RDKit cannot read the SMILES …'
    >>> kind_of_reason("atoms 3 and 7 are 0.12 Å apart")
    'atoms … and … are … Å apart'
    """
    reason = re.sub(r"^\S.*? (line|structure|molecule|row) \d+: ", "", reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason)
    return re.sub(r"(?<![A-Za-z])[-−]?\d+(\.\d+)?([eE][-+]?\d+)?(?![A-Za-z\d])", "…", reason)


def metrics(results: Relaxations, seconds: float) -> dict[str, Any]:
    """Return the content of `metrics.json`: counts, quantiles and reasons; None if unknown."""
    done = results.of("converged", "step limit")
    quantities = {
        "steps": results.steps,
        "energy_gained_ev": results.gained,
        "rmsd_ang": results.rmsd,
        "fmax_start_ev_per_ang": results.fmax_start,
        "fmax_ev_per_ang": results.fmax,
    }
    ran = len(results) - results.count("failed")
    judged = np.isfinite(results.outside)
    return {
        "molecules": len(results),
        **{s.replace(" ", "_"): results.count(s) for s in STATUSES},
        "converged_share": results.count("converged") / len(results) if len(results) else None,
        "seconds": round(seconds, 3),
        "molecules_per_second": ran / seconds if seconds > 0 else None,
        "steps_in_all": int(np.nansum(results.steps)),
        "outside_domain": int(results.outside[judged].sum()) if judged.any() else None,
        **{name: _quantiles(values[done]) for name, values in quantities.items()},
        "reasons": [
            {"status": s, "reason": kind, "count": count, "example": example}
            for (s, kind), (count, example) in _by_count(results)
        ],
    }


def _by_count(results: Relaxations):
    return sorted(results.reasons.items(), key=lambda item: -item[1][0])


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Return mean and quantiles of the finite values, None if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    names = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {
        "mean": float(values.mean()),
        **{k: float(np.quantile(values, q)) for k, q in names.items()},
    }


def write_relaxation_report(
    workdir: str | os.PathLike,
    results: Relaxations,
    *,
    title: str,
    seconds: float,
    info: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[Picture] = (),
    files: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      results: Result of `read_results`.
      title: Headline of the page.
      seconds: Time that the relaxations took, in seconds.
      info: Sections of names and values: settings, force field, hardware.
      pictures: Molecules before and after.
      files: Names of further files in the workdir, to list on the page.

    Returns:
      Path of `report.html`.
    """
    workdir = Path(workdir)
    content = metrics(results, seconds)
    # Write the metrics first, so that they exist even if a figure fails.
    write_text(
        workdir / "metrics.json",
        json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
    )
    body = [
        page.heading(title, 1),
        *_headline(content),
        *_distributions(results),
        *_pictures(pictures),
        *_reasons(results),
        *sections.provenance(info, files),
    ]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def _headline(content: Mapping[str, Any]) -> Iterator[str]:
    total, share = content["molecules"], content["converged_share"]
    percent = "–" if share is None else f"{100 * share:.4g}"
    steps, gained = content["steps"] or {}, content["energy_gained_ev"] or {}
    outside = content["outside_domain"]
    domain = (
        []
        if outside is None
        else [
            (
                "outside of the domain",
                page.number(outside),
                "",
                "end farther from training than 99 % of validation",
            )
        ]
    )
    yield page.cards(
        [
            (
                "molecules",
                page.number(total),
                "",
                f"{page.number(content['steps_in_all'])} steps in all",
            ),
            (
                "converged",
                percent,
                "%",
                f"{page.number(content['converged'])} of {page.number(total)}; "
                f"{page.number(content['step_limit'])} at the step limit, {page.number(content['diverged'])} diverged",
            ),
            ("failed", page.number(content["failed"]), "", "not relaxed at all; reasons below"),
            (
                "speed",
                page.number(content["molecules_per_second"]),
                "molecules/s",
                f"{page.duration(content['seconds'])} in all, compilation included",
            ),
            (
                "steps, median",
                page.number(steps.get("median")),
                "",
                f"95 % need at most {page.number(steps.get('p95'))}",
            ),
            (
                "energy gained, median",
                page.number(gained.get("median")),
                "eV",
                f"mean {page.number(gained.get('mean'))} eV",
            ),
            *domain,
        ]
    )


def _distributions(results: Relaxations) -> Iterator[str]:
    yield page.heading("Distributions")
    if not results.of("converged", "step limit").any():
        yield page.paragraph("No molecule was relaxed, so there is nothing to show.")
        return
    yield page.figure(
        distribution_figure(results),
        (
            "Steps, energy at the start less energy at the end, root mean square distance between start and end after "
            "alignment, and the largest force on an atom, of molecules that converged or came to the step limit. Lines are "
            "medians."
        ),
        wide=True,
    )


def distribution_figure(results: Relaxations) -> Figure:
    """Draw histograms of steps, energy gained (eV), RMSD (Å), and fmax before and after (eV/Å)."""
    done = results.of("converged", "step limit")
    fig, axes = figures.figure(
        "Steps", "Energy gained", "RMSD to the start", "Largest force", size=(9.2, 6.0)
    )
    _histogram(axes[0], results.steps[done], "steps", whole=True)
    _histogram(axes[1], results.gained[done], "energy gained (eV)")
    _histogram(axes[2], results.rmsd[done], "RMSD (Å)")
    _forces(axes[3], results.fmax_start[done], results.fmax[done])
    return fig


def _histogram(ax, values: np.ndarray, label: str, whole: bool = False) -> None:
    """Draw a histogram without outliers, and annotate the median and the number of outliers."""
    values = values[np.isfinite(values)]
    ax.set(xlabel=label, ylabel="molecules")
    if not len(values):
        figures.mark_empty(ax)
        return
    low, high = (
        np.quantile(values, [0.002, 0.998]) if len(values) > 500 else (values.min(), values.max())
    )
    low = min(low, 0.0)
    high = high if high > low else low + 1.0
    bins = min(60, max(10, int(2 * math.sqrt(len(values)))))
    edges = np.linspace(low, high, bins + 1)
    if whole:
        width = max(1, math.ceil((high - low + 1) / bins))
        edges = np.arange(math.floor(low), high + width + 1, width) - 0.5
    counts, _ = np.histogram(values, edges)
    ax.stairs(counts, edges, fill=True, color=figures.BLUE, alpha=0.85, linewidth=0)
    median = float(np.median(values))
    ax.axvline(median, color=figures.VERMILLION, linewidth=1.4)
    outside = len(values) - int(counts.sum())
    note = f"median {page.number(int(median) if whole else median)}" + (
        f" · {outside:,} outside" if outside else ""
    )
    ax.set_title(note, loc="right", fontsize=8.5, color=figures.VERMILLION)
    ax.set_xlim(edges[0], edges[-1])
    _count_axis(ax)


def _forces(ax, before: np.ndarray, after: np.ndarray) -> None:
    """Draw histograms of the largest forces (eV/Å) before and after, on a logarithmic axis."""
    ax.set(xlabel="largest force on an atom (eV/Å)", ylabel="molecules", xscale="log")
    found = {"start": (before, figures.GREY), "end": (after, figures.BLUE)}
    values = {k: (v[np.isfinite(v) & (v > 0)], c) for k, (v, c) in found.items()}
    known = np.concatenate([v for v, _ in values.values()])
    if not len(known):
        ax.set_xscale("linear")
        figures.mark_empty(ax)
        return
    low, high = math.log10(known.min()), math.log10(known.max())
    edges = np.logspace(low - 0.05, max(high, low + 0.5) + 0.05, 51)
    for name, (v, color) in values.items():
        ax.stairs(
            np.histogram(v, edges)[0],
            edges,
            fill=True,
            color=color,
            alpha=0.6,
            linewidth=0,
            label=name,
        )
    figures.add_legend(ax, loc="upper center", ncols=2)
    _count_axis(ax)
    ax.set_ylim(top=1.2 * ax.get_ylim()[1])  # space for the legend


def _count_axis(ax) -> None:
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(figures.MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(figures.FuncFormatter(figures.format_tick))


def _pictures(pictures: Sequence[Picture]) -> Iterator[str]:
    if pictures:
        yield page.heading("Some molecules before and after")
        yield page.figure(
            molecule_figure(pictures),
            (
                "Molecules at the start (above) and relaxed (below), aligned and seen from the same side, from small to "
                "large changes of their geometry."
            ),
            wide=True,
        )


def _reasons(results: Relaxations) -> Iterator[str]:
    """Yield a table of the reasons why molecules did not converge, the most frequent first."""
    yield page.heading("Not converged")
    if not results.reasons:
        yield page.paragraph("All molecules converged.")
        return
    rows = [
        (
            kind or "–",
            status,
            count,
            f"{100 * count / len(results):.3g} %",
            example if len(example) < 160 else example[:159] + "…",
        )
        for (status, kind), (count, example) in _by_count(results)
    ]
    yield page.table(("reason", "status", "molecules", "share", "for example"), rows[:_MAX_REASONS])
    if len(rows) > _MAX_REASONS:
        yield page.paragraph(
            f"{len(rows) - _MAX_REASONS} rarer reasons are not shown; results.csv has them all."
        )


def choose(
    results: Relaxations, num_conformers: int = 1, count: int = 6, most_atoms: int = 60
) -> list[int]:
    """Choose converged molecules to show, and return their indices from small to large RMSD.

    Large molecules, and several conformers of one molecule, are chosen only if there are too few
    others.

    Args:
      results: Result of `read_results`.
      num_conformers: Number of conformers per molecule.
      count: Maximum number of molecules to show.
      most_atoms: Number of atoms up to which a molecule is small.
    """
    good = np.flatnonzero(
        results.of("converged") & np.isfinite(results.rmsd) & (results.n_atoms > 1)
    )
    small = good[results.n_atoms[good] <= most_atoms]
    good = small if len(small) >= count else good
    good = good[np.lexsort((results.index[good], results.rmsd[good]))]
    one_of_each = np.sort(np.unique(results.index[good] // num_conformers, return_index=True)[1])
    good = good[one_of_each] if len(one_of_each) >= count else good
    places = (
        np.unique(np.linspace(0, len(good) - 1, count).round().astype(int)) if len(good) else []
    )
    return [int(results.index[good[i]]) for i in places]

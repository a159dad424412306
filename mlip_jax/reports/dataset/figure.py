"""Figure of a data set: one panel per distribution, and bars of elements and charges."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mlip_jax.datasets.quality.histogram import Histogram
from mlip_jax.reports import figures
from mlip_jax.reports.dataset.summary import DatasetSummary
from mlip_jax.reports.html_page import number


def format_charge(charge: float) -> str:
    return f"{charge:+g}".replace("-", "−") if charge else "0"


def dataset_figure(summary: DatasetSummary):
    """Return a matplotlib `Figure` with a panel per distribution, and for elements and charges."""
    distributions = summary.distributions()
    bars = {}
    elements = {s: summary.elements[s] for s in summary.symbols() if summary.elements[s]}
    charges = {format_charge(c): n for c, n in sorted(summary.charges.items()) if n}
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
    edges, counts = _bins_to_draw(h)
    beyond = h.known - int(counts.sum())
    median = h.quantile(0.5)
    note = f"median {number(int(median) if h.has_integer_bins else median)}"
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
    pad = 0.0 if len(counts) > 8 else 1.0 if h.has_integer_bins else 0.0
    ax.set_xlim(edges[0] - pad, edges[-1] + pad)
    ax.set_ylim(0, 1.06 * max(counts.max(), 1))
    ax.yaxis.set_major_locator(figures.MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(figures.FuncFormatter(figures.format_tick))
    ax.axvline(h.quantile(0.5), color=figures.VERMILLION, linewidth=1.4)


def _bins_to_draw(h: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Return edges and counts of the bins to draw, without outliers that compress the plot."""
    filled = np.flatnonzero(h.counts)
    if not len(filled):
        return h.edges[:0], h.counts[:0]
    first, last = filled[0], filled[-1]
    if h.known >= 200:
        low, high = np.searchsorted(h.edges, [h.quantile(q) for q in (5e-4, 0.9995)])
        first, last = max(first, min(low - 2, last)), min(last, max(high + 1, first))
    return _merge_bins(h.edges[first : last + 2], h.counts[first : last + 1], max_bins=80)


def _merge_bins(
    edges: np.ndarray, counts: np.ndarray, max_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge neighboring bins to at most `max_bins` bins; the last one may be narrower."""
    step = math.ceil(len(counts) / max_bins)
    return np.append(edges[:-1:step], edges[-1]), np.add.reduceat(
        counts, np.arange(0, len(counts), step)
    )


def _draw_bars(ax, counts: Mapping[str, int], total: int, label: str, share: str) -> None:
    """Draw bars on a log axis, so that rare elements are visible, with percentages on top."""
    values = 100 * np.array(list(counts.values()), float) / max(total, 1)
    x = np.arange(len(values))
    ax.bar(x, values, width=0.68, color=figures.GREEN)
    fine = len(values) <= 14
    for position, value in zip(x, values):
        if fine:
            ax.annotate(
                f"{value:.2g}" if value < 99.95 else "100",
                (position, value),
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

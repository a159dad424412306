"""Histograms of relaxations: steps, energies, distances and forces."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from mlip_jax.reports import figures
from mlip_jax.reports import html_page as page
from mlip_jax.reports.relaxation.results import Relaxations


def distribution_figure(results: Relaxations) -> Figure:
    """Draw histograms of steps, energy gained (eV), RMSD (Å), and fmax before and after (eV/Å)."""
    done = results.of("converged", "step limit")
    fig, axes = figures.figure(
        "Steps", "Energy decrease", "RMSD to the start", "Largest force", size=(9.2, 6.0)
    )
    _histogram(axes[0], results.steps[done], "steps", whole=True)
    _histogram(axes[1], results.gained[done], "energy decrease (eV)")
    _histogram(axes[2], results.rmsd[done], "RMSD (Å)")
    _forces(axes[3], results.fmax_start[done], results.fmax[done])
    return fig


def cell_figure(results: Relaxations) -> Figure:
    """Draw histograms of the change of the volume (%) and of the final pressure (GPa)."""
    done = results.of("converged", "step limit")
    fig, axes = figures.figure("Volume", "Pressure", size=(9.2, 3.0))
    _histogram(axes[0], results.volume_change, "change of the volume (%)")
    _histogram(axes[1], results.pressure[done], "pressure (GPa)")
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
    text = f"{median:g}" if whole else page.number(median)
    note = f"median {text}" + (f" · {outside:,} outside" if outside else "")
    ax.set_title(note, loc="right", fontsize=8.5, color=figures.VERMILLION)
    ax.set_xlim(edges[0], edges[-1])
    if whole:
        ax.xaxis.set_major_locator(figures.MaxNLocator(integer=True))
    _count_axis(ax)


def _forces(ax, before: np.ndarray, after: np.ndarray) -> None:
    """Draw histograms of the largest forces (eV/Å) before and after, on a logarithmic axis."""
    ax.set(xlabel="largest force on an atom (eV/Å)", ylabel="molecules", xscale="log")
    forces = {"start": (before, figures.GREY), "end": (after, figures.BLUE)}
    values = {k: (v[np.isfinite(v) & (v > 0)], c) for k, (v, c) in forces.items()}
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

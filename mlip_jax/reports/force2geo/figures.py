"""Figures of an evaluation of relaxations.

Each function takes the values of M molecules, (M,), by force field, and returns a matplotlib
`Figure`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mlip_jax.reports import figures

# Colors of Okabe and Ito, starting with those of figures.py. Baselines are gray and dashed.
_COLORS = (figures.BLUE, figures.VERMILLION, figures.GREEN, "#CC79A7", "#E69F00", "#56B4E9")
_BASELINES = {"start": (0, (1, 1.5)), "oracle": (0, (5, 2))}
_SIZE = (4.9, 3.9)
_LOWEST, _HIGHEST = -20.0, 120.0
# _COARSE_BINS: number of bins for fewer than _MANY molecules.
_BINS, _COARSE_BINS, _MANY = 56, 28, 300


def percentages(values: Mapping[str, np.ndarray]) -> Figure:
    """Draw histograms of the energy minimization percentage from -20 to 120."""
    fig, ax = figures.figure("Energy minimization", size=_SIZE)
    num_bins = _BINS if max(map(len, values.values()), default=0) >= _MANY else _COARSE_BINS
    edges, outside = np.linspace(_LOWEST, _HIGHEST, num_bins + 1), 0
    for name, color, v in _each(values):
        share = 100 * np.histogram(v, edges)[0] / max(len(v), 1)
        filled = len(values) == 1
        ax.stairs(
            share,
            edges,
            color=color,
            linewidth=1.6,
            label=figures.escape_label(name),
            fill=filled,
            alpha=0.85 if filled else 1.0,
        )
        outside += int(((v < _LOWEST) | (v > _HIGHEST)).sum())
    for percentage in (0, 100):
        ax.axvline(percentage, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
    ax.set(
        xlabel="energy minimization (%)",
        ylabel="molecules (%)",
        xlim=(_LOWEST, _HIGHEST),
        ylim=(0, None),
    )
    return _finish(fig, ax, len(values), outside, "upper left")


def residuals(values: Mapping[str, np.ndarray], limit: float) -> Figure:
    """Draw cumulative distributions of E_relaxed - E_opt (kcal/mol) and a line at `limit`."""
    fig, ax = figures.figure("Energy above the minimum", size=_SIZE)
    _cumulative(ax, values)
    known = _finite_values(values)
    ax.axvline(limit, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_xscale("symlog", linthresh=1.0)
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    ax.set(
        xlabel="E(relaxed) − E(opt) (kcal/mol)",
        xlim=(min(1.4 * low, -0.2), max(1.4 * high, 3 * limit)),
    )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("-", "−")))
    return _finish(fig, ax, len(values), 0, "lower right")


def largest_forces(values: Mapping[str, np.ndarray], limit: float) -> Figure:
    """Draw cumulative distributions of the oracle's largest force (eV/Å) and a line at `limit`."""
    fig, ax = figures.figure("Largest force of the reference method", size=_SIZE)
    _cumulative(ax, {name: np.maximum(v, 1e-4) for name, v in values.items()})
    ax.axvline(limit, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_xscale("log")
    known = _finite_values(values)
    low, high = np.quantile(np.maximum(known, 1e-4), [0.002, 1.0]) if len(known) else (limit, limit)
    ax.set(
        xlabel="largest force on an atom (eV/Å)",
        xlim=(min(low, limit / 3), max(1.2 * high, 3 * limit)),
    )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    return _finish(fig, ax, len(values), 0, "lower right")


def against_size(values: Mapping[str, np.ndarray], sizes: np.ndarray) -> Figure:
    """Draw the percentage against the number of atoms (M,), with medians of similar sizes."""
    fig, ax = figures.figure("Energy minimization by size", size=_SIZE)
    outside = 0
    for name, color, _ in _each(values):
        known = np.isfinite(values[name])
        v, n = values[name][known], sizes[known]
        inside = (v >= _LOWEST) & (v <= _HIGHEST)
        outside += int((~inside).sum())
        # A little horizontal jitter with a fixed seed keeps dots from overlapping.
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, int(inside.sum()))
        ax.scatter(
            n[inside] + jitter,
            v[inside],
            s=9,
            color=color,
            linewidths=0,
            rasterized=True,
            alpha=float(np.clip(600 / max(len(v), 1), 0.12, 0.6)),
        )
        order = np.argsort(n, kind="stable")
        groups = [g for g in np.array_split(order, min(10, max(len(v) // 8, 1))) if len(g)]
        ax.plot(
            [n[g].mean() for g in groups],
            [np.median(v[g]) for g in groups],
            color=color,
            linewidth=2,
            marker="o",
            markersize=4,
            label=figures.escape_label(name),
        )
    ax.axhline(0, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
    ax.axhline(100, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
    ax.set(xlabel="number of atoms", ylabel="energy minimization (%)", ylim=(_LOWEST, _HIGHEST))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(fig, ax, len(values), outside, "lower left")


def _each(values):
    """Yield (name, color, finite values) per force field."""
    for number, (name, v) in enumerate(values.items()):
        yield name, _COLORS[number % len(_COLORS)], v[np.isfinite(v)]


def _cumulative(ax, values) -> None:
    """Draw cumulative percentages of all M molecules; with missing values they stay below 100 %."""
    number = 0
    for name, v in values.items():
        known = np.sort(v[np.isfinite(v)])
        style = {"color": figures.GREY, "linewidth": 1.5, "linestyle": _BASELINES.get(name)}
        if name not in _BASELINES:
            style = {"color": _COLORS[number % len(_COLORS)], "linewidth": 2}
            number += 1
        if len(known):
            share = 100 * np.arange(len(known) + 1) / len(v)
            ax.stairs(
                share[1:],
                np.append(known, max(known[-1] * 1e3, 1e9)),
                baseline=None,
                label=figures.escape_label(name),
                **style,
            )
    ax.set(ylabel="molecules (%)", ylim=(0, 102))


def _finite_values(values) -> np.ndarray:
    """Return the finite values of all force fields in one array."""
    joined = np.concatenate([np.zeros(0), *values.values()])
    return joined[np.isfinite(joined)]


def _finish(fig, ax, count, outside, legend_position) -> Figure:
    """Add a legend if there are several force fields, and the number of points outside."""
    if count > 1:
        ax.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, loc=legend_position)
    if outside:
        ax.set_title(f"{outside:,} outside", loc="right", fontsize=8.5, color=figures.GREY)
    return fig

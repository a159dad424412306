"""Figures of a diversity study: errors against conformers per molecule, and against their RMSD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mlip_jax.reports import figures
from mlip_jax.reports.diversity.generalization import NAMES

_PANELS = ("iid_s", "ood_s", "iid_c", "ood_c")
# Colors of Okabe and Ito, as in reports/figures.py.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MAX_RMSD_PANELS = 4
_LINES_IN_A_PANEL = 3  # with more lines, a legend inside the panel would hide some of them


def against_conformers(groups: Mapping[int, Sequence[Any]], name: str, unit: str) -> Figure:
    """Draw the four metrics against n_c, one line per N or n_s, with deviations over seeds.

    Args:
      groups: Seed groups (report.py) in the order of n_c, by N or n_s.
      name: "N" or "n_s".
      unit: Metric with its unit, for the y axes.
    """
    fig, axes = figures.figure(*(NAMES[n] for n in _PANELS), size=(9.2, 7.2))
    ticks = sorted({p.num_conformers for group in groups.values() for p in group})
    for ax, metric in zip(axes, _PANELS):
        drawn = []
        for color, (value, group) in zip(_cycle(len(groups)), groups.items()):
            known = [p for p in group if metric in p.metrics]
            if known:
                drawn += _line(
                    ax,
                    [p.num_conformers for p in known],
                    [p.metrics[metric] for p in known],
                    color,
                    f"${name}$ = {figures.format_tick(value)}",
                )
        _finish(ax, drawn)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.set(xlabel="conformers per molecule, $n_c$", ylabel=unit)
    if len(groups) > _LINES_IN_A_PANEL:
        _one_legend(fig, axes)
    return fig


def against_rmsd(groups: Mapping[int, Sequence[Any]], name: str, unit: str) -> Figure:
    """Draw errors of unseen conformers against their RMSD, one line per n_c.

    There is one panel per N or n_s, for the largest of them.
    """
    shown = dict(list(groups.items())[-_MAX_RMSD_PANELS:])
    fig, axes = figures.figure(
        *(f"${name}$ = {figures.format_tick(v)}" for v in shown),
        size=(9.2 if len(shown) > 1 else 6.0, 3.6 * -(-len(shown) // 2)),
    )
    for ax, group in zip(np.atleast_1d(axes), shown.values()):
        drawn = []
        for color, point in zip(_cycle(len(group)), group):
            known = sorted(point.by_rmsd)
            if known:
                centers = [0.5 * (point.edges[b] + point.edges[b + 1]) for b in known]
                drawn += _line(
                    ax,
                    centers,
                    [point.by_rmsd[b] for b in known],
                    color,
                    f"$n_c$ = {point.num_conformers}",
                )
        _finish(ax, drawn)
        ax.set(xlabel="RMSD to the nearest training conformer (Å)", ylabel=unit)
    return fig


def _one_legend(fig: Figure, axes: Sequence[Any]) -> None:
    """Replace the legends of the panels by a single legend next to them."""
    entries: dict[str, Any] = {}
    for ax in axes:
        entries |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    fig.legend(
        entries.values(), entries.keys(), loc="outside right upper", fontsize=9, frameon=False
    )


def _cycle(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]


def _line(
    ax, x: Sequence[float], spreads: Sequence[tuple[float, float | None]], color: str, label: str
) -> list[float]:
    """Draw means with error bars, and return the ends of the bars."""
    means = [mean for mean, _ in spreads]
    bars = [std or 0.0 for _, std in spreads]
    ax.errorbar(
        x,
        means,
        yerr=bars,
        color=color,
        marker="o",
        markersize=4,
        linewidth=1.6,
        capsize=2.5,
        label=label,
    )
    return [mean + sign * bar for mean, bar in zip(means, bars) for sign in (1, -1)]


def _finish(ax, drawn: list[float]) -> None:
    """Set a log scale that shows all values in `drawn`, and add a legend."""
    if not drawn:
        figures.mark_empty(ax)
        return
    figures.set_log_scale(ax, np.array(drawn))
    figures.add_legend(ax)

"""Figures of the errors of predictions: parity, and errors by size, element and subset.

Each function returns a matplotlib `Figure`.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlip_jax.datasets.statistics import element_counts
from mlip_jax.reports import errors
from mlip_jax.reports.figures import (
    BLUE,
    GREY,
    SPLIT_COLORS,
    VERMILLION,
    add_legend,
    escape_label,
    figure,
    format_tick,
    mark_empty,
    parity,
)
from mlip_jax.reports.predictions import Predictions

_MAX_BARS = 16


def energy_parity(predictions: Predictions, color: str = BLUE) -> Figure:
    """Draw predicted against reference energies per atom, both minus the same per-element energies.

    Total energies are dominated by a sum of atomic constants, compared with which errors would be
    invisible. A least-squares fit to the reference energies removes them.
    """
    elements = np.unique(predictions.numbers)
    baseline = element_counts(
        predictions.numbers, predictions.sizes, elements
    ) @ errors.element_energies(predictions, predictions.energy, elements)
    reference, predicted = (
        1e3 * (energy - baseline) / predictions.sizes
        for energy in (predictions.energy, predictions.energy_predicted)
    )
    fig, ax = figure("Energy")
    axis = "energy minus per-element fit (meV/atom)"
    error = errors.energy_errors_per_atom(predictions)
    parity(ax, reference, predicted, color=color, axis=axis, error=error, unit="meV/atom")
    return fig


def force_parity(predictions: Predictions, color: str = BLUE) -> Figure:
    """Draw predicted against reference force components in eV/Å."""
    fig, ax = figure("Forces")
    reference, predicted = predictions.forces.ravel(), predictions.forces_predicted.ravel()
    error, axis = 1e3 * errors.force_errors(predictions), "force component (eV/Å)"
    parity(ax, reference, predicted, color=color, axis=axis, error=error, unit="meV/Å")
    return fig


def energy_error_against_size(predictions: Predictions, color: str = BLUE) -> Figure:
    """Draw total-energy errors (meV) against the number of atoms, with fit ± 2 standard errors."""
    error = 1e3 * errors.energy_errors(predictions)
    known = np.isfinite(error)
    sizes, error = predictions.sizes[known], error[known]
    fig, ax = figure("Energy error against molecule size", size=(9.2, 4.2))
    low, high = _robust_limits(error)
    inside = (error >= low) & (error <= high)
    # Sizes are integers: a little horizontal jitter with a fixed seed keeps dots from overlapping.
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, inside.sum())
    dots = {"s": 9, "alpha": float(np.clip(800 / max(inside.sum(), 1), 0.08, 0.6)), "linewidths": 0}
    ax.scatter(sizes[inside] + jitter, error[inside], color=color, rasterized=True, **dots)
    ax.axhline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    fit = errors.energy_slope(predictions)
    if math.isfinite(fit.slope):
        grid = np.linspace(sizes.min(), sizes.max(), 100)
        line, stderr = fit.line(grid)
        uncertainty = f" ± {fit.stderr:.3g}" if math.isfinite(fit.stderr) else ""
        ax.fill_between(
            grid, line - 2 * stderr, line + 2 * stderr, color=VERMILLION, alpha=0.25, linewidth=0
        )
        ax.plot(
            grid,
            line,
            color=VERMILLION,
            linewidth=2,
            label=f"slope {fit.slope:+.3g}{uncertainty} meV/atom",
        )
        add_legend(ax, loc="upper left")
    ax.set(xlabel="number of atoms", ylabel="predicted − reference (meV)", ylim=(low, high))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _annotate_outside(ax, error.size - int(inside.sum()))
    return fig


def error_distributions(splits: dict[str, Predictions]) -> Figure:
    """Draw densities of energy errors (meV/atom) and force-component errors (meV/Å) per split."""
    fig, axes = figure("Energy errors", "Force errors", size=(9.2, 3.9))
    kinds = (errors.energy_errors_per_atom, lambda p: 1e3 * errors.force_errors(p).ravel())
    for ax, unit, kind in zip(axes, ("meV/atom", "meV/Å"), kinds, strict=True):
        values = {name: kind(p) for name, p in splits.items()}
        values = {name: v[np.isfinite(v)] for name, v in values.items()}
        values = {name: v for name, v in values.items() if v.size}
        ax.set(
            xlabel=f"predicted − reference ({unit})", ylabel=f"density (1/({unit}))", yscale="log"
        )
        if not values:
            mark_empty(ax)
            continue
        # Use the median over splits, so that outliers of a small split do not compress the others.
        reach = (
            1.3 * float(np.median([np.percentile(np.abs(v), 99.5) for v in values.values()])) or 1.0
        )
        edges = np.linspace(-reach, reach, 82)
        # Empty bins extend below the axis, so that single bars have sides.
        floor = 0.5 / (max(v.size for v in values.values()) * (edges[1] - edges[0]))
        for name, v in values.items():
            counts, _ = np.histogram(v, edges)
            density = counts / (v.size * np.diff(edges))
            style = {
                "color": SPLIT_COLORS.get(name, GREY),
                "linewidth": 1.6,
                "label": escape_label(name),
            }
            ax.stairs(np.maximum(density, 0.5 * floor), edges, baseline=None, **style)
        ax.set_ylim(bottom=floor)
        add_legend(ax)
        outside = sum(int(np.sum(np.abs(v) > reach)) for v in values.values())
        _annotate_outside(ax, outside, side="left")
    return fig


def element_errors(groups: list[errors.GroupErrors], color: str = BLUE) -> Figure:
    """Draw the force error per element in meV/Å: bars for the MAE, markers for the RMSE."""
    groups = [g for g in groups if math.isfinite(g.force_mae_mev_per_ang)]
    fig, ax = figure("Force error per element", size=(9.2, 3.6))
    x = np.arange(len(groups))
    ax.bar(x, [g.force_mae_mev_per_ang for g in groups], width=0.62, color=color, label="MAE")
    rmse = [g.force_rmse_mev_per_ang for g in groups]
    ax.scatter(x, rmse, color=VERMILLION, marker="D", s=28, label="RMSE", zorder=3)
    ax.set_xticks(x, [f"{g.label}\n{format_tick(g.num_atoms)}" for g in groups])
    ax.set(xlabel="element, and number of atoms", ylabel="force error (meV/Å)", ylim=(0, None))
    ax.set_xlim(-0.7, max(len(groups), 1) - 0.3)
    ax.grid(visible=False, axis="x")
    add_legend(ax)
    return fig


def subset_errors(groups: list[errors.GroupErrors], color: str = BLUE) -> Figure:
    """Draw bars of energy MAE (meV/atom) and force MAE (meV/Å) per subset, markers for the RMSE."""
    groups = groups[:_MAX_BARS]
    fig, axes = figure(
        "Energy error per subset", "Force error per subset", size=(9.2, 1.6 + 0.3 * len(groups))
    )
    y = np.arange(len(groups))
    kinds = (
        ("energy", "energy_{}_mev_per_atom", "meV/atom"),
        ("force", "force_{}_mev_per_ang", "meV/Å"),
    )
    for ax, (name, field, unit) in zip(axes, kinds, strict=True):
        ax.barh(
            y,
            [getattr(g, field.format("mae")) for g in groups],
            height=0.62,
            color=color,
            label="MAE",
        )
        rmse = [getattr(g, field.format("rmse")) for g in groups]
        ax.scatter(rmse, y, color=VERMILLION, marker="D", s=22, label="RMSE", zorder=3)
        ax.set(xlabel=f"{name} error ({unit})", xlim=(0, None), ylim=(len(groups) - 0.4, -0.6))
        ax.set_yticks(
            y, [escape_label(g.label) for g in groups] if ax is axes[0] else [""] * len(groups)
        )
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
    add_legend(axes[1])
    return fig


def _robust_limits(values: np.ndarray) -> tuple[float, float]:
    """Return limits that include zero and the middle 99 % of the values, with a margin of 20 %."""
    if values.size == 0:
        return -1.0, 1.0
    low, high = np.percentile(values, [0.5, 99.5])
    low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.2 * (high - low) or 1.0
    return low - pad, high + pad


def _annotate_outside(ax: Axes, count: int, side: str = "right") -> None:
    """Annotate the number of points outside the axis limits."""
    if count:
        text = f"{count:,} {'point' if count == 1 else 'points'} outside"
        x = 0.97 if side == "right" else 0.03
        ax.text(x, 0.97, text, transform=ax.transAxes, ha=side, va="top", fontsize=8.5, color=GREY)

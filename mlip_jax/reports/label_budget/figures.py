"""Figures of the report on a label budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlip_jax.reports import figures
from mlip_jax.reports.molecules import draw

_COLORS = (figures.BLUE, figures.VERMILLION, figures.GREEN, figures.GREY)
_SIDE = 2.0  # inches of the picture of a molecule


def learning_curves(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw the force error of each strategy against its labels and the time of the oracle.

    Args:
      rounds: Evaluations of the rounds, by strategy.
    """
    fig, axes = figures.figure("Labels", "Time of the reference method", size=(9.2, 3.4))
    shown = [[], [], []]  # labels, minutes and errors of all strategies
    for color, (strategy, evaluations) in zip(_COLORS, rounds.items()):
        split = "test" if evaluations[0]["test"] else "valid"
        errors = [1e3 * e[split]["force_mae"] for e in evaluations]
        labels = [e["num_labels"] for e in evaluations]
        minutes = [max(e["oracle_seconds"], 1e-3) / 60 for e in evaluations]
        for values, more in zip(shown, (labels, minutes, errors)):
            values += more
        for ax, x in zip(axes, (labels, minutes)):
            ax.plot(x, errors, "o-", color=color, label=strategy, markersize=4)
    names = ("training labels", "time of the calculations (min)")
    for ax, name, values in zip(axes, names, shown):
        ax.set(xlabel=name, ylabel="force MAE (meV/Å)")
        figures.set_log_scale(ax, np.array(values, float), "x")
        figures.set_log_scale(ax, np.array(shown[2]))
        figures.add_legend(ax)
    return fig


def calibration(structures: Mapping[str, Sequence[Any]]) -> Figure:
    """Draw the true against the expected force error of each test structure.

    Args:
      structures: Columns "expected_force_error" and "force_error" (eV/Å), and "kind".
    """
    fig, ax = figures.figure("Test structures")
    expected, error = (
        1e3 * np.array(structures[name]) for name in ("expected_force_error", "force_error")
    )
    kinds = np.array(structures["kind"])
    for color, kind in zip(_COLORS, np.unique(kinds)):
        rows = kinds == kind
        ax.plot(expected[rows], error[rows], ".", color=color, label=kind, markersize=5)
    ends = [min(expected.min(), error.min()), max(expected.max(), error.max())]
    ax.plot(ends, ends, "--", color=figures.GREY, linewidth=1)
    ax.set(xlabel="expected error (meV/Å)", ylabel="error (meV/Å)")
    for which in ("x", "y"):
        figures.set_log_scale(ax, np.concatenate([expected, error]), which)
    figures.add_legend(ax)
    return fig


def labels_per_molecule(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Draw how many molecules have how many labels, by strategy.

    Args:
      counts: Number of molecules by number of labels, by strategy.
    """
    fig, ax = figures.figure("Labels per molecule", size=(5.6, 3.2))
    width = 0.8 / max(len(counts), 1)
    for k, (color, (strategy, molecules)) in enumerate(zip(_COLORS, counts.items())):
        x = np.array(sorted(int(n) for n in molecules))
        ax.bar(
            x + (k - (len(counts) - 1) / 2) * width,
            [molecules[str(n)] for n in x],
            width,
            color=color,
            label=strategy,
        )
    ax.set(xlabel="labels of a molecule", ylabel="molecules")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figures.add_legend(ax)
    return fig


def pictures(molecules: Sequence[tuple[str, Atoms]]) -> Figure:
    """Draw molecules side by side, each with a title."""
    count = max(len(molecules), 1)
    fig = Figure(figsize=(_SIDE * count, _SIDE + 0.4), facecolor="white")
    FigureCanvasAgg(fig)
    axes = fig.subplots(1, count, squeeze=False)[0]
    for ax, (title, atoms) in zip(axes, molecules):
        centered = atoms.positions - atoms.positions.mean(axis=0)
        turned = centered @ np.linalg.svd(centered, full_matrices=True)[2].T
        draw(ax, atoms.numbers, turned, float(np.abs(turned[:, :2]).max()) + 0.8)
        ax.set_title(figures.escape_label(title, 26), fontsize=8)
    return fig

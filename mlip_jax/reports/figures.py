"""Elements of figures that all reports share: style, colors, axes, parity plots, learning curves.

Functions that return a matplotlib `Figure` are independent of pyplot.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mlip_jax.reports import errors

# Colors of Okabe and Ito, which people with color vision deficiency can distinguish.
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
SPLIT_COLORS = {"train": BLUE, "valid": GREEN, "test": VERMILLION}
_DENSE = 3000  # number of points above which dots overlap too much; a density is drawn instead
# Panels of the learning curves: (title, y label, {column: split}).
PANELS = (
    ("Loss", "loss", {"train_loss": "train", "valid_loss": "valid"}),
    (
        "Energy",
        "MAE (meV/atom)",
        {"train_energy_mae_mev_per_atom": "train", "valid_energy_mae_mev_per_atom": "valid"},
    ),
    (
        "Forces",
        "MAE (meV/Å)",
        {"train_force_mae_mev_per_ang": "train", "valid_force_mae_mev_per_ang": "valid"},
    ),
    (
        "Stress",
        "MAE (meV/Å³)",
        {"train_stress_mae_mev_per_ang3": "train", "valid_stress_mae_mev_per_ang3": "valid"},
    ),
    ("Learning rate", "learning rate", {"learning_rate": "train"}),
)


def learning_curves(
    columns: dict[str, np.ndarray], layout: Sequence[tuple[str, str, dict[str, str]]] = PANELS
) -> Figure | None:
    """Draw loss, errors and learning rate against the step.

    Args:
      columns: Columns of the metrics file by name, each (R,) with NaN where not measured. The x
        axis is `step`, or `epoch`, or the row number if both are missing.
      layout: (title, y label, {column: split}) of each panel. Panels without data are skipped.

    Returns:
      The figure, or None if no panel has data.
    """
    rows = max((len(column) for column in columns.values()), default=0)
    axis = next(
        (name for name in ("step", "epoch") if np.isfinite(columns.get(name, [np.nan])).any()),
        "row",
    )
    x = columns.get(axis, np.arange(rows, dtype=float))
    panels = []
    for title, ylabel, series in layout:
        curves = {name: _curve(x, columns[name]) for name in series if name in columns}
        curves = {name: curve for name, curve in curves.items() if curve[0].size}
        if curves:
            panels.append((title, ylabel, series, curves))
    if not panels:
        return None
    fig, axes = figure(
        *(title for title, *_ in panels), size=(9.2, 3.1 * math.ceil(len(panels) / 2) + 0.3)
    )
    for ax, (_, ylabel, series, curves) in zip(np.atleast_1d(axes), panels, strict=True):
        for name, (steps, values) in curves.items():
            _draw_curve(
                ax,
                steps,
                values,
                SPLIT_COLORS[series[name]] if len(series) > 1 else GREY,
                series[name],
            )
        ax.set(xlabel=axis, ylabel=ylabel)
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_formatter(FuncFormatter(format_tick))
        set_log_scale(ax, np.concatenate([values for _, values in curves.values()]))
        if len(series) > 1:
            add_legend(ax)
    return fig


def figure(
    *titles: str, size: tuple[float, float] = (4.5, 4.3)
) -> tuple[Figure, Axes | np.ndarray]:
    """Return a figure and its axes, with one styled panel per title and two panels per row.

    A single panel is returned as `Axes`, several panels as an array of `Axes`.
    """
    fig = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    grid = fig.subplots(math.ceil(len(titles) / 2), min(len(titles), 2), squeeze=False).ravel()
    for ax in grid[len(titles) :]:
        ax.remove()
    for ax, title in zip(grid, titles, strict=False):
        ax.set_title(title, fontsize=11, fontweight="bold", loc="left")
        ax.grid(visible=True, color="#dddddd", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        ax.tick_params(which="both", colors="#333333", labelsize=9, length=3)
        ax.xaxis.label.set_size(10)
        ax.yaxis.label.set_size(10)
    return fig, grid[0] if len(titles) == 1 else grid[: len(titles)]


def parity(
    ax: Axes,
    reference: np.ndarray,
    predicted: np.ndarray,
    *,
    color: str,
    axis: str,
    error: np.ndarray,
    unit: str,
) -> None:
    """Draw predicted against reference values on equal axes.

    The axes show all references and the middle 80 % of the predictions. Few points are drawn as
    dots, many points as a density.

    Args:
      ax: Axes to draw on.
      reference: Reference values (N,) in the unit of `axis`.
      predicted: Predicted values (N,) in the unit of `axis`.
      color: Color of the dots.
      axis: Quantity and unit for the labels of both axes.
      error: Errors in `unit`, annotated as MAE and RMSE.
      unit: Unit of `error`.
    """
    known = np.isfinite(reference) & np.isfinite(predicted)
    reference, predicted = reference[known], predicted[known]
    ax.set(xlabel=f"reference {axis}", ylabel=f"predicted {axis}", aspect="equal")
    if reference.size == 0:
        mark_empty(ax)
        return
    # A few extreme predictions must not compress all others to a dot, but predictions that are
    # all shifted must not leave an empty panel.
    middle = np.percentile(predicted, [10, 90])
    low, high = min(reference.min(), middle[0]), max(reference.max(), middle[1])
    pad = 0.05 * (high - low) or 1.0
    low, high = low - pad, high + pad
    inside = (predicted >= low) & (predicted <= high)
    if reference.size > _DENSE:
        extent = (low, high, low, high)
        style = {"gridsize": 90, "bins": "log", "cmap": "viridis", "linewidths": 0.1, "mincnt": 1}
        cells = ax.hexbin(
            reference[inside], predicted[inside], extent=extent, rasterized=True, **style
        )
        # Place the color bar inside the panel, in a corner without good predictions, so that all
        # parity plots have the same frame.
        bar = ax.figure.colorbar(
            cells, cax=ax.inset_axes([0.6, 0.13, 0.36, 0.025]), orientation="horizontal"
        )
        bar.ax.set_title("number of points", fontsize=8, pad=3)
        bar.ax.tick_params(labelsize=8, length=2)
        bar.outline.set_visible(False)
    else:
        ax.scatter(
            reference, predicted, s=9, alpha=0.45, color=color, linewidths=0, rasterized=True
        )
    ax.axline((low, low), slope=1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    ax.set(xlim=(low, high), ylim=(low, high))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    note = f"MAE {errors.mae(error):,.4g} {unit}\nRMSE {errors.rmse(error):,.4g} {unit}"
    cut = reference.size - int(inside.sum())
    _note(ax, note + (f"\n{cut:,} outside" if cut else ""))


def _curve(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of the measured points, in the order of steps.

    If a resumed run measured a step again, the later value counts.
    """
    known = np.isfinite(x) & np.isfinite(values)
    # np.unique keeps the first of equal entries, so reverse the order.
    steps, last = np.unique(x[known][::-1], return_index=True)
    return steps, values[known][::-1][last]


def _draw_curve(ax: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Draw a line; for more than 400 points, a faint line and the medians of 150 blocks."""
    if steps.size <= 400:
        marker = {"marker": "o", "markersize": 3.5} if steps.size <= 40 else {}
        ax.plot(steps, values, color=color, linewidth=1.6, label=label, **marker)
        return
    ax.plot(steps, values, color=color, linewidth=0.5, alpha=0.25, rasterized=True)
    blocks = zip(np.array_split(steps, 150), np.array_split(values, 150), strict=True)
    medians = np.array([(np.median(s), np.median(v)) for s, v in blocks])
    ax.plot(*medians.T, color=color, linewidth=1.6, label=label)


def set_log_scale(ax: Axes, values: np.ndarray, which: str = "y") -> None:
    """Make the x or y axis logarithmic, with limits around the positive values.

    The limits span at least a factor of four, so that at least one tick is visible.
    """
    positive = values[values > 0]
    if positive.size == 0:
        return
    low, high = np.log(positive.min()), np.log(positive.max())
    reach = max(0.5 * (high - low) * 1.1, 0.5 * math.log(4))
    limits = np.exp([0.5 * (low + high) - reach, 0.5 * (low + high) + reach])
    (ax.set_xscale if which == "x" else ax.set_yscale)("log", nonpositive="mask")
    (ax.set_xlim if which == "x" else ax.set_ylim)(*limits)
    axis = ax.xaxis if which == "x" else ax.yaxis
    decades = 2 * reach / math.log(10)
    subs = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(format_tick))
    axis.set_minor_formatter(NullFormatter())


def format_tick(value: float, _position: int | None = None) -> str:
    """Format a number for a tick: 1500 as 1.5k, 0.00001 as 1e-05."""
    units: tuple[tuple[float, str], ...] = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    scale, unit = next(((scale, unit) for scale, unit in units if abs(value) >= scale), (1.0, ""))
    return f"{value / scale:.3g}{unit}"


def escape_label(text: str, length: int = 34) -> str:
    """Shorten a label from data and escape its dollar signs, which would start a formula."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return "".join(c if c.isprintable() else "�" for c in text).replace("$", r"\$")


def add_legend(ax: Axes, **options) -> None:
    """Add a legend whose entries are opaque."""
    legend = ax.legend(fontsize=9, frameon=True, framealpha=0.85, edgecolor="none", **options)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _note(ax: Axes, text: str) -> None:
    """Write text in the upper left corner of axes."""
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 3}
    ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=9.5, bbox=box)


def mark_empty(ax: Axes) -> None:
    """Write "no labels" on axes without data."""
    ax.set_yscale("linear")
    ax.text(0.5, 0.5, "no labels", transform=ax.transAxes, ha="center", va="center", color=GREY)

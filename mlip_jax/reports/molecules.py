"""Ball-and-stick pictures of molecules, viewed along the axis of their smallest extent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from mlip_jax.datasets.quality.geometry import bond_limit, superpose
from mlip_jax.reports.figures import GREY, escape_label

_BALL, _SMALLEST = 0.42, 0.17  # radius of a ball as a fraction of the covalent radius; minimum in Å
_CLEARANCE = 0.15  # margin around the balls in Å
_SIDE, _LEFT, _TOP, _BOTTOM = 1.95, 0.3, 0.3, 0.45  # square of a molecule, margins; inches


_STICK, _OUTLINE = 0.17, 0.7  # width of a stick in Å, width of outlines in points
_DARK = np.array([[0.15, 0.15, 0.15]])
_CIRCLE = np.stack(
    [np.cos(angles := np.linspace(0, 2 * np.pi, 40, endpoint=False)), np.sin(angles)], axis=1
)


class _Shape(NamedTuple):
    """Polygon of a drawing.

    Attributes:
      depth: Depth; larger values are closer to the viewer.
      corners: Corners, (k, 2) in Å.
      color: Color of the face.
      edge: Color of the edge.
      width: Width of the edge in points.
    """

    depth: float
    corners: np.ndarray
    color: np.ndarray
    edge: np.ndarray
    width: float


@dataclasses.dataclass(frozen=True)
class Picture:
    """Molecule before and after, with the same order of atoms, a title and a text below."""

    title: str
    before: Atoms
    after: Atoms
    below: str = ""


def molecule_figure(
    pictures: Sequence[Picture], rows: tuple[str, str] = ("before", "after")
) -> Figure:
    """Draw one column per molecule: `before` above `after`, at the same scale.

    Args:
      pictures: Molecules to draw.
      rows: Labels of the two rows.
    """
    columns = max(len(pictures), 1)
    width, height = _LEFT + _SIDE * columns, _TOP + 2 * _SIDE + _BOTTOM
    fig = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(fig)
    axes = fig.subplots(
        2,
        columns,
        squeeze=False,
        gridspec_kw=dict(
            left=_LEFT / width,
            right=1.0,
            bottom=_BOTTOM / height,
            top=1 - _TOP / height,
            wspace=0.0,
            hspace=0.0,
        ),
    )
    for column, picture in enumerate(pictures):
        before, after = _views(picture.before.positions, picture.after.positions)
        edges = _ball_radii(picture.after.numbers)[:, None]
        reach = max((np.abs(p[:, :2]) + edges).max() for p in (before, after)) + _CLEARANCE
        for ax, positions in zip(axes[:, column], (before, after)):
            draw(ax, picture.after.numbers, positions, reach)
        axes[0, column].set_title(escape_label(picture.title, 24), fontsize=9, fontweight="bold")
        below = "\n".join(escape_label(line) for line in picture.below.splitlines())
        axes[1, column].text(
            0.5,
            0.0,
            below,
            transform=axes[1, column].transAxes,
            ha="center",
            va="top",
            fontsize=8,
            color=GREY,
            linespacing=1.35,
        )
    for ax, label in zip(axes[:, 0], rows):
        ax.text(
            -0.02,
            0.5,
            label,
            transform=ax.transAxes,
            rotation=90,
            ha="right",
            va="center",
            fontsize=10,
            color=GREY,
        )
    return fig


def _views(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Center, align and rotate both geometries, (n, 3) in Å.

    The longest axis is then horizontal and the shortest axis points at the viewer.
    """
    after = after - after.mean(0)
    before = superpose(before, after)
    axes = np.linalg.svd(after, full_matrices=True)[2].T if len(after) > 1 else np.eye(3)
    axes[:, 2] *= np.sign(np.linalg.det(axes))
    return before @ axes, after @ axes


def bonds(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the bonded pairs of atoms, (B, 2), see `bond_limit`."""
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    return np.argwhere(np.triu(distances < bond_limit(numbers[:, None], numbers[None]), 1))


def draw(ax: Axes, numbers: np.ndarray, positions: np.ndarray, reach: float) -> None:
    """Draw one molecule, viewed along z, in a square with side 2 `reach`.

    Args:
      ax: Axes to draw on.
      numbers: Atomic numbers, (n,).
      positions: Positions in Å, (n, 3). Atoms with a larger z cover those behind them.
      reach: Half of the side of the square in Å.
    """
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.axis("off")
    radii = _ball_radii(numbers)
    depth = positions[:, 2]
    fog = 0.45 * (depth.max() - depth) / max(np.ptp(depth), 2.0)  # distant atoms are lighter
    colors = _blend_with_white(jmol_colors[numbers], fog)
    outline = 2 * reach / (72 * _SIDE) * _OUTLINE  # width of outlines in Å
    shapes = [
        shape
        for i, j in bonds(numbers, positions)
        for shape in _stick(
            positions[[i, j]], radii[[i, j]], colors[[i, j]], fog[[i, j]].mean(), outline
        )
    ]
    for atom in range(len(numbers)):
        circle = positions[atom, :2] + radii[atom] * _CIRCLE
        shapes.append(
            _Shape(
                depth[atom],
                circle,
                colors[atom],
                _blend_with_white(_DARK, fog[atom : atom + 1])[0],
                _OUTLINE,
            )
        )
    shapes.sort(key=lambda shape: shape.depth)
    # A single artist draws all shapes in this order, from back to front.
    ax.add_collection(
        PolyCollection(
            [s.corners for s in shapes],
            facecolors=[s.color for s in shapes],
            edgecolors=[s.edge for s in shapes],
            linewidths=[s.width for s in shapes],
        )
    )


def _ball_radii(numbers: np.ndarray) -> np.ndarray:
    """Return the radii of the balls of atoms in Å, (n,)."""
    return np.maximum(_BALL * covalent_radii[numbers], _SMALLEST)


def _stick(
    ends: np.ndarray, radii: np.ndarray, colors: np.ndarray, fog: float, outline: float
) -> list[_Shape]:
    """Return the shapes of a stick between two balls.

    Each half has the color of its atom and is drawn over a slightly wider dark bar, its outline.
    """
    direction = ends[1] - ends[0]
    across = np.array([-direction[1], direction[0]])
    length, seen = np.linalg.norm(direction), np.linalg.norm(across)
    if seen < 1e-3:  # the bond points at the viewer
        return []
    across *= 0.5 * _STICK / seen
    inset = np.minimum(0.8 * radii / length, 0.5)
    first, last = ends[0, :2] + direction[:2] * inset[0], ends[1, :2] - direction[:2] * inset[1]
    middle, depth = 0.5 * (first + last), ends[:, 2].mean()
    dark, wider = _blend_with_white(_DARK, np.array([fog]))[0], across * (1 + 2 * outline / _STICK)

    def bar(a, b, side, color, nearer):
        return _Shape(
            depth + nearer, np.array([a - side, a + side, b + side, b - side]), color, color, 0.0
        )

    return [
        bar(first, last, wider, dark, -2e-6),
        bar(first, middle, across, colors[0], -1e-6),
        bar(middle, last, across, colors[1], -1e-6),
    ]


def _blend_with_white(colors: np.ndarray, fog: np.ndarray) -> np.ndarray:
    """Blend colors (k, 3) with white by the fractions `fog`, (k,)."""
    return colors + (1 - colors) * fog[:, None]

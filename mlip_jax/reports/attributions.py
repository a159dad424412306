"""Pictures of molecules whose atoms are colored by their attributions to a property."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlip_jax.datasets.isolation.molecules import is_safe_smiles
from mlip_jax.reports import figures
from mlip_jax.reports import html_page as page
from mlip_jax.reports.figures import escape_label

MAX_PICTURES = 6
_COLUMNS = 3
_EXPLANATION = (
    "Gradient times input: the derivative of the prediction with respect to the features of an atom, "
    "times these features, summed over features. Attributions of hydrogens are added to those of "
    "their atom. They show what the readout uses, not what a change of the molecule would cause."
)


class AttributedMolecule(NamedTuple):
    """A molecule with the attributions of one property.

    Attributes:
      title: Name of the molecule and its prediction.
      smiles: SMILES.
      attributions: Attributions in the unit of the property: of the heavy atoms in the order of the
        SMILES, or of these and then of the hydrogens in the order of RDKit, (n,).
    """

    title: str
    smiles: str
    attributions: np.ndarray


def section(name: str, unit: str, molecules: Sequence[AttributedMolecule]) -> Iterator[str]:
    """Yield a figure of molecules for a property; nothing if none can be drawn."""
    drawn = [(m, *drawing) for m in molecules if (drawing := _drawing(m)) is not None]
    if not drawn:
        return
    yield page.heading(f"Attributions of atoms: {name}")
    yield page.figure(_figure(drawn[:MAX_PICTURES], name, unit), _EXPLANATION, wide=True)


def _drawing(molecule: AttributedMolecule):
    """Return positions (n, 2), symbols, bonds and attributions of the heavy atoms, or None."""
    from rdkit import Chem
    from rdkit.Chem import rdDepictor

    if not molecule.smiles or not is_safe_smiles(molecule.smiles):
        return None
    heavy = Chem.MolFromSmiles(molecule.smiles)
    if heavy is None:
        return None
    values, count = np.array(molecule.attributions, np.float64), heavy.GetNumAtoms()
    if len(values) != count:
        complete = Chem.AddHs(heavy)
        if complete.GetNumAtoms() != len(values):  # other atoms than those of the SMILES
            return None
        for atom in list(complete.GetAtoms())[count:]:
            for neighbor in atom.GetNeighbors():
                values[neighbor.GetIdx()] += values[atom.GetIdx()]
        values = values[:count]
    rdDepictor.Compute2DCoords(heavy)
    positions = heavy.GetConformer().GetPositions()[:, :2]
    symbols = [atom.GetSymbol() for atom in heavy.GetAtoms()]
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in heavy.GetBonds()]
    return positions, symbols, bonds, values


def _figure(drawn, name: str, unit: str) -> Figure:
    """Draw the molecules in rows; a common scale of colors is symmetric about zero."""
    rows = -(-len(drawn) // _COLUMNS)
    fig = Figure(figsize=(9.2, 3.0 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, _COLUMNS, squeeze=False).ravel()
    limit = max(float(np.abs(values).max()) for *_, values in drawn) or 1.0
    points = None
    for ax in axes:
        ax.axis("off")
    for ax, (molecule, positions, symbols, bonds, values) in zip(axes, drawn):
        for i, j in bonds:
            # not clipped: the axes of a chain are as flat as the chain
            line = {"color": figures.GREY, "linewidth": 1.2, "zorder": 1, "clip_on": False}
            ax.plot(*positions[[i, j]].T, **line)
        points = ax.scatter(
            *positions.T,
            c=values,
            cmap="coolwarm",
            vmin=-limit,
            vmax=limit,
            s=90,
            edgecolors=figures.GREY,
            linewidths=0.6,
            zorder=2,
            clip_on=False,
        )
        for (x, y), symbol in zip(positions, symbols):
            if symbol != "C":
                ax.text(x, y, symbol, ha="center", va="center", fontsize=7, zorder=3)
        ax.set_title(escape_label(molecule.title, 30), fontsize=9, pad=10)
        ax.set_aspect("equal")
        ax.margins(0.1)
    label = f"{name} ({unit})" if unit else name
    fig.colorbar(points, ax=list(axes), label=label, shrink=0.8)
    return fig

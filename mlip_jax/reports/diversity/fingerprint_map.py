"""Map of molecules: the two principal components of the Morgan fingerprints of several sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mlip_jax.datasets.molecules.fingerprints import NUM_BITS
from mlip_jax.reports import figures

_COLORS = (figures.BLUE, figures.GREEN, figures.VERMILLION)


def principal_components(fingerprints: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Compute the principal components of fingerprints.

    Args:
      fingerprints: Fingerprints of zeros and ones, (S, B).
      count: Number of components, K.

    Returns:
      Coordinates along the components, (S, K) float64, and the fraction of the variance of each
      component, (K,). The coordinate of largest magnitude of each component is positive, so that
      the map is the same on all machines.

    Raises:
      ValueError: There are fewer fingerprints than components.
    """
    x = np.asarray(fingerprints, np.float64)
    if len(x) < count:
        raise ValueError(
            f"{count} principal components require at least {count} fingerprints, received {len(x)}"
        )
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x)  # (B, B), independent of the number of molecules
    projected = x @ vectors[:, ::-1][:, :count]  # (S, K)
    # The signs of eigenvectors are arbitrary, so fix them by the coordinate of largest magnitude.
    signs = np.sign(projected[np.abs(projected).argmax(0), np.arange(count)])
    total = values.sum()
    shares = values[::-1][:count] / total if total > 0 else np.zeros(count)
    return projected * np.where(signs == 0, 1, signs), shares


def unpack(fingerprints: Sequence[bytes]) -> np.ndarray:
    """Convert binary fingerprints of RDKit to rows of zeros and ones, (S, B) uint8.

    The binary fingerprints are those of `fingerprints.morgan_fingerprint`.
    """
    from rdkit.DataStructs import ConvertToNumpyArray, ExplicitBitVect

    rows = []
    for binary in fingerprints:
        row = np.zeros(0, np.uint8)
        ConvertToNumpyArray(ExplicitBitVect(binary), row)
        rows.append(row)
    return np.array(rows, np.uint8).reshape(len(rows), NUM_BITS)


def draw(sets: Mapping[str, np.ndarray]) -> Figure:
    """Draw the molecules of several sets along the first two principal components of all sets.

    Args:
      sets: Fingerprints (S, B) by the name of the set.
    """
    projected, shares = principal_components(np.concatenate(list(sets.values())))
    fig, ax = figures.figure("Morgan fingerprints", size=(6.4, 5.0))
    parts = np.split(projected, np.cumsum([len(f) for f in sets.values()])[:-1])
    for color, name, part in zip(_COLORS, sets, parts):
        ax.scatter(
            *part.T,
            s=10,
            alpha=0.5,
            color=color,
            linewidths=0,
            label=f"{name} ({len(part):,})",
            rasterized=True,
        )
    ax.set(
        xlabel=f"component 1 ({100 * shares[0]:.1f} % of the variance)",
        ylabel=f"component 2 ({100 * shares[1]:.1f} %)",
    )
    figures.add_legend(ax)
    return fig

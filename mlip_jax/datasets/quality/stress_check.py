"""Check of signs and units of stresses against the energy differences of similar crystals."""

from __future__ import annotations

import numpy as np
from ase.units import GPa

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.problems import WRONG_STRESS, Problem
from mlip_jax.datasets.stress import stress_labels

STRESS_RATIO = "stress ratio"
_MIN_PAIRS = 6
# Largest component of the strain of a pair, and smallest fraction of its energy difference and of
# the work of the forces that the work of the stress must exceed.
_MAX_STRAIN, _MIN_WORK = 0.1, 0.3
# Ratios that count as 1 or -1, and the fraction of pairs that must agree on a wrong one.
_NEAR_ONE, _AGREEMENT = (0.6, 1.6), 0.6
# Units that a stress may have instead of eV/Å³.
_UNITS = {"GPa": GPa, "kbar": 0.1 * GPa}


def stress_ratios(columns: Columns) -> np.ndarray:
    """Return (ΔE + F·u) / (V σ:ε) of pairs of crystals with the same atoms, (P,); 1 if correct.

    Forces F and virials V σ are means of the two; ε is the strain between the cells and u the
    displacements apart from it. Pairs whose stress does little work are skipped.
    """
    stress = stress_labels(columns)
    if stress is None or columns.cell is None:
        return np.zeros(0)
    volume = np.abs(np.linalg.det(columns.cell))
    known = np.isfinite(stress).all((1, 2)) & np.isfinite(columns.energy) & columns.pbc.all(1)
    known &= volume > 0
    ratios = [np.zeros(0)]
    for n in np.unique(columns.n_atoms[known]):
        members = np.flatnonzero(known & (columns.n_atoms == n))  # (S,)
        atoms = columns.offsets[members][:, None] + np.arange(n)  # (S, n)
        # crystals with the same atoms, by volume; each forms a pair with the next one
        _, group = np.unique(columns.numbers[atoms], axis=0, return_inverse=True)
        group = group.ravel()
        order = np.lexsort((volume[members], group))
        first = np.flatnonzero(group[order[1:]] == group[order[:-1]])
        pairs = np.stack([order[first], order[first + 1]], axis=1)  # (P, 2)
        ratios.append(_ratios(columns, stress, volume, members[pairs], atoms[pairs]))
    ratios = np.concatenate(ratios)
    return ratios[np.isfinite(ratios)]


def _ratios(columns: Columns, stress, volume, pairs: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """Return the ratio of each pair, NaN if the strain is large or the work of the stress small.

    Args:
      columns: Structures.
      stress: Stress of each structure (eV/Å³), (S, 3, 3).
      volume: Volume of each structure (Å³), (S,).
      pairs: Structures of each pair, (P, 2).
      atoms: Their atoms, (P, 2, n).
    """
    cells = columns.cell[pairs]  # (P, 2, 3, 3)
    # relative to the mean cell, so that errors of second order cancel
    mean = cells.mean(1)
    change = np.linalg.solve(mean, cells[:, 1] - cells[:, 0])
    strain = 0.5 * (change + change.swapaxes(1, 2))
    scaled = columns.positions[atoms] @ np.linalg.inv(cells)  # (P, 2, n, 3)
    change = scaled[:, 1] - scaled[:, 0]
    moved = (change - np.round(change)) @ mean  # (P, n, 3)
    of_forces = (columns.forces[atoms].mean(1) * moved).sum((1, 2))
    virial = volume[:, None, None] * stress
    of_stress = (virial[pairs].mean(1) * strain).sum((1, 2))
    change = columns.energy[pairs[:, 1]] - columns.energy[pairs[:, 0]] + of_forces
    usable = np.abs(strain).max((1, 2)) <= _MAX_STRAIN
    usable &= np.abs(change) > _MIN_WORK * np.maximum(np.abs(of_forces), 1e-6)
    usable &= of_stress != 0
    return np.where(usable, change / np.where(of_stress == 0, 1.0, of_stress), np.nan)


def diagnose_stress(findings) -> list[Problem]:
    """Return the problem of stresses that do not fit the energy differences, if there is one.

    It is a warning: only runs with loss.stress use the stress, and these refuse the data.
    """
    ratio = findings.distributions[STRESS_RATIO]
    median = ratio.median
    agreement = ratio.share(*sorted((0.5 * median, 2 * median)))
    if ratio.count < _MIN_PAIRS or agreement < _AGREEMENT or _NEAR_ONE[0] <= median <= _NEAR_ONE[1]:
        return []
    text = (
        f"over {ratio.count} pairs of crystals the energy differences are {median:.4g} times those "
        f"that the stress implies, expected 1; {agreement:.0%} of the pairs agree with it to a "
        "factor of two"
    )
    if _NEAR_ONE[0] <= -median <= _NEAR_ONE[1]:
        text = (
            f"has the wrong sign: {text}. ASE's stress is positive under tension, "
            "VASP's has the opposite sign. Set the reader option stress_sign_reversed=True"
        )
    else:
        likely = [name for name, unit in _UNITS.items() if 0.7 < abs(median) / unit < 1.4]
        text = f"is not in eV/Å³{f', but in {likely[0]}' * bool(likely)}: {text}"
    return [Problem("warning", WRONG_STRESS, f"the stress, used only with loss.stress, {text}")]

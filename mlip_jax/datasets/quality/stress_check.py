"""Check of signs and units of stresses against the energy differences of similar crystals."""

from __future__ import annotations

import numpy as np
from ase.units import GPa

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.problems import Problem
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
    known = np.isfinite(stress).all((1, 2)) & np.isfinite(columns.energy) & columns.pbc.all(1)
    groups: dict[bytes, list[int]] = {}
    for s in np.flatnonzero(known):
        numbers = columns.numbers[columns.offsets[s] : columns.offsets[s + 1]]
        groups.setdefault(numbers.tobytes(), []).append(s)
    volume, ratios = np.abs(np.linalg.det(columns.cell)), []
    for members in groups.values():
        order = np.array(members)[np.argsort(volume[members])]
        ratios += [_ratio(columns, stress, volume, a, b) for a, b in zip(order, order[1:])]
    return np.array([r for r in ratios if np.isfinite(r)])


def _ratio(columns: Columns, stress, volume, a: int, b: int) -> float:
    """Return the ratio of a pair, NaN if the strain is large or the work of the stress small."""
    atoms = [slice(columns.offsets[s], columns.offsets[s + 1]) for s in (a, b)]
    cells = columns.cell[[a, b]]
    # relative to the mean cell, so that errors of second order cancel
    change = np.linalg.solve(cells.mean(0), cells[1] - cells[0])
    strain = 0.5 * (change + change.T)
    if np.abs(strain).max() > _MAX_STRAIN:
        return np.nan
    scaled = [np.linalg.solve(cell.T, columns.positions[x].T).T for cell, x in zip(cells, atoms)]
    change = scaled[1] - scaled[0]
    moved = (change - np.round(change)) @ cells.mean(0)
    of_forces = (0.5 * (columns.forces[atoms[0]] + columns.forces[atoms[1]]) * moved).sum()
    of_stress = (0.5 * (volume[a] * stress[a] + volume[b] * stress[b]) * strain).sum()
    change = columns.energy[b] - columns.energy[a] + of_forces
    if not abs(change) > _MIN_WORK * max(abs(of_forces), 1e-6) or of_stress == 0:
        return np.nan
    return float(change / of_stress)


def diagnose_stress(findings) -> list[Problem]:
    """Return the problem of stresses that do not fit the energy differences, if there is one."""
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
            f"the stress has the wrong sign: {text}. ASE's stress is positive under tension, "
            "VASP's has the opposite sign. Set the reader option stress_sign_reversed=True"
        )
    else:
        likely = [name for name, unit in _UNITS.items() if 0.7 < abs(median) / unit < 1.4]
        text = f"the stress is not in eV/Å³{f', but in {likely[0]}' * bool(likely)}: {text}"
    return [Problem("error", "stress", text)]

"""Evidence on units and signs that single structures give, without a second conformation.

Forces: a bond of H that is longer or shorter than other bonds of its kind is pulled back, with a
stiffness that hardly depends on molecule or method (pairs.py uses the same for two conformations).

Energies: the total energy of a molecule is close to the sum over its isolated atoms, at most some
percent below it, so their ratio shows the unit of the energies.
"""

from __future__ import annotations

import numpy as np
from ase import units

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.geometry import same_size, segment_sum

_HYDROGENS = 12  # maximum number of bonds per structure
_STRUCTURES = 4096  # maximum number of structures per block
_PAIRS = 400_000  # pairs of atoms in memory at a time
_LONGEST = 1.6  # Å, of a bond of H
# Deviation (Å) from the median length of bonds of H to the same element. Lengths at equilibrium
# vary by 0.03 Å with the surroundings of the bond, so smaller deviations prove nothing.
_MIN_DEVIATION, _MAX_DEVIATION = 0.05, 0.4
# 1/Å, of the Morse potential of a bond of H with 33 eV/Å² and 4.6 eV. Without it, strongly distorted
# structures would have half the stiffness.
_WIDTH = 1.9
# Energies of isolated atoms (hartree) by atomic number. All-electron: nonrelativistic limit, which
# Hartree-Fock and density functionals reproduce to 1 %. GFN2-xTB: of the valence electrons.
ALL_ELECTRON = {
    **{1: -0.5, 2: -2.904, 3: -7.478, 4: -14.667, 5: -24.654, 6: -37.845, 7: -54.589, 8: -75.067},
    **{9: -99.734, 10: -128.938, 11: -162.255, 12: -200.053, 13: -242.346, 14: -289.359},
    **{15: -341.259, 16: -398.110, 17: -460.148, 18: -527.540},
}
GFN2_XTB = {
    **{1: -0.3935, 5: -0.9524, 6: -1.7933, 7: -2.6058, 8: -3.7676, 9: -4.6193, 14: -1.5697},
    **{15: -2.3742, 16: -3.1465, 17: -4.4825, 35: -4.0483, 53: -3.7796},
}


def bond_forces(columns: Columns, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return stiffness and forces of the bonds of H to C, N and O in single structures.

    Args:
      columns: Block of structures.
      usable: Whether all forces and positions of a structure are known, bool, shape (S,).

    Returns:
      Stiffness of the stretched and compressed bonds (eV/Å²), shape (k,), negative for gradients;
      absolute force on H along each of the other bonds (eV/Å), shape (m,).
    """
    length, force, element = _bonds(columns, np.flatnonzero(usable)[:_STRUCTURES])
    stiffness, at_rest = [np.zeros(0)], [np.zeros(0)]
    for z in (6, 7, 8):
        kind = element == z
        if not kind.any():
            continue
        deviation = length[kind] - np.median(length[kind])
        restoring = np.median(force[kind]) - force[kind]
        size = np.abs(deviation)
        moved = (size > _MIN_DEVIATION) & (size < _MAX_DEVIATION)
        # Morse potential: force = stiffness / width * (1 - decay) * decay
        decay = np.exp(-_WIDTH * deviation[moved])
        stiffness.append(_WIDTH * restoring[moved] / ((1 - decay) * decay))
        at_rest.append(np.abs(force[kind][size <= _MIN_DEVIATION]))
    return np.concatenate(stiffness), np.concatenate(at_rest)


def _bonds(columns: Columns, structures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return length (Å), force on H along the bond (eV/Å) and other element of each bond of H."""
    found = [(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))]
    for n, part in same_size(columns.n_atoms[structures]):
        step = max(1, _PAIRS // (n * n))
        for start in range(0, len(part) if n > 1 else 0, step):
            first = columns.offsets[structures[part[start : start + step]], None]
            found.append(_bonds_of_size(columns, first + np.arange(n)))
    length, force, element = (np.concatenate(values) for values in zip(*found))
    return length, force, element


def _bonds_of_size(columns, rows):
    """Return the result of `_bonds` for structures of one size, with the atoms `rows` (m, n)."""
    numbers, positions = columns.numbers[rows], columns.positions[rows]
    # The first hydrogen atoms of each structure; one row per hydrogen atom from here on.
    hydrogen = np.argsort(numbers != 1, axis=1, kind="stable")[:, :_HYDROGENS]
    s, k = np.nonzero(np.take_along_axis(numbers, hydrogen, 1) == 1)
    atom = hydrogen[s, k]
    vectors = positions[s, atom][:, None] - positions[s]  # from every atom to H, (h, n, 3)
    squares = np.einsum("hni,hni->hn", vectors, vectors)
    squares[np.arange(len(s)), atom] = np.inf
    partner = squares.argmin(1)
    row = np.arange(len(s))
    length = np.sqrt(squares[row, partner])
    element = numbers[s, partner].astype(np.int64)
    bonded = np.isin(element, (6, 7, 8)) & (length < _LONGEST) & (length > 0)
    along = np.einsum("hi,hi->h", columns.forces[rows[s, atom]], vectors[row, partner])
    return length[bonded], along[bonded] / length[bonded], element[bonded]


def energy_ratios(columns: Columns, isolated: dict[int, float]) -> np.ndarray:
    """Return the total energy divided by that of the isolated atoms, one value per composition.

    Compositions are skipped if the energy of an isolated atom is unknown, or if they contain only
    hydrogen, whose bond energies are large compared with its atomic energy.

    Args:
      columns: Block of structures.
      isolated: Energies of isolated atoms by atomic number (hartree).
    """
    table = np.full(256, np.nan)
    table[list(isolated)] = np.array(list(isolated.values())) * units.Hartree
    starts = columns.offsets[:-1]
    total = segment_sum(table[columns.numbers], starts)
    heavy = segment_sum((columns.numbers > 2).astype(np.int64), starts)
    usable = np.flatnonzero(
        (heavy > 0) & (columns.n_atoms > 1) & np.isfinite(columns.energy * total)
    )
    # Equal compositions have equal sums over their isolated atoms, up to rounding.
    _, first = np.unique(np.round(total[usable], 3), return_index=True)
    return (columns.energy / total)[usable[np.sort(first)]]

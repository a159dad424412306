"""Comparison of conformations of one molecule: do energies and forces fit, in eV and Å?

Between two close conformations, ΔE = E₂ - E₁ equals W = -½(F₁ + F₂)·Δx up to third order in Δx.
The ratio ΔE/W is 1 for forces and -1 for gradients, and it reveals every unit that does not fit the
others. It cannot reveal a factor common to energies and forces. The stiffness of bonds to H reveals
that factor, because it hardly depends on molecule, method or temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.filters import molecule_codes
from mlip_jax.datasets.quality.geometry import kabsch_align, same_size, segment_sum

MAX_PAIRS = 500
MAX_RMSD = 0.3  # Å
# The closer half of the pairs within MAX_RMSD is used, but at least this number if available.
_MIN_PAIRS = 60
# Maximum number of conformations that are compared: per block, per molecule if there is only one,
# and per molecule if there are many.
_MEMBERS = 3072
_MEMBERS_OF_ONE = 2048
_MEMBERS_OF_MANY = 64
# Number of pairs that are aligned. The pairs are ranked by _PROBES distances between their atoms.
_MAX_ALIGNED = 1000
_PROBES = 24
_NUM_NEIGHBORS = 2  # neighbors per conformation
_CHUNK = 400_000  # atoms
_COPY_DISTANCE = 1e-7  # Å², sum over the probes, below which two conformations are copies
# Forces perpendicular to the displacement do not determine the energy difference: |W| must exceed
# this fraction of ½(|F₁| + |F₂|)|Δx|.
_MIN_COSINE = 0.1
# Maximum number of pairs whose bonds to H are measured, and of bonds per pair.
_MAX_BOND_PAIRS = 300
_MAX_HYDROGENS = 12
# Relative change of a bond length. Smaller changes reflect the surroundings of the bond: at the
# minima of another method (e.g. MMFF94 conformers) lengths and forces vary from bond to bond,
# independent of the stiffness. After a larger change it is another bond.
_MIN_STRETCH, _MAX_STRETCH = 2e-3, 0.5
# Relative resolution of a total energy in single precision. A pair whose W and ΔE are both below it
# carries no information.
_RESOLUTION = 2e-7


class ClosePairs(NamedTuple):
    """Pairs of close conformations, p of them.

    Attributes:
      first: Index of the first structure in the block, shape (p,).
      second: Index of the second structure in the block, shape (p,).
      rmsd: RMSD after alignment (Å), shape (p,).
      energy: Energy difference ΔE (eV), shape (p,).
      work: Work W of the mean forces (eV), shape (p,).
      stiffness: |F₂ - F₁| / |Δx| (eV/Å²), shape (p,).
    """

    first: np.ndarray
    second: np.ndarray
    rmsd: np.ndarray
    energy: np.ndarray
    work: np.ndarray
    stiffness: np.ndarray


def neighbor_pairs(
    columns: Columns, usable: np.ndarray, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of similar conformations of one molecule with the same order of atoms.

    Args:
      columns: Block of structures.
      usable: Whether all forces and positions of a structure are known, bool, shape (S,).
      seed: Random seed for the choice of molecules, if there are more than are compared.

    Returns:
      Indices of the first and the second structures, each of shape (p,), the closest pairs first.
    """
    return _nearest(columns, *_choose_members(columns, usable, seed))


def close_pairs(columns: Columns, first: np.ndarray, second: np.ndarray) -> ClosePairs:
    """Return the closest pairs of `neighbor_pairs` that have energies, at most MAX_PAIRS."""
    pairs = _align(columns, first, second)
    scale = np.abs(columns.energy[pairs.first]) * _RESOLUTION
    informative = (np.maximum(np.abs(pairs.work), np.abs(pairs.energy)) > scale) & np.isfinite(
        pairs.work
    )
    good = informative & (pairs.rmsd <= MAX_RMSD) & (pairs.rmsd > 1e-4)
    order = np.flatnonzero(good)
    order = order[np.argsort(pairs.rmsd[order], kind="stable")]
    order = order[: min(max(len(order) // 2, _MIN_PAIRS), MAX_PAIRS)]
    return ClosePairs(*(values[order] for values in pairs))


def bond_stiffness(columns: Columns, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the stiffness of bonds of H to C, N or O (eV/Å²), shape (k,).

    The stiffness is the decrease of the force along a bond with its length, between the two
    structures of a pair. It is about 33 for any molecule and method, and negative for gradients. No
    energies and no alignment are needed.
    """
    chosen = np.linspace(0, len(first) - 1, min(len(first), _MAX_BOND_PAIRS)).astype(np.int64)
    first, second = first[chosen], second[chosen]
    stiffness = [np.zeros(0)]
    for n, part in same_size(columns.n_atoms[first]):
        start_a, start_b = (columns.offsets[s[part], None] for s in (first, second))
        numbers = columns.numbers[start_a + np.arange(n)]  # (m, n)
        # Up to _HYDROGENS hydrogen atoms of each structure come first; other atoms are dropped.
        hydrogen = np.argsort(numbers != 1, axis=1, kind="stable")[:, :_MAX_HYDROGENS]
        # From here on, one row per hydrogen atom.
        pair, k = np.nonzero(np.take_along_axis(numbers, hydrogen, 1) == 1)
        hydrogen, start_a, start_b = hydrogen[pair, k], start_a[pair, 0], start_b[pair, 0]
        step = max(1, _CHUNK // n)
        partner = np.concatenate(
            [
                np.zeros(0, np.int64),
                *(
                    _partners(columns.positions, start_a[s : s + step], hydrogen[s : s + step], n)
                    for s in range(0, len(hydrogen), step)
                ),
            ]
        )
        bonded = np.isin(numbers[pair, partner], (6, 7, 8))
        hydrogen, partner, start_a, start_b = (
            v[bonded] for v in (hydrogen, partner, start_a, start_b)
        )
        (length_a, force_a), (length_b, force_b) = (
            _bond_projections(columns, s + hydrogen, s + partner) for s in (start_a, start_b)
        )
        stretch = length_b - length_a
        informative = (np.abs(stretch) > _MIN_STRETCH * length_a) & (
            np.abs(stretch) < _MAX_STRETCH * length_a
        )
        stiffness.append((force_a - force_b)[informative] / stretch[informative])
    return np.concatenate(stiffness)


def _partners(positions, start, hydrogen, n):
    """Return the closest other atom of each hydrogen atom, within its structure of n atoms."""
    difference = positions[start[:, None] + np.arange(n)] - positions[start + hydrogen][:, None]
    squares = np.einsum("mni,mni->mn", difference, difference)  # (m, n)
    squares[np.arange(len(start)), hydrogen] = np.inf
    return squares.argmin(1)


def _bond_projections(columns, hydrogen, partner):
    """Return the length of each bond (Å) and the force on its hydrogen atom along it (eV/Å)."""
    bond = columns.positions[hydrogen] - columns.positions[partner]
    length = np.sqrt(np.einsum("ki,ki->k", bond, bond))
    return length, np.einsum("ki,ki->k", columns.forces[hydrogen], bond) / length


def _choose_members(columns, usable, seed):
    """Return the structures to compare and the group of each.

    Molecules are chosen at random with all of their conformations, or with the first ones of a
    molecule that has too many. Members of a group have the same molecule and the same order of
    atoms.
    """
    candidates = np.flatnonzero(usable & (columns.n_atoms > 1))
    if len(candidates) < 2:
        return candidates, candidates
    _, group, counts = np.unique(
        molecule_codes(columns.molecule)[candidates], return_inverse=True, return_counts=True
    )
    order = candidates[np.argsort(group, kind="stable")]
    starts = np.cumsum(counts) - counts
    molecules = np.flatnonzero(counts > 1)
    molecules = molecules[np.random.default_rng(seed).permutation(len(molecules))]
    each = int(np.clip(_MEMBERS // max(len(molecules), 1), _MEMBERS_OF_MANY, _MEMBERS_OF_ONE))
    # Take whole molecules until the limit of the block is reached.
    taken = np.minimum(counts[molecules], each)
    molecules = molecules[np.cumsum(taken) <= _MEMBERS]
    chosen = [order[starts[g] : starts[g] + min(counts[g], each)] for g in molecules]
    if not chosen:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    members = np.concatenate(chosen)
    # A molecule may occur with several orders of atoms; each forms a group of its own.
    label = np.repeat(np.arange(len(chosen)), [len(c) for c in chosen])
    key = np.stack([label, _order_of_atoms(columns, members)])
    return members, np.unique(key, axis=1, return_inverse=True)[1].ravel()


def _order_of_atoms(columns, members):
    """Return a hash of the ordered atomic numbers. Collisions within a molecule are unlikely."""
    n = columns.n_atoms[members]
    starts = np.cumsum(n) - n
    position = np.arange(n.sum()) - np.repeat(starts, n)
    value = columns.numbers[columns.atoms_of(members)].astype(np.int64)
    mixed = (value * 0x9E3779B1 + position * 0x85EBCA77) % 0x7FFFFFFF
    return segment_sum(mixed * mixed % 0x7FFFFFFF, starts) * 4096 + n % 4096


def _nearest(columns, members, group):
    """Return unique pairs of members with their closest neighbors in the group.

    Members are compared by a few interatomic distances, which requires no alignment.
    """
    if not len(members):
        return members, members
    probes = _distances_within(columns, members)
    order = np.argsort(group, kind="stable")
    pairs, distance = [], []
    for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(part) < 2:
            continue
        x = probes[part] - probes[part].mean(0)  # centered to reduce rounding errors
        norm = np.einsum("mi,mi->m", x, x)
        squares = norm[:, None] + norm - 2 * (x @ x.T)  # (members, members)
        squares[squares < _COPY_DISTANCE] = np.inf  # excludes the member itself and its copies
        rows = np.arange(len(part))
        for _ in range(_NUM_NEIGHBORS):
            nearest = squares.argmin(1)
            pairs.append(np.stack([part, part[nearest]]))
            distance.append(squares[rows, nearest])
            squares[rows, nearest] = np.inf
    if not pairs:
        return members[:0], members[:0]
    # (2, pairs) and (pairs,). A pair found from both of its members is kept once.
    pairs, distance = np.sort(np.concatenate(pairs, 1), axis=0), np.concatenate(distance)
    _, unique = np.unique(pairs, axis=1, return_index=True)
    unique = unique[np.isfinite(distance[unique])]
    chosen = unique[np.argsort(distance[unique], kind="stable")][:_MAX_ALIGNED]
    return members[pairs[0, chosen]], members[pairs[1, chosen]]


def _distances_within(columns, members):
    """Return _PROBES interatomic distances per structure, shape (members, _PROBES).

    The atom pairs are random, but the same for structures of equal size.
    """
    n = columns.n_atoms[members][:, None]
    drawn = np.random.default_rng(0).random((2, _PROBES))
    first = (drawn[0] * n).astype(np.int64)
    second = (first + 1 + (drawn[1] * (n - 1)).astype(np.int64)) % n
    start = columns.offsets[members][:, None]
    difference = columns.positions[start + first] - columns.positions[start + second]
    return np.sqrt(np.einsum("mki,mki->mk", difference, difference))


def _align(columns, first, second):
    """Return ClosePairs of all pairs, with the second conformation rotated onto the first.

    The forces are rotated as well. W is NaN if the forces are nearly perpendicular to the
    displacement.
    """
    rmsd, work, stiffness = (
        np.full(len(first), np.inf),
        np.full(len(first), np.nan),
        np.full(len(first), np.nan),
    )
    for n, part in same_size(columns.n_atoms[first]):
        rows_a, rows_b = (columns.offsets[s[part], None] + np.arange(n) for s in (first, second))
        a, b = columns.positions[rows_a], columns.positions[rows_b]  # (m, n, 3)
        force_a, force_b = columns.forces[rows_a], columns.forces[rows_b]
        if columns.pbc is None:
            displacement, force_b = _displacement(a, b, force_b)
        else:
            displacement, force_b = _displacement_periodic(
                columns, first[part], second[part], a, b, force_b
            )
        rmsd[part] = np.sqrt(np.einsum("mni,mni->m", displacement, displacement) / n)  # (m,)
        w = -0.5 * np.einsum("mni,mni->m", force_a + force_b, displacement)  # (pairs of size n,)
        norms = [
            np.sqrt(np.einsum("mni,mni->m", x, x))
            for x in (force_a, force_b, displacement, force_b - force_a)
        ]
        stiffness[part] = norms[3] / norms[2]
        work[part] = np.where(
            np.abs(w) > _MIN_COSINE * 0.5 * (norms[0] + norms[1]) * norms[2], w, np.nan
        )
    return ClosePairs(
        first, second, rmsd, columns.energy[second] - columns.energy[first], work, stiffness
    )


def _displacement(a, b, force_b):
    """Return displacements from a to the aligned b and the rotated forces of b, each (m, n, 3)."""
    rotation = kabsch_align(a, b)
    return (b - b.mean(1, keepdims=True)) @ rotation - (
        a - a.mean(1, keepdims=True)
    ), force_b @ rotation


def _displacement_periodic(columns, first, second, a, b, force_b):
    """Return the result of `_displacement` for structures that may be periodic.

    Periodic structures are not rotated. Their displacements use the nearest images if their cells
    are equal, and are infinite otherwise.
    """
    displacement, turned = _displacement(a, b, force_b)
    for p in np.flatnonzero(columns.pbc[first].any(1) | columns.pbc[second].any(1)):
        pbc, cell = columns.pbc[first[p]], columns.cell[first[p]]
        same = (pbc == columns.pbc[second[p]]).all() and np.allclose(
            cell, columns.cell[second[p]], atol=1e-6
        )
        difference = b[p] - a[p]  # (n, 3)
        if same:
            fractional = difference @ np.linalg.pinv(np.where(pbc[:, None], cell, 0.0))
            difference = difference - np.where(pbc, np.rint(fractional), 0) @ cell
        displacement[p] = difference - difference.mean(0) if same else np.inf
        turned[p] = force_b[p]
    return displacement, turned

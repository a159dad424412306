"""Conformations of one molecule against each other: do energies, forces and positions fit, and are they in eV and Å?

Between two close conformations, ΔE = E₂ - E₁ is W = -½(F₁ + F₂)·Δx up to third order in Δx. The ratio ΔE/W is 1 for
forces, -1 for gradients, and shows every unit that does not fit the others. It is blind to a factor that energies and
forces share; that one shows in the stiffness of bonds to H, which hardly depends on molecule, method or temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.filters import molecule_codes
from mlip_jax.datasets.quality.geometry import kabsch_align, same_size, segment_sum

MAX_PAIRS = 500
MAX_RMSD = 0.3
# Of the pairs that are close enough the nearer half is kept, where it is this many.
_FEW = 60
# Conformations that are compared with each other, at most: in a block, and of one molecule.
_MEMBERS = 3072
_MEMBERS_OF_ONE = 2048
_MEMBERS_OF_MANY = 64
# Pairs that are aligned, nearest first by a few distances between their atoms.
_ALIGNED = 1000
_PROBES = 24
_NEIGHBOURS = 2
_CHUNK = 400_000  # atoms
_SAME = 1e-7  # Å², of the probes together
# Forces across the displacement say nothing of the energy: |W| is compared with ½(|F₁| + |F₂|)|Δx|.
_LEAST_COSINE = 0.1
# Bonds to H that are measured: in so many pairs, so many in each.
_BONDED = 300
_HYDROGENS = 12
# A bond that changes its length by less, relative, tells of its surroundings: at the minima of another method
# (conformers by MMFF94) lengths and forces differ from place to place, whatever the stiffness. By more, it is another.
_LEAST_STRETCH, _MOST_STRETCH = 2e-3, 0.5
# Of a total energy in single precision: a pair whose W and ΔE are both below it says nothing.
_RESOLUTION = 2e-7


class ClosePairs(NamedTuple):
    """Pairs of structures, each (p,): indices into the block, RMSD after alignment in Å, ΔE and W in eV, and
    |F₂ - F₁| / |Δx| in eV/Å²."""

    first: np.ndarray
    second: np.ndarray
    rmsd: np.ndarray
    energy: np.ndarray
    work: np.ndarray
    stiffness: np.ndarray


def neighbours(columns: Columns, usable: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of conformations of one molecule with the same order of atoms, the nearest first: indices, (p,) each.

    Args:
      columns: A block.
      usable: (S,), bool: all forces and all positions are known.
      seed: Of the choice of molecules where there are many.
    """
    return _nearest(columns, *_choose_members(columns, usable, seed))


def close_pairs(columns: Columns, first: np.ndarray, second: np.ndarray) -> ClosePairs:
    """Those of the neighbours that are close and have energies, at most MAX_PAIRS, the closest."""
    pairs = _align(columns, first, second)
    scale = np.abs(columns.energy[pairs.first]) * _RESOLUTION
    told = (np.maximum(np.abs(pairs.work), np.abs(pairs.energy)) > scale) & np.isfinite(pairs.work)
    good = told & (pairs.rmsd <= MAX_RMSD) & (pairs.rmsd > 1e-4)
    order = np.flatnonzero(good)
    order = order[np.argsort(pairs.rmsd[order], kind="stable")]
    order = order[:min(max(len(order) // 2, _FEW), MAX_PAIRS)]
    return ClosePairs(*(values[order] for values in pairs))


def bond_stiffness(columns: Columns, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How fast the force along a bond of H to C, N or O falls with its length, between neighbours, eV/Å², (k,).

    About 33 for whatever molecule and method, negative for gradients. Needs neither energies nor an alignment.
    """
    chosen = np.linspace(0, len(first) - 1, min(len(first), _BONDED)).astype(np.int64)
    first, second = first[chosen], second[chosen]
    found = [np.zeros(0)]
    for n, part in same_size(columns.n_atoms[first]):
        start_a, start_b = (columns.offsets[s[part], None] for s in (first, second))
        numbers = columns.numbers[start_a + np.arange(n)]
        hydrogen = np.argsort(numbers != 1, axis=1, kind="stable")[:, :_HYDROGENS]
        pair, k = np.nonzero(np.take_along_axis(numbers, hydrogen, 1) == 1)
        hydrogen, start_a, start_b = hydrogen[pair, k], start_a[pair, 0], start_b[pair, 0]
        step = max(1, _CHUNK // n)
        partner = np.concatenate([np.zeros(0, np.int64), *(
            _partners(columns.positions, start_a[s:s + step], hydrogen[s:s + step], n)
            for s in range(0, len(hydrogen), step))])
        bonded = np.isin(numbers[pair, partner], (6, 7, 8))
        hydrogen, partner, start_a, start_b = (v[bonded] for v in (hydrogen, partner, start_a, start_b))
        (length_a, force_a), (length_b, force_b) = (_along(columns, s + hydrogen, s + partner)
                                                    for s in (start_a, start_b))
        stretch = length_b - length_a
        told = (np.abs(stretch) > _LEAST_STRETCH * length_a) & (np.abs(stretch) < _MOST_STRETCH * length_a)
        found.append((force_a - force_b)[told] / stretch[told])
    return np.concatenate(found)


def _partners(positions, start, hydrogen, n):
    """The nearest other atom of each hydrogen, within its structure of n atoms that begins at `start`."""
    difference = positions[start[:, None] + np.arange(n)] - positions[start + hydrogen][:, None]
    squares = np.einsum("mni,mni->mn", difference, difference)
    squares[np.arange(len(start)), hydrogen] = np.inf
    return squares.argmin(1)


def _along(columns, hydrogen, partner):
    """Length of each bond and the force on its hydrogen along it."""
    bond = columns.positions[hydrogen] - columns.positions[partner]
    length = np.sqrt(np.einsum("ki,ki->k", bond, bond))
    return length, np.einsum("ki,ki->k", columns.forces[hydrogen], bond) / length


def _choose_members(columns, usable, seed):
    """Structures to compare and the group of each: whole molecules by lot, a window of those that are too large."""
    candidates = np.flatnonzero(usable & (columns.n_atoms > 1))
    if len(candidates) < 2:
        return candidates, candidates
    _, group, counts = np.unique(molecule_codes(columns.molecule)[candidates], return_inverse=True, return_counts=True)
    order = candidates[np.argsort(group, kind="stable")]
    starts = np.cumsum(counts) - counts
    several = np.flatnonzero(counts > 1)
    several = several[np.random.default_rng(seed).permutation(len(several))]
    each = int(np.clip(_MEMBERS // max(len(several), 1), _MEMBERS_OF_MANY, _MEMBERS_OF_ONE))
    taken = np.minimum(counts[several], each)
    several = several[np.cumsum(taken) <= _MEMBERS]
    chosen = [order[starts[g]:starts[g] + min(counts[g], each)] for g in several]
    if not chosen:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    members = np.concatenate(chosen)
    # One molecule may stand in several orders of atoms: a group has one.
    label = np.repeat(np.arange(len(chosen)), [len(c) for c in chosen])
    key = np.stack([label, _order_of_atoms(columns, members)])
    return members, np.unique(key, axis=1, return_inverse=True)[1].ravel()


def _order_of_atoms(columns, members):
    """A number that is equal where the atomic numbers are equal, in their order; exact enough within a molecule."""
    n = columns.n_atoms[members]
    starts = np.cumsum(n) - n
    place = np.arange(n.sum()) - np.repeat(starts, n)
    value = columns.numbers[columns.atoms_of(members)].astype(np.int64)
    mixed = (value * 0x9E3779B1 + place * 0x85EBCA77) % 0x7FFFFFFF
    return segment_sum(mixed * mixed % 0x7FFFFFFF, starts) * 4096 + n % 4096


def _nearest(columns, members, group):
    """The nearest neighbours of every member in its group, by a few distances within the molecule: unique pairs."""
    if not len(members):
        return members, members
    probes = _distances_within(columns, members)
    order = np.argsort(group, kind="stable")
    pairs, distance = [], []
    for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(part) < 2:
            continue
        x = probes[part] - probes[part].mean(0)
        norm = np.einsum("mi,mi->m", x, x)
        squares = norm[:, None] + norm - 2 * (x @ x.T)
        squares[squares < _SAME] = np.inf  # itself, and copies of it
        rows = np.arange(len(part))
        for _ in range(_NEIGHBOURS):
            nearest = squares.argmin(1)
            pairs.append(np.stack([part, part[nearest]]))
            distance.append(squares[rows, nearest])
            squares[rows, nearest] = np.inf
    if not pairs:
        return members[:0], members[:0]
    pairs, distance = np.sort(np.concatenate(pairs, 1), axis=0), np.concatenate(distance)
    _, unique = np.unique(pairs, axis=1, return_index=True)
    unique = unique[np.isfinite(distance[unique])]
    chosen = unique[np.argsort(distance[unique], kind="stable")][:_ALIGNED]
    return members[pairs[0, chosen]], members[pairs[1, chosen]]


def _distances_within(columns, members):
    """_PROBES distances of each structure between atoms spread over it, the same atoms for equal sizes."""
    n = columns.n_atoms[members][:, None]
    drawn = np.random.default_rng(0).random((2, _PROBES))
    first = (drawn[0] * n).astype(np.int64)
    second = (first + 1 + (drawn[1] * (n - 1)).astype(np.int64)) % n
    start = columns.offsets[members][:, None]
    difference = columns.positions[start + first] - columns.positions[start + second]
    return np.sqrt(np.einsum("mki,mki->mk", difference, difference))


def _align(columns, first, second):
    """ClosePairs of all of them; the second conformation and its forces are turned onto the first. W is NaN where the
    forces are across the displacement."""
    rmsd, work, stiffness = np.full(len(first), np.inf), np.full(len(first), np.nan), np.full(len(first), np.nan)
    for n, part in same_size(columns.n_atoms[first]):
        rows_a, rows_b = (columns.offsets[s[part], None] + np.arange(n) for s in (first, second))
        a, b = columns.positions[rows_a], columns.positions[rows_b]
        force_a, force_b = columns.forces[rows_a], columns.forces[rows_b]
        if columns.pbc is None:
            displacement, force_b = _displacement(a, b, force_b)
        else:
            displacement, force_b = _displacement_periodic(columns, first[part], second[part], a, b, force_b)
        rmsd[part] = np.sqrt(np.einsum("mni,mni->m", displacement, displacement) / n)
        w = -0.5 * np.einsum("mni,mni->m", force_a + force_b, displacement)
        norms = [np.sqrt(np.einsum("mni,mni->m", x, x))
                 for x in (force_a, force_b, displacement, force_b - force_a)]
        stiffness[part] = norms[3] / norms[2]
        work[part] = np.where(np.abs(w) > _LEAST_COSINE * 0.5 * (norms[0] + norms[1]) * norms[2], w, np.nan)
    return ClosePairs(first, second, rmsd, columns.energy[second] - columns.energy[first], work, stiffness)


def _displacement(a, b, force_b):
    rotation = kabsch_align(a, b)
    return (b - b.mean(1, keepdims=True)) @ rotation - (a - a.mean(1, keepdims=True)), force_b @ rotation


def _displacement_periodic(columns, first, second, a, b, force_b):
    """As _displacement; in one and the same cell nothing can be turned and the nearest images are compared."""
    displacement, turned = _displacement(a, b, force_b)
    for p in np.flatnonzero(columns.pbc[first].any(1) | columns.pbc[second].any(1)):
        pbc, cell = columns.pbc[first[p]], columns.cell[first[p]]
        same = (pbc == columns.pbc[second[p]]).all() and np.allclose(cell, columns.cell[second[p]], atol=1e-6)
        difference = b[p] - a[p]
        if same:
            fractional = difference @ np.linalg.pinv(np.where(pbc[:, None], cell, 0.0))
            difference = difference - np.where(pbc, np.rint(fractional), 0) @ cell
        displacement[p] = difference - difference.mean(0) if same else np.inf
        turned[p] = force_b[p]
    return displacement, turned

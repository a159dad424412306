"""Statistics that show whether a data set can be trusted.

1. `examine` collects the statistics of one block of structures.
2. `combine` adds the statistics of several blocks.
3. `diagnosis.diagnose` turns them into a list of problems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.distribution import Accumulator, Distribution, rounded
from mlip_jax.datasets.quality.geometry import (
    chunks,
    finite_positions,
    segment_sum,
    shortest_distances,
)
from mlip_jax.datasets.quality.pairs import bond_stiffness, close_pairs, neighbor_pairs
from mlip_jax.datasets.quality.single_structures import (
    ALL_ELECTRON,
    GFN2_XTB,
    bond_forces,
    energy_ratios,
)
from mlip_jax.datasets.quality.stress_check import STRESS_RATIO, stress_ratios

TOO_CLOSE = 0.4  # Å
LARGE_FORCE = 100.0  # eV/Å
# An energy is an outlier if its residual per atom, after a fit of one energy per element, exceeds
# both OUTLIER_ENERGY (eV/atom) and OUTLIER_Z robust standard deviations.
OUTLIER_ENERGY = 2.0
OUTLIER_Z = 30.0
WORST = 5  # number of extreme values that are kept per quantity
COUNTS = (
    "blocks",
    "structures",
    "atoms",
    "no energy",
    "no forces",
    "partly forces",
    "no labels",
    "properties",
    "positions not finite",
    "too close",
    "large force",
    "energy outlier",
    "periodic",
)
DISTRIBUTIONS = (
    "energy per atom",
    "energy residual",
    "force component",
    "net force",
    "relative net force",
    "shortest distance",
    "shortest distance organic",
    "pair ratio",
    "pair distance",
    "pair stiffness",
    "bond stiffness",
    "stretch stiffness",
    "bond force",
    "energy ratio all-electron",
    "energy ratio GFN2-xTB",
    STRESS_RATIO,
)
# Quantities whose extreme values are kept with the names of their structures: the largest values,
# except the smallest distances and the pair ratios closest to -1.
WORST_OF = (
    "force component",
    "relative net force",
    "shortest distance",
    "energy residual",
    "pair ratio",
)
# Range of ΔE/W for a pair whose forces have the wrong sign.
FLIPPED = (-1.3, -0.7)


@dataclasses.dataclass
class Findings:
    """Statistics of one or more blocks.

    The size is bounded. The statistics of the blocks do not depend on the number of processes.

    Attributes:
      counts: Number of structures per name in COUNTS, unless the name says otherwise.
        "partly forces": some force components are not finite.
        "properties": at least one property is known.
        "too close": two atoms are closer than TOO_CLOSE Å.
        "large force": a force component exceeds LARGE_FORCE eV/Å.
      distributions: Distribution per name in DISTRIBUTIONS.
        "energy per atom": total energy per atom (eV).
        "energy residual": centered residual of a robust fit of element energies to the block
        (eV/atom).
        "force component": absolute value of a force component (eV/Å).
        "net force": |ΣF| (eV/Å).
        "relative net force": |ΣF| / sqrt(Σ|F|²); 1 for random forces.
        "shortest distance": shortest distance between two atoms of a structure (Å).
        "shortest distance organic": the same, for structures with H and one of C, N, O.
        "pair ratio": ΔE/W of close pairs.
        "pair distance": RMSD of close pairs (Å).
        "pair stiffness": |F₂ - F₁| / |Δx| of close pairs (eV/Å²).
        "bond stiffness": stiffness of bonds of H to C, N or O between two conformations (eV/Å²).
        "stretch stiffness": the same of stretched bonds in single structures.
        "bond force": force along bonds of H that are not stretched (eV/Å).
        "energy ratio all-electron", "energy ratio GFN2-xTB": energy divided by that of the isolated
        atoms with these methods, one value per composition and block.
        "stress ratio": energy differences of crystals over those that the stress implies.
      worst: List of [value, "source#conformer"] per name in WORST_OF, the worst first. Pairs are
        named "source#conformer and source#conformer"; only ratios within FLIPPED are listed.
    """

    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    distributions: dict[str, Distribution] = dataclasses.field(
        default_factory=lambda: {name: Distribution() for name in DISTRIBUTIONS}
    )
    worst: dict[str, list[list[Any]]] = dataclasses.field(
        default_factory=lambda: {name: [] for name in WORST_OF}
    )

    def to_json(self) -> dict[str, Any]:
        """Return plain values without NaN, rounded because last digits depend on the machine."""
        worst = {k: [[rounded(value), name] for value, name in v] for k, v in self.worst.items()}
        return {
            "counts": dict(self.counts),
            "worst": worst,
            "distributions": {k: d.to_json() for k, d in self.distributions.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Findings:
        """Create findings from the output of `to_json`. Statistics that it lacks are empty."""
        findings = cls()
        findings.counts |= {k: int(n) for k, n in values["counts"].items()}
        findings.distributions |= {
            k: Distribution.from_json(d) for k, d in values["distributions"].items()
        }
        findings.worst |= {k: [list(w) for w in v] for k, v in values["worst"].items()}
        return findings


def combine(findings: Iterable[Findings]) -> Findings:
    """Return the sum of the findings of several blocks."""
    total = Findings()
    for block in findings:
        for name, n in block.counts.items():
            total.counts[name] += n
        for name, distribution in block.distributions.items():
            total.distributions[name].add(distribution)
        for name, worst in block.worst.items():
            total.worst[name] = _worst_first(name, total.worst[name] + [list(w) for w in worst])
    return total


def examine(columns: Columns, *, seed: int = 0, shortest: np.ndarray | None = None) -> Findings:
    """Collect the statistics of one block of structures.

    Args:
      columns: Block of structures. Pairs of conformations are searched within the block.
      seed: Random seed for the choice of molecules, if the block has more than are compared.
      shortest: Precomputed shortest_distances(columns) (Å), shape (S,).
    """
    findings = Findings()
    with np.errstate(invalid="ignore", over="ignore"):
        shortest = shortest_distances(columns) if shortest is None else shortest
        finite = finite_positions(columns)
        no_energy = ~np.isfinite(columns.energy)
        forces = _examine_forces(columns, findings)
        findings.counts |= {
            "blocks": 1,
            "structures": len(columns),
            "atoms": int(len(columns.numbers)),
            "no energy": int(no_energy.sum()),
            "no forces": int(forces["none"].sum()),
            "partly forces": int(forces["partly"].sum()),
            "no labels": int((no_energy & forces["none"]).sum()),
            "properties": int(_any_property(columns).sum()),
            "positions not finite": int((~finite).sum()),
            "too close": int((shortest < TOO_CLOSE).sum()),
            "large force": int((forces["largest"] > LARGE_FORCE).sum()),
            "periodic": 0 if columns.pbc is None else int(columns.pbc.any(1).sum()),
        }
        _examine_distances(columns, shortest, findings)
        _examine_energies(columns, findings)
        findings.distributions[STRESS_RATIO] = Distribution.from_values(stress_ratios(columns))
        usable = finite & ~forces["none"] & ~forces["partly"]
        labeled = usable & ~no_energy
        _examine_pairs(
            columns,
            *neighbor_pairs(columns, labeled if labeled.any() else usable, seed=seed),
            findings,
        )
        stretched, at_rest = bond_forces(columns, usable)
        for name, values in (
            ("stretch stiffness", stretched),
            ("bond force", at_rest),
            ("energy ratio all-electron", energy_ratios(columns, ALL_ELECTRON)),
            ("energy ratio GFN2-xTB", energy_ratios(columns, GFN2_XTB)),
        ):
            findings.distributions[name] = Distribution.from_values(values)
    return findings


def count_duplicates(fingerprints: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the number and the ascending indices of structures that repeat an earlier one.

    Args:
      fingerprints: geometry.fingerprints of all structures of a data set, in order, shape (S,).
    """
    # The sort is stable: the first of equal fingerprints is the first structure.
    order = np.argsort(fingerprints, kind="stable")
    repeated = np.sort(order[1:][fingerprints[order][1:] == fingerprints[order][:-1]])
    return len(repeated), repeated


def _any_property(columns: Columns) -> np.ndarray:
    """Return whether a structure property, or a property of all atoms, is known, shape (S,)."""
    known = np.zeros(len(columns), bool)
    for values in columns.properties.values():
        known |= np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    for values in columns.atom_properties.values():
        unknown = (~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))).astype(float)
        known |= segment_sum(unknown, columns.offsets[:-1]) == 0
    return known


def _examine_forces(columns, findings):
    """Add the force statistics to `findings`.

    Returns:
      Dictionary of arrays, shape (S,). "none": no force component is known. "partly": some
      components are unknown. "largest": largest absolute component (eV/Å).
    """
    size = len(columns)
    none, partly = np.zeros(size, bool), np.zeros(size, bool)
    components = Accumulator()
    largest, net, relative = np.full(size, np.nan), np.full(size, np.nan), np.full(size, np.nan)
    for structures, atoms, starts in chunks(columns):
        forces = columns.forces[atoms]
        total = segment_sum(forces, starts)  # (chunk, 3)
        # A finite sum implies finite forces, so most chunks skip the search for missing ones.
        if not np.isfinite(total).all():
            known = np.isfinite(forces)
            count = segment_sum(known.sum(1), starts)
            none[structures] = count == 0
            partly[structures] = (count > 0) & (count < 3 * columns.n_atoms[structures])
            flat = np.abs(forces[known])
            forces = np.where(known, forces, 0.0)
        else:
            none[structures] = columns.n_atoms[structures] == 0
            flat = np.abs(forces).ravel()
        squares = segment_sum(np.einsum("ai,ai->a", forces, forces), starts)  # (chunk,)
        net[structures] = np.sqrt(np.einsum("si,si->s", total, total))
        relative[structures] = net[structures] / np.sqrt(np.where(squares > 0, squares, np.nan))
        if (squares.max(initial=0.0)) > 0:
            largest[structures] = _largest(forces, starts)
        components.add(flat)
    findings.distributions["force component"] = components.distribution()
    findings.distributions["net force"] = Distribution.from_values(net)
    findings.distributions["relative net force"] = Distribution.from_values(relative)
    findings.worst["force component"] = _worst(columns, "force component", largest)
    findings.worst["relative net force"] = _worst(columns, "relative net force", relative)
    return {"none": none, "partly": partly, "largest": largest}


def _examine_pairs(columns, first, second, findings):
    """Add the statistics of close pairs and of bonds of H to `findings`."""
    pairs = close_pairs(columns, first, second)
    ratio = pairs.energy / pairs.work
    findings.distributions["pair ratio"] = Distribution.from_values(ratio)
    findings.distributions["pair distance"] = Distribution.from_values(pairs.rmsd)
    findings.distributions["pair stiffness"] = Distribution.from_values(pairs.stiffness)
    findings.distributions["bond stiffness"] = Distribution.from_values(
        bond_stiffness(columns, first, second)
    )
    findings.worst["pair ratio"] = _worst_first(
        "pair ratio",
        [
            [
                float(ratio[p]),
                f"{_name(columns, pairs.first[p])} and {_name(columns, pairs.second[p])}",
            ]
            for p in np.flatnonzero((ratio >= FLIPPED[0]) & (ratio <= FLIPPED[1]))
        ],
    )


def _largest(forces, starts):
    """Return the largest absolute force component per structure, 0 without atoms."""
    largest = np.zeros(len(starts))
    filled = np.append(starts[1:], len(forces)) > starts
    largest[filled] = np.maximum.reduceat(np.abs(forces).ravel(), 3 * starts[filled])
    return largest


def _examine_distances(columns, shortest, findings):
    """Add the statistics of shortest distances to `findings`."""
    findings.distributions["shortest distance"] = Distribution.from_values(shortest)
    # One sum counts both: H atoms in the lower 32 bits, C, N and O atoms in the upper 32 bits.
    kind = np.zeros(256, np.int64)
    kind[1], kind[6:9] = 1, 1 << 32
    seen = segment_sum(kind[columns.numbers], columns.offsets[:-1])
    organic = (seen >> 32 > 0) & (seen & 0xFFFFFFFF > 0)
    findings.distributions["shortest distance organic"] = Distribution.from_values(
        shortest[organic]
    )
    findings.worst["shortest distance"] = _worst(columns, "shortest distance", shortest)


def _examine_energies(columns, findings):
    """Add the energy statistics and the number of outliers to `findings`."""
    known = np.isfinite(columns.energy) & (columns.n_atoms > 0)
    n_atoms = np.maximum(columns.n_atoms, 1)
    findings.distributions["energy per atom"] = Distribution.from_values(
        (columns.energy / n_atoms)[known]
    )
    if not known.any():
        return
    residual = _energy_residuals(columns, known) / n_atoms
    findings.distributions["energy residual"] = Distribution.from_values(residual)
    deviation = np.abs(residual)
    limit = max(OUTLIER_ENERGY, OUTLIER_Z * 1.4826 * float(np.median(deviation[known])))
    findings.counts["energy outlier"] = int((deviation > limit).sum())
    findings.worst["energy residual"] = _worst(columns, "energy residual", deviation)


def _energy_residuals(columns, known):
    """Return energies minus fitted element energies, centered, shape (S,); NaN if unknown.

    The fit has one energy per element. Then n_atoms times the median residual per atom is
    subtracted. Structures far from the first fit are excluded from the second one.
    """
    present = np.flatnonzero(np.bincount(columns.numbers))
    column_of = np.zeros(256, np.int64)
    column_of[present] = np.arange(len(present))
    key = (
        np.repeat(np.arange(len(columns)) * len(present), columns.n_atoms)
        + column_of[columns.numbers]
    )
    # Number of atoms per structure and element, (S, elements).
    counts = (
        np.bincount(key, minlength=len(columns) * len(present))
        .reshape(len(columns), -1)
        .astype(np.float64)
    )
    used = known
    n_atoms = np.maximum(columns.n_atoms, 1)
    for _ in range(2):
        x, y = counts[used], columns.energy[used]
        # Normal equations with weights 1 / n_atoms, so that large structures do not dominate.
        weighted = x / n_atoms[used, None]
        # einsum instead of BLAS: sums of BLAS depend on the number of threads.
        solution = np.linalg.lstsq(
            np.einsum("se,sf->ef", weighted, x), np.einsum("se,s->e", weighted, y), rcond=1e-12
        )[0]
        residual = np.where(known, columns.energy - np.einsum("se,e->s", counts, solution), np.nan)
        per_atom = residual / n_atoms
        center = np.nanmedian(per_atom)
        deviation = np.abs(per_atom - center)
        used = known & (deviation <= 10 * np.nanmedian(deviation) + 1e-6)
    return residual - center * n_atoms


def _worst(columns, name, values):
    """Return the entries of `Findings.worst` for the values of one block, shape (S,)."""
    score = np.where(
        np.isfinite(values), values if name == "shortest distance" else -values, np.inf
    )
    extreme = np.argpartition(score, WORST)[:WORST] if len(score) > WORST else np.arange(len(score))
    return _worst_first(
        name, [[float(values[s]), _name(columns, s)] for s in extreme if np.isfinite(values[s])]
    )


def _worst_first(name, worst):
    """Sort entries of `Findings.worst`, the worst first, and keep WORST of them."""
    score = {"shortest distance": lambda value: value, "pair ratio": lambda value: abs(value + 1)}
    worse = score.get(name, lambda value: -value)
    return sorted(worst, key=lambda w: (worse(w[0]), w[1]))[:WORST]


def _name(columns, s):
    """Return the name of structure s in the block."""
    return f"{columns.source[s]}#{columns.conformer[s]}"

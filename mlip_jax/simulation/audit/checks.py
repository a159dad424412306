"""Checks of an audit. Each evaluates geometries with a force field, most also with a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator
from ase.optimize import BFGS

from mlip_jax.potential import Potential
from mlip_jax.simulation.audit import geometries
from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.reference.oracle import Method
from mlip_jax.simulation.relaxation.relax import relax

_MEV = 1000.0
_NOISE = 0.05  # noise of the geometries that are relaxed, Å
_REFERENCE_STEPS, _REFERENCE_FMAX = 200, 0.01  # relaxation with the reference method; eV/Å
_STEPS_BETWEEN_RECORDS = 20


@dataclasses.dataclass(frozen=True)
class AuditCurve:
    """Energies along a scan.

    Attributes:
      name: Name of the molecule.
      label: Name and unit of the coordinate.
      x: Coordinate, (K,).
      energy: Energies of the force field (eV) relative to its lowest one, (K,).
      reference: Those of the reference method, or None.
    """

    name: str
    label: str
    x: np.ndarray
    energy: np.ndarray
    reference: np.ndarray | None = None


@dataclasses.dataclass
class AuditCheck:
    """Result of a check.

    Attributes:
      name: Name of the check.
      description: Measured quantities, for the report.
      rows: One dict of values per molecule, with "molecule" as the first key.
      scores: Summary: values by name.
      curves: Scans.
      skipped: Molecules or parts without a result, with the reasons.
    """

    name: str
    description: str
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    curves: list[AuditCurve] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def mean(self, column: str, name: str, reduce: Callable = np.mean) -> None:
        """Add the mean of the finite values of a column to the scores, if there are any."""
        values = [row[column] for row in self.rows if np.isfinite(row.get(column, np.nan))]
        if values:
            self.scores[name] = float(reduce(values))


@dataclasses.dataclass(frozen=True)
class Auditor:
    """A force field and a reference method under the same checks.

    Attributes:
      potential: The force field.
      calculator: Its ASE calculator.
      reference: Reference method, or None.
      dtype: Precision of relaxation and dynamics.
    """

    potential: Potential
    calculator: Calculator
    reference: Method | None
    dtype: str

    def known(self, check: AuditCheck, items: Iterable[tuple], build: Callable) -> Iterable:
        """Yield (item, geometries) of items whose elements the force field knows."""
        for item in items:
            built = build(item)
            first = built[0] if isinstance(built, list) else built
            atoms = first.frames[0] if isinstance(first, geometries.GeometryScan) else first
            missing = set(atoms.numbers.tolist()) - set(self.potential.elements)
            if missing:
                check.skipped.append(f"{item[0]}: contains elements unknown to the force field")
            else:
                yield item, built

    def energies(self, frames: Sequence[Atoms]) -> np.ndarray:
        """Return energies of the force field (eV), (K,)."""
        return np.array([self.calculator.get_potential_energy(atoms) for atoms in frames])

    def reference_energies(self, frames: Sequence[Atoms]) -> np.ndarray:
        """Return energies of the reference method (eV), (K,); NaN where it fails or is missing."""
        values = np.full(len(frames), np.nan)
        if self.reference is None:
            return values
        calculator = self.reference.calculator(frames[0])
        for k, atoms in enumerate(frames):
            try:
                values[k] = calculator.get_potential_energy(atoms)
            except (CalculationFailed, RuntimeError):  # not converged
                continue
        return values


def bond_scans(auditor: Auditor) -> AuditCheck:
    """Stretch bonds: one minimum, and forces that are the derivative of the energy."""
    check = AuditCheck(
        "Bond scans",
        "One side of a bond moves along it, from 0.8 to 1.6 times its length. A smooth force field "
        "has one stationary point, and its force is the numerical derivative of the energy.",
    )
    scans = auditor.known(check, geometries.BONDS, lambda item: geometries.bond_scan(*item))
    for (name, *_), scan in scans:
        energy, slope = [], []
        for atoms in scan.frames:
            energy.append(auditor.calculator.get_potential_energy(atoms))
            forces = auditor.calculator.get_forces(atoms)
            slope.append(-(forces[scan.moving] @ scan.direction).sum())
        energy, slope = np.array(energy), np.array(slope)
        # five-point derivative, away from the ends
        step = scan.x[1] - scan.x[0]
        numerical = (energy[:-4] - 8 * energy[1:-3] + 8 * energy[3:-1] - energy[4:]) / (12 * step)
        check.rows.append(
            {
                "molecule": name,
                "stationary points": int((np.diff(np.sign(slope)) != 0).sum()),
                "largest force error (eV/Å)": float(np.abs(slope[2:-2] - numerical).max()),
            }
        )
        check.curves.append(AuditCurve(name, "bond length (Å)", scan.x, energy - energy.min()))
    check.mean("stationary points", "largest number of stationary points", np.max)
    check.mean("largest force error (eV/Å)", "largest force error (eV/Å)", np.max)
    return check


def torsion_scans(auditor: Auditor) -> AuditCheck:
    """Turn groups about bonds, and compare the profile with the reference."""
    check = AuditCheck(
        "Torsions",
        "One side of a bond turns about it. Errors are those of energies relative to the mean over "
        "the profile, and of the difference between its highest and lowest point.",
    )
    scans = auditor.known(check, geometries.TORSIONS, lambda item: geometries.torsion_scan(*item))
    for (name, *_), scan in scans:
        energy = auditor.energies(scan.frames)
        reference = auditor.reference_energies(scan.frames)
        row = {"molecule": name, "height (meV)": _MEV * float(np.ptp(energy))}
        row |= _relative_errors(energy, reference)
        row["error of the height (meV)"] = _MEV * float(np.ptp(energy) - np.ptp(reference))
        check.rows.append(row)
        check.curves.append(
            AuditCurve(
                name,
                "torsion (degrees)",
                scan.x,
                energy - energy.min(),
                None if np.isnan(reference).any() else reference - reference.min(),
            )
        )
    check.mean("error (meV)", "mean error of torsions (meV)")
    return check


def conformer_energies(auditor: Auditor, count: int) -> AuditCheck:
    """Compare energies of conformers with the reference, relative to their mean."""
    check = AuditCheck(
        "Conformers",
        f"Energies of {count} embeddings per molecule, relaxed with MMFF94, relative to their mean.",
    )
    molecules = auditor.known(
        check, geometries.FLEXIBLE, lambda item: geometries.conformers(item[1], count)
    )
    for (name, _), frames in molecules:
        energy, reference = auditor.energies(frames), auditor.reference_energies(frames)
        row = {"molecule": name, "range (meV)": _MEV * float(np.ptp(energy))}
        check.rows.append(row | _relative_errors(energy, reference))
    check.mean("error (meV)", "mean error of conformers (meV)")
    return check


def dimers(auditor: Auditor) -> AuditCheck:
    """Compare interaction energies of two molecules with the reference."""
    check = AuditCheck(
        "Dimers",
        "Interaction energies at eight distances, relative to the separate molecules. Distances "
        "are relative to van der Waals contact.",
    )
    scans = auditor.known(check, geometries.DIMERS, lambda item: geometries.dimer_scan(*item))
    for (name, *_), scan in scans:
        energy = auditor.energies(scan.frames)
        reference = auditor.reference_energies(scan.frames)
        energy, reference = energy[:-1] - energy[-1], reference[:-1] - reference[-1]
        check.rows.append(
            {
                "molecule": name,
                "lowest (meV)": _MEV * float(energy.min()),
                "lowest, reference (meV)": _MEV * float(reference.min()),
                "error (meV)": _MEV * float(np.abs(energy - reference).mean()),
            }
        )
        known = None if np.isnan(reference).any() else reference
        check.curves.append(
            AuditCurve(name, "distance over van der Waals contact", scan.x, energy, known)
        )
    check.mean("error (meV)", "mean error of dimers (meV)")
    return check


def relaxed_geometries(auditor: Auditor) -> AuditCheck:
    """Relax rings from displaced geometries: planarity, and bond lengths of the reference."""
    check = AuditCheck(
        "Relaxed rings",
        f"Rings are relaxed from geometries with noise of {_NOISE} Å. Aromatic rings are planar. Bond "
        "lengths are compared with those after a relaxation by the reference method.",
    )
    molecules = list(auditor.known(check, geometries.RINGS, lambda item: _displace(item[1])))
    results = relax([atoms for _, atoms in molecules], auditor.potential, dtype=auditor.dtype)
    for ((name, _), _), result in zip(molecules, results):
        if not result.converged:
            check.skipped.append(f"{name}: {result.status} {result.reason}".rstrip())
            continue
        check.rows.append(
            {
                "molecule": name,
                "out of plane (Å)": geometries.out_of_plane(result.atoms),
                "error of bond lengths (Å)": _bond_length_error(auditor, result.atoms),
            }
        )
    check.mean("out of plane (Å)", "largest distance out of plane (Å)", np.max)
    check.mean("error of bond lengths (Å)", "mean error of bond lengths (Å)")
    return check


def dynamics(auditor: Auditor, picoseconds: float, temperature: float) -> AuditCheck:
    """Run dynamics: energy drift at constant energy, and survival at a high temperature."""
    check = AuditCheck(
        "Dynamics",
        f"Drift of the energy at constant energy from 300 K, and whether all bonds are intact at "
        f"{temperature:g} K, each for {picoseconds:g} ps with steps of 0.5 fs.",
    )
    if not auditor.potential.conservative:
        check.skipped.append("all molecules: forces are not the gradient of the energy")
        return check
    molecules = list(
        auditor.known(check, geometries.FLEXIBLE, lambda item: geometries.conformers(item[1], 1))
    )
    if not molecules:
        return check
    results = relax([frames[0] for _, frames in molecules], auditor.potential)
    starts, steps = [r.atoms for r in results], max(100, round(2000 * picoseconds))
    common = {"frame_every": 0, "record_every": _STEPS_BETWEEN_RECORDS}
    constant = MolecularDynamics(
        starts, auditor.potential, ensemble="nve", temperature=300.0, **common
    ).run(steps)
    hot = MolecularDynamics(
        starts, auditor.potential, ensemble="langevin", temperature=temperature, **common
    ).run(steps)
    for ((name, _), frames), nve, langevin in zip(molecules, constant, hot):
        time, conserved = nve.thermo.time / 1000, nve.thermo.conserved
        drift = np.polyfit(time, _MEV * (conserved - conserved[0]) / len(frames[0]), 1)[0]
        check.rows.append(
            {
                "molecule": name,
                "drift (meV/atom/ps)": float("nan") if nve.broken else float(drift),
                "intact": "no" if nve.broken or langevin.broken else "yes",
            }
        )
    check.mean("drift (meV/atom/ps)", "largest drift (meV/atom/ps)", lambda v: np.abs(v).max())
    check.scores["broken molecules"] = float(sum(row["intact"] == "no" for row in check.rows))
    return check


def _relative_errors(energy: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return the mean absolute error of energies relative to their mean."""
    difference = energy - reference
    return {"error (meV)": _MEV * float(np.abs(difference - difference.mean()).mean())}


def _displace(smiles: str) -> Atoms:
    atoms = geometries.from_smiles(smiles, mmff=True)
    atoms.rattle(_NOISE, seed=0)
    return atoms


def _bond_length_error(auditor: Auditor, atoms: Atoms) -> float:
    """Return the mean absolute error of the bond lengths (Å); NaN without a reference."""
    if auditor.reference is None:
        return float("nan")
    pairs, other = geometries.bonded_pairs(atoms), atoms.copy()
    other.calc = auditor.reference.calculator(other)
    if not BFGS(other, logfile=None).run(fmax=_REFERENCE_FMAX, steps=_REFERENCE_STEPS):
        return float("nan")
    lengths = [
        np.linalg.norm(a.positions[pairs[:, 0]] - a.positions[pairs[:, 1]], axis=1)
        for a in (atoms, other)
    ]
    return float(np.abs(lengths[0] - lengths[1]).mean())

"""Labels of the reference method, with the reason for each one that is missing or rejected."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.checks import LARGE_FORCE, OUTLIER_ENERGY, OUTLIER_Z, examine
from mlip_jax.datasets.quality.diagnosis import diagnose
from mlip_jax.datasets.quality.problems import UNCONFIRMED
from mlip_jax.label_budget.geometry import to_atoms
from mlip_jax.label_budget.pool import PoolMolecule
from mlip_jax.simulation.reference.oracle import TBLITE, Oracle, OracleError
from mlip_jax.structure import Structure, from_ase
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

# Rejected labels: |sum of forces| above this fraction of the norm of all forces, and above this
# value (eV/Å). A reference method with a grid leaves a few hundredths.
_NET_SHARE, _NET_FORCE = 0.3, 0.1
# Pilot calculations: number of molecules, displaced copies of each, displacement (Å).
_PILOT_MOLECULES, _PILOT_COPIES, _PILOT_WIDTH = 3, 3, 0.04
_EARLY = ("gradients", "some gradients", "units", "forces and energies", UNCONFIRMED)


@dataclasses.dataclass(frozen=True)
class LabeledBatch:
    """Structures with labels of the reference method, and what became of the others.

    Attributes:
      columns: Structures with labels.
      rows: Indices of these structures in the batch.
      failures: Reason for each structure without a usable label, by its name.
      seconds: Duration of all calculations (s), summed over the processes.
    """

    columns: Columns
    rows: np.ndarray
    failures: dict[str, str]
    seconds: float


def label(oracle: Oracle, columns: Columns, name: str, *, required: bool = True) -> LabeledBatch:
    """Label structures. Structures without a usable label are reported and skipped.

    Each label is on disk as soon as it arrives, in the cache of the oracle.

    Args:
      oracle: Reference method.
      columns: Structures to label.
      name: Name of the batch, for names of structures, the progress bar and the log.
      required: Whether at least one usable label is required.

    Raises:
      OracleError: The method failed for all structures, for reasons other than the structures or
        with `required`.
      OSError: The labels cannot be written.
    """
    names = [f"{name} {k}: {columns.molecule[k]}, {columns.subset[k]}" for k in range(len(columns))]
    atoms = {n: to_atoms(columns[k]) for k, n in enumerate(names)}
    results = oracle.evaluate(atoms, f"labels of {name}")
    usable, failures, seconds = [], {}, 0.0
    for k, n in enumerate(names):
        result = results[n]
        seconds += result.seconds if np.isfinite(result.seconds) else 0.0
        reason = result.error or _reason_to_reject(result.forces)
        if reason:
            failures[n] = reason
        else:
            usable.append((k, result.energy, result.forces))
    if not usable and required:
        raise OracleError(
            f"{oracle.method.name} gave no usable label for {count_of(len(names), 'structure')}; "
            f"the first reason: {next(iter(failures.values()))}"
        )
    rows = np.array([k for k, *_ in usable], np.int64)
    labeled = dataclasses.replace(
        columns.take(rows),
        energy=np.array([energy for _, energy, _ in usable]),
        forces=np.concatenate([np.zeros((0, 3)), *(forces for *_, forces in usable)]),
    )
    _report(failures, len(names), name)
    return LabeledBatch(labeled, rows, failures, seconds)


def _reason_to_reject(forces: np.ndarray) -> str:
    """Return why forces (eV/Å), (n, 3), are rejected, or ""."""
    largest = np.abs(forces).max()
    if largest > LARGE_FORCE:
        return f"a force component is {largest:.3g} eV/Å, beyond {LARGE_FORCE:g} eV/Å"
    net, norm = np.linalg.norm(forces.sum(axis=0)), np.linalg.norm(forces)
    if net > max(_NET_FORCE, _NET_SHARE * norm):
        return f"the forces sum to {net:.3g} eV/Å instead of zero"
    return ""


def energy_outliers(new: Columns, known: Columns) -> np.ndarray:
    """Return which energies of new labels are outliers among all labels, (S,) bool.

    The energies minus a fit of one energy per element, per atom, are compared by their median and
    their median absolute deviation.

    Args:
      new: New labels.
      known: Earlier labels; may be empty.
    """
    everything = Columns.concatenate([known, new]) if len(known) else new
    elements = np.unique(everything.numbers)
    counts = np.stack(
        [np.add.reduceat(everything.numbers == z, everything.offsets[:-1]) for z in elements], 1
    ).astype(np.float64)
    weight = np.ones(len(everything))
    for _ in range(5):  # outliers lose their influence on the fit
        energies = np.linalg.lstsq(
            counts * weight[:, None], everything.energy * weight, rcond=None
        )[0]
        residual = (everything.energy - counts @ energies) / everything.n_atoms
        residual = residual - np.median(residual)
        width = max(1.4826 * float(np.median(np.abs(residual))), 1e-6)
        weight = 1 / np.maximum(np.abs(residual) / (3 * width), 1.0)
    limit = max(OUTLIER_ENERGY, OUTLIER_Z * width)
    return np.abs(residual[len(everything) - len(new) :]) > limit


def check_oracle(oracle: Oracle, molecules: Sequence[PoolMolecule], seed: int) -> int:
    """Compare forces with energy differences of displaced copies of the smallest molecules.

    Only methods of the user are checked: the units and signs of the built-in ones are known.

    Args:
      oracle: Reference method.
      molecules: Molecules of the pool.
      seed: Seed of the displacements.

    Returns:
      Number of calculations; 0 if all molecules are single atoms, which have no forces.

    Raises:
      OracleError: The forces have the wrong sign or unit, or the method fails.
    """
    if oracle.method.name in TBLITE:
        return 0
    structures = list(_pilot_structures(molecules, seed))
    if not structures:
        log.warning(
            "%s: signs and units are not checked, because all molecules are single atoms",
            oracle.method.name,
        )
        return 0
    batch = label(oracle, Columns.from_structures(structures), "the check of the oracle")
    problems = [
        p
        for p in diagnose(examine(batch.columns, seed=seed))
        if p.severity == "error" and p.what in _EARLY
    ]
    if problems:
        raise OracleError(
            f"{oracle.method.name}: {problems[0].message}. The budget has not been spent; "
            f"{count_of(len(structures), 'calculation')} checked the method."
        )
    return len(structures)


def _pilot_structures(molecules: Sequence[PoolMolecule], seed: int):
    """Yield the smallest molecules, each with slightly displaced copies."""
    rng = np.random.default_rng(seed)
    smallest = sorted(
        (m for m in molecules if len(m.geometries[0]) > 1), key=lambda m: len(m.geometries[0])
    )[:_PILOT_MOLECULES]
    for molecule in smallest:
        for copy in range(_PILOT_COPIES + 1):
            yield _copy_of(molecule, copy, rng)


def _copy_of(molecule: PoolMolecule, copy: int, rng: np.random.Generator) -> Structure:
    """Return a molecule, displaced unless it is the first copy."""
    atoms = molecule.geometries[0].copy()
    if copy:
        atoms.positions += _PILOT_WIDTH * rng.standard_normal(atoms.positions.shape)
    return from_ase(
        atoms,
        molecule=molecule.name,
        smiles=molecule.smiles,
        conformer=copy,
        subset="check",
        source=molecule.name,
    )


def _report(failures: dict[str, str], total: int, name: str) -> None:
    """Log the structures without a usable label."""
    if failures:
        first, reason = next(iter(failures.items()))
        log.warning(
            "%s: %d of %s have no usable label; the first, %s: %s",
            name,
            len(failures),
            count_of(total, "structure"),
            first,
            reason,
        )

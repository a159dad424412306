"""Files of an evaluation: structures with predictions, and the list of skipped structures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from mlip_jax.foreign_text import TableWriter, one_line
from mlip_jax.simulation.structure_predictions import StructurePredictions
from mlip_jax.structure import Structure
from mlip_jax.tasks.force_field_evaluation.evaluation import EvaluatedStructures
from mlip_jax.workdir import atomic_open

STRUCTURES, SKIPPED_FILE, ARRAYS = "predictions.xyz", "skipped.csv", "predictions.npz"
_BLOCK = 1024  # structures that are read at a time


def predicted_atoms(structure: Structure, predictions: StructurePredictions, s: int) -> Atoms:
    """Return a structure with its predictions.

    The calculator has the predicted energy, forces and stress. `info` and `arrays` contain the
    labels, as "reference_energy" and "reference_forces", expected errors and domain distances.

    Args:
      structure: Structure, with labels.
      predictions: Predictions.
      s: Index of the structure in `predictions`.
    """
    rows = slice(predictions.offsets[s], predictions.offsets[s + 1])
    atoms = Atoms(
        structure.numbers,
        structure.positions,
        cell=structure.cell,
        pbc=False if structure.pbc is None else structure.pbc,
        info={"charge": structure.charge},
    )
    if structure.spin:
        atoms.info["num_unpaired_electrons"] = int(structure.spin)
    for name in ("molecule", "smiles", "source"):
        if text := getattr(structure, name):
            atoms.info[name] = one_line(text)
    if structure.subset:
        atoms.info["config_type"] = one_line(structure.subset)
    results = {"energy": float(predictions.energy[s]), "forces": predictions.forces[rows]}
    if predictions.stress is not None and np.isfinite(predictions.stress[s]).all():
        results["stress"] = full_3x3_to_voigt_6_stress(predictions.stress[s])
    if predictions.charges is not None:
        results["charges"] = predictions.charges[rows]
    atoms.calc = SinglePointCalculator(atoms, **results)
    if np.isfinite(structure.energy):
        atoms.info["reference_energy"] = structure.energy
    if structure.forces is not None and np.isfinite(structure.forces).any():
        atoms.arrays["reference_forces"] = np.array(structure.forces)
    for name in ("energy_std", "energy_expected_error"):
        if (values := getattr(predictions, name)) is not None:
            atoms.info[name] = float(values[s])
    for name in ("forces_std", "forces_expected_error", "domain_distance"):
        if (values := getattr(predictions, name)) is not None:
            atoms.arrays[name] = values[rows]
    outside = predictions.outside_domain
    if outside is not None and (outside[s] or predictions.farthest is not None):
        atoms.info["outside_domain"] = bool(outside[s])
    return atoms


def write_structures(path: Path, evaluated: EvaluatedStructures) -> None:
    """Write all structures with their predictions as extended XYZ (eV, eV/Å, eV/Å³)."""
    from ase.io import write

    with atomic_open(path, "w", encoding="utf-8") as file:
        for start in range(0, len(evaluated.indices), _BLOCK):
            columns = evaluated.data.rows.take(evaluated.indices[start : start + _BLOCK])
            frames = [
                predicted_atoms(structure, evaluated.predictions, start + k)
                for k, structure in enumerate(columns)
            ]
            write(file, frames, format="extxyz")


def write_skipped(path: Path, evaluated: EvaluatedStructures) -> None:
    """Write a CSV file of the structures without predictions, with reasons."""
    data, skipped = evaluated.data, np.array(sorted(evaluated.skipped), np.int64)
    with atomic_open(path, "w", newline="", encoding="utf-8") as file:
        table = TableWriter(file, lineterminator="\n")
        table.writerow(["structure", "reason"])
        table.writerows(data.unusable)
        for start in range(0, len(skipped), _BLOCK):
            block = skipped[start : start + _BLOCK]
            for i, structure in zip(block, data.rows.take(block)):
                table.writerow([f"{structure.source}#{structure.conformer}", evaluated.skipped[i]])

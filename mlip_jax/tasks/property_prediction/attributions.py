"""Attributions of predicted properties to atoms, for the molecules that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.isolation.molecules import is_safe_smiles
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.foreign_text import table_rows
from mlip_jax.reports.attributions import MAX_PICTURES, AttributedMolecule
from mlip_jax.structure import from_ase
from mlip_jax.tasks.property_prediction.conformers import PredictionInput
from mlip_jax.tasks.property_prediction.ensemble import Ensemble


def attribute(
    ensemble: Ensemble, results: Path, inputs: Callable[[set[int]], Iterator[PredictionInput]]
) -> dict[str, list[AttributedMolecule]]:
    """Attribute the lowest and highest predictions of each scalar property to atoms.

    Args:
      ensemble: Predictors. Attributions are means over members and conformers.
      results: Table of predictions.
      inputs: Function that returns the molecules of the file with certain indices, at the
        geometries of the predictions.
    """
    with open(results, newline="", encoding="utf-8") as file:
        rows = {int(row["index"]): row for row in table_rows(file) if row["status"] == "predicted"}
    names = [t.name for t in ensemble.targets if t.kind == "scalar"]
    chosen = {name: _extremes(rows, name) for name in names}
    wanted = {index for indices in chosen.values() for index in indices}
    molecules = {m.index: m for m in inputs(wanted) if not m.reason} if wanted else {}
    if not all(member.reads_bonds for member in ensemble.members):
        molecules = {k: m for k, m in molecules.items() if has_order_of_smiles(m.record)}
    values = _attributions(ensemble, list(molecules.values())) if molecules else {}
    return {
        name: [
            AttributedMolecule(
                f"{_title(molecules[index].record)}: {float(rows[index][name]):.4g}",
                molecules[index].record.smiles,
                values[index][name],
            )
            for index in indices
            if index in molecules
        ]
        for name, indices in chosen.items()
    }


def has_order_of_smiles(record: MoleculeRecord) -> bool:
    """Return whether the atoms are in RDKit's order of the SMILES: heavy atoms, then hydrogens.

    Otherwise a picture of the SMILES would show the attributions at wrong atoms.
    """
    from rdkit import Chem

    if record.bonds is None or not record.smiles or not is_safe_smiles(record.smiles):
        return False
    given, expected = Chem.Mol(record.bonds), Chem.MolFromSmiles(record.smiles)
    return expected is not None and _numbered_bonds(given) == _numbered_bonds(Chem.AddHs(expected))


def _numbered_bonds(molecule) -> tuple[list[int], set[frozenset[int]]]:
    """Return the atomic numbers, and the bonds as pairs of indices."""
    pairs = {frozenset((b.GetBeginAtomIdx(), b.GetEndAtomIdx())) for b in molecule.GetBonds()}
    return [atom.GetAtomicNum() for atom in molecule.GetAtoms()], pairs


def _extremes(rows: dict[int, dict[str, str]], name: str) -> list[int]:
    """Return the indices of the molecules with the lowest and highest predictions, in order."""
    order = sorted(rows, key=lambda index: float(rows[index][name]))
    half = MAX_PICTURES // 2
    return order if len(order) <= MAX_PICTURES else order[:half] + order[-half:]


def _title(record: MoleculeRecord) -> str:
    return record.name or record.display_name


def _attributions(
    ensemble: Ensemble, molecules: Sequence[PredictionInput]
) -> dict[int, dict[str, np.ndarray]]:
    """Return the attributions of each property, by the index of the molecule."""
    columns = Columns.from_structures(
        from_ase(atoms, smiles=str(atoms.info.get("smiles", "")))
        for molecule in molecules
        for atoms in molecule.conformers
    )
    of_members = [member.attributions(columns) for member in ensemble.members]
    weights = np.concatenate([molecule.weights for molecule in molecules])
    start, result = 0, {}
    for molecule in molecules:
        stop = start + len(molecule.conformers)
        result[molecule.index] = {
            name: np.mean(
                [
                    sum(weights[k] * values[k][name] for k in range(start, stop))
                    for values in of_members
                ],
                axis=0,
            )
            for name in of_members[0][start]
        }
        start = stop
    return result

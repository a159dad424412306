"""Pool of molecules: starting geometries by molecule, and molecules that are held out.

Molecules are read from a file of SMILES, of structures, or from a store. All geometries of one
molecule belong to the same split.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.molecules.files import kind_of, read_molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.datasets.smiles.entries import CsvColumns
from mlip_jax.structure import hill_formula
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_WITHOUT_POSITIONS = ("smi", "csv", "sdf")  # kinds of files whose molecules are embedded
# An element of fewer molecules than this is kept for training.
_RARE = 3


@dataclasses.dataclass(frozen=True)
class PoolMolecule:
    """Molecule of the pool.

    Attributes:
      name: Identity of the molecule: a SMILES, the name in a store, or the formula.
      smiles: SMILES, or "".
      geometries: Starting geometries with the same order of atoms.
      embedded: Whether RDKit embedded the geometries. Otherwise the user gave them.
    """

    name: str
    smiles: str
    geometries: tuple[Atoms, ...]
    embedded: bool


@dataclasses.dataclass(frozen=True)
class Pool:
    """Molecules by split, and the molecules that cannot be used.

    Attributes:
      molecules: Molecules of "train", "valid" and "test".
      unusable: Reason for each molecule that cannot be used, by name.
    """

    molecules: dict[str, list[PoolMolecule]]
    unusable: dict[str, str]


def read_pool(
    path: str | Path,
    *,
    num_conformers: int,
    columns: CsvColumns,
    limit: int | None,
    mmff: bool,
    seed: int,
    num_processes: int | None,
) -> tuple[list[PoolMolecule], dict[str, str]]:
    """Read the molecules of a file or store.

    Args:
      path: File of SMILES or of structures, or a store.
      num_conformers: Number of conformers that are embedded per SMILES.
      columns: Columns of a CSV file.
      limit: Number of molecules of the file; None for all.
      mmff: Whether to relax embedded conformers with MMFF94.
      seed: Seed of the embedding.
      num_processes: Number of worker processes of the embedding; None for one per core.

    Returns:
      Molecules, and the reason for each unusable one.

    Raises:
      DatasetError: The file is missing or corrupted, or has no usable molecule.
    """
    kind = kind_of(path)
    embeds = kind in _WITHOUT_POSITIONS
    records = read_molecules(
        path,
        num_conformers=num_conformers if embeds else 1,
        mmff=mmff,
        seed=seed,
        columns=columns,
        limit=limit,
        num_processes=num_processes,
    )
    return group_records(records, embedded=embeds, named=kind == "store", where=str(path))


def group_records(
    records: Iterable[MoleculeRecord], *, embedded: bool, named: bool, where: str
) -> tuple[list[PoolMolecule], dict[str, str]]:
    """Return the records as molecules with all their geometries; see `read_pool`.

    Args:
      records: Geometries of molecules.
      embedded: Whether RDKit embedded them.
      named: Whether names identify molecules, as in stores.
      where: Name of the source, for messages.
    """
    groups: dict[str, list[MoleculeRecord]] = {}
    unusable: dict[str, str] = {}
    for record in records:
        if record.atoms is None:
            unusable.setdefault(record.display_name, record.failure)
            continue
        name = molecule_identity(record.smiles) or (record.name if named else "")
        groups.setdefault(name or hill_formula(record.atoms.numbers), []).append(record)
    molecules = []
    for name, group in groups.items():
        # Stereoisomers and other orders of the atoms share an identity; the first one is used.
        numbers, smiles = group[0].atoms.numbers, group[0].smiles
        same = [
            r.atoms
            for r in group
            if np.array_equal(r.atoms.numbers, numbers) and r.smiles == smiles
        ]
        if len(same) < len(group):
            log.info("%s: using %d of %d geometries of one isomer", name, len(same), len(group))
        molecules.append(PoolMolecule(name, smiles, tuple(same), embedded))
    used = {molecule.smiles for molecule in molecules}
    unusable = {name: reason for name, reason in unusable.items() if name not in used}
    if unusable:
        name, reason = next(iter(unusable.items()))
        log.warning(
            "%s cannot be used; the first, %s: %s",
            count_of(len(unusable), "molecule"),
            name,
            reason,
        )
    if not molecules:
        raise DatasetError(f"{where}: contains no usable molecule")
    return molecules, unusable


def split_pool(
    molecules: Sequence[PoolMolecule], fractions: tuple[float, float], seed: int
) -> dict[str, list[PoolMolecule]]:
    """Draw the molecules of "valid" and "test"; the others are for training.

    Molecules with an element of fewer than three molecules stay in training, because a force field
    cannot predict elements that it never saw.

    Args:
      molecules: Molecules.
      fractions: Fractions of the molecules for validation and for the test.
      seed: Seed of the draw.

    Raises:
      DatasetError: There are too few molecules.
    """
    count = Counter(z for m in molecules for z in set(m.geometries[0].numbers.tolist()))
    free = [
        k
        for k, m in enumerate(molecules)
        if min(count[z] for z in m.geometries[0].numbers.tolist()) >= _RARE
    ]
    sizes = [max(round(f * len(molecules)), 1) if f else 0 for f in fractions]
    if sum(sizes) > len(free) or sum(sizes) >= len(molecules):
        raise DatasetError(
            f"too few molecules: {len(molecules)}. Validation takes {sizes[0]}, the test "
            f"{sizes[1]}, and training needs others. Molecules with an element that occurs in fewer "
            f"than {_RARE} molecules are used only for training"
        )
    order = _keep_elements(molecules, np.random.default_rng(seed).permutation(free).tolist(), count)
    valid, test = set(order[: sizes[0]]), set(order[sizes[0] : sum(sizes)])
    return {
        "train": [m for k, m in enumerate(molecules) if k not in valid | test],
        "valid": [molecules[k] for k in sorted(valid)],
        "test": [molecules[k] for k in sorted(test)],
    }


def _keep_elements(
    molecules: Sequence[PoolMolecule], order: Sequence[int], count: Counter
) -> list[int]:
    """Return the indices in order, those last whose removal would leave none with an element.

    Args:
      molecules: Molecules.
      order: Indices of some of them.
      count: Number of molecules with each element.
    """
    left, first, last = Counter(count), [], []
    for k in order:
        elements = set(molecules[k].geometries[0].numbers.tolist())
        if min(left[z] for z in elements) > 1:
            left.subtract(elements)
            first.append(k)
        else:
            last.append(k)
    return first + last

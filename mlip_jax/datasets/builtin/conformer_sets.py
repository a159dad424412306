"""Conformers of user molecules with GFN2-xTB energies and forces: a substitute for GEOM.

The result is a folder of files in the layout of SPICE, `conformers-00000.hdf5` and so on, each with
`molecules_per_file` molecules. This bounds the memory, and the reader of SPICE reads
`folder/*.hdf5`. Files are merged from one part per molecule. Each part is saved as soon as it is
finished, so an interrupted run resumes without repeating a molecule.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax import workers
from mlip_jax.datasets.builtin import generate
from mlip_jax.datasets.builtin.conformers import ConformerOptions, ConformerTask, make_conformers
from mlip_jax.datasets.builtin.molecules import Molecule
from mlip_jax.datasets.molecules.files import kind_of
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles import entries

log = logging.getLogger(__name__)

# Incremented whenever the same parameters would result in different geometries.
SAMPLING_VERSION = 1


class Selection(NamedTuple):
    """Selection of molecules of a file.

    Attributes:
      count: Number of molecules, the first ones that match; None for all.
      elements: Symbols of the allowed elements, which must include H; empty for any.
      charge: Total charge (e); None for any.
      min_atoms: Minimum number of atoms including hydrogens; None for no bound.
      max_atoms: Maximum number of atoms including hydrogens; None for no bound.
      min_rotatable: Minimum number of rotatable bonds.
    """

    count: int | None = None
    elements: tuple[str, ...] = ()
    charge: int | None = 0
    min_atoms: int | None = None
    max_atoms: int | None = None
    min_rotatable: int = 0


_OPTIONS, _SELECTION = ConformerOptions(), Selection()


def select_molecules(
    path: str | Path, selection: Selection, subset: str, left_out: Counter[str]
) -> Iterator[Molecule]:
    """Yield the selected molecules of a file of SMILES (.smi, .csv).

    Duplicates and molecules of several fragments are skipped.

    Args:
      path: Path of the file.
      selection: Selection of molecules.
      subset: Subset name of the molecules.
      left_out: Counter of the reasons for skipping molecules, updated in place.

    Raises:
      DatasetError, ConfigError: The file cannot be read or does not contain SMILES.
    """
    path, kind = Path(path), kind_of(path)
    if kind not in ("smi", "csv"):
        raise DatasetError(f"{path}: expected a .smi or .csv file of SMILES, received {kind!r}")
    seen: set[bytes] = set()  # digests of canonical SMILES, 8 bytes instead of some 50 per molecule
    taken = 0
    for entry in entries.read_entries(path, kind, entries.CsvColumns()):
        if selection.count is not None and taken == selection.count:
            return
        smiles, reason = _rejection(entry.smiles, selection)
        digest = hashlib.blake2b(smiles.encode(), digest_size=8).digest()
        if not reason and digest in seen:
            reason = "duplicate"
        if reason:
            left_out[reason] += 1
            continue
        seen.add(digest)
        taken += 1
        # A slash would create a nested group in the HDF5 file.
        yield Molecule(f"{entry.number:08d} {entry.name}".strip().replace("/", "_"), smiles, subset)


def _rejection(smiles: str, selection: Selection) -> tuple[str, str]:
    """Return the canonical SMILES and the reason to skip the molecule, "" if it is selected."""
    from rdkit import Chem
    from rdkit.Chem.rdMolDescriptors import CalcNumRotatableBonds

    from mlip_jax.datasets.molecules.connectivity import from_smiles

    mol = from_smiles(smiles)
    if mol is None:
        return "", "not a valid SMILES"
    atoms = mol.GetNumAtoms() + sum(atom.GetTotalNumHs() for atom in mol.GetAtoms())
    symbols = {atom.GetSymbol() for atom in mol.GetAtoms()} | {"H"}
    reasons = {
        "several fragments": len(Chem.GetMolFrags(mol)) > 1,
        "other elements": bool(selection.elements) and not symbols <= set(selection.elements),
        "other charge": selection.charge is not None
        and Chem.GetFormalCharge(mol) != selection.charge,
        "too small": selection.min_atoms is not None and atoms < selection.min_atoms,
        "too large": selection.max_atoms is not None and atoms > selection.max_atoms,
        "too few rotatable bonds": CalcNumRotatableBonds(mol) < selection.min_rotatable,
    }
    return Chem.MolToSmiles(mol), next((reason for reason, is_so in reasons.items() if is_so), "")


def generate_conformers(
    folder: str | Path,
    smiles_file: str | Path,
    *,
    options: ConformerOptions = _OPTIONS,
    selection: Selection = _SELECTION,
    subset: str = "Conformers",
    seed: int = 0,
    molecules_per_file: int = 1000,
    num_processes: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Generate the files of conformers that do not exist yet.

    The content of a file depends on the arguments and on the versions of RDKit, tblite and NumPy.
    It does not depend on the number of processes or on interruptions. Scripts that call this
    function need `if __name__ == "__main__":`.

    Args:
      folder: Output folder, created if missing.
      smiles_file: .smi or .csv file of the molecules.
      options: Options for building conformers.
      selection: Selection of molecules.
      subset: Subset name of the molecules in the files.
      seed: Seed of the embedding.
      molecules_per_file: Number of molecules per file, which bounds the memory.
      num_processes: Number of worker processes; None for one per available core.
      progress: Whether to show a progress bar.

    Returns:
      Paths of the files in order. If all molecules of a file failed, it is not in the list and has
      the suffix .empty instead (`conformers-00003.empty`).

    Raises:
      ImportError: RDKit or tblite is missing.
      ValueError: The options are invalid.
      FileExistsError: A file of that name exists and was not generated by this function.
      DatasetError, ConfigError: See `select_molecules`. DatasetError also if there is no conformer.
      OSError: The disk is full or not writable. No partial file remains.
    """
    generate.require("rdkit", "tblite")
    _check(options, molecules_per_file)
    folder, left_out = Path(folder), Counter[str]()
    num_processes = workers.available_cores() if num_processes is None else num_processes
    molecules = select_molecules(smiles_file, selection, subset, left_out)
    files = []
    for number in itertools.count():
        chunk = list(itertools.islice(molecules, molecules_per_file))
        if not chunk:
            break
        path = folder / f"conformers-{number:05d}.hdf5"
        if _make_file(path, chunk, options, seed, num_processes, progress):
            files.append(path)
    log.info("%s: %d files; molecules skipped: %s", folder, len(files), dict(left_out) or "none")
    if not files:
        raise DatasetError(
            f"{smiles_file}: no molecule has a conformer (skipped: {dict(left_out)})"
        )
    return files


def _check(options: ConformerOptions, molecules_per_file: int) -> None:
    """Raise ValueError if an option is out of range."""
    if not 1 <= options.min_conformers <= options.num_conformers:
        raise ValueError(
            "min_conformers must be between 1 and num_conformers; received "
            f"{options.min_conformers} and {options.num_conformers}"
        )
    if (
        options.candidates < 1
        or options.prune_rmsd < 0
        or options.mmff_steps < 0
        or options.gfn2_steps < 0
    ):
        raise ValueError(
            "candidates must be at least 1, and prune_rmsd, mmff_steps and gfn2_steps not "
            f"negative; received {options}"
        )
    if molecules_per_file < 1:
        raise ValueError(f"molecules_per_file must be at least 1; received {molecules_per_file}")


def _make_file(
    path: Path,
    molecules: list[Molecule],
    options: ConformerOptions,
    seed: int,
    num_processes: int,
    progress: bool,
) -> bool:
    """Generate a file unless it exists. Return whether it contains any conformer."""
    from mlip_jax.datasets.builtin import storage

    parameters: dict[str, Any] = {
        "kind": "conformers",
        "options": options._asdict(),
        "seed": seed,
        "sampling_version": SAMPLING_VERSION,
        "molecules": hashlib.sha256(json.dumps(molecules).encode()).hexdigest(),
    }
    empty = path.with_suffix(".empty")  # readers would report an empty HDF5 file as corrupted
    if generate.is_cached(empty, parameters):
        return False
    if not generate.is_cached(path, parameters):
        versions = {name: version(name) for name in ("rdkit", "tblite", "numpy")}
        counts, costs = (
            [options.num_conformers] * len(molecules),
            [float(len(m.smiles)) for m in molecules],
        )
        with storage.Parts(path, parameters | versions) as parts:
            if not generate.is_cached(path, parameters):  # another process may have written it
                with generate.progress_bar(progress, counts) as advance:
                    tasks = [
                        ConformerTask(m, options.num_conformers, options, seed) for m in molecules
                    ]
                    generate.make_parts(
                        parts, make_conformers, tasks, costs, num_processes, advance
                    )
                parts.merge(molecules, counts, parameters | {"versions": versions})
    summary = storage.summarize(path)
    log.info("%s: %s", path, summary)
    if not summary["conformations"]:
        os.replace(path, empty)
    return summary["conformations"] > 0

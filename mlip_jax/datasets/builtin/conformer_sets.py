"""Sets of conformers of a user's molecules with GFN2-xTB energies and forces: a stand-in for GEOM.

A folder of files in SPICE's layout, `conformers-00000.hdf5` and so on, each of so many molecules: whatever is at work
on one holds no more in memory, and what reads SPICE reads `folder/*.hdf5`. A file is made of parts, one for each
molecule, which are on disk as soon as they are made: a run that was killed goes on, and makes no molecule twice.
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
from mlip_jax.datasets.molecules import entries
from mlip_jax.datasets.molecules.files import kind_of
from mlip_jax.datasets.reader import DatasetError

log = logging.getLogger(__name__)

# Goes up whenever the same parameters would give other geometries.
SAMPLING_VERSION = 1


class Selection(NamedTuple):
    """Which molecules of a file are taken, the first `count` of them (None: all).

    Attributes:
      elements: Symbols; empty: any. charge: Total charge in e, None: any.
      min_atoms, max_atoms: Hydrogens included; None: no bound. min_rotatable: Rotatable bonds.
    """

    count: int | None = None
    elements: tuple[str, ...] = ()
    charge: int | None = 0
    min_atoms: int | None = None
    max_atoms: int | None = None
    min_rotatable: int = 0


_OPTIONS, _SELECTION = ConformerOptions(), Selection()


def select_molecules(path: str | Path, selection: Selection, subset: str, left_out: Counter[str]
                     ) -> Iterator[Molecule]:
    """Molecules of a file of SMILES (.smi, .csv), one after another; each once, in one fragment.

    Args:
      subset: That they are filed under. left_out: Counts the reasons of those that are not taken.

    Raises:
      DatasetError, ConfigError: The file cannot be read, or holds no SMILES.
    """
    path, kind = Path(path), kind_of(path)
    if kind not in ("smi", "csv"):
        raise DatasetError(f"{path}: conformers are made of SMILES, from a .smi or .csv file; this is {kind!r}")
    seen: set[bytes] = set()  # digests of canonical SMILES: 8 bytes and not some 50 of each molecule
    taken = 0
    for entry in entries.read_entries(path, kind, entries.CsvColumns()):
        if selection.count is not None and taken == selection.count:
            return
        smiles, reason = _judge(entry.smiles, selection)
        digest = hashlib.blake2b(smiles.encode(), digest_size=8).digest()
        if not reason and digest in seen:
            reason = "the same as one before"
        if reason:
            left_out[reason] += 1
            continue
        seen.add(digest)
        taken += 1
        # a slash would be a group within a group of the HDF5 file
        yield Molecule(f"{entry.number:08d} {entry.name}".strip().replace("/", "_"), smiles, subset)


def _judge(smiles: str, selection: Selection) -> tuple[str, str]:
    """Canonical SMILES, and why the molecule is not taken, "" where it is."""
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
        "other charge": selection.charge is not None and Chem.GetFormalCharge(mol) != selection.charge,
        "too small": selection.min_atoms is not None and atoms < selection.min_atoms,
        "too large": selection.max_atoms is not None and atoms > selection.max_atoms,
        "too few rotatable bonds": CalcNumRotatableBonds(mol) < selection.min_rotatable}
    return Chem.MolToSmiles(mol), next((reason for reason, is_so in reasons.items() if is_so), "")


def generate_conformers(folder: str | Path, smiles_file: str | Path, *, options: ConformerOptions = _OPTIONS,
                        selection: Selection = _SELECTION, subset: str = "Conformers", seed: int = 0,
                        molecules_per_file: int = 1000, num_processes: int | None = None,
                        progress: bool = True) -> list[Path]:
    """Makes the files that are not there yet; a script that calls it needs `if __name__ == "__main__":`.

    What a file holds depends on the arguments and on the versions of RDKit, tblite and numpy, but neither on the number
    of processes nor on interruptions.

    Args:
      folder: Made if missing. smiles_file: .smi or .csv.
      options, selection, subset, seed: Of the conformers, of the molecules, their name in the files, of the embedding.
      molecules_per_file: So many are held in memory.
      num_processes: None for one per core that this process may use.

    Returns:
      The files, in order. Where all molecules of a file failed, `conformers-00003.empty` says so in its place.

    Raises:
      ImportError: RDKit or tblite is missing. ValueError: Options that mean nothing. FileExistsError: A file of that
        name is there that was not made here.
      DatasetError, ConfigError: See `select_molecules`; or no molecule is taken.
      OSError: The disk is full or cannot be written to. Nothing half-written is left.
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
    log.info("%s: %d files; molecules left out: %s", folder, len(files), dict(left_out) or "none")
    if not files:
        raise DatasetError(f"{smiles_file}: no conformer could be made of any molecule (left out: {dict(left_out)})")
    return files


def _check(options: ConformerOptions, molecules_per_file: int) -> None:
    if not 1 <= options.min_conformers <= options.num_conformers:
        raise ValueError("min_conformers must be between 1 and num_conformers; received "
                         f"{options.min_conformers} and {options.num_conformers}")
    if options.candidates < 1 or options.prune_rmsd < 0 or options.mmff_steps < 0 or options.gfn2_steps < 0:
        raise ValueError("candidates must be at least 1, and prune_rmsd, mmff_steps and gfn2_steps not negative; "
                         f"received {options}")
    if molecules_per_file < 1:
        raise ValueError(f"molecules_per_file must be at least 1; received {molecules_per_file}")


def _make_file(path: Path, molecules: list[Molecule], options: ConformerOptions, seed: int, num_processes: int,
               progress: bool) -> bool:
    """Make a file, unless it is there; whether it holds a conformer."""
    from mlip_jax.datasets.builtin import storage

    parameters: dict[str, Any] = {
        "kind": "conformers", "options": options._asdict(), "seed": seed, "sampling_version": SAMPLING_VERSION,
        "molecules": hashlib.sha256(json.dumps(molecules).encode()).hexdigest()}
    nothing = path.with_suffix(".empty")  # apart, since a reader takes a file without molecules for a damaged one
    if generate.is_cached(nothing, parameters):
        return False
    if not generate.is_cached(path, parameters):
        versions = {name: version(name) for name in ("rdkit", "tblite", "numpy")}
        counts, costs = [options.num_conformers] * len(molecules), [float(len(m.smiles)) for m in molecules]
        with storage.Parts(path, parameters | versions) as parts:
            if not generate.is_cached(path, parameters):  # made by another process in the meantime
                with generate.progress_bar(progress, counts) as advance:
                    tasks = [ConformerTask(m, options.num_conformers, options, seed) for m in molecules]
                    generate.make_parts(parts, make_conformers, tasks, costs, num_processes, advance)
                parts.merge(molecules, counts, parameters | {"versions": versions})
    found = storage.summarize(path)
    log.info("%s: %s", path, found)
    if not found["conformations"]:
        os.replace(path, nothing)
    return found["conformations"] > 0

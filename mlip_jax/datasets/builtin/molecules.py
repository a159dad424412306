"""Molecules of the built-in data set, listed explicitly or built by rules.

A force field is trained on most of these molecules and tested on the rest. Therefore, every
functional group occurs in several molecules, on several carbon skeletons. Most molecules are
neutral and consist of H, C, N, O and S. A few charged, halogenated and phosphorus compounds are
included to exercise filters of elements and charges.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mlip_jax.datasets.builtin.molecule_tables import (
    CHARGED_SIDE_CHAINS,
    CHARGED_SMILES,
    DIPEPTIDES,
    DRUG_SMILES,
    DRUGS,
    FRAGMENTS,
    GROUPS,
    MONOMER_SMILES,
    MONOMERS,
    OTHER_ELEMENTS_SMILES,
    RESIDUE_PAIRS,
    RINGS,
    SIDE_CHAINS,
    SKELETONS,
    SUBSTITUENTS,
    SUBSTITUENTS_PER_RING,
)
from mlip_jax.datasets.isolation.molecules import is_safe_smiles


class Molecule(NamedTuple):
    """A molecule of a generated data set.

    Attributes:
      name: Unique name.
      smiles: SMILES.
      subset: Name of the subset.
    """

    name: str
    smiles: str
    subset: str


def embedded_molecules() -> list[Molecule]:
    """Return all molecules of the built-in data set in a fixed order."""
    skeletons = [
        (f"{skeleton}-{group}", base + smiles)
        for skeleton, base in SKELETONS.items()
        for group, smiles in GROUPS.items()
    ]
    return (
        _family(_dipeptides(), DIPEPTIDES)
        + _family(_table(DRUG_SMILES), DRUGS)
        + _family(_substituted_rings(), FRAGMENTS)
        + _family(
            skeletons
            + _table(MONOMER_SMILES)
            + _table(CHARGED_SMILES)
            + _table(OTHER_ELEMENTS_SMILES),
            MONOMERS,
        )
    )


def read_smiles_file(
    path: str | Path, subset: str = "User molecules"
) -> tuple[list[Molecule], list[str]]:
    """Read a .smi file: a SMILES and, optionally, a name per line; '#' starts a comment line.

    Args:
      path: Path of the file.
      subset: Subset name of the molecules.

    Returns:
      Molecules, and one message per skipped line.

    Raises:
      OSError: The file cannot be read.
    """
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    molecules, problems, first_line = [], [], {}
    for line, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        words = text.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        mol = Chem.MolFromSmiles(words[0]) if is_safe_smiles(words[0]) else None
        if mol is None or not mol.GetNumAtoms():
            problems.append(f"{path}, line {line}: {words[0]!r} is not a valid SMILES string")
            continue
        smiles = Chem.MolToSmiles(mol)
        if smiles in first_line:
            problems.append(
                f"{path}, line {line}: {words[0]!r} is the molecule of line {first_line[smiles]}"
            )
            continue
        first_line[smiles] = line
        # Names become groups of an HDF5 file, where a slash would create a nested group.
        name = words[1].strip().replace("/", "_") if len(words) > 1 else f"line-{line}"
        if any(name == molecule.name for molecule in molecules):
            name = f"{name} (line {line})"
        molecules.append(Molecule(name, smiles, subset))
    return molecules, problems


def _family(pairs, subset):
    """Return molecules of one subset from pairs (name, SMILES)."""
    return [Molecule(name, smiles, subset) for name, smiles in pairs]


def _table(text):
    """Return pairs (name, SMILES) from a table of alternating words."""
    words = text.split()
    return list(zip(words[::2], words[1::2], strict=True))


def _residue(side_chain):
    """Return an amino-acid residue as a SMILES fragment from nitrogen to carbonyl carbon."""
    if side_chain is None:
        return "N1CCC[C@H]1C(=O)"
    return f"N[C@@H]({side_chain})C(=O)" if side_chain else "NCC(=O)"


def _dipeptides():
    """Return residues and pairs of residues with an acetyl and an N-methyl cap, as in SPICE."""
    single = [
        (name, _residue(chain)) for name, chain in (SIDE_CHAINS | CHARGED_SIDE_CHAINS).items()
    ]
    pairs = [
        (
            pair,
            "".join(
                _residue(SIDE_CHAINS[name]).replace("1", str(ring + 1))
                for ring, name in enumerate(pair.split("-"))
            ),
        )
        for pair in RESIDUE_PAIRS
    ]
    return [(f"ace-{name}-nme", f"CC(=O){body}NC") for name, body in single + pairs]


def _substituted_rings():
    """Return each ring with some of the substituents, so that all occur about equally often."""
    substituents = list(SUBSTITUENTS.items())
    pairs = []
    for ring, (ring_name, template) in enumerate(RINGS.items()):
        for step in range(SUBSTITUENTS_PER_RING):
            # The step of 3 varies the substituents of one ring. The offset varies them over rings.
            name, smiles = substituents[(ring + 3 * step) % len(substituents)]
            pairs.append((f"{ring_name}-{name}", template.format(smiles).replace("()", "")))
    return pairs

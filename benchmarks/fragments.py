"""Small, flexible, drug-like molecules: molecules of SMILES files and their fragments.

    python benchmarks/fragments.py fragments.smi zinc.txt pubchem.smi --min_atoms=18 \\
        --max_atoms=36 --min_rotatable=4

Each bond that BRICS cuts (Degen et al., ChemMedChem 3, 1503 (2008)) gives two fragments, capped
with hydrogen. The output contains neutral connected molecules of H, C, N, O, F, S and Cl, each
once, in a random order (--seed). A CPU can label conformers of such molecules
(configs/geom_like.py).
"""

import argparse
import random
from pathlib import Path

from rdkit import Chem, RDLogger
from rdkit.Chem import BRICS, Lipinski

ELEMENTS = {"H", "C", "N", "O", "F", "S", "Cl"}


def molecules(path: Path):
    """Yield RDKit molecules of the first column of a file; commas or blanks separate columns."""
    for line in path.read_text().splitlines():
        fields = line.replace(",", " ").split()
        mol = Chem.MolFromSmiles(fields[0]) if fields and "." not in fields[0] else None
        if mol is not None:
            yield mol


def fragments(mol):
    """Yield both fragments for each bond that may be cut."""
    for ends, _ in BRICS.FindBRICSBonds(mol):
        cut = Chem.FragmentOnBonds(mol, [mol.GetBondBetweenAtoms(*ends).GetIdx()], addDummies=False)
        for part in Chem.GetMolFrags(cut, asMols=True, sanitizeFrags=False):
            for atom in part.GetAtoms():
                atom.SetNoImplicit(False)  # a hydrogen replaces the bond
            fragment = Chem.MolFromSmiles(Chem.MolToSmiles(part))
            if fragment is not None:
                yield fragment


def is_suitable(mol, a) -> bool:
    """Return whether a molecule has the charge, elements, size and flexibility of the arguments."""
    if Chem.GetFormalCharge(mol) or any(x.GetNumRadicalElectrons() for x in mol.GetAtoms()):
        return False
    size = Chem.AddHs(mol).GetNumAtoms()
    return (
        {x.GetSymbol() for x in mol.GetAtoms()} <= ELEMENTS
        and a.min_atoms <= size <= a.max_atoms
        and Lipinski.NumRotatableBonds(mol) >= a.min_rotatable
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("smiles", nargs="+", type=Path)
    parser.add_argument("--min_atoms", type=int, default=18, help="hydrogens included")
    parser.add_argument("--max_atoms", type=int, default=36)
    parser.add_argument("--min_rotatable", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    unique = {}
    for path in a.smiles:
        for mol in molecules(path):
            candidates = (mol, *fragments(mol))
            unique |= {Chem.MolToSmiles(m): None for m in candidates if is_suitable(m, a)}
    names = list(unique)
    random.Random(a.seed).shuffle(names)
    a.output.write_text("".join(f"{smiles} {number}\n" for number, smiles in enumerate(names)))
    print(f"{a.output}: {len(names)} molecules")


if __name__ == "__main__":
    main()

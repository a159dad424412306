"""Crystals, surfaces and reactions of the benchmarks in this folder: `structures.py FOLDER`.

Writes crystals.json (50 structures), molecular.json (three molecular crystals of up to 32 atoms) and
reactions.json (both ends of five reactions), in the format of ASE's databases.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bcc110, bulk, fcc100, fcc110, fcc111, hcp0001, molecule
from ase.constraints import FixAtoms
from ase.db import connect
from ase.spacegroup import crystal

from mlip_jax.datasets.molecules.files import from_smiles

METALS = {
    "Cu": ("fcc", 3.58),
    "Al": ("fcc", 4.10),
    "Ni": ("fcc", 3.55),
    "Ag": ("fcc", 4.05),
    "Au": ("fcc", 4.25),
    "Pd": ("fcc", 3.88),
    "Pt": ("fcc", 4.05),
    "Fe": ("bcc", 2.80),
    "W": ("bcc", 3.10),
    "Na": ("bcc", 4.30),
    "Mg": ("hcp", 3.15),
    "Ti": ("hcp", 3.00),
}
COVALENT = {
    "Si": ("diamond", 5.35),
    "C": ("diamond", 3.50),
    "GaAs": ("zincblende", 5.80),
    "SiC": ("zincblende", 4.45),
}
OXIDES = {
    "MgO": ("rocksalt", 4.30),
    "CaO": ("rocksalt", 4.75),
    "ZnO": ("wurtzite", 3.20),
    "BeO": ("wurtzite", 2.75),
}
SALTS = {
    "NaCl": ("rocksalt", 5.75),
    "KCl": ("rocksalt", 6.20),
    "LiF": ("rocksalt", 4.15),
    "KBr": ("rocksalt", 6.50),
    "MgS": ("rocksalt", 5.10),
    "CsCl": ("cesiumchloride", 4.05),
    "NaF": ("rocksalt", 4.75),
    "CaF2": ("fluorite", 5.40),
    "ZnS": ("zincblende", 5.50),
}
# SMILES and number of molecules per cell
PACKED = {
    "carbon dioxide": ("O=C=O", 4),
    "nitrogen": ("N#N", 4),
    "ammonia": ("N", 4),
    "water": ("O", 4),
    "methane": ("C", 2),
    "acetylene": ("C#C", 4),
    "hydrogen cyanide": ("C#N", 4),
    "formaldehyde": ("C=O", 4),
}
# for SO3LR
LARGER = {"formamide": ("NC=O", 4), "acetic acid": ("CC(=O)O", 4), "urea": ("NC(=O)N", 4)}
RATTLE, STRAIN = 0.08, 0.02


def crystals() -> list[Atoms]:
    """Return 50 crystals and surfaces, away from their minima."""
    found = []
    for kind, table in (("metal", METALS), ("covalent", COVALENT), ("oxide", OXIDES)):
        found += [_bulk(kind, name, *form) for name, form in table.items()]
    found += _other_oxides()
    found += [_bulk("salt", name, *form) for name, form in SALTS.items()]
    for number, atoms in enumerate(found):
        _disturb(atoms, number)
    found += [_pack(name, *content, seed=k) for k, (name, content) in enumerate(PACKED.items())]
    return found + _slabs()


def molecular_crystals() -> list[Atoms]:
    """Return three molecular crystals of 24 to 32 atoms."""
    return [_pack(name, *content, seed=k) for k, (name, content) in enumerate(LARGER.items())]


def _bulk(kind: str, name: str, form: str, a: float) -> Atoms:
    cubic = form in ("fcc", "bcc", "rocksalt", "diamond", "zincblende")
    atoms = bulk(name, form, a=a, **({"cubic": True} if cubic else {}))
    atoms.info |= {"name": name, "kind": kind}
    return atoms


def _other_oxides() -> list[Atoms]:
    """Return oxides with internal degrees of freedom."""
    rutile = [(0, 0, 0), (0.3, 0.3, 0.0)]
    perovskite = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.0)]
    quartz = [(0.47, 0.0, 0.0), (0.41, 0.27, 0.12)]
    fluorite = [(0, 0, 0), (0.25, 0.25, 0.25)]
    cases = {
        "TiO2": (["Ti", "O"], rutile, 136, [4.7, 4.7, 3.0, 90, 90, 90]),
        "SnO2": (["Sn", "O"], rutile, 136, [4.85, 4.85, 3.25, 90, 90, 90]),
        "SrTiO3": (["Sr", "Ti", "O"], perovskite, 221, [4.0, 4.0, 4.0, 90, 90, 90]),
        "SiO2": (["Si", "O"], quartz, 152, [5.0, 5.0, 5.5, 90, 90, 120]),
        "CeO2": (["Ce", "O"], fluorite, 225, [5.5, 5.5, 5.5, 90, 90, 90]),
    }
    found = []
    for name, (symbols, basis, group, cell) in cases.items():
        atoms = crystal(symbols, basis, spacegroup=group, cellpar=cell)
        plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
        plain.info = {"name": name, "kind": "oxide"}
        found.append(plain)
    return found


def _disturb(atoms: Atoms, seed: int) -> None:
    """Displace the atoms and strain the cell."""
    rng = np.random.default_rng(seed)
    atoms.positions += rng.normal(0.0, RATTLE, atoms.positions.shape)
    strain = rng.normal(0.0, STRAIN, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)


def _pack(name: str, smiles: str, count: int, seed: int, closest: float = 2.3) -> Atoms:
    """Return molecules packed at random into a cubic cell.

    Args:
      closest: Smallest distance of atoms of different molecules (Å).
    """
    rng, one = np.random.default_rng(seed), from_smiles(smiles)
    one.positions -= one.positions.mean(0)
    side = (count * 8.0 * len(one)) ** (1 / 3)
    while True:
        side *= 1.02
        packed = Atoms(cell=[side] * 3, pbc=True)
        for _ in range(count):
            if not _insert(packed, one, rng, closest):
                break
        else:
            packed.info = {"name": name, "kind": "molecular crystal"}
            return packed


def _insert(packed: Atoms, one: Atoms, rng, closest: float, tries: int = 30) -> bool:
    """Add a molecule at a random place; return whether there is one."""
    side = packed.cell.lengths()[0]
    images = side * (np.stack(np.meshgrid(*[range(-2, 3)] * 3), -1).reshape(-1, 3))
    for _ in range(tries):
        new = one.copy()
        new.euler_rotate(*rng.uniform(0, 360, 3))
        new.positions += rng.uniform(0, side, 3)
        others = [packed.positions + x for x in images] if len(packed) else []
        others += [new.positions + x for x in images if x.any()]
        far = new.positions[:, None] - np.concatenate(others)[None]
        if np.linalg.norm(far, axis=-1).min() > closest:
            packed.extend(new)
            return True
    return False


def _slabs() -> list[Atoms]:
    """Return surfaces whose lower half is fixed."""
    found = {
        "Cu(111)": fcc111("Cu", (1, 2, 4), a=3.62, vacuum=6.0, orthogonal=True),
        "Al(100)": fcc100("Al", (2, 2, 3), a=4.05, vacuum=6.0),
        "Ag(110)": fcc110("Ag", (1, 2, 5), a=4.14, vacuum=6.0),
        "Fe(110)": bcc110("Fe", (1, 2, 4), a=2.85, vacuum=6.0, orthogonal=True),
        "Mg(0001)": hcp0001("Mg", (2, 2, 3), a=3.2, c=5.2, vacuum=6.0),
        "Pt(111) + O": fcc111("Pt", (2, 2, 3), a=3.97, vacuum=6.0),
        "Ni(100) + H": fcc100("Ni", (2, 2, 3), a=3.52, vacuum=6.0),
        "Cu(100) + CO": fcc100("Cu", (2, 2, 3), a=3.62, vacuum=6.0),
    }
    add_adsorbate(found["Pt(111) + O"], "O", 1.2, "fcc")
    add_adsorbate(found["Ni(100) + H"], "H", 0.7, "hollow")
    carbon_monoxide = molecule("CO")
    carbon_monoxide.rotate(180, "x")
    add_adsorbate(found["Cu(100) + CO"], carbon_monoxide, 1.9, "ontop", mol_index=1)
    for number, (name, atoms) in enumerate(found.items()):
        rng = np.random.default_rng(number)
        height = atoms.positions[:, 2]
        fixed = height < np.median(height[atoms.get_tags() > 0]) - 0.1
        atoms.positions[~fixed] += rng.normal(0.0, RATTLE, (int((~fixed).sum()), 3))
        atoms.set_constraint(FixAtoms(mask=fixed))
        atoms.info = {"name": name, "kind": "surface"}
    return list(found.values())


def reactions() -> list[list[Atoms]]:
    """Return both ends of five reactions; `info["force_field"]` names the force field."""
    return [
        _named(_adatom("Al"), "adatom on Al(100)", "sevennet"),
        _named(_vacancy("Cu"), "vacancy in Cu", "sevennet"),
        _named(_inversion(), "inversion of ammonia", "so3lr"),
        _named(_rotation("CCCC", (0, 1, 2, 3), (180.0, 65.0)), "rotation of butane", "so3lr"),
        _named(_rotation("O=CO", (0, 1, 2, 4), (0.0, 180.0)), "rotation of formic acid", "so3lr"),
    ]


def _named(ends: list[Atoms], name: str, force_field: str) -> list[Atoms]:
    for atoms in ends:
        atoms.info = {"name": name, "force_field": force_field}
    return ends


def _adatom(symbol: str) -> list[Atoms]:
    """Return an adatom in neighboring hollows, as in ASE's tutorial."""
    slab = fcc100(symbol, (2, 2, 3), a=4.05, vacuum=6.0)
    add_adsorbate(slab, symbol, 1.7, "hollow")
    slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
    last = slab.copy()
    last.positions[-1] += last.cell.array[0] / 2
    return [slab, last]


def _vacancy(symbol: str) -> list[Atoms]:
    """Return a vacancy that moves to a neighboring site."""
    whole = bulk(symbol, a=3.62, cubic=True) * (2, 1, 1)
    whole = whole * (1, 2, 1)
    first, last = whole.copy(), whole.copy()
    distances = whole.get_distances(0, range(1, len(whole)), mic=True)
    neighbor = 1 + int(np.argmin(distances))
    last.positions[neighbor] = whole.positions[0]
    del first[0], last[0]
    return [first, last]


def _inversion() -> list[Atoms]:
    first = from_smiles("N")
    hydrogen = first.positions[1:]
    normal = np.cross(hydrogen[1] - hydrogen[0], hydrogen[2] - hydrogen[0])
    normal /= np.linalg.norm(normal)
    last = first.copy()
    last.positions[0] -= 2 * normal * ((first.positions[0] - hydrogen[0]) @ normal)
    return [first, last]


def _rotation(smiles: str, atoms: tuple[int, ...], angles: tuple[float, float]) -> list[Atoms]:
    """Return conformers with two values of a dihedral angle (degrees)."""
    ends = []
    for angle in angles:
        end = from_smiles(smiles)
        # atoms on the far side of the central bond move
        bonds = end.get_all_distances() < 1.75
        moved, front = {atoms[2]}, [atoms[2]]
        while front:
            for k in np.flatnonzero(bonds[front.pop()]).tolist():
                if k not in moved and k != atoms[1]:
                    moved.add(k)
                    front.append(k)
        end.set_dihedral(*atoms, angle, indices=sorted(moved))
        ends.append(end)
    return ends


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, structures in (
        ("crystals", crystals()),
        ("molecular", molecular_crystals()),
        ("reactions", [end for ends in reactions() for end in ends]),
    ):
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        for atoms in structures:
            connect(path).write(atoms, data=dict(atoms.info))
            print(len(atoms), atoms.info)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

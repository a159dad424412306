"""Structures for the tests of the D3 term, and the script that computed their reference values.

    pip install dftd3==1.7.0 ase
    PYTHONPATH=. python tests/terms/d3_golden.py

writes tests/data/d3.npz with the package dftd3 (s-dftd3): energies in hartree, gradients in
hartree/bohr and virials in hartree, without the three-body term.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms

FILE = Path(__file__).parents[1] / "data" / "d3.npz"
# CUTOFFS: cutoffs of energies and coordination numbers (bohr), which keep the lists short.
CUTOFFS = 30.0, 20.0
# LAST: last element (Rn). For heavier ones dftd3 has other reference systems than those of 2010.
LAST = 86


def elements() -> list[Atoms]:
    """Return a triatomic molecule of carbon and two others for all pairs of elements Z and 87 - Z."""
    apart = [[0.0, 0.0, 0.0], [2.4, 0.3, 0.0], [0.5, 2.6, 0.7]]
    return [Atoms([z, LAST + 1 - z, 6], apart) for z in range(1, LAST // 2 + 1)]


def molecule() -> Atoms:
    """Return a distorted molecule with bonds of several orders."""
    positions = [
        [0.00, 0.02, 0.01], [1.22, 0.05, -0.03], [-0.72, 1.29, 0.05], [-2.14, 1.18, 0.12],
        [-0.65, -1.24, 0.02], [-0.02, -2.14, 0.02], [-1.75, -1.31, -0.04], [-0.21, 2.17, -0.12],
        [-2.61, 2.86, 0.31], [3.6, 0.4, 1.9], [3.1, 1.2, 2.1],
    ]  # fmt: skip
    return Atoms("COCNOHHHSClH", positions)


def crystals() -> list[Atoms]:
    """Return a salt and a metal oxide in triclinic cells."""
    cell = np.array([[4.1, 0.2, 0.1], [-0.9, 3.8, 0.3], [0.4, 0.7, 5.0]])
    scaled = [[0.1, 0.2, 0.3], [0.6, 0.7, 0.1], [0.4, 0.1, 0.8], [0.9, 0.6, 0.55]]
    return [
        Atoms("NaClOH", scaled_positions=scaled, cell=cell, pbc=True),
        Atoms("TiOTiAu", scaled_positions=scaled, cell=1.1 * cell[::-1], pbc=True),
    ]


FUNCTIONAL = "r2scan"


def structures() -> list[Atoms]:
    """Return all structures."""
    return [*elements(), molecule(), *crystals()]


def main() -> None:
    from ase.units import Bohr
    from dftd3.interface import DispersionModel, RationalDampingParam

    from mlip_jax.terms.layers.d3_functionals import FUNCTIONALS

    def damping(functional):
        s6, s8, a1, a2 = FUNCTIONALS[functional]
        return RationalDampingParam(s6=s6, s8=s8, s9=0.0, a1=a1, a2=a2, alp=14.0)

    def model(atoms):
        lattice = {"lattice": atoms.cell.array / Bohr, "periodic": atoms.pbc}
        created = DispersionModel(
            atoms.numbers, atoms.positions / Bohr, **(lattice if atoms.pbc.any() else {})
        )
        created.set_realspace_cutoff(CUTOFFS[0], CUTOFFS[0], CUTOFFS[1])
        return created

    for functional in FUNCTIONALS:  # our parameters are those that dftd3 knows
        known = RationalDampingParam(method=functional, atm=False)
        ours, theirs = (
            model(molecule()).get_dispersion(d, grad=False)["energy"]
            for d in (damping(functional), known)
        )
        assert abs(ours - theirs) < 1e-12, functional
    results = [model(a).get_dispersion(damping(FUNCTIONAL), grad=True) for a in structures()]
    np.savez_compressed(
        FILE,
        energy=[r["energy"] for r in results],
        gradient=np.concatenate([r["gradient"] for r in results]),
        virial=[r["virial"] for r in results[-2:]],
    )


if __name__ == "__main__":
    main()

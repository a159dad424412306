"""Write the results of so3krates-torch for its SO3LR.

Runs with so3krates-torch 0.2.1: `python write_so3lr.py FOLDER`. Long-range pairs are cut off at 12 Å,
with a switch of 2 Å. The model stores constants in single precision; so3lr_exact.npz has the results
with these constants in double precision, except the exponent of the radial basis, which has single
precision in mlff, too.
"""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import torch
from ase import units
from so3krates_torch.blocks import physical_potentials
from so3krates_torch.blocks.so3_conv_invariants import load_cgmatrix
from so3krates_torch.calculator.so3 import TorchkratesCalculator
from structures import structures, write_results


def calculator():
    """Return the calculator of so3krates-torch in double precision."""
    package = importlib.util.find_spec("so3krates_torch").submodule_search_locations[0]
    return TorchkratesCalculator(
        model_paths=str(Path(package) / "pretrained/so3lr/so3lr.model"),
        r_max_lr=12.0,
        dispersion_energy_cutoff_lr_damping=2.0,
        default_dtype="float64",
        compute_stress=True,
    )


def use_exact_basis(model):
    """Replace the logarithms of the binomial coefficients of the radial basis."""
    for module in model.modules():
        if type(module).__name__ == "BernsteinBasis":
            n = module.n_rbf - 1
            logarithms = [
                math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
                for k in range(n + 1)
            ]
            module.b = torch.tensor(logarithms, dtype=torch.float64)


def use_exact_couplings(model):
    """Replace the coupling coefficients of the invariants."""
    diagonal = np.diagonal(load_cgmatrix()[0].astype(np.float64))
    for module in model.modules():
        if type(module).__name__ == "L0Contraction":
            blocks = []
            for degree in module.degrees:
                stored = diagonal[degree**2 : (degree + 1) ** 2]
                exact = np.sign(stored) / math.sqrt(2 * degree + 1)
                assert np.abs(exact - stored).max() < 1e-6
                blocks.append(exact)
            module.cg_rep = torch.tensor(np.concatenate(blocks))


def use_exact_tables(model):
    """Replace the free-atom values of the dispersion and the hartree of ASE."""
    for name in ("ALPHAS", "C6_COEF"):
        table = getattr(physical_potentials, name).numpy()
        decimal = [float(str(value)) for value in table]
        setattr(physical_potentials, name, torch.tensor(decimal, dtype=torch.float64))
    physical_potentials.HARTREE = units.Hartree


CORRECTIONS = (use_exact_basis, use_exact_couplings, use_exact_tables)


def results(calc):
    """Return the structures with energy, forces and stress."""
    outputs = []
    for atoms in structures():
        atoms.info["charge"] = 0.0
        atoms.info["total_spin"] = 0.0
        atoms.calc = calc
        stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else None
        outputs.append((atoms, (atoms.get_potential_energy(), atoms.get_forces(), stress)))
    return outputs


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    calc = calculator()
    previous = results(calc)
    write_results(folder / "so3lr.npz", previous)
    for correct in CORRECTIONS:
        correct(calc.models[0])
        calc.reset()
        new = results(calc)
        changes = [
            max(float(np.abs(np.subtract(a[1][k], b[1][k])).max()) for a, b in zip(new, previous))
            for k in range(2)
        ]
        print(f"{correct.__name__}: {changes[0]:.1e} eV, {changes[1]:.1e} eV/Å")
        previous = new
    write_results(folder / "so3lr_exact.npz", previous)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

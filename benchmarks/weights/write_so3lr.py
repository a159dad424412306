"""Write the results of so3krates-torch for its SO3LR.

Runs with so3krates-torch 0.2.1: `python write_so3lr.py FOLDER`. Long-range pairs are cut off at 12 Å,
with a switch of 2 Å.
"""

import importlib.util
import sys
from pathlib import Path

from so3krates_torch.calculator.so3 import TorchkratesCalculator
from structures import structures, write_results


def main(folder):
    package = importlib.util.find_spec("so3krates_torch").submodule_search_locations[0]
    calculator = TorchkratesCalculator(
        model_paths=str(Path(package) / "pretrained/so3lr/so3lr.model"),
        r_max_lr=12.0,
        dispersion_energy_cutoff_lr_damping=2.0,
        default_dtype="float64",
        compute_stress=True,
    )
    outputs = []
    for atoms in structures():
        atoms.info["charge"] = 0.0
        atoms.info["total_spin"] = 0.0
        atoms.calc = calculator
        stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else None
        outputs.append((atoms, (atoms.get_potential_energy(), atoms.get_forces(), stress)))
    write_results(folder / "so3lr.npz", outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

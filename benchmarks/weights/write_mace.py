"""Write .model files of MACE with random weights, and the results of mace-torch for them.

Runs with mace-torch 0.3.16: `python write_mace.py FOLDER [NAME ...]`. The results are those of a model in
double precision. A model in single precision is compared with a double-precision model that has its
weights, because the couplings in the file have only single precision.
"""

import os
import sys
from pathlib import Path

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

import numpy as np
import torch
from ase.data import atomic_numbers
from e3nn import o3
from mace.calculators import MACECalculator
from mace.modules import blocks
from mace.modules.models import MACE, ScaleShiftMACE
from structures import structures, write_results

NAMES = (
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
)
PLAIN, RESIDUAL, DENSITY, DENSITY_RESIDUAL = (getattr(blocks, name) for name in NAMES)
CASES = {
    "residual": {},
    "plain": {"interaction_cls_first": PLAIN, "hidden_irreps": "4x0e"},
    "mace": {"interaction_cls_first": PLAIN, "cls": MACE},
    "density": {
        "interaction_cls_first": DENSITY,
        "interaction_cls": DENSITY_RESIDUAL,
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
        "num_interactions": 3,
    },
    "heads": {"heads": ["first", "second"], "hidden_irreps": "4x0e+4x1o+4x2e"},
    "tiny": {
        "interaction_cls_first": DENSITY,
        "interaction_cls": DENSITY_RESIDUAL,
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
        "heads": ["first", "second"],
        "hidden_irreps": "2x0e+2x1o",
        "max_ell": 1,
        "num_bessel": 3,
        "radial_MLP": [4],
    },
    "one_layer": {
        "num_interactions": 1,
        "interaction_cls_first": PLAIN,
        "heads": ["first", "second"],
        "max_ell": 1,
        "num_bessel": 3,
        "radial_MLP": [4],
        "correlation": 2,
    },
    "agnostic": {"use_agnostic_product": True, "correlation": 2},
    "float32": {"dtype": torch.float32, "interaction_cls_first": DENSITY_RESIDUAL},
}
UNSUPPORTED = {
    "attention": {"interaction_cls": blocks.RealAgnosticAttResidualInteractionBlock},
    "gaussian": {"radial_type": "gaussian"},
    "soft": {"distance_transform": "Soft"},
    "cutoff": {"apply_cutoff": False},
}


def create(dtype, cls=ScaleShiftMACE, heads=None, **options):
    """Return a model with random weights; `options` replace the defaults."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    num = len(heads or [None])
    rng = np.random.default_rng(0)
    energies = rng.normal(-3.0, 1.0, (num, 3))
    settings = {
        "r_max": 3.5,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": RESIDUAL,
        "interaction_cls_first": RESIDUAL,
        "num_interactions": 2,
        "num_elements": 3,
        "hidden_irreps": "4x0e+4x1o",
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": energies if num > 1 else energies[0],
        "avg_num_neighbors": 7.3,
        "atomic_numbers": [atomic_numbers[s] for s in ("H", "C", "O")],
        "correlation": 3,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [8, 8],
        "heads": heads,
    } | options
    settings["hidden_irreps"] = o3.Irreps(settings["hidden_irreps"])
    if cls is ScaleShiftMACE:
        scales = ([1.3, 0.9], [0.2, -0.1]) if num > 1 else (1.3, 0.2)
        settings |= {"atomic_inter_scale": scales[0], "atomic_inter_shift": scales[1]}
    model = cls(**settings)
    return model


def results(path, head):
    """Return energy, forces and stress of each structure."""
    calculator = MACECalculator(str(path), device="cpu", default_dtype="float64", head=head)
    outputs = []
    for atoms in structures():
        atoms.calc = calculator
        periodic = atoms.pbc.all()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        outputs.append(
            (atoms, (energy, forces, atoms.get_stress(voigt=False) if periodic else None))
        )
    return outputs


def main(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    cases = CASES | UNSUPPORTED
    for name in names or cases:
        case = dict(cases[name])
        dtype = case.pop("dtype", torch.float64)
        model = create(dtype, **case)
        path = folder / f"{name}.model"
        torch.save(model, path)
        if name in UNSUPPORTED:
            continue
        reference = path
        if dtype == torch.float32:
            exact = create(torch.float64, **case)
            weights = {n for n, _ in model.named_parameters()}
            state = exact.state_dict()
            for key, value in model.state_dict().items():
                if key in weights or not any(s in key for s in ("U_matrix", "_w3j", "mask")):
                    state[key] = value.to(state[key].dtype)
            exact.load_state_dict(state)
            reference = folder / f"{name}_reference.model"
            torch.save(exact, reference)
        for head in case.get("heads") or [None]:
            target = folder / f"{name}{f'_{head}' if head else ''}.npz"
            write_results(target, results(reference, head))
            print(target.name, os.path.getsize(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""Train NequIP for one epoch, and write its checkpoint, its package and the results of nequip.

Runs with nequip 0.19.1: `python write_nequip.py FOLDER`.
"""

import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from nequip.data import AtomicDataDict, from_ase
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
from nequip.model import ModelFromCheckpoint
from nequip.utils.global_state import set_global_state
from structures import structures, write_results

SYMBOLS = ["H", "C", "O"]
R_MAX = 3.5
MODEL = {
    "_target_": "nequip.model.NequIPGNNModel",
    "seed": 0,
    "model_dtype": "float64",
    "type_names": SYMBOLS,
    "r_max": R_MAX,
    "num_layers": 2,
    "l_max": 1,
    "num_features": 4,
    "radial_mlp_depth": 1,
    "radial_mlp_width": 8,
    "num_bessels": 4,
    "avg_num_neighbors": 6.5,
    "per_type_energy_scales": dict(zip(SYMBOLS, (1.1, 0.9, 1.3))),
    "per_type_energy_shifts": dict(zip(SYMBOLS, (-1.0, -2.0, -3.0))),
}
# UNEVEN: other numbers of channels for each irrep and layer.
_BUILT = ("num_layers", "l_max", "num_features")
UNEVEN = {name: value for name, value in MODEL.items() if name not in _BUILT} | {
    "_target_": "nequip.model.FullNequIPGNNModel",
    "irreps_edge_sh": "1x0e+1x1o+1x2e",
    "type_embed_num_features": 4,
    "radial_mlp_depth": [1, 1, 1],
    "radial_mlp_width": [8, 8, 8],
    "feature_irreps_hidden": ["4x0e+2x0o+3x1o+1x1e", "5x0e+2x1o+3x2e", "4x0e"],
}
METRICS = {"_target_": "nequip.train.EnergyForceMetrics", "coeffs": {"total_energy_mae": 1.0}}


def config(folder, model, module):
    """Return the settings of a training run."""
    transforms = [
        {
            "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
            "model_type_names": SYMBOLS,
        },
        {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": R_MAX},
    ]
    loader = {"_target_": "torch.utils.data.DataLoader", "batch_size": 1}
    return {
        "run": ["train"],
        "data": {
            "_target_": "nequip.data.datamodule.ASEDataModule",
            "seed": 0,
            "train_file_path": str(folder / "data.xyz"),
            "val_file_path": str(folder / "data.xyz"),
            "transforms": transforms,
            "train_dataloader": loader,
            "val_dataloader": loader,
        },
        "trainer": {
            "_target_": "lightning.Trainer",
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "dirpath": str(folder),
                    "filename": "best",
                    "save_last": True,
                }
            ],
        },
        "training_module": {
            "_target_": f"nequip.train.{module}",
            "loss": {
                "_target_": "nequip.train.EnergyForceLoss",
                "per_atom_energy": True,
                "coeffs": {"total_energy": 1.0, "forces": 1.0},
            },
            "val_metrics": METRICS,
            "train_metrics": METRICS,
            "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.05},
            "model": model,
        },
    }


def results(path):
    """Return energy, forces and stress of each structure."""
    (model,) = ModelFromCheckpoint(str(path)).eval().values()
    transforms = [
        ChemicalSpeciesToAtomTypeMapper(model_type_names=SYMBOLS),
        NeighborListTransform(r_max=R_MAX),
    ]
    outputs = []
    for atoms in structures():
        data = from_ase(atoms)
        for transform in transforms:
            data = transform(data)
        out = model(data)
        stress = out[AtomicDataDict.STRESS_KEY].detach().numpy()[0] if atoms.pbc.all() else None
        energy = out[AtomicDataDict.TOTAL_ENERGY_KEY].item()
        outputs.append((atoms, (energy, out[AtomicDataDict.FORCE_KEY].detach().numpy(), stress)))
    return outputs


def main(folder):
    cases = {
        "parity": ("EMALightningModule", MODEL),
        "natural": (
            "NequIPLightningModule",
            MODEL | {"parity": False, "l_max": 2, "num_features": [4, 3, 2]},
        ),
        "uneven": ("NequIPLightningModule", UNEVEN),
    }
    for name, (module, model) in cases.items():
        run = folder / name
        run.mkdir(parents=True, exist_ok=True)
        frames, rng = structures(), np.random.default_rng(0)
        for atoms in frames:
            forces = rng.normal(0, 1, (len(atoms), 3))
            atoms.calc = SinglePointCalculator(atoms, energy=-2.0 * len(atoms), forces=forces)
        ase.io.write(run / "data.xyz", frames)
        (run / "config.yaml").write_text(yaml.safe_dump(config(run, model, module)))
        train = ["-m", "nequip.scripts.train", "-cp", str(run), "-cn", "config"]
        subprocess.run([sys.executable, *train, f"hydra.run.dir={run}"], check=True)
        package = run / f"{name}.nequip.zip"
        build = "from nequip.scripts.package import main; main()"
        checkpoint = str(run / "last.ckpt")
        subprocess.run([sys.executable, "-c", build, "build", checkpoint, str(package)], check=True)
        write_results(run / f"{name}.npz", results(checkpoint))
        print(name)


if __name__ == "__main__":
    set_global_state()
    torch.set_default_dtype(torch.float64)
    main(Path(sys.argv[1]).absolute())

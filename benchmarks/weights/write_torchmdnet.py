"""Write checkpoints of TorchMD-Net's equivariant transformer, and the results of torchmdnet.

Runs with torchmd-net 3.1.0: `python write_torchmdnet.py FOLDER`.
"""

import sys
from pathlib import Path

import torch
from structures import structures, write_results
from torchmdnet.models.model import create_model, load_model
from torchmdnet.priors import Atomref

HPARAMS = {
    "model": "equivariant-transformer",
    "precision": 64,
    "embedding_dimension": 8,
    "num_layers": 2,
    "num_rbf": 6,
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "activation": "silu",
    "attn_activation": "silu",
    "num_heads": 2,
    "distance_influence": "both",
    "neighbor_embedding": True,
    "vector_cutoff": True,
    "cutoff_lower": 0.0,
    "cutoff_upper": 4.0,
    "max_z": 20,
    "max_num_neighbors": 64,
    "output_model": "Scalar",
    "output_mlp_num_layers": 0,
    "reduce_op": "sum",
    "derivative": True,
    "atom_filter": -1,
    "aggr": "add",
    "equivariance_invariance_group": "O(3)",
    "prior_model": [{"Atomref": {"max_z": 20}}],
    "prior_args": None,
    "box_vecs": None,
    "static_shapes": False,
    "check_errors": True,
    "remove_ref_energy": False,
    "lr": 1e-4,
    "charge": False,
    "spin": False,
}


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in {
        "et": {},
        "gauss": {"rbf_type": "gauss", "distance_influence": "values", "activation": "tanh"},
        "float32": {"precision": 32},
    }.items():
        torch.manual_seed(0)
        hparams = HPARAMS | changes
        prior = Atomref(max_z=20)
        model = create_model(dict(hparams), prior_model=[prior], std=torch.tensor(1.7))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for z in (1, 6, 8):
                model.prior_model[0].atomref.weight[z] = -0.5 * z
        path = folder / f"{name}.ckpt"
        state = {f"model.{k}": v for k, v in model.state_dict().items()}
        torch.save({"state_dict": state, "hyper_parameters": hparams, "epoch": 3}, path)
        model = load_model(str(path), derivative=True).double()
        outputs = []
        for atoms in structures():
            if atoms.pbc.any():
                continue
            z = torch.as_tensor(atoms.numbers, dtype=torch.long)
            positions = torch.as_tensor(atoms.positions, dtype=torch.float64)
            energy, forces = model(z, positions)
            outputs.append((atoms, (energy.item(), forces.detach().numpy(), None)))
        write_results(folder / f"{name}.npz", outputs)
        print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

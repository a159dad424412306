"""Measurements of TorchMD-Net: equivariant transformer and TensorNet.

This script runs in the environment of TorchMD-Net. All measurements include the neighbor lists,
which the models compute.
"""

import tempfile

import measure
import numpy as np
import torch
import torch_step
from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.models.model import create_model

OF_MODEL = {
    "equivariant-transformer": dict(
        attn_activation="silu", distance_influence="both", neighbor_embedding=True
    ),
    "tensornet": dict(equivariance_invariance_group="O(3)"),
}


def arguments(job, derivative: bool) -> dict:
    options = dict(job["options"])
    heads = {"num_heads": options.pop("num_heads")} if "num_heads" in options else {}
    return dict(
        model=job["model"],
        embedding_dimension=options["num_features"],
        num_layers=options["num_layers"],
        num_rbf=options["num_radial"],
        rbf_type="expnorm",
        trainable_rbf=False,
        activation="silu",
        cutoff_lower=0.0,
        cutoff_upper=measure.CUTOFF,
        max_z=20,
        max_num_neighbors=64,
        precision=32,
        derivative=derivative,
        atom_filter=-1,
        prior_model=None,
        output_model="Scalar",
        reduce_op="add",
        **heads,
        **OF_MODEL[job["model"]],
    )


def make_model(job, derivative: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(arguments(job, derivative)).to(torch_step.DEVICE)


def collate(molecules):
    def joined(field, dtype):
        return torch.tensor(np.concatenate([getattr(m, field) for m in molecules]), dtype=dtype)

    counts = torch.tensor([len(m.numbers) for m in molecules])
    batch = {
        "z": joined("numbers", torch.long),
        "positions": joined("positions", torch.float32),
        "molecule": torch.repeat_interleave(torch.arange(len(molecules)), counts),
        "energy": torch.tensor([[m.energy] for m in molecules], dtype=torch.float32),
        "forces": joined("forces", torch.float32),
    }
    return {key: value.to(torch_step.DEVICE) for key, value in batch.items()}


def train(job):
    model = make_model(job)

    def predict(batch):
        energy, forces = model(batch["z"], batch["positions"].clone(), batch["molecule"])
        return energy, batch["energy"], forces, batch["forces"]

    return torch_step.train(job, model, collate, predict)


def latency(job):
    with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        state = {
            f"model.{name}": value
            for name, value in make_model(job, derivative=False).state_dict().items()
        }
        torch.save(
            {"state_dict": state, "hyper_parameters": arguments(job, derivative=False)}, file.name
        )
        calculator = TMDNETCalculator(file.name, device=torch_step.DEVICE)
    return measure.latency(job, lambda atoms: calculator)


if __name__ == "__main__":
    measure.main({"train": train, "latency": latency}, ("torchmd-net", "torch"))

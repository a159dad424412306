"""Measurements of the authors' FAENet. This script runs in the environment of faenet.

Frames and edges are computed before the measurement. Energies and forces are averages over the
eight frames, in a loop as in faenet.fa_forward. FAENet uses one function of torch-scatter, which
has no wheels; it is replaced by that of PyTorch Geometric. Elements have no physical properties,
because FAENet cannot read them from present versions of mendeleev.
"""

import sys
import types
from types import SimpleNamespace

import measure
import numpy as np
import torch
import torch_geometric.utils
import torch_step

sys.modules["torch_scatter"] = types.ModuleType("torch_scatter")
sys.modules["torch_scatter"].scatter = torch_geometric.utils.scatter

from faenet import FAENet
from faenet.frame_averaging import frame_averaging_3D


def make_model(job) -> torch.nn.Module:
    torch.manual_seed(0)
    options = job["options"]
    return FAENet(
        cutoff=measure.CUTOFF,
        preprocess=lambda *args: None,  # edges are given
        num_gaussians=options["num_radial"],
        num_filters=options["num_features"],
        hidden_channels=options["num_features"],
        num_interactions=options["num_layers"],
        tag_hidden_channels=0,
        pg_hidden_channels=0,
        phys_embeds=False,
        mp_type="simple",
        regress_forces="from_energy",
    ).to(torch_step.DEVICE)


def collate(molecules):
    frames, axes = [], []
    for molecule in molecules:
        positions = torch.as_tensor(molecule.positions, dtype=torch.float32)
        rotated, _, rotations = frame_averaging_3D(positions, fa_method="all")
        frames.append(torch.stack(rotated))
        axes.append(torch.cat(rotations).expand(len(positions), -1, -1, -1))
    receivers, senders = torch_step.join_edges(molecules)
    return torch_step.join(molecules) | {
        "positions": torch.cat(frames, dim=1).to(torch_step.DEVICE),  # (8, N, 3)
        "axes": torch.cat(axes).transpose(0, 1).to(torch_step.DEVICE),  # (8, N, 3, 3)
        "edges": torch_step.tensor(np.stack([senders, receivers]), torch.long),
    }


def train(job):
    model = make_model(job)

    def predict(batch):
        energies, forces = [], []
        for positions, axes in zip(batch["positions"], batch["axes"]):
            data = SimpleNamespace(
                pos=positions.clone().requires_grad_(),
                atomic_numbers=batch["numbers"],
                batch=batch["graph"],
                edge_index=batch["edges"],
            )
            energy = model.energy_forward(data, preproc=False)["energy"][:, 0]
            (gradient,) = torch.autograd.grad(energy.sum(), data.pos, create_graph=True)
            energies.append(energy)
            forces.append(-(gradient[:, None] @ axes.transpose(1, 2))[:, 0])
        mean = torch.stack(forces).mean(0)
        return torch.stack(energies).mean(0), batch["energy"], mean, batch["forces"]

    return torch_step.train(job, model, collate, predict)


def latency(job):
    raise SystemExit("faenet has no ASE calculator")


if __name__ == "__main__":
    measure.main({"train": train, "latency": latency}, ("faenet", "torch"))

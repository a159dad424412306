"""Measurements of PyTorch Geometric: DimeNet++. This script runs in PyTorch Geometric's environment.

Edges and triplets are computed before the measurement. PyTorch Geometric computes them in each
step, with extensions that are not required here.
"""

import measure
import numpy as np
import torch
import torch_geometric.nn.models.dimenet as dimenet
import torch_step

# edges and triplets of the batch that is evaluated
_current = {}
dimenet.radius_graph = lambda *args, **kwargs: _current["edges"]
dimenet.triplets = lambda *args, **kwargs: _current["triplets"]


def make_model(job) -> torch.nn.Module:
    torch.manual_seed(0)
    options = job["options"]
    return dimenet.DimeNetPlusPlus(
        hidden_channels=options["num_features"],
        out_channels=1,
        num_blocks=options["num_layers"],
        int_emb_size=64,
        basis_emb_size=8,
        out_emb_channels=256,
        num_spherical=options["max_degree"] + 1,
        num_radial=options["num_radial"],
        cutoff=measure.CUTOFF,
        output_initializer="glorot_orthogonal",
    ).to(torch_step.DEVICE)


def triplets(receivers, senders):
    """Return pairs of edges k -> j and j -> i with k != i, as indices (kj, ji)."""
    order = np.argsort(receivers, kind="stable")
    count = np.bincount(receivers, minlength=max(receivers.max(), senders.max()) + 1)
    first = np.cumsum(count) - count
    ji = np.repeat(np.arange(len(receivers)), count[senders])
    place = np.arange(len(ji)) - np.repeat(
        np.cumsum(count[senders]) - count[senders], count[senders]
    )
    kj = order[first[senders[ji]] + place]
    keep = senders[kj] != receivers[ji]
    return kj[keep], ji[keep]


def collate(molecules):
    i, j = torch_step.join_edges(molecules)
    kj, ji = triplets(i, j)
    indices = [i, j, i[ji], j[ji], j[kj], kj, ji]
    return torch_step.join(molecules) | {
        "edges": torch_step.tensor(np.stack([j, i]), torch.long),
        "triplets": tuple(torch_step.tensor(index, torch.long) for index in indices),
    }


def train(job):
    model = make_model(job)

    def predict(batch):
        _current.update(edges=batch["edges"], triplets=batch["triplets"])
        positions = batch["positions"].clone().requires_grad_()
        energy = model(batch["numbers"], positions, batch["graph"])[:, 0]
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return energy, batch["energy"], -gradient, batch["forces"]

    return torch_step.train(job, model, collate, predict)


def latency(job):
    raise SystemExit("PyTorch Geometric has no ASE calculator")


if __name__ == "__main__":
    measure.main({"train": train, "latency": latency}, ("torch-geometric", "torch"))

"""Measurements of SchNetPack: PaiNN and SchNet. This script runs in SchNetPack's environment."""

from typing import TypeVar

import measure
import torch
import torch.utils.data.dataloader as torch_loader
import torch_step

# SchNetPack 2.1.1 imports this name, which newer versions of torch lack.
if not hasattr(torch_loader, "T_co"):
    torch_loader.T_co = TypeVar("T_co", covariant=True)

import schnetpack
from schnetpack import properties
from schnetpack.data.loader import _atoms_collate_fn
from schnetpack.interfaces import SpkCalculator
from schnetpack.transform import MatScipyNeighborList

REPRESENTATIONS = {
    "painn": schnetpack.representation.PaiNN,
    "schnet": schnetpack.representation.SchNet,
}


def make_model(job) -> torch.nn.Module:
    torch.manual_seed(0)
    options = job["options"]
    width = options["num_features"]
    representation = REPRESENTATIONS[job["model"]](
        n_atom_basis=width,
        n_interactions=options["num_layers"],
        radial_basis=schnetpack.nn.GaussianRBF(n_rbf=options["num_radial"], cutoff=measure.CUTOFF),
        cutoff_fn=schnetpack.nn.CosineCutoff(measure.CUTOFF),
    )
    return schnetpack.model.NeuralNetworkPotential(
        representation=representation,
        input_modules=[schnetpack.atomistic.PairwiseDistances()],
        output_modules=[
            schnetpack.atomistic.Atomwise(n_in=width, output_key="energy"),
            schnetpack.atomistic.Forces(),
        ],
    ).to(torch_step.DEVICE)


def collate(molecules):
    batch = _atoms_collate_fn([_inputs(m) for m in molecules])
    return {key: value.to(torch_step.DEVICE) for key, value in batch.items()}


def _inputs(molecule):
    receivers, senders = (torch.from_numpy(i) for i in measure.edges(molecule.positions))
    return {
        properties.idx: torch.tensor([0]),
        properties.n_atoms: torch.tensor([len(molecule.numbers)]),
        properties.Z: torch.tensor(molecule.numbers, dtype=torch.long),
        properties.R: torch.tensor(molecule.positions, dtype=torch.float32),
        properties.cell: torch.zeros(1, 3, 3),
        properties.pbc: torch.zeros(3, dtype=torch.bool),
        properties.idx_i: receivers,
        properties.idx_j: senders,
        properties.offsets: torch.zeros(len(receivers), 3),
        "label_energy": torch.tensor([molecule.energy], dtype=torch.float32),
        "label_forces": torch.tensor(molecule.forces, dtype=torch.float32),
    }


def train(job):
    model = make_model(job)

    def predict(batch):
        out = model(dict(batch))
        return out["energy"], batch["label_energy"], out["forces"], batch["label_forces"]

    return torch_step.train(job, model, collate, predict)


class CalculatorOfModule(SpkCalculator):
    """SchNetPack's calculator for a module instead of a file."""

    def _load_model(self, model_file):
        return model_file.eval()


def latency(job):
    model = make_model(job).requires_grad_(False)
    calculator = CalculatorOfModule(
        model_file=model,
        neighbor_list=MatScipyNeighborList(cutoff=measure.CUTOFF),
        energy_unit="eV",
        position_unit="Ang",
        device=torch_step.DEVICE,
    )
    return measure.latency(job, lambda atoms: calculator)


if __name__ == "__main__":
    measure.main({"train": train, "latency": latency}, ("schnetpack", "torch"))

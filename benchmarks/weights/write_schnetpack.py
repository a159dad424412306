"""Write best_inference_model files of SchNetPack, and the results of schnetpack for them.

Runs with schnetpack 2.1.1: `python write_schnetpack.py FOLDER`.
"""

import sys
from pathlib import Path
from typing import TypeVar

import torch
import torch.utils.data.dataloader

torch.utils.data.dataloader.T_co = TypeVar("T_co", covariant=True)  # schnetpack 2.1.1 imports it
import schnetpack as spk
from schnetpack import properties
from schnetpack.transform import AddOffsets, CastTo64, MatScipyNeighborList
from structures import structures, write_results

CUTOFF = 4.0


def create(name):
    """Return a model with random weights."""
    torch.manual_seed(0)
    rbf, cutoff = spk.nn.GaussianRBF(n_rbf=6, cutoff=CUTOFF), spk.nn.CosineCutoff(CUTOFF)
    if name == "schnet":
        representation = spk.representation.SchNet(
            8, 2, spk.nn.BesselRBF(n_rbf=6, cutoff=CUTOFF), cutoff, n_filters=6
        )
        posts = [AddOffsets("energy", add_mean=True)]
        posts[0].mean = torch.tensor([-2.5])
    else:
        representation = spk.representation.PaiNN(
            8, 2, rbf, cutoff, shared_interactions=name == "shared", epsilon=1e-6
        )
        posts = [AddOffsets("energy", add_atomrefs=True), AddOffsets("energy", add_mean=True)]
        posts[0].atomref = torch.linspace(-1.0, -5.0, 100)
        posts[1].mean = torch.tensor([0.7])
    model = spk.model.NeuralNetworkPotential(
        representation=representation,
        input_modules=[spk.atomistic.Strain(), spk.atomistic.PairwiseDistances()],
        output_modules=[
            spk.atomistic.Atomwise(n_in=8, output_key="energy"),
            spk.atomistic.Forces(calc_stress=True),
        ],
        postprocessors=[CastTo64(), *posts],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def results(model):
    """Return energy, forces and stress of each structure, in double precision."""
    model = model.double()
    outputs = []
    for atoms in structures():
        converter = spk.interfaces.AtomsConverter(
            MatScipyNeighborList(cutoff=CUTOFF), dtype=torch.float64
        )
        inputs = converter(atoms)
        if not atoms.pbc.any():
            inputs[properties.cell] = torch.eye(3, dtype=torch.float64)[None] * 100
        out = model(inputs)
        stress = out["stress"].detach().numpy()[0] if atoms.pbc.all() else None
        energy = out["energy"].detach().numpy()[0]
        outputs.append((atoms, (energy, out["forces"].detach().numpy(), stress)))
    return outputs


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("painn", "shared", "schnet"):
        model = create(name)
        torch.save(model, folder / f"{name}_best_inference_model")
        outputs = [spk.task.ModelOutput(name="energy", loss_fn=torch.nn.MSELoss(), metrics={})]
        task = spk.task.AtomisticTask(model, outputs, optimizer_args={"lr": 1e-3})
        checkpoint = {
            "state_dict": task.state_dict(),
            "hyper_parameters": dict(task.hparams),
            "pytorch-lightning_version": "2.0",
        }
        torch.save(checkpoint, folder / f"{name}.ckpt")
        write_results(folder / f"{name}.npz", results(model))
        print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

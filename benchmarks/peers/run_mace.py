"""Measurements of mace-torch: MACE. This script runs in the environment of mace-torch."""

import os

# e3nn 0.4.4 loads its constants from a pickle.
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

import ase
import measure
import numpy as np
import torch
import torch_step
from e3nn.o3 import Irreps
from mace.calculators import MACECalculator
from mace.data import AtomicData, KeySpecification, config_from_atoms
from mace.modules import (
    RealAgnosticInteractionBlock,
    RealAgnosticResidualInteractionBlock,
    ScaleShiftMACE,
    gate_dict,
)
from mace.tools import AtomicNumberTable
from mace.tools.compile import prepare
from mace.tools.torch_geometric.dataloader import Collater

ELEMENTS = AtomicNumberTable([1, 6, 7, 8, 9, 16, 17])
LABELS = KeySpecification(
    info_keys={"energy": "label_energy"}, arrays_keys={"forces": "label_forces"}
)


def make_model(job) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    options = job["options"]
    degrees = range(options["feature_degree"] + 1)
    hidden = Irreps([(options["num_features"], (l, (-1) ** l)) for l in degrees])
    return ScaleShiftMACE(
        r_max=measure.CUTOFF,
        num_bessel=options["num_radial"],
        num_polynomial_cutoff=5,
        max_ell=options["max_degree"],
        interaction_cls_first=RealAgnosticInteractionBlock,
        interaction_cls=RealAgnosticResidualInteractionBlock,
        num_interactions=options["num_layers"],
        num_elements=len(ELEMENTS),
        atomic_numbers=ELEMENTS.zs,
        hidden_irreps=hidden,
        MLP_irreps=Irreps("16x0e"),
        gate=gate_dict["silu"],
        atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=20.0,
        correlation=options["correlation"],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    ).to(torch_step.DEVICE)


def collate(molecules):
    graphs = []
    for molecule in molecules:
        atoms = ase.Atoms(numbers=molecule.numbers, positions=molecule.positions)
        atoms.info["label_energy"], atoms.arrays["label_forces"] = molecule.energy, molecule.forces
        config = config_from_atoms(atoms, key_specification=LABELS)
        graphs.append(AtomicData.from_config(config, z_table=ELEMENTS, cutoff=measure.CUTOFF))
    return Collater([], [])(graphs).to(torch_step.DEVICE)


def train(job):
    compiled = job["options"].get("compiled")
    model = torch.compile(prepare(make_model)(job)) if compiled else make_model(job)

    def predict(batch):
        if compiled:  # the compiled model does not request gradients itself
            batch.positions.requires_grad_(True)
            batch.node_attrs.requires_grad_(True)
        out = model(batch.to_dict(), training=True)
        return out["energy"], batch.energy, out["forces"], batch.forces

    return torch_step.train(job, model, collate, predict)


def latency(job):
    model = make_model(job).requires_grad_(False)
    mode = "default" if job["options"].get("compiled") else None
    calculator = MACECalculator(
        models=[model], device=torch_step.DEVICE, default_dtype="float32", compile_mode=mode
    )
    return measure.latency(job, lambda atoms: calculator)


if __name__ == "__main__":
    measure.main({"train": train, "latency": latency}, ("mace-torch", "torch"))

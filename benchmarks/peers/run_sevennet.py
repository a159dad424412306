"""Measurements of sevenn: SevenNet. This script runs in the environment of sevenn."""

import copy
import warnings

import ase
import measure
import sevenn._const as constants
import sevenn._keys as key
import torch
import torch_step
from sevenn.atom_graph_data import AtomGraphData
from sevenn.calculator import SevenNetCalculator
from sevenn.model_build import build_E3_equivariant_model
from sevenn.train.dataload import unlabeled_atoms_to_graph
from torch_geometric.loader.dataloader import Collater

ELEMENTS = (1, 6, 7, 8, 9, 16, 17)
AVERAGE_NEIGHBORS = 20.0
LABELS = ("label_energy", "label_forces")


def make_model(job) -> torch.nn.Module:
    torch.manual_seed(0)
    options = job["options"]
    config = copy.deepcopy(constants.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG) | {
        key.CUTOFF: measure.CUTOFF,
        key.NODE_FEATURE_MULTIPLICITY: options["num_features"],
        key.LMAX: options["max_degree"],
        key.IS_PARITY: options["parity"] == "full",
        key.NUM_CONVOLUTION: options["num_layers"],
        key.SELF_CONNECTION_TYPE: options["self_connection"],
        key.CONV_DENOMINATOR: AVERAGE_NEIGHBORS,
        key.NUM_SPECIES: len(ELEMENTS),
        key.TYPE_MAP: {number: n for n, number in enumerate(ELEMENTS)},
        key.SHIFT: 0.0,
        key.SCALE: 1.0,
    }
    config[key.RADIAL_BASIS] = config[key.RADIAL_BASIS] | {
        "bessel_basis_num": options["num_radial"]
    }
    return build_E3_equivariant_model(config).to(torch_step.DEVICE)


def collate(molecules):
    graphs = []
    for molecule in molecules:
        atoms = ase.Atoms(numbers=molecule.numbers, positions=molecule.positions)
        graph = AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, measure.CUTOFF))
        graph[LABELS[0]] = torch.tensor(molecule.energy, dtype=torch.float32)
        graph[LABELS[1]] = torch.tensor(molecule.forces, dtype=torch.float32)
        graphs.append(graph)
    return Collater(graphs)(graphs).to(torch_step.DEVICE)


def train(job):
    model = make_model(job)
    model.set_is_batch_data(True)
    model.train()

    def predict(batch):
        out = model(batch.clone())
        energy, forces = out[key.PRED_TOTAL_ENERGY], out[key.PRED_FORCE]
        return energy, batch[LABELS[0]], forces, batch[LABELS[1]]

    return torch_step.train(job, model, collate, predict)


def latency(job):
    model = make_model(job).requires_grad_(False)
    calculator = SevenNetCalculator(model, file_type="model_instance", device=torch_step.DEVICE)
    return measure.latency(job, lambda atoms: calculator)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    measure.main({"train": train, "latency": latency}, ("sevenn", "torch"))

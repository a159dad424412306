"""Measurements of nequip: NequIP and Allegro. This script runs in the environment of nequip."""

import warnings

import ase
import measure
import torch
import torch_step
from ase.data import chemical_symbols
from e3nn.util.jit import script
from nequip.data import AtomicDataDict, from_ase
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
from nequip.integrations.ase import NequIPCalculator
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state

ELEMENTS = [chemical_symbols[z] for z in (1, 6, 7, 8, 9, 16, 17)]
AVERAGE_NEIGHBORS = 20.0
BESSEL = "allegro.nn.TwoBodyBesselScalarEmbed"


def make_model(job, compile_mode: str = "eager") -> torch.nn.Module:
    set_global_state()
    options = job["options"]
    build, sizes = NequIPGNNModel, {"num_features": options["num_features"]}
    common = {
        "seed": 0,
        "model_dtype": "float32",
        "type_names": ELEMENTS,
        "r_max": measure.CUTOFF,
        "num_layers": options["num_layers"],
        "l_max": options["max_degree"],
        "avg_num_neighbors": AVERAGE_NEIGHBORS,
        "compile_mode": compile_mode,
    }
    if job["model"] == "allegro":
        from allegro.model import AllegroModel as build

        sizes = {
            "radial_chemical_embed": {"_target_": BESSEL, "num_bessels": options["num_radial"]},
            "num_scalar_features": options["num_features"],
            "num_tensor_features": options["num_tensor_features"],
        }
    else:
        common["num_bessels"] = options["num_radial"]
    return build(**common, **sizes).to(torch_step.DEVICE)


def transforms():
    return [ChemicalSpeciesToAtomTypeMapper(ELEMENTS), NeighborListTransform(measure.CUTOFF)]


def collate(molecules):
    graphs = []
    for molecule in molecules:
        data = from_ase(ase.Atoms(numbers=molecule.numbers, positions=molecule.positions))
        for transform in transforms():
            data = transform(data)
        data[AtomicDataDict.TOTAL_ENERGY_KEY] = torch.tensor([[molecule.energy]])
        data[AtomicDataDict.FORCE_KEY] = torch.tensor(molecule.forces)
        graphs.append(data)
    batch = AtomicDataDict.batched_from_list(graphs)
    single = {
        key: value.float() if value.dtype == torch.float64 else value
        for key, value in batch.items()
    }
    return AtomicDataDict.to_(single, torch.device(torch_step.DEVICE))


def train(job):
    compiled = job["options"].get("compiled")
    model = make_model(job, "compile" if compiled else "eager").train()
    labels = (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY)

    def predict(batch):
        inputs = {key: value for key, value in batch.items() if key not in labels}
        out = model(inputs)
        return tuple(values[key] for key in labels for values in (out, batch))

    return torch_step.train(job, model, collate, predict)


def latency(job):
    """Time the calculator, with "compiled" for a model in TorchScript."""
    model = make_model(job).eval().requires_grad_(False)
    if job["options"].get("compiled"):
        model = script(model)
    calculator = NequIPCalculator(model, torch_step.DEVICE, transforms=transforms())
    return measure.latency(job, lambda atoms: calculator)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    measure.main({"train": train, "latency": latency}, ("nequip", "nequip-allegro", "torch"))

"""Measurements of mlip: ViSNet, MACE and NequIP in JAX. This script runs in the environment of mlip.

Batches are built and padded by mlip and contain about the requested number of structures.
"""

import logging

import ase
import jax
import measure
import numpy as np
import optax
from ase.calculators.singlepoint import SinglePointCalculator
from mlip.data import GraphDatasetBuilderConfig
from mlip.data.chemical_systems_readers.ase_atoms_reader import ASEAtomsReader
from mlip.data.single_graph_dataset_builder import SingleGraphDatasetBuilder
from mlip.models import ForceField, Mace, Nequip, Visnet
from mlip.models.loss import MSELoss
from mlip.simulation.ase.mlip_ase_calculator import MLIPForceFieldASECalculator
from mlip.training.ema import exponentially_moving_average
from mlip.training.training_state import init_training_state
from mlip.training.training_step import make_train_step

EDGE_CAPACITY_FACTOR = 1.25
# factor to the number of structures, because the builder's batches contain fewer than requested
SPARE = 1.5


def make_batches(job, batch: int, count: int):
    """Return the batches and the package's information on the data."""
    images = []
    for molecule in measure.read_molecules(job["work"], count):
        atoms = ase.Atoms(numbers=molecule.numbers, positions=molecule.positions)
        atoms.calc = SinglePointCalculator(atoms, energy=molecule.energy, forces=molecule.forces)
        images.append(atoms)
    config = GraphDatasetBuilderConfig(graph_cutoff_angstrom=measure.CUTOFF, batch_size=batch)
    builder = SingleGraphDatasetBuilder(ASEAtomsReader(images), config, dataset_info=True)
    return builder.get_dataset(), builder.dataset_info


def sizes_of_visnet(options):
    return {"num_channels": options["num_features"], "l_max": 2}


def sizes_of_mace(options):
    return {
        "num_channels": options["num_features"],
        "l_max": options["max_degree"],
        "node_symmetry": options["feature_degree"],
        "correlation": options["correlation"],
    }


def sizes_of_nequip(options):
    degrees = range(options["max_degree"] + 1)
    irreps = [
        f"{options['num_features']}x{l}{p}" for l in degrees for p in ("oe" if l % 2 else "eo")
    ]
    return {
        "target_irreps": "+".join(irreps),
        "l_max": options["max_degree"],
        "radial_mlp_hidden": [128],  # as in nequip
    }


OF_MODEL = {
    "visnet": (Visnet, sizes_of_visnet),
    "mace": (Mace, sizes_of_mace),
    "nequip": (Nequip, sizes_of_nequip),
}


def make_force_field(job, info) -> ForceField:
    network, sizes = OF_MODEL[job["model"]]
    config = network.Config(
        num_layers=job["options"]["num_layers"],
        num_rbf=job["options"]["num_radial"],
        **sizes(job["options"]),
    )
    return ForceField.from_mlip_network(network(config, info))


def train(job):
    dataset, info = make_batches(job, job["batch"], int(SPARE * job["batch"] * job["batches"]))
    graphs = [graph for _, graph in zip(range(job["batches"]), dataset)]
    force_field = make_force_field(job, info)
    optimizer, average = optax.adam(measure.LEARNING_RATE), exponentially_moving_average(0.999)
    real = [_real(graph) for graph in graphs]
    loss = MSELoss(lambda epoch: measure.ENERGY_WEIGHT, lambda epoch: measure.FORCE_WEIGHT)
    function = make_train_step(
        force_field.predictor,
        loss,
        optimizer,
        average,
        avg_n_graphs_per_batch=float(np.mean([r[0] for r in real])),
    )
    held = {"state": init_training_state(force_field.params, optimizer, average)}
    data = [jax.device_put(graph) for graph in graphs]

    def step(graph):
        held["state"], _ = function(held["state"], graph, 0)

    device = jax.devices()[0]
    times = measure.time_steps(
        step,
        data,
        job["seconds"],
        lambda: jax.block_until_ready(held["state"].params),
        each=device.platform == "cpu",
    )
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    result = measure.training_result(
        times,
        real,
        sum(p.size for p in jax.tree.leaves(force_field.params)),
        device=device.platform,
        peak_device_mib=None if peak is None else peak / 2**20,
    )
    if job["counters"]:
        result |= measure.xla_cost(function.lower(held["state"], data[0], 0).compile())
    return result


def _real(graph) -> tuple[int, int, int]:
    mask = np.asarray(graph.graph_mask())
    return (
        int(mask.sum()),
        int(np.asarray(graph.n_node)[mask].sum()),
        int(np.asarray(graph.n_edge)[mask].sum()),
    )


def latency(job):
    force_field = make_force_field(job, make_batches(job, 8, 200)[1])
    return measure.latency(
        job, lambda atoms: MLIPForceFieldASECalculator(atoms, EDGE_CAPACITY_FACTOR, force_field)
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    measure.main({"train": train, "latency": latency}, ("mlip", "jax"))

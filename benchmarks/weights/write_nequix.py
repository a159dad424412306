"""Write small models of Nequix, and their results.

Runs with nequix 0.4.5: `python write_nequix.py FOLDER`. The calculator of nequix rounds positions
to single precision; here the model gets them in double precision.
"""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jraph
import matscipy.neighbours
import numpy as np
from ase.geometry import complete_cell
from nequix.model import Nequix, load_model, save_model
from structures import structures, write_results

NUMBERS = [1, 6, 8]
CONFIG = {
    "atomic_numbers": NUMBERS,
    "cutoff": 3.5,
    "hidden_irreps": "6x0e + 4x1o + 2x2e",
    "lmax": 2,
    "n_layers": 3,
    "radial_basis_size": 4,
    "radial_mlp_size": 8,
    "radial_mlp_layers": 2,
    "radial_polynomial_p": 6.0,
    "mlp_init_scale": 4.0,
    "index_weights": False,
    "layer_norm": True,
    "shift": 0.165,
    "scale": 0.807,
    "avg_n_neighbors": 6.5,
    "kernel": True,
}
# INDEXED: weights of each element in the self-connections, no normalization, more harmonics.
INDEXED = CONFIG | {
    "hidden_irreps": "4x0e + 3x1o",
    "lmax": 3,
    "n_layers": 2,
    "index_weights": True,
    "layer_norm": False,
}
CONSTRUCTOR = CONFIG.keys() - {"atomic_numbers", "kernel"}


def randomize(model):
    """Return the model with other weights of the normalization than ones."""
    rng = np.random.default_rng(1)

    def changed(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype)

    return jax.tree.map(changed, model)


def graph_of(atoms):
    """Return the graph of a structure in double precision; molecules get a cell of zeros."""
    receivers, senders, shifts = matscipy.neighbours.neighbour_list(
        "ijS",
        positions=atoms.positions,
        cell=complete_cell(atoms.cell),
        pbc=atoms.pbc,
        cutoff=CONFIG["cutoff"],
    )
    return jraph.GraphsTuple(
        n_node=np.array([len(atoms)]),
        n_edge=np.array([len(senders)]),
        nodes={
            "species": np.searchsorted(NUMBERS, atoms.numbers).astype(np.int32),
            "positions": atoms.positions,
        },
        edges={"shifts": shifts * atoms.pbc.astype(np.float64)},
        senders=senders,
        receivers=receivers,
        globals={"cell": np.asarray(atoms.cell)[None] * atoms.pbc.all()},
    )


def results(path):
    """Return energy, forces and stress of each structure in double precision."""
    model, _ = load_model(path)  # nequix reads files in single precision only
    jax.config.update("jax_enable_x64", True)
    frames = structures()
    graph = jraph.batch_np([graph_of(atoms) for atoms in frames])
    graph = jraph.pad_with_graphs(graph, graph.n_node.sum() + 1, graph.n_edge.sum() + 1, 4)
    energy, forces, stress = map(np.asarray, eqx.filter_jit(model)(graph))
    ends = np.cumsum([len(atoms) for atoms in frames])
    return [
        (atoms, (energy[k], forces[end - len(atoms) : end], stress[k]))
        for k, (atoms, end) in enumerate(zip(frames, ends))
    ]


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in (("nequix", CONFIG), ("nequix_indexed", INDEXED)):
        model = Nequix(
            jax.random.key(3),
            n_species=len(NUMBERS),
            atom_energies=[-3.67, -8.4, -7.28],
            **{option: config[option] for option in CONSTRUCTOR},
        )
        path = folder / f"{name}.nqx"
        save_model(path, randomize(model), config)
        write_results(f"{path}.npz", results(path))
        jax.config.update("jax_enable_x64", False)
        print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

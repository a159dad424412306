"""Tests for agreement with reference implementations, in float64.

So3krates: golden values are reference outputs of mlff v1.0 (sparse form) in float64 for random
weights; the fixtures contain weights, options, structures, energies and forces. PaiNN: the
reference is a plain NumPy implementation of the paper's equations with SchNetPack's constants; it
reproduces the outputs of SchNetPack 2.1.1 in float64 (64 features, 3 interactions; too many weights
for a fixture) to 1e-14.
"""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.graph import node_graph_index
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.importers import mlff
from mlip_jax.importers.formats.mlff_weights import MlffWeights
from mlip_jax.importers.formats.weights import check_shapes
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.structure import Structure
from tests.models.parameters import quick_parameters

DATA = Path(__file__).parents[1] / "data"


pytestmark = pytest.mark.usefixtures("double_precision")


def read_parity(path):
    """Read a fixture of a PyTorch model.

    Returns:
      State dict; structures; values of each structure by name, such as "energy" and "forces".
    """
    with np.load(path) as data:
        state = {n.removeprefix("weights/"): data[n] for n in data if n.startswith("weights/")}
        values = {}
        for name in data:
            if name.startswith("structures/"):
                values.setdefault(name.split("/")[2], []).append(data[name])
    structures = [Structure(z, x) for z, x in zip(values["numbers"], values["positions"])]
    return state, structures, values


def energies_and_forces(model, params, structures, dtype=np.float64, with_forces=True):
    """Return energies (S,) and forces of one padded batch of all structures.

    Energies alone compile in half of the time; forces are zero then.
    """
    columns = Columns.from_structures(structures)
    sizes = graph_sizes(columns, model.cutoff)
    budget = PaddingBudget(
        int(sizes.n_node.sum()) + 3, int(sizes.n_edge.sum()) + 6, len(structures) + 2
    )
    batch = build_batch(columns, budget, model.cutoff, dtype=dtype)
    result = jax.jit(lambda p, g: evaluate(model, p, g, 1.0, with_forces=with_forces))(
        params, batch
    )
    return np.asarray(result.energy)[: len(structures)], np.asarray(result.forces)[
        : len(columns.numbers)
    ]


def batch_energies(model, params, structures, dtype=np.float64):
    """Return energies (S,) of one padded batch, without compiling forces."""
    columns = Columns.from_structures(structures)
    n_edge = int(graph_sizes(columns, model.cutoff).n_edge.sum())
    budget = PaddingBudget(len(columns.numbers) + 1, n_edge + 6, len(structures) + 1)
    batch = build_batch(columns, budget, model.cutoff, dtype=dtype)
    atomic = jax.jit(model.apply)(params, batch).energies
    energies = jax.ops.segment_sum(atomic, node_graph_index(batch), len(structures) + 1)
    return np.asarray(energies)[: len(structures)]


def assert_agree(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def so3krates_of(data, **options):
    """Return our So3krates with further options, and its parameters, from a file of mlff."""
    settings = ast.literal_eval(str(data["config"]))
    weights = MlffWeights(
        {name.removeprefix("weights/"): data[name] for name in data if name.startswith("weights/")}
    )
    model = models.create("so3krates", **mlff.model_options(settings), **options)
    params = {"params": mlff.model_params(weights, settings)}
    weights.check_all_used()
    check_shapes(model, params)
    return model, params


# tests/models/test_contract.py compares the two lists of pairs
@pytest.mark.parametrize(
    ("kind", "undirected"),
    [("plain", True), ("full", True), pytest.param("full", False, marks=pytest.mark.slow)],
)
def test_so3krates_agrees_with_mlff(kind, undirected):
    with np.load(DATA / f"parity_mlff_so3krates_{kind}.npz") as data:
        structures = [
            Structure(data[f"structures/{s}/numbers"], data[f"structures/{s}/positions"])
            for s in (0, 1)
        ]
        expected_energies = np.concatenate([data[f"structures/{s}/energy"] for s in (0, 1)])
        expected_forces = np.concatenate([data[f"structures/{s}/forces"] for s in (0, 1)])
        model, params = so3krates_of(data, undirected=undirected)
    energies, forces = energies_and_forces(model, params, structures)
    assert_agree(energies, expected_energies)
    assert_agree(forces, expected_forces)


def test_spline_filters_follow_the_exact_ones():
    """Interpolated filters of a network are close to the exact ones, closer with more knots."""
    with np.load(DATA / "parity_mlff_so3krates_plain.npz") as data:
        structures = [
            Structure(data[f"structures/{s}/numbers"], data[f"structures/{s}/positions"])
            for s in (0, 1)
        ]
        expected = np.concatenate([data[f"structures/{s}/energy"] for s in (0, 1)])
        cases = [so3krates_of(data, radial_filter="spline", num_knots=knots) for knots in (48, 96)]
    errors = []
    for model, params in cases:
        energies, _ = energies_and_forces(model, params, structures, with_forces=False)
        errors.append(np.abs(energies - expected).max() / np.abs(expected).max())
    assert errors[0] < 1e-2 and errors[1] < 0.2 * errors[0]


def plain_painn_energy(params, numbers, positions, layers, num_radial, cutoff, epsilon=1e-8):
    """Return PaiNN's energy by loops over atoms and pairs; positions may be complex."""

    def silu(x):
        return x / (1.0 + np.exp(-x))

    def dense(p, x):
        return x @ p["kernel"] + p.get("bias", 0.0)

    n, width = len(numbers), params["embedding"].shape[1]
    s, v = params["embedding"][numbers], np.zeros((n, 3, width), positions.dtype)
    centers = np.linspace(0.0, cutoff, num_radial)
    spacing = centers[1] - centers[0]
    for block in range(layers):
        phi = dense(
            params[f"message_{block}_layer_2"], silu(dense(params[f"message_{block}_layer_1"], s))
        )
        new_s, new_v = s.astype(positions.dtype), v.copy()
        for i in range(n):
            for j in range(n):
                d = np.sqrt(((positions[j] - positions[i]) ** 2).sum())
                if i == j or d.real >= cutoff:
                    continue
                rbf = np.exp(-0.5 * ((d - centers) / spacing) ** 2)
                filters = dense(params["filters"], rbf) * 0.5 * (np.cos(np.pi * d / cutoff) + 1.0)
                x = phi[j] * filters[3 * width * block : 3 * width * (block + 1)]
                new_s[i] += x[:width]
                new_v[i] += (
                    x[width : 2 * width] * ((positions[j] - positions[i]) / d)[:, None]
                    + x[2 * width :] * v[j]
                )
        s, v = new_s, new_v
        update = params[f"update_{block}"]
        mixed = dense(update["mix"], v)
        u, w = mixed[..., :width], mixed[..., width:]
        norm = np.sqrt((u**2).sum(1) + epsilon)
        a = dense(update["layer_2"], silu(dense(update["layer_1"], np.concatenate([s, norm], 1))))
        s = s + a[:, :width] + a[:, 2 * width :] * (u * w).sum(1)
        v = v + a[:, None, width : 2 * width] * w
    energy = params["energy"]
    return dense(energy["final"], silu(dense(energy["hidden"], s))).sum()


def test_painn_agrees_with_the_equations():
    options = {
        "num_features": 16,
        "num_layers": 2,
        "num_radial": 20,
        "cutoff": 4.0,
        "zero_init": False,
    }
    model = models.create("painn", **options, learned_shift=False)
    params = quick_parameters(model, example_graph(np.float64))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: np.asarray(p, np.float64) + 0.1 * rng.standard_normal(p.shape), params
    )
    structures = [
        Structure(np.array([6, 8, 1, 1, 7]), rng.normal(size=(5, 3)) * 1.5),
        Structure(np.array([8, 1, 1]), rng.normal(size=(3, 3))),
    ]
    energies, forces = energies_and_forces(model, params, structures)

    def plain(structure, positions):
        return plain_painn_energy(params["params"], structure.numbers, positions, 2, 20, 4.0)

    expected, derivatives = [plain(s, s.positions) for s in structures], []
    for s in structures:
        for n, x in np.ndindex(s.positions.shape):
            moved = s.positions.astype(complex)
            moved[n, x] += 1e-30j  # a complex step: exact to rounding
            derivatives.append(plain(s, moved).imag / 1e-30)
    assert_agree(energies, np.array(expected))
    assert_agree(forces, -np.array(derivatives).reshape(-1, 3))


def test_painn_basis_and_cutoff_equal_those_of_schnetpack():
    """Gaussians on an even grid from 0 to the cutoff, as wide as their spacing; cosine cutoff."""
    from mlip_jax.models.layers.basic import cosine_cutoff, gaussian_basis

    d = jnp.array([0.0, 5.0 / 19, 2.5, 5.0, 6.0])
    basis = np.asarray(gaussian_basis(d, 20, 5.0))
    assert basis[0, 0] == basis[1, 1] == 1.0
    assert basis[0, 1] == pytest.approx(np.exp(-0.5), rel=1e-12)
    np.testing.assert_allclose(
        cosine_cutoff(d, 5.0)[jnp.array([0, 2, 3, 4])], [1.0, 0.5, 0.0, 0.0], atol=1e-15
    )

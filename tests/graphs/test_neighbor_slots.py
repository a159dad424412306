"""Tests for neighbors in slots: sums without scatter operations equal those over edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.graph import max_by_graph, spread_by_graph, sum_by_graph
from mlip_jax.graphs.neighbor_slots import add_neighbor_slots, choose_capacity, max_neighbors
from mlip_jax.graphs.resident import collect
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models import create
from mlip_jax.models.layers import slot_messages
from mlip_jax.potential import evaluate, example_graph, hessian_columns
from mlip_jax.structure import Structure
from mlip_jax.target_device import compiling_for

CUTOFF = 2.2
SMALL = {
    "painn": dict(num_features=4, num_layers=2, num_radial=2, zero_init=False),
    "so3krates": dict(
        num_features=4, num_layers=2, num_radial=3, num_heads=2, degrees=(1, 2), zero_init=False
    ),
    "allegro": dict(
        num_features=4,
        num_tensor_features=2,
        num_layers=2,
        max_degree=1,
        num_radial=3,
        embedding_widths=(4,),
        latent_widths=(4,),
        energy_widths=(4,),
        zero_init=False,
    ),
    "mace": dict(
        num_features=2,
        num_layers=2,
        max_degree=1,
        correlation=2,
        num_radial=3,
        radial_network=(4,),
        first_interaction="residual_density",
        interaction="agnostic",
        zbl=True,
        zero_init=False,
    ),
    "nequip": dict(num_features=2, num_layers=2, max_degree=1, num_radial=3),
    "sevennet": dict(num_features=2, num_layers=2, max_degree=1, num_radial=3),
    "nequix": dict(num_features=(2, 2), num_layers=2, max_degree=1, num_radial=3),
    "pace": dict(num_features=2, num_layers=2, feature_degree=1, correlation=2),
    "painn_oc": dict(num_features=4, num_layers=2, num_radial=4),
    "faenet": dict(num_features=4, num_layers=1, num_radial=4),
    "equiformer": dict(num_features=4, num_layers=1, num_heads=2, num_radial=4),
    "schnet": dict(num_features=4, num_layers=1, num_radial=5, zero_init=False),
    "equivariant_transformer": dict(
        num_features=8, num_layers=1, num_radial=5, num_heads=2, zero_init=False
    ),
}


def structures(periodic=False):
    """Return three structures of 5, 1 and 7 atoms; the second has no neighbors unless periodic."""
    rng = np.random.default_rng(3)
    found = []
    for count in (5, 1, 7):
        box = {"cell": np.diag([2.0, 2.5, 3.0]) + 0.1, "pbc": np.ones(3, bool)} if periodic else {}
        grid = np.array([[x, y, z] for x in range(2) for y in range(2) for z in range(2)])[:count]
        positions = 1.1 * grid + rng.normal(0, 0.1, (count, 3))
        found.append(Structure(numbers=rng.choice([1, 6, 8], count), positions=positions, **box))
    return Columns.from_structures(found)


def batch(periodic=False):
    n_edge = 1600 if periodic else 160
    return build_batch(structures(periodic), PaddingBudget(16, n_edge, 5), CUTOFF, dtype=np.float64)


slotted = jax.jit(add_neighbor_slots, static_argnums=1)


def parameters(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example_graph())
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape), shapes)


def loss(params, model, graph):
    """Depend on energies and forces, so that the gradient has second derivatives."""
    out = evaluate(model, params, graph, 1.0)
    return (out.energy**2).sum() + (out.forces**2).sum(), (out.energy, out.forces)


@pytest.mark.parametrize("periodic", [False, True])
def test_each_slot_has_one_neighbor_and_its_reverse(periodic):
    graph = batch(periodic)
    capacity = int(np.bincount(graph.receivers[: graph.n_edge[:3].sum()]).max())
    slots = slotted(graph, capacity).edges["slots"]
    used, edge = np.asarray(slots.used), np.asarray(slots.edge)
    assert sorted(edge[used]) == list(range(graph.n_edge[:3].sum()))
    np.testing.assert_array_equal(graph.receivers[edge][used], np.nonzero(used)[0])
    reverse = edge.ravel()[np.asarray(slots.reverse)]
    np.testing.assert_array_equal(graph.senders[reverse][used], graph.receivers[edge][used])
    np.testing.assert_array_equal(graph.receivers[reverse][used], graph.senders[edge][used])
    if periodic:
        shifts = graph.edges["shifts"]
        np.testing.assert_array_equal(shifts[reverse][used], -shifts[edge][used])


def test_too_few_slots_make_positions_invalid_instead_of_dropping_a_neighbor():
    graph = batch()
    largest = int(np.bincount(graph.receivers[: graph.n_edge[:3].sum()]).max())
    assert np.isfinite(slotted(graph, largest).nodes["positions"]).all()
    assert np.isnan(slotted(graph, largest - 1).nodes["positions"]).all()


def test_the_number_of_slots_is_that_of_the_atom_with_most_neighbors():
    data = collect(structures(), CUTOFF)
    largest = max_neighbors(data.receivers, data.first_edge)
    per_structure = np.split(data.receivers, data.first_edge[1:-1])
    assert largest == max(np.bincount(r).max() for r in per_structure if len(r))
    model = create("painn")
    assert choose_capacity(model, largest, 10.0) == 0  # on a CPU
    with compiling_for("gpu"):
        assert choose_capacity(model, largest, 10.0) == -(-largest // 8) * 8
        assert choose_capacity(model, 400, 10.0) == 0  # a few atoms have far more than the others


@pytest.mark.parametrize(
    "name, periodic",
    [
        ("painn", False),
        ("schnet", True),
        pytest.param("painn", True, marks=pytest.mark.slow),
        pytest.param("allegro", False, marks=pytest.mark.slow),
        pytest.param("so3krates", False, marks=pytest.mark.slow),
        pytest.param("mace", False, marks=pytest.mark.slow),
        pytest.param("nequip", True, marks=pytest.mark.slow),
        pytest.param("sevennet", False, marks=pytest.mark.slow),
        pytest.param("nequix", False, marks=pytest.mark.slow),
        pytest.param("pace", False, marks=pytest.mark.slow),
        pytest.param("painn_oc", False, marks=pytest.mark.slow),
        pytest.param("faenet", False, marks=pytest.mark.slow),
        pytest.param("equiformer", False, marks=pytest.mark.slow),
        pytest.param("equivariant_transformer", True, marks=pytest.mark.slow),
    ],
)
def test_slots_change_no_energy_force_or_gradient_of_the_loss(monkeypatch, name, periodic):
    if periodic:  # filters in the form for many slots
        monkeypatch.setattr(slot_messages, "_MANY", 0)
    model = create(name, cutoff=CUTOFF, **SMALL[name])
    with jax.enable_x64(True):
        graph, params = batch(periodic), parameters(model)
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        expected = gradient(params, model, graph)
        capacity = int(np.bincount(graph.receivers[: graph.n_edge[:3].sum()]).max())

        def compute(params):
            in_slots = add_neighbor_slots(jax.tree.map(jnp.asarray, graph), capacity)
            return jax.value_and_grad(loss, has_aux=True)(params, model, in_slots)

        with compiling_for("gpu"):
            lowered = jax.jit(compute).lower(params)
        # the only scatter is the inverse of the pair order, in which nothing is added
        assert lowered.as_text().count('"stablehlo.scatter"(') == 1
        found = lowered.compile()(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * (np.abs(b).max() + 1e-3))


@pytest.mark.slow
def test_all_pairs_of_a_single_structure_change_no_hessian():
    model = create("painn", cutoff=CUTOFF, **SMALL["painn"])
    one = structures().take(np.array([2]))
    with jax.enable_x64(True):
        params, directions = parameters(model), np.random.default_rng(1).normal(size=(2, 9, 3))
        graph = build_batch(one, PaddingBudget(9, 60, 2), CUTOFF, dtype=np.float64)

        def columns(params):
            return hessian_columns(model, params, graph, 1.0, directions)

        expected = jax.jit(columns)(params)
        with compiling_for("gpu"):
            lowered = jax.jit(lambda p: columns(p)).lower(params)
        assert "stablehlo.scatter" not in lowered.as_text()
        found = lowered.compile()(params)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_values_of_graphs_are_spread_as_on_a_cpu():
    """Detects values of another graph, also NaN, and a type that changes."""
    graphs = np.array([0, 0, 2, 3], np.int32)  # graph 1 is empty
    for values in (np.array([[1.0], [2.0], [np.nan], [4.0]]), np.array([True, False, False, True])):
        found = {}
        for platform in ("cpu", "gpu"):
            with compiling_for(platform):
                found[platform] = spread_by_graph(jnp.asarray(values), graphs)
        np.testing.assert_array_equal(found["gpu"], found["cpu"])
        assert found["gpu"].dtype == found["cpu"].dtype


def test_sums_and_maxima_by_graph_are_those_of_a_cpu():
    rng = np.random.default_rng(2)
    graphs = np.array([0, 0, 2, 2, 2, 3, 4], np.int32)  # graph 1 is empty, 4 is padding
    values, numbers = rng.normal(size=(7, 3)), rng.integers(-1, 9, 7)
    results = {}
    for platform in ("cpu", "gpu"):
        with compiling_for(platform):
            results[platform] = (
                sum_by_graph(jnp.asarray(values), graphs, 4),
                max_by_graph(jnp.asarray(numbers), graphs, 4, -1),
            )
    np.testing.assert_allclose(results["gpu"][0], results["cpu"][0], rtol=1e-6)
    np.testing.assert_array_equal(results["gpu"][1], results["cpu"][1])
    assert results["gpu"][1][1] == -1

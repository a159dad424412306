"""Tests that graphs built on the device equal those built on the host."""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.graphs.slots import Slots, build, to_slots

SIZE, NUM, CUTOFF = 7, 4, 2.5


_build = jax.jit(build, static_argnums=(2, 3, 4))


def random_slots(seed, counts):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(1, 9, (NUM, SIZE))
    positions = rng.uniform(-2, 2, (NUM, SIZE, 3)).astype(np.float32)
    return Slots(
        jnp.asarray(numbers, jnp.int32),
        jnp.asarray(counts, jnp.int32),
        jnp.arange(NUM, dtype=jnp.float32),
        jnp.zeros(NUM),
    ), positions


def built(slots, positions, budget, long_range=None):
    return jax.device_get(_build(slots, positions, budget, CUTOFF, long_range))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, SIZE), min_size=NUM, max_size=NUM))
def test_edges_pairs_and_atoms_equal_those_of_the_host(seed, counts):
    slots, positions = random_slots(seed, counts)
    budget = PaddingBudget(SIZE * NUM + 2, SIZE * SIZE * NUM, NUM + 1, SIZE * SIZE * NUM)
    batch = built(slots, positions, budget, 3.0)
    graph, offset, edges, pairs = batch.graph, 0, [], []
    for m, count in enumerate(counts):
        assert graph.n_node[m] == count and batch.takes_part[m] == (count > 0)
        x = positions[m, :count].astype(np.float64)
        np.testing.assert_array_equal(
            graph.nodes["positions"][offset : offset + count], positions[m, :count]
        )
        np.testing.assert_array_equal(
            graph.nodes["numbers"][offset : offset + count], slots.numbers[m, :count]
        )
        neighbors = neighbor_list(x, CUTOFF)
        assert graph.n_edge[m] == len(neighbors.senders)
        edges += [(offset + r, offset + s) for r, s in zip(neighbors.receivers, neighbors.senders)]
        receivers, senders, _ = long_range_list(x, 3.0)
        pairs += [(offset + r, offset + s) for r, s in zip(receivers, senders)]
        distances = np.linalg.norm(x[:, None] - x[None], axis=-1) + np.diag(np.full(count, np.inf))
        expected = (distances.min(), distances.min(1).max()) if count > 1 else (np.inf, 0.0)
        np.testing.assert_allclose(
            (batch.nearest[m], batch.max_nearest_distance[m]), expected, rtol=1e-5
        )
        offset += count
    edges_of_device = list(zip(graph.receivers.tolist(), graph.senders.tolist()))
    assert edges_of_device[: len(edges)] == edges and set(edges_of_device[len(edges) :]) <= {
        (offset, offset)
    }
    assert graph.n_node.sum() == budget.n_node and graph.n_edge.sum() == budget.n_edge
    listed = graph.edges["long_range"]
    made_pairs = list(zip(listed["receivers"].tolist(), listed["senders"].tolist()))
    assert made_pairs[: len(pairs)] == pairs and set(made_pairs[len(pairs) :]) <= {(offset, offset)}
    order, half = graph.edges["pair_order"], budget.n_edge // 2
    assert sorted(order) == list(range(budget.n_edge))
    assert all(
        edges_of_device[a] == edges_of_device[b][::-1] for a, b in zip(order[:half], order[half:])
    )
    assert int(jraph.get_number_of_padding_with_graphs_graphs(graph)) == 1


def test_slots_beyond_the_budget_wait_and_lose_no_neighbor():
    slots, positions = random_slots(0, [5, 7, 6, 7])
    counts = [
        len(neighbor_list(positions[m, :c].astype(float), CUTOFF).senders)
        for m, c in enumerate([5, 7, 6, 7])
    ]
    room = sum(counts[:2])
    batch = built(slots, positions, PaddingBudget(40, room, NUM + 1))
    expected = np.cumsum(counts) <= room
    assert expected[:2].all() and not expected.all()
    np.testing.assert_array_equal(batch.takes_part, expected)
    np.testing.assert_array_equal(batch.graph.n_edge[:NUM], np.where(expected, counts, 0))


def test_values_of_atoms_return_to_their_slots():
    slots, positions = random_slots(1, [3, 0, 7, 1])
    batch = built(slots, positions, PaddingBudget(15, 100, NUM + 1))
    back = np.asarray(to_slots(batch, jnp.asarray(batch.graph.nodes["positions"]), SIZE))
    for m, count in enumerate([3, 0, 7, 1]):
        np.testing.assert_array_equal(back[m, :count], positions[m, :count])
        assert not back[m, count:].any()


def test_a_slot_that_is_too_large_reports_its_size():
    slots, positions = random_slots(2, [7, 7, 7, 7])
    counts = [len(neighbor_list(positions[m].astype(float), CUTOFF).senders) for m in range(NUM)]
    batch = built(slots, positions, PaddingBudget(40, min(counts) - 2, NUM + 1))
    assert not batch.takes_part.any() and batch.graph.n_edge[:NUM].sum() == 0
    np.testing.assert_array_equal(batch.n_edge, counts)


@pytest.mark.parametrize(
    "budget", [PaddingBudget(SIZE, 100, NUM + 1), PaddingBudget(20, 41, NUM + 1)]
)
def test_an_invalid_budget_is_rejected(budget):
    slots, positions = random_slots(1, [3, 0, 7, 1])
    with pytest.raises(ValueError, match="a budget for more than 7 atoms"):
        built(slots, positions, budget)

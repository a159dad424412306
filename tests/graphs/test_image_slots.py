"""Tests that graphs of periodic slots have the same edges and pairs as those of the host."""

import jax
import numpy as np
import pytest
from ase.build import bulk

from mlip_jax.graphs.image_slots import ImageBudget, build_with_images, count_images, max_images
from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.graphs.slots import Box, Slots

CUTOFF, FAR = 3.0, 4.5
PERIODIC = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 1]], bool)
COUNTS = np.array([3, 4, 0, 1], np.int32)


def test_edges_and_pairs_equal_those_of_the_host():
    """Cells smaller than the cutoffs, skewed, with open directions and atoms outside of them."""
    rng = np.random.default_rng(0)
    cell = 2.2 * np.eye(3) + rng.normal(0, 0.4, (4, 3, 3))
    positions = rng.uniform(-4, 6, (4, 4, 3))
    zeros = np.zeros(4)
    slots = Slots(np.ones((4, 4), np.int32), COUNTS, zeros, zeros)
    images = max(count_images(c, p, FAR) for c, p in zip(cell, PERIODIC))
    budget = ImageBudget(12, 1200, 5, 2000, images)
    with jax.enable_x64(True):
        build = jax.jit(build_with_images, static_argnums=(3, 4, 5))
        batch, needed = jax.device_get(
            build(slots, positions, Box(cell, PERIODIC), budget, CUTOFF, FAR)
        )
    graph, first, edges, pairs = batch.graph, 0, [], []
    for m, count in enumerate(COUNTS):
        x = positions[m, :count]
        assert needed[m] == count_images(cell[m], PERIODIC[m], FAR)
        listed = neighbor_list(x, CUTOFF, cell[m], PERIODIC[m])
        assert graph.n_edge[m] == batch.n_edge[m] == len(listed.senders)
        edges += zip(listed.receivers + first, listed.senders + first, map(tuple, listed.shifts))
        receivers, senders, shifts = long_range_list(x, FAR, cell[m], PERIODIC[m])
        assert batch.n_pair[m] == len(senders)
        pairs += zip(receivers + first, senders + first, map(tuple, shifts))
        if count:
            vectors = x[listed.senders] - x[listed.receivers] + listed.shifts @ cell[m]
            np.testing.assert_allclose(batch.nearest[m], np.linalg.norm(vectors, axis=1).min())
        first += count
    ours = list(zip(graph.receivers, graph.senders, map(tuple, graph.edges["shifts"])))
    assert set(ours[: len(edges)]) == set(edges) and len(set(edges)) == len(edges) > 100
    assert (np.diff(graph.receivers) >= 0).all()
    assert set(ours[len(edges) :]) == {(first, first, (0, 0, 0))}
    order = graph.edges["pair_order"].reshape(2, -1)
    assert sorted(order.ravel()) == list(range(1200))
    for forward, reverse in order.T:
        (r, s, t), other = ours[forward], ours[reverse]
        assert other == (s, r, tuple(-np.array(t)))
    far = graph.edges["long_range"]
    listed = list(zip(far["receivers"], far["senders"], far["shifts"]))[: len(pairs)]
    assert set(map(unordered, listed)) == set(map(unordered, pairs))


def unordered(pair):
    """Return both directions of a pair."""
    r, s, shift = int(pair[0]), int(pair[1]), np.asarray(pair[2], int)
    return frozenset({(r, s, *shift.tolist()), (s, r, *(-shift).tolist())})


@pytest.mark.parametrize("element", ["Be", "C", "Fe", "Ni", "Cu"])
def test_primitive_cells_fit_within_the_cutoff_of_dispersion(element):
    """Relaxations with D3 used to reject primitive cells as too large."""
    crystal = bulk(element)
    assert count_images(0.9 * crystal.cell.array, crystal.pbc, 31.8) < max_images(31.8)

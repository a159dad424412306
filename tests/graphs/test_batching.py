"""Batch plans and padded batches: nothing is lost, nothing is changed, little is wasted."""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batching import (
    Budget,
    Sizes,
    build_batch,
    check_sizes,
    choose_budget,
    enlarge,
    fill,
    measure,
    plan_window,
)
from mlip_jax.graphs.graph import displacements, long_range_pairs, node_graph_index, pairs
from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.structure import Structure

CUTOFF = 3.0


def structures(sizes, seed=0, periodic=()):
    """Random structures of given numbers of atoms; those at the positions `periodic` have a cell."""
    rng = np.random.default_rng(seed)
    made = []
    for s, n in enumerate(sizes):
        cell = np.diag(rng.uniform(3.5, 5.0, 3)) + rng.uniform(-0.3, 0.3, (3, 3)) if s in periodic else None
        made.append(Structure(
            rng.integers(1, 10, n), rng.uniform(0, 4.0, (n, 3)), energy=float(rng.normal()),
            forces=rng.normal(size=(n, 3)), charge=float(rng.integers(-1, 2)), cell=cell,
            pbc=None if cell is None else np.array([True, True, s % 2 == 0]), source=f"file:{s}"))
    return made


@st.composite
def size_lists(draw):
    n_node = np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=300)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return Sizes(n_node, 2 * (n_node * (n_node - 1) * rng.uniform(0, 0.5, len(n_node))).astype(np.int64))


@settings(max_examples=50, deadline=None)
@given(sizes=size_lists(), batch_size=st.integers(1, 40), seed=st.integers(0, 99))
def test_plan_is_a_partition_within_the_budget(sizes, batch_size, seed):
    budget = choose_budget(sizes, batch_size)
    rng = np.random.default_rng(seed)
    order = rng.choice(len(sizes.n_node), rng.integers(1, len(sizes.n_node) + 1), replace=False)
    plan = plan_window(order, sizes, budget)
    assert sorted(np.concatenate(plan).tolist()) == sorted(order.tolist())
    for batch in plan:
        assert 0 < len(batch) <= budget.graphs - 1
        assert sizes.n_node[batch].sum() <= budget.nodes - 1
        assert sizes.n_edge[batch].sum() <= budget.edges
    again = plan_window(order, sizes, budget)
    assert len(again) == len(plan) and all(np.array_equal(a, b) for a, b in zip(plan, again))
    shares = fill(plan, sizes, budget)
    assert all(0 <= share <= 1 for share in shares.values())


def realistic_sizes(count=4000, seed=0):
    """Molecules of 3 to 60 atoms, mean some 30, with the edges that they have within 5 Å."""
    rng = np.random.default_rng(seed)
    n_node = np.clip(rng.normal(30, 11, count), 3, 60).astype(np.int64)
    density = np.clip(rng.normal(0.75, 0.1, count) * np.minimum(1.0, (24 / n_node) ** 0.6), 0.1, 1.0)
    return Sizes(n_node, 2 * (n_node * (n_node - 1) / 2 * density).astype(np.int64))


@pytest.mark.parametrize("batch_size", [8, 32, 64, 128])
def test_at_least_nine_edges_in_ten_are_real(batch_size):
    sizes = realistic_sizes()
    budget = choose_budget(sizes, batch_size)
    plan = plan_window(np.random.default_rng(1).permutation(len(sizes.n_node)), sizes, budget)
    assert fill(plan, sizes, budget)["edges"] >= 0.9
    mean = len(sizes.n_node) / len(plan)
    assert 0.7 * batch_size < mean < 1.5 * batch_size


def test_plan_keeps_the_order_but_for_gaps():
    sizes = realistic_sizes(200)
    order = np.random.default_rng(0).permutation(200)
    plan = plan_window(order, sizes, choose_budget(sizes, 16))
    assert plan[0][0] == order[0]
    place = np.empty(200, int)
    place[order] = np.arange(200)
    assert np.corrcoef(place[np.concatenate(plan)], np.arange(200))[0, 1] > 0.8


def test_structure_that_is_too_large_is_named():
    sizes = Sizes(np.array([3, 50]), np.array([6, 900]))
    with pytest.raises(ValueError, match=r"spice:aspirin has 50 atoms and 900 edges"):
        check_sizes(sizes, Budget(20, 100, 5), ["spice:water", "spice:aspirin"].__getitem__)
    with pytest.raises(ValueError, match="structure 1 has"):
        plan_window(np.array([1, 0]), sizes, Budget(200, 100, 5))


@pytest.mark.parametrize("sizes", [Sizes(np.array([1]), np.array([0])), Sizes(np.array([1, 9]), np.array([0, 72])),
                                   Sizes(np.array([2, 2, 2]), np.array([2, 0, 2]))])
@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_tiny_sets_have_a_budget(sizes, batch_size):
    budget = choose_budget(sizes, batch_size)
    plan = plan_window(np.arange(len(sizes.n_node)), sizes, budget)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(sizes.n_node)))
    assert budget.edges >= 2 and budget.edges % 2 == 0


def test_no_structures_have_no_budget():
    with pytest.raises(ValueError, match="at least one structure"):
        choose_budget(Sizes(np.zeros(0, int), np.zeros(0, int)), 4)
    assert plan_window(np.zeros(0, int), Sizes(np.zeros(0, int), np.zeros(0, int)), Budget(8, 16, 3)) == []


def single_graph(s: Structure, periodic: bool):
    nb = neighbor_list(s.positions, CUTOFF, s.cell, s.pbc)
    shifts = {"shifts": np.zeros((len(nb.senders), 3), np.int32) if nb.shifts is None else nb.shifts}
    cell = {"cell": (np.zeros((3, 3)) if s.cell is None else s.cell)[None]}
    return jraph.GraphsTuple(
        nodes={"positions": s.positions, "numbers": s.numbers, "forces": s.forces},
        edges=shifts if periodic else {}, senders=nb.senders, receivers=nb.receivers,
        globals={"energy": np.array([s.energy]), "charge": np.array([s.charge]), **(cell if periodic else {})},
        n_node=np.array([len(s)]), n_edge=np.array([len(nb.senders)]))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 999),
       periodic=st.sets(st.integers(0, 5), max_size=2), spare=st.integers(0, 7))
def test_batch_is_what_jraph_makes_of_single_graphs(sizes, seed, periodic, spare):
    made = structures(sizes, seed, periodic)
    columns = Columns.from_structures(made)
    measured = measure(columns, CUTOFF)
    is_periodic = columns.cell is not None
    graphs, atoms, edges = len(made), int(measured.n_node.sum()), int(measured.n_edge.sum())
    budget = Budget(atoms + 1 + spare, edges + 2 * spare, graphs + 1 + spare)
    batch = build_batch(columns, budget, CUTOFF, dtype=np.float64)
    expected = jraph.batch_np([single_graph(s, is_periodic) for s in made])
    for room, count in (("nodes", atoms), ("globals", graphs), ("edges", edges)):
        for key, value in getattr(expected, room).items():
            np.testing.assert_array_equal(getattr(batch, room)[key][:count], value, err_msg=f"{room}/{key}")
    np.testing.assert_array_equal(batch.senders[:edges], expected.senders)
    np.testing.assert_array_equal(batch.receivers[:edges], expected.receivers)
    np.testing.assert_array_equal(batch.n_node[:graphs], expected.n_node)
    np.testing.assert_array_equal(batch.n_edge[:graphs], expected.n_edge)
    check_padding(batch, budget, graphs, atoms, edges)


def check_padding(batch, budget, graphs, atoms, edges):
    """jraph's contract, and pairs: padding edges join a padding atom to itself."""
    assert batch.n_node.sum() == budget.nodes and batch.n_edge.sum() == budget.edges
    assert len(batch.n_node) == len(batch.n_edge) == budget.graphs
    assert jraph.get_number_of_padding_with_graphs_graphs(batch) == budget.graphs - graphs
    assert jraph.get_number_of_padding_with_graphs_nodes(batch) == budget.nodes - atoms
    assert jraph.get_number_of_padding_with_graphs_edges(batch) == budget.edges - edges
    assert (batch.senders[edges:] == atoms).all() and (batch.receivers[edges:] == atoms).all()
    assert (np.diff(batch.receivers) >= 0).all()
    for key in ("positions", "numbers", "forces"):
        assert not batch.nodes[key][atoms:].any()
    for value in batch.globals.values():
        assert not value[graphs:].any()
    order = batch.edges["pair_order"]
    np.testing.assert_array_equal(np.sort(order), np.arange(budget.edges))
    forward, backward = np.split(order, 2)
    np.testing.assert_array_equal(batch.senders[forward], batch.receivers[backward])
    index = np.repeat(np.arange(budget.graphs), batch.n_node)
    vectors = batch.nodes["positions"][batch.senders] - batch.nodes["positions"][batch.receivers]
    if "shifts" in batch.edges:
        cell = batch.globals["cell"][index[batch.receivers]]
        vectors = vectors + np.einsum("ec,ecx->ex", batch.edges["shifts"], cell)
    np.testing.assert_allclose(vectors[forward], -vectors[backward], atol=1e-5)
    np.testing.assert_array_equal(index[batch.senders], index[batch.receivers])


def test_masks_of_jraph():
    columns = Columns.from_structures(structures([3, 4]))
    batch = build_batch(columns, Budget(12, 40, 5), 10.0)
    np.testing.assert_array_equal(jraph.get_graph_padding_mask(batch), np.arange(5) < 2)
    np.testing.assert_array_equal(jraph.get_node_padding_mask(batch), np.arange(12) < 7)
    np.testing.assert_array_equal(jraph.get_edge_padding_mask(batch), np.arange(40) < 18)


def test_displacements_are_those_of_the_neighbour_list():
    made = structures([5, 4, 6], 3, periodic={0, 1, 2})
    columns = Columns.from_structures(made)
    measured = measure(columns, CUTOFF)
    edges = int(measured.n_edge.sum())
    batch = build_batch(columns, Budget(20, edges + 4, 5), CUTOFF)
    vectors = np.asarray(displacements(batch))
    expected = []
    for s in made:
        nb = neighbor_list(s.positions, CUTOFF, s.cell, s.pbc)
        expected.append(s.positions[nb.senders] - s.positions[nb.receivers] + nb.shifts @ s.cell)
    np.testing.assert_allclose(vectors[:edges], np.concatenate(expected), atol=1e-5)
    assert not vectors[edges:].any()
    assert (np.linalg.norm(vectors, axis=1) < CUTOFF + 1e-5).all()
    index = node_graph_index(jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(index, np.repeat(np.arange(5), batch.n_node))


def test_pairs_stand_once():
    columns = Columns.from_structures(structures([5, 7], 1))
    batch = build_batch(columns, Budget(16, 80, 3), CUTOFF)
    once, both = pairs(batch), pairs(batch, undirected=False)
    assert once.undirected and not both.undirected
    assert len(once.senders) == 40 and len(both.senders) == 80
    for p in (once, both):  # padding is beyond every cutoff
        length = np.linalg.norm(p.displacements, axis=1)
        assert (length[np.asarray(p.senders) == 12] > 1e3).all() and length[np.asarray(p.senders) != 12].max() < CUTOFF

    def listed(p, mirror):
        rows = np.column_stack([p.receivers, p.senders, np.round(np.asarray(p.displacements), 5)])
        if mirror:
            back = np.column_stack([p.senders, p.receivers, np.round(-np.asarray(p.displacements), 5)])
            rows = np.concatenate([rows, back])
        return sorted(map(tuple, rows[rows[:, 1] != 12].tolist()))

    assert listed(once, True) == listed(both, False)
    without = batch._replace(edges={})
    assert not pairs(without).undirected


def test_any_order_of_indices_and_reference_energies():
    made = structures([3, 5, 4], 2)
    columns = Columns.from_structures(made)
    reference = np.linspace(-1e5, 0, 119)
    batch = build_batch(columns.take(np.array([2, 0])), Budget(12, 40, 4), CUTOFF, reference, dtype=np.float64)
    np.testing.assert_array_equal(batch.nodes["numbers"][:7], np.concatenate([made[2].numbers, made[0].numbers]))
    for g, s in enumerate((2, 0)):
        assert batch.globals["energy"][g] == pytest.approx(made[s].energy - reference[made[s].numbers].sum(), rel=1e-12)


def test_reference_energies_are_subtracted_before_single_precision():
    """A small remainder of a large energy keeps its digits."""
    s = Structure(np.array([6, 6]), np.zeros((2, 3)) + np.arange(2)[:, None], energy=-2e5 + 0.123456)
    reference = np.zeros(119)
    reference[6] = -1e5
    batch = build_batch(Columns.from_structures([s]), Budget(4, 4, 2), CUTOFF, reference)
    assert batch.globals["energy"].dtype == np.float32
    assert batch.globals["energy"][0] == pytest.approx(0.123456, abs=1e-6)


def test_missing_labels_stay_nan_and_padding_is_zero():
    s = Structure(np.array([1, 1]), np.eye(2, 3))
    batch = build_batch(Columns.from_structures([s]), Budget(4, 4, 3), CUTOFF)
    assert np.isnan(batch.globals["energy"][0]) and not batch.globals["energy"][1:].any()
    assert np.isnan(batch.nodes["forces"][:2]).all() and not batch.nodes["forces"][2:].any()


def test_empty_batch_is_all_padding():
    columns = Columns.from_structures(structures([3, 4]))
    batch = build_batch(columns.take(np.zeros(0, np.int64)), Budget(8, 16, 3), CUTOFF, np.zeros(119))
    check_padding(batch, Budget(8, 16, 3), 0, 0, 0)


@pytest.mark.parametrize("budget", [Budget(7, 40, 5), Budget(20, 4, 5), Budget(20, 40, 2)])
def test_what_does_not_fit_is_refused(budget):
    columns = Columns.from_structures(structures([3, 4]))
    with pytest.raises(ValueError, match="do not fit into Budget"):
        build_batch(columns, budget, 10.0)


@settings(max_examples=40, deadline=None)
@given(sizes=size_lists(), batch_size=st.integers(1, 40), seed=st.integers(0, 99))
def test_plan_respects_the_room_for_pairs(sizes, batch_size, seed):
    rng = np.random.default_rng(seed)
    sizes = sizes._replace(n_pair=(sizes.n_edge // 2 * rng.uniform(0, 3, len(sizes.n_edge))).astype(np.int64))
    budget = choose_budget(sizes, batch_size)
    order = rng.permutation(len(sizes.n_node))
    plan = plan_window(order, sizes, budget)
    assert sorted(np.concatenate(plan).tolist()) == sorted(order.tolist())
    for batch in plan:
        chosen = sizes.take(batch)
        assert chosen.n_node.sum() <= budget.nodes - 1 and chosen.n_edge.sum() <= budget.edges
        assert chosen.n_pair.sum() <= budget.pairs and len(batch) <= budget.graphs - 1
    assert 0 <= fill(plan, sizes, budget)["pairs"] <= 1


@pytest.mark.parametrize("batch_size", [16, 64])
def test_pairs_leave_the_batches_full_of_edges(batch_size):
    sizes = realistic_sizes()
    order = np.random.default_rng(1).permutation(len(sizes.n_node))
    plain = choose_budget(sizes, batch_size)
    with_pairs = sizes._replace(n_pair=sizes.n_node * (sizes.n_node - 1) // 2)
    budget = choose_budget(with_pairs, batch_size)
    assert budget[:3] == plain[:3] and plain.pairs == 0
    plan = plan_window(order, with_pairs, budget)
    shares = fill(plan, with_pairs, budget)
    assert shares["edges"] >= 0.88 and shares["pairs"] >= 0.7
    assert "pairs" not in fill(plan_window(order, sizes, plain), sizes, plain)


def test_pairs_that_do_not_fit_are_named():
    sizes = Sizes(np.array([3, 50]), np.array([6, 90]), np.array([3, 1225]))
    budget = Budget(60, 100, 5, 1000)
    with pytest.raises(ValueError, match="structure 1 has 50 atoms and 90 edges, 1225 long-range pairs.*1000 pairs"):
        check_sizes(sizes, budget)
    assert enlarge(budget, sizes) == budget._replace(pairs=1225)
    assert enlarge(budget, sizes.take(np.zeros(0, int))) == budget
    assert enlarge(Budget(8, 16, 3), sizes._replace(n_pair=None)) == Budget(51, 90, 3)
    columns = Columns.from_structures(structures([3, 4]))
    with pytest.raises(ValueError, match="9 long-range pairs do not fit into Budget"):
        build_batch(columns, Budget(20, 60, 5, 8), CUTOFF, long_range_cutoff=np.inf)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=0, max_size=6), seed=st.integers(0, 999),
       periodic=st.sets(st.integers(0, 5), max_size=2), spare=st.integers(0, 7),
       cutoff=st.sampled_from([3.5, 5.0, np.inf]))
def test_pairs_of_a_batch_are_those_of_the_single_structures(sizes, seed, periodic, spare, cutoff):
    periodic = set() if np.isinf(cutoff) else periodic
    made = structures(sizes, seed, periodic)
    columns = Columns.from_structures(made)
    measured = measure(columns, CUTOFF, cutoff)
    n_pair, atoms = int(measured.n_pair.sum()), int(measured.n_node.sum())
    budget = Budget(atoms + 1 + spare, int(measured.n_edge.sum()) + 2 * spare, len(made) + 1, n_pair + spare)
    batch = build_batch(columns, budget, CUTOFF, dtype=np.float64, long_range_cutoff=cutoff)
    plain = build_batch(columns, budget._replace(pairs=0), CUTOFF, dtype=np.float64)
    listed = batch.edges.pop("long_range")
    assert jax.tree.structure(batch) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, batch, plain)
    first, place = 0, 0
    for s, count in zip(made, measured.n_pair):
        receivers, senders, shifts = long_range_list(s.positions, cutoff, s.cell, s.pbc)
        assert len(receivers) == count
        rows = slice(place, place + count)
        np.testing.assert_array_equal(listed["receivers"][rows], receivers + first)
        np.testing.assert_array_equal(listed["senders"][rows], senders + first)
        if columns.cell is not None:
            np.testing.assert_array_equal(listed["shifts"][rows], 0 if shifts is None else shifts)
        first, place = first + len(s), place + count
    assert all(len(part) == budget.pairs for part in listed.values())
    assert (listed["receivers"][place:] == atoms).all() and (listed["senders"][place:] == atoms).all()
    assert "shifts" not in listed or not listed["shifts"][place:].any()
    assert ("shifts" in listed) == (columns.cell is not None)


def test_long_range_displacements_reach_the_images():
    made = structures([5, 4, 6], 3, periodic={0, 2})
    columns = Columns.from_structures(made)
    measured = measure(columns, CUTOFF, 6.0)
    budget = Budget(20, int(measured.n_edge.sum()), 5, int(measured.n_pair.sum()) + 9)
    found = long_range_pairs(build_batch(columns, budget, CUTOFF, dtype=np.float64, long_range_cutoff=6.0))
    assert found.undirected
    expected = []
    for s in made:
        i, j, shifts = long_range_list(s.positions, 6.0, s.cell, s.pbc)
        expected.append(s.positions[j] - s.positions[i] + (0 if shifts is None else shifts @ s.cell))
    # what follows are padding pairs, of no length
    np.testing.assert_allclose(found.displacements, np.concatenate([*expected, np.zeros((9, 3))]), atol=1e-5)


def test_a_graph_without_long_range_pairs_says_so():
    batch = build_batch(Columns.from_structures(structures([3])), Budget(8, 16, 2), CUTOFF)
    with pytest.raises(ValueError, match=r"no long-range pairs.*found \['pair_order'\]"):
        long_range_pairs(batch)


def test_all_pairs_of_a_periodic_structure_are_refused():
    columns = Columns.from_structures(structures([3, 4], periodic={1}))
    with pytest.raises(ValueError, match="pairs without end"):
        measure(columns, CUTOFF, np.inf)
    with pytest.raises(ValueError, match="pairs without end"):
        build_batch(columns, Budget(20, 400, 5, 400), CUTOFF, long_range_cutoff=np.inf)

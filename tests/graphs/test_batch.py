"""Tests for padded batches: no structure is lost or changed, and padding follows the contract."""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.graph import displacements, long_range_pairs, node_graph_index, pairs
from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.structure import Structure

CUTOFF = 3.0


def structures(sizes, seed=0, periodic=()):
    """Return random structures with these numbers of atoms; those at the indices `periodic` have a
    cell.
    """
    rng = np.random.default_rng(seed)
    result = []
    for s, n in enumerate(sizes):
        cell = (
            np.diag(rng.uniform(3.5, 5.0, 3)) + rng.uniform(-0.3, 0.3, (3, 3))
            if s in periodic
            else None
        )
        result.append(
            Structure(
                rng.integers(1, 10, n),
                rng.uniform(0, 4.0, (n, 3)),
                energy=float(rng.normal()),
                forces=rng.normal(size=(n, 3)),
                charge=float(rng.integers(-1, 2)),
                cell=cell,
                pbc=None if cell is None else np.array([True, True, s % 2 == 0]),
                source=f"file:{s}",
            )
        )
    return result


def single_graph(s: Structure, periodic: bool):
    nb = neighbor_list(s.positions, CUTOFF, s.cell, s.pbc)
    shifts = {
        "shifts": np.zeros((len(nb.senders), 3), np.int32) if nb.shifts is None else nb.shifts
    }
    cell = {"cell": (np.zeros((3, 3)) if s.cell is None else s.cell)[None]}
    return jraph.GraphsTuple(
        nodes={"positions": s.positions, "numbers": s.numbers, "forces": s.forces},
        edges=shifts if periodic else {},
        senders=nb.senders,
        receivers=nb.receivers,
        globals={
            "energy": np.array([s.energy]),
            "charge": np.array([s.charge]),
            **(cell if periodic else {}),
        },
        n_node=np.array([len(s)]),
        n_edge=np.array([len(nb.senders)]),
    )


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    periodic=st.sets(st.integers(0, 5), max_size=2),
    spare=st.integers(0, 7),
)
def test_batch_equals_that_of_jraph(sizes, seed, periodic, spare):
    molecules = structures(sizes, seed, periodic)
    columns = Columns.from_structures(molecules)
    measured = graph_sizes(columns, CUTOFF)
    is_periodic = columns.cell is not None
    graphs, atoms, edges = len(molecules), int(measured.n_node.sum()), int(measured.n_edge.sum())
    budget = PaddingBudget(atoms + 1 + spare, edges + 2 * spare, graphs + 1 + spare)
    batch = build_batch(columns, budget, CUTOFF, dtype=np.float64)
    expected = jraph.batch_np([single_graph(s, is_periodic) for s in molecules])
    for room, count in (("nodes", atoms), ("globals", graphs), ("edges", edges)):
        for key, value in getattr(expected, room).items():
            np.testing.assert_array_equal(
                getattr(batch, room)[key][:count], value, err_msg=f"{room}/{key}"
            )
    np.testing.assert_array_equal(batch.senders[:edges], expected.senders)
    np.testing.assert_array_equal(batch.receivers[:edges], expected.receivers)
    np.testing.assert_array_equal(batch.n_node[:graphs], expected.n_node)
    np.testing.assert_array_equal(batch.n_edge[:graphs], expected.n_edge)
    check_padding(batch, budget, graphs, atoms, edges)


def check_padding(batch, budget, graphs, atoms, edges):
    """Assert jraph's padding contract: padding edges join a padding atom to itself."""
    assert batch.n_node.sum() == budget.n_node and batch.n_edge.sum() == budget.n_edge
    assert len(batch.n_node) == len(batch.n_edge) == budget.n_graph
    assert jraph.get_number_of_padding_with_graphs_graphs(batch) == budget.n_graph - graphs
    assert jraph.get_number_of_padding_with_graphs_nodes(batch) == budget.n_node - atoms
    assert jraph.get_number_of_padding_with_graphs_edges(batch) == budget.n_edge - edges
    assert (batch.senders[edges:] == atoms).all() and (batch.receivers[edges:] == atoms).all()
    assert (np.diff(batch.receivers) >= 0).all()
    for key in ("positions", "numbers", "forces"):
        assert not batch.nodes[key][atoms:].any()
    for value in batch.globals.values():
        assert not value[graphs:].any()
    order = batch.edges["pair_order"]
    np.testing.assert_array_equal(np.sort(order), np.arange(budget.n_edge))
    forward, backward = np.split(order, 2)
    np.testing.assert_array_equal(batch.senders[forward], batch.receivers[backward])
    index = np.repeat(np.arange(budget.n_graph), batch.n_node)
    vectors = batch.nodes["positions"][batch.senders] - batch.nodes["positions"][batch.receivers]
    if "shifts" in batch.edges:
        cell = batch.globals["cell"][index[batch.receivers]]
        vectors = vectors + np.einsum("ec,ecx->ex", batch.edges["shifts"], cell)
    np.testing.assert_allclose(vectors[forward], -vectors[backward], atol=1e-5)
    np.testing.assert_array_equal(index[batch.senders], index[batch.receivers])


def test_masks_of_jraph():
    columns = Columns.from_structures(structures([3, 4]))
    batch = build_batch(columns, PaddingBudget(12, 40, 5), 10.0)
    np.testing.assert_array_equal(jraph.get_graph_padding_mask(batch), np.arange(5) < 2)
    np.testing.assert_array_equal(jraph.get_node_padding_mask(batch), np.arange(12) < 7)
    np.testing.assert_array_equal(jraph.get_edge_padding_mask(batch), np.arange(40) < 18)


def test_displacements_equal_those_of_the_neighbor_list():
    molecules = structures([5, 4, 6], 3, periodic={0, 1, 2})
    columns = Columns.from_structures(molecules)
    measured = graph_sizes(columns, CUTOFF)
    edges = int(measured.n_edge.sum())
    batch = build_batch(columns, PaddingBudget(20, edges + 4, 5), CUTOFF)
    vectors = np.asarray(displacements(batch))
    expected = []
    for s in molecules:
        nb = neighbor_list(s.positions, CUTOFF, s.cell, s.pbc)
        expected.append(s.positions[nb.senders] - s.positions[nb.receivers] + nb.shifts @ s.cell)
    np.testing.assert_allclose(vectors[:edges], np.concatenate(expected), atol=1e-5)
    assert not vectors[edges:].any()
    assert (np.linalg.norm(vectors, axis=1) < CUTOFF + 1e-5).all()
    index = node_graph_index(jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(index, np.repeat(np.arange(5), batch.n_node))


def test_pairs_occur_once():
    columns = Columns.from_structures(structures([5, 7], 1))
    batch = build_batch(columns, PaddingBudget(16, 80, 3), CUTOFF)
    once, both = pairs(batch), pairs(batch, undirected=False)
    assert once.undirected and not both.undirected
    assert len(once.senders) == 40 and len(both.senders) == 80
    for p in (once, both):  # padding is beyond every cutoff
        length = np.linalg.norm(p.displacements, axis=1)
        assert (length[np.asarray(p.senders) == 12] > 1e3).all() and length[
            np.asarray(p.senders) != 12
        ].max() < CUTOFF

    def listed(p, mirror):
        rows = np.column_stack([p.receivers, p.senders, np.round(np.asarray(p.displacements), 5)])
        if mirror:
            back = np.column_stack(
                [p.senders, p.receivers, np.round(-np.asarray(p.displacements), 5)]
            )
            rows = np.concatenate([rows, back])
        return sorted(map(tuple, rows[rows[:, 1] != 12].tolist()))

    assert listed(once, True) == listed(both, False)
    without = batch._replace(edges={})
    assert not pairs(without).undirected


def test_any_order_of_indices_and_reference_energies():
    molecules = structures([3, 5, 4], 2)
    columns = Columns.from_structures(molecules)
    reference = np.linspace(-1e5, 0, 119)
    batch = build_batch(
        columns.take(np.array([2, 0])),
        PaddingBudget(12, 40, 4),
        CUTOFF,
        reference,
        dtype=np.float64,
    )
    np.testing.assert_array_equal(
        batch.nodes["numbers"][:7], np.concatenate([molecules[2].numbers, molecules[0].numbers])
    )
    for g, s in enumerate((2, 0)):
        assert batch.globals["energy"][g] == pytest.approx(
            molecules[s].energy - reference[molecules[s].numbers].sum(), rel=1e-12
        )


def test_reference_energies_are_subtracted_before_single_precision():
    """A small remainder of a large energy keeps its digits."""
    s = Structure(
        np.array([6, 6]), np.zeros((2, 3)) + np.arange(2)[:, None], energy=-2e5 + 0.123456
    )
    reference = np.zeros(119)
    reference[6] = -1e5
    batch = build_batch(Columns.from_structures([s]), PaddingBudget(4, 4, 2), CUTOFF, reference)
    assert batch.globals["energy"].dtype == np.float32
    assert batch.globals["energy"][0] == pytest.approx(0.123456, abs=1e-6)


def test_missing_labels_stay_nan_and_padding_is_zero():
    s = Structure(np.array([1, 1]), np.eye(2, 3))
    batch = build_batch(Columns.from_structures([s]), PaddingBudget(4, 4, 3), CUTOFF)
    assert np.isnan(batch.globals["energy"][0]) and not batch.globals["energy"][1:].any()
    assert np.isnan(batch.nodes["forces"][:2]).all() and not batch.nodes["forces"][2:].any()


def test_empty_batch_is_all_padding():
    columns = Columns.from_structures(structures([3, 4]))
    batch = build_batch(
        columns.take(np.zeros(0, np.int64)), PaddingBudget(8, 16, 3), CUTOFF, np.zeros(119)
    )
    check_padding(batch, PaddingBudget(8, 16, 3), 0, 0, 0)


@pytest.mark.parametrize(
    "budget", [PaddingBudget(7, 40, 5), PaddingBudget(20, 4, 5), PaddingBudget(20, 40, 2)]
)
def test_structures_that_do_not_fit_are_rejected(budget):
    columns = Columns.from_structures(structures([3, 4]))
    with pytest.raises(ValueError, match="do not fit into PaddingBudget"):
        build_batch(columns, budget, 10.0)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=0, max_size=6),
    seed=st.integers(0, 999),
    periodic=st.sets(st.integers(0, 5), max_size=2),
    spare=st.integers(0, 7),
    cutoff=st.sampled_from([3.5, 5.0, np.inf]),
)
def test_pairs_of_a_batch_equal_those_of_its_structures(sizes, seed, periodic, spare, cutoff):
    periodic = set() if np.isinf(cutoff) else periodic
    molecules = structures(sizes, seed, periodic)
    columns = Columns.from_structures(molecules)
    measured = graph_sizes(columns, CUTOFF, cutoff)
    n_pair, atoms = int(measured.n_pair.sum()), int(measured.n_node.sum())
    budget = PaddingBudget(
        atoms + 1 + spare,
        int(measured.n_edge.sum()) + 2 * spare,
        len(molecules) + 1,
        n_pair + spare,
    )
    batch = build_batch(columns, budget, CUTOFF, dtype=np.float64, long_range_cutoff=cutoff)
    plain = build_batch(columns, budget._replace(n_pair=0), CUTOFF, dtype=np.float64)
    listed = batch.edges.pop("long_range")
    assert jax.tree.structure(batch) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, batch, plain)
    first, row = 0, 0
    for s, count in zip(molecules, measured.n_pair):
        receivers, senders, shifts = long_range_list(s.positions, cutoff, s.cell, s.pbc)
        assert len(receivers) == count
        rows = slice(row, row + count)
        np.testing.assert_array_equal(listed["receivers"][rows], receivers + first)
        np.testing.assert_array_equal(listed["senders"][rows], senders + first)
        if columns.cell is not None:
            np.testing.assert_array_equal(listed["shifts"][rows], 0 if shifts is None else shifts)
        first, row = first + len(s), row + count
    assert all(len(part) == budget.n_pair for part in listed.values())
    assert (listed["receivers"][row:] == atoms).all() and (listed["senders"][row:] == atoms).all()
    assert "shifts" not in listed or not listed["shifts"][row:].any()
    assert ("shifts" in listed) == (columns.cell is not None)


def test_long_range_displacements_reach_the_images():
    molecules = structures([5, 4, 6], 3, periodic={0, 2})
    columns = Columns.from_structures(molecules)
    measured = graph_sizes(columns, CUTOFF, 6.0)
    budget = PaddingBudget(20, int(measured.n_edge.sum()), 5, int(measured.n_pair.sum()) + 9)
    pairs = long_range_pairs(
        build_batch(columns, budget, CUTOFF, dtype=np.float64, long_range_cutoff=6.0)
    )
    assert pairs.undirected
    expected = []
    for s in molecules:
        i, j, shifts = long_range_list(s.positions, 6.0, s.cell, s.pbc)
        expected.append(
            s.positions[j] - s.positions[i] + (0 if shifts is None else shifts @ s.cell)
        )
    # the rest are padding pairs of zero length
    np.testing.assert_allclose(
        pairs.displacements, np.concatenate([*expected, np.zeros((9, 3))]), atol=1e-5
    )


def test_a_graph_without_long_range_pairs_is_rejected():
    batch = build_batch(Columns.from_structures(structures([3])), PaddingBudget(8, 16, 2), CUTOFF)
    with pytest.raises(ValueError, match=r"no long-range pairs.*received \['pair_order'\]"):
        long_range_pairs(batch)


def test_all_pairs_of_a_periodic_structure_are_rejected():
    columns = Columns.from_structures(structures([3, 4], periodic={1}))
    with pytest.raises(ValueError, match="infinitely many pairs"):
        graph_sizes(columns, CUTOFF, np.inf)
    with pytest.raises(ValueError, match="infinitely many pairs"):
        build_batch(columns, PaddingBudget(20, 400, 5, 400), CUTOFF, long_range_cutoff=np.inf)


def test_pairs_that_do_not_fit_are_rejected():
    columns = Columns.from_structures(structures([3, 4]))
    with pytest.raises(ValueError, match="9 long-range pairs do not fit into PaddingBudget"):
        build_batch(columns, PaddingBudget(20, 60, 5, 8), CUTOFF, long_range_cutoff=np.inf)

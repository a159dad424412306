"""Tests for data sets on the device: their batches equal those built on the host bit for bit."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import ReadReport
from mlip_jax.datasets.readers.spice import Reader
from mlip_jax.graphs import resident as module
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.packing import plan_batches
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.graphs.resident import collect, estimate_bytes, gather, indexable, nbytes
from mlip_jax.graphs.shapes import PaddingBudget, Sizes
from mlip_jax.structure import Structure

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
CUTOFF = 3.0
REFERENCE = np.linspace(-1e4, 50.0, 119)


def read() -> Columns:
    """Return real molecules, with single atoms among them."""
    with Reader(DATA) as reader:
        molecules = list(reader.read(range(len(reader)), ReadReport()))
    atoms = [
        Structure(np.array([z]), np.zeros((1, 3)), charge=float(z % 3 - 1)) for z in (1, 11, 35)
    ]
    return Columns.from_structures([molecules[0], *atoms, *molecules[1:]])


def crystals(count=24, seed=0) -> Columns:
    """Return random structures, periodic in 0 to 3 directions, some of whose labels are unknown."""
    rng = np.random.default_rng(seed)
    case = []
    for s in range(count):
        n = int(rng.integers(1, 9))
        pbc = [None, (1, 1, 1), (1, 1, 0), (0, 0, 1)][s % 4]
        cell = np.diag(rng.uniform(3.5, 5.0, 3)) + rng.uniform(-0.3, 0.3, (3, 3))
        case.append(
            Structure(
                rng.integers(1, 10, n),
                rng.uniform(-3, 6.0, (n, 3)),
                charge=float(rng.integers(-1, 2)),
                energy=float(rng.normal()) if s % 5 else np.nan,
                forces=rng.normal(size=(n, 3)) if s % 3 else None,
                cell=None if pbc is None else cell,
                pbc=None if pbc is None else np.array(pbc, bool),
            )
        )
    return Columns.from_structures(case)


def padded(indices, budget: PaddingBudget) -> np.ndarray:
    indices = np.asarray(indices, np.int32)
    return np.concatenate([indices, np.full(budget.n_graph - 1 - len(indices), -1, np.int32)])


def batch(resident, indices, budget: PaddingBudget):
    """Gather a batch, compiled: operations with new shapes one by one take longer."""
    return jax.jit(partial(gather, budget=budget))(resident, padded(indices, budget))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == b.tobytes() or np.isnan(b).any(), path
        np.testing.assert_array_equal(np.asarray(a), b, err_msg=str(path))


SETS = {
    "open": (read, None, PaddingBudget(120, 640, 14)),
    "open, all pairs": (read, np.inf, PaddingBudget(121, 641, 14, 700)),
    "open, near pairs": (read, 4.0, PaddingBudget(120, 640, 14, 400)),
    "periodic": (crystals, None, PaddingBudget(40, 900, 9)),
    "periodic, pairs": (crystals, 4.5, PaddingBudget(41, 901, 9, 1600)),
}


class CountedTraces:
    """Compiled function that counts how often it is traced, as before each compilation."""

    def __init__(self, function):
        self.count = 0

        def traced(*args):
            self.count += 1
            return function(*args)

        self._compiled = jax.jit(traced)

    def __call__(self, *args):
        return self._compiled(*args)


@pytest.fixture(scope="module", params=SETS)
def case(request):
    """Return structures, their sizes, budget and long-range cutoff, and the compiled gather."""
    load, long_range_cutoff, budget = SETS[request.param]
    columns = load()
    resident = collect(columns, CUTOFF, REFERENCE, long_range_cutoff)
    gathered = CountedTraces(partial(gather, jax.device_put(resident), budget=budget))
    return (
        columns,
        graph_sizes(columns, CUTOFF, long_range_cutoff),
        budget,
        long_range_cutoff,
        gathered,
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_batches_of_device_and_host_are_equal(case, data):
    columns, sizes, budget, long_range_cutoff, gathered = case
    number = st.integers(0, len(columns) - 1)
    indices = np.array(data.draw(st.lists(number, max_size=budget.n_graph - 1)), np.int64)
    taken = sizes.take(indices)
    room = (budget.n_node - 1, budget.n_edge, budget.n_pair)
    fits = np.all([np.cumsum(n) <= most for n, most in zip(taken, room) if n is not None], axis=0)
    indices = indices[: len(fits) if fits.all() else int(np.argmin(fits))]
    expected = build_batch(
        columns.take(indices), budget, CUTOFF, REFERENCE, long_range_cutoff=long_range_cutoff
    )
    assert_same(gathered(padded(indices, budget)), expected)
    assert gathered.count == 1


def test_full_batches_are_equal(case):
    """Batches that leave no graph, or hardly an edge, for padding."""
    columns, sizes, budget, long_range_cutoff, gathered = case
    plan = plan_batches(np.random.default_rng(0).permutation(len(columns)), sizes, budget)
    assert sum(len(indices) for indices in plan) == len(columns)
    for indices in plan:
        expected = build_batch(
            columns.take(indices), budget, CUTOFF, REFERENCE, long_range_cutoff=long_range_cutoff
        )
        assert_same(gathered(padded(indices, budget)), expected)


def test_double_precision(double_precision):
    columns = crystals(6)
    budget = PaddingBudget(60, 1500, 7, 2000)
    resident = collect(columns, CUTOFF, REFERENCE, 4.0, np.float64)
    expected = build_batch(
        columns, budget, CUTOFF, REFERENCE, dtype=np.float64, long_range_cutoff=4.0
    )
    assert_same(batch(resident, range(6), budget), expected)


@pytest.mark.parametrize("long_range_cutoff", [None, 4.5])
def test_pieces_give_the_same_data_set(long_range_cutoff):
    """Holds also if only some of the pieces are periodic."""
    columns = Columns.concatenate([crystals(7), read().take(np.arange(9)), crystals(1)])
    whole = collect(columns, CUTOFF, REFERENCE, long_range_cutoff)
    pieces = [crystals(7), read().take(np.arange(0)), read().take(np.arange(9)), crystals(1)]
    assert pieces[-2].cell is None and pieces[0].cell is not None
    in_pieces = collect(iter(pieces), CUTOFF, REFERENCE, long_range_cutoff)
    jax.tree.map(np.testing.assert_array_equal, in_pieces, whole)
    assert jax.tree.structure(in_pieces) == jax.tree.structure(whole)
    assert [x.dtype for x in jax.tree.leaves(in_pieces)] == [
        x.dtype for x in jax.tree.leaves(whole)
    ]


def test_long_columns_are_collected_in_pieces(monkeypatch):
    columns = read()
    whole = collect(columns, CUTOFF)
    monkeypatch.setattr(module, "_PIECE_SIZE", 10)
    jax.tree.map(np.testing.assert_array_equal, collect(columns, CUTOFF), whole)


@pytest.mark.parametrize("load", [read, crystals])
@pytest.mark.parametrize("long_range_cutoff", [None, 4.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bytes_are_estimated_exactly(load, long_range_cutoff, dtype):
    columns, spin = load(), dtype == np.float64
    if spin:
        columns = dataclasses.replace(columns, spin=np.ones(len(columns)))
    resident = collect(columns, CUTOFF, None, long_range_cutoff, dtype)
    sizes = graph_sizes(columns, CUTOFF, long_range_cutoff)
    assert estimate_bytes(sizes, columns.cell is not None, dtype, spin) == nbytes(resident)
    assert nbytes(resident) == sum(x.nbytes for x in jax.tree.leaves(resident))


def test_integers_are_as_small_as_they_can_be():
    """Large structures among small ones, and atoms many cells away from each other."""
    rng = np.random.default_rng(0)
    large = Structure(np.full(700, 6), rng.uniform(0, 12, (700, 3)))
    far = Structure(
        np.array([6, 6]),
        np.array([[0, 0, 0], [2000.0, 0, 0]]),
        cell=np.eye(3) * 4,
        pbc=np.ones(3, bool),
    )
    small = read().take(np.arange(3))
    assert [collect(small, CUTOFF).senders.dtype, collect(small, CUTOFF).pair_order.dtype] == [
        np.uint8,
        np.uint8,
    ]
    columns = Columns.concatenate([small, Columns.from_structures([large, far])])
    resident = collect([columns.take(np.arange(3)), columns.take(np.arange(3, 5))], 5.5)
    assert (resident.senders.dtype, resident.shifts.dtype) == (np.uint16, np.int16)
    sizes = graph_sizes(columns, 5.5)
    assert sizes.n_edge.max() > 2**16 and resident.pair_order.dtype == np.uint32
    budget = PaddingBudget(int(sizes.n_node.sum()) + 1, int(sizes.n_edge.sum()) + 2, 7)
    assert_same(
        batch(resident, [4, 1, 3], budget),
        build_batch(columns.take(np.array([4, 1, 3])), budget, 5.5),
    )


def test_structures_without_edges():
    columns = Columns.from_structures(
        [Structure(np.array([z]), np.zeros((1, 3))) for z in (1, 2, 3)]
    )
    budget = choose_budget(graph_sizes(columns, CUTOFF, np.inf), 2)
    resident = collect(columns, CUTOFF, long_range_cutoff=np.inf)
    for indices in ([2, 0], []):
        expected = build_batch(
            columns.take(np.array(indices, int)), budget, CUTOFF, long_range_cutoff=np.inf
        )
        assert_same(batch(resident, indices, budget), expected)


@pytest.mark.parametrize("change", [{"n_node": 1}, {"n_edge": 2}, {"n_pair": 1}])
def test_structures_that_do_not_fit_give_nan(change):
    columns = read().take(np.array([0, 5, 7]))
    sizes = graph_sizes(columns, CUTOFF, np.inf)
    budget = PaddingBudget(*(int(n.sum()) for n in sizes[:2]), 6, int(sizes.n_pair.sum()))._replace(
        n_node=int(sizes.n_node.sum()) + 1
    )
    resident = collect(columns, CUTOFF, long_range_cutoff=np.inf)
    fitting = batch(resident, range(3), budget)
    assert np.isfinite(fitting.nodes["positions"]).all()
    less = budget._replace(**{name: getattr(budget, name) - by for name, by in change.items()})
    assert np.isnan(batch(resident, range(3), less).nodes["positions"]).all()
    assert np.isnan(batch(resident, [0, 3], budget).nodes["positions"]).all()
    with pytest.raises(ValueError, match=r"indices of 5 structures.*received shape \(3,\)"):
        gather(resident, np.arange(3), budget)


def test_more_edges_than_int32_can_index_are_rejected(monkeypatch):
    columns = read()
    sizes = graph_sizes(columns, CUTOFF)
    edges = int(sizes.n_edge.sum())
    assert indexable(sizes) and not indexable(Sizes(sizes.n_node, np.array([2**30, 2**30])))
    monkeypatch.setattr(module, "_MAX_INDEX", edges)
    collect(columns, CUTOFF)
    monkeypatch.setattr(module, "_MAX_INDEX", edges - 1)
    with pytest.raises(
        ValueError,
        match=f"{edges} edges and 0 long-range pairs; a device holds at most {edges - 1} of each",
    ):
        collect(columns, CUTOFF)


def test_no_structures_are_rejected():
    for nothing in ([], crystals(4).take(np.arange(0))):
        with pytest.raises(ValueError, match="no structures"):
            collect(nothing, CUTOFF)


def test_labels_of_structures_and_atoms_reach_the_batches():
    """Detects property training on the device with the labels of other structures."""
    columns, rng = read(), np.random.default_rng(0)
    columns = dataclasses.replace(
        columns,
        properties={"gap": rng.normal(size=len(columns)), "dipole": np.ones((len(columns), 3))},
        atom_properties={"charge": rng.normal(size=len(columns.numbers))},
    )
    budget, names = PaddingBudget(120, 640, 14), ("gap", "dipole", "charge", "missing")
    pieces = [columns.take(np.arange(3)), columns.take(np.arange(3, len(columns)))]
    resident = collect(pieces, CUTOFF, REFERENCE, properties=names)
    taken = columns.take(np.array([4, 1]))
    expected = build_batch(taken, budget, CUTOFF, REFERENCE, properties=names)
    assert_same(batch(resident, [4, 1], budget), expected)


def test_spins_reach_the_batches_of_host_and_device():
    """Numbers of unpaired electrons used to be lost between the file and the model."""
    columns = Columns.from_structures(
        [Structure(np.array([z]), np.zeros((1, 3)), spin=float(z % 2)) for z in (1, 2, 3)]
    )
    budget = PaddingBudget(4, 4, 4)
    host = build_batch(columns, budget, CUTOFF, REFERENCE)
    assert host.globals["spin"].tolist() == [1, 0, 1, 0]
    pieces = collect(columns, CUTOFF, REFERENCE)
    assert_same(batch(pieces, [0, 1, 2], budget), host)

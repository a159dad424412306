"""Tests for batches: each structure once per epoch, identical on all hosts and when resumed."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax.datasets import statistics
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.training import data
from mlip_jax.training.data import Batches, Split

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
CUTOFF = 4.0

FRAMES = """\
2
Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 charge=0 pbc="T T T" Lattice="4.2 0 0 0 4.2 0 0 0 4.2"
Na 0.0 0.0 0.0 0.5 0.0 0.0
Cl 2.1 0.0 0.0 -0.5 0.0 0.0
3
Properties=species:S:1:pos:R:3:forces:R:3 energy=-2.0 charge=0 pbc="F F F"
O 0.0 0.0 0.0 0.0 0.0 0.1
H 0.0 0.0 0.96 0.0 0.0 -0.1
H 0.0 0.93 -0.24 0.0 0.0 0.0
1
Properties=species:S:1:pos:R:3 energy=-3.0 charge=1 pbc="F F F"
He 0.0 0.0 0.0
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Store with one shard per molecule."""
    store = Store(
        convert(
            ConversionSpec(str(DATA), atoms_per_shard=60),
            tmp_path_factory.mktemp("data") / "store",
            num_processes=1,
            progress=False,
        )
    )
    assert len(store.manifest["shards"]) > 10
    return store


@pytest.fixture(scope="module", params=["store", "columns"])
def split(request, store):
    """Split whose indices are neither dense nor ascending."""
    indices = np.random.default_rng(0).permutation(len(store))[:77]
    rows = store if request.param == "store" else store.take(np.arange(len(store)))
    sizes = graph_sizes(store.take(np.arange(len(store))), CUTOFF)
    return Split(rows, indices, sizes.take(indices))


@pytest.fixture(scope="module")
def reference(store):
    return statistics.reference_energies(
        statistics.Summary([store.take(np.arange(len(store)))]), "least_squares"
    )


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(data, "_WINDOW", 7)
    monkeypatch.setattr(data, "_WINDOW_STEPS", 1)


def batches(split, reference, num_devices=2, num_hosts=1, host=0, batch_size=3):
    return Batches(
        (choose_budget(split.sizes, batch_size),),
        CUTOFF,
        reference,
        num_devices,
        num_hosts=num_hosts,
        host=host,
    )


def epochs_of(stream, count):
    """Return plans and batches of the first epochs: [[(plan, batch), ...], ...]."""
    epochs = [[] for _ in range(count)]
    with contextlib.closing(stream):
        for plan, batch in stream:
            if plan.epoch == count:
                return epochs
            epochs[plan.epoch].append((plan, batch))


def members_of(steps):
    return [members for plan, _ in steps for members in plan.members]


def assert_identical(a, b):
    """Assert that trees have the same structure, and arrays of the same type, shape and bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def assert_same_steps(a, b):
    assert len(a) == len(b)
    for (plan, batch), (other, other_batch) in zip(a, b):
        assert plan.epoch == other.epoch
        assert [p.tolist() for p in plan.members] == [p.tolist() for p in other.members]
        assert_identical(batch, other_batch)


def shape(budget, num_devices, per_device=1):
    leading = (num_devices, 1, per_device)
    return {
        "positions": (*leading, budget.n_node, 3),
        "senders": (*leading, budget.n_edge),
        "n_node": (*leading, budget.n_graph),
    }


@pytest.mark.parametrize("num_devices", [1, 2, 5])
def test_every_epoch_contains_every_structure_once_in_a_new_order(
    split, reference, small_windows, num_devices
):
    factory = batches(split, reference, num_devices)
    assert len(split) / factory.window_size(split, factory.num_micro_batches) > 3
    epochs = epochs_of(factory.training(split, seed=3), 3)
    for steps in epochs:
        np.testing.assert_array_equal(
            np.sort(np.concatenate(members_of(steps))), np.arange(len(split))
        )
        for plan, batch in steps:
            assert 1 <= len(plan.members) <= num_devices
            got = {
                "positions": batch.nodes["positions"].shape,
                "senders": batch.senders.shape,
                "n_node": batch.n_node.shape,
            }
            assert got == shape(factory.budgets[0], num_devices)
    orders = {tuple(np.concatenate(members_of(steps)).tolist()) for steps in epochs}
    assert len(orders) == 3


def test_small_data_have_a_single_window(split, reference):
    factory = batches(split, reference, 1)
    assert factory.window_size(split, factory.num_micro_batches) >= 4096
    (steps,) = epochs_of(factory.training(split, seed=0), 1)
    np.testing.assert_array_equal(np.sort(np.concatenate(members_of(steps))), np.arange(len(split)))
    assert len(steps) < 1.3 * len(split) / 3


def test_the_seed_determines_the_batches(split, reference, small_windows):
    factory = batches(split, reference)
    first, again, other = (epochs_of(factory.training(split, seed), 2) for seed in (3, 3, 4))
    for a, b in zip(first, again):
        assert_same_steps(a, b)
    orders = [np.concatenate(members_of(epochs[0])).tolist() for epochs in (first, other)]
    assert orders[0] != orders[1]
    # An epoch of one seed differs from the epochs of the next seed.
    assert np.concatenate(members_of(first[1])).tolist() != orders[1]


def test_a_batch_contains_the_structures_of_its_plan(split, reference, store, small_windows):
    factory = batches(split, reference)
    (steps,) = epochs_of(factory.training(split, seed=1), 1)
    seen = 0
    for plan, batch in steps:
        for device, members in enumerate(factory.local_members(plan)):
            one = jax.tree.map(lambda x: x[device, 0, 0], batch)  # noqa: B023
            ends = np.cumsum(one.n_node)
            for g, place in enumerate(members):
                s = store[int(split.indices[place])]
                atoms = slice(ends[g] - one.n_node[g], ends[g])
                np.testing.assert_array_equal(one.nodes["numbers"][atoms], s.numbers)
                np.testing.assert_array_equal(
                    one.nodes["positions"][atoms], s.positions.astype(np.float32)
                )
                np.testing.assert_array_equal(
                    one.nodes["forces"][atoms], s.forces.astype(np.float32)
                )
                remainder = s.energy - sum(reference[z] for z in s.numbers)
                np.testing.assert_allclose(
                    one.globals["energy"][g], remainder, rtol=1e-6, atol=1e-6
                )
                assert one.globals["charge"][g] == s.charge
                d = np.linalg.norm(s.positions[:, None] - s.positions[None], axis=-1)
                assert one.n_edge[g] == (d < CUTOFF).sum() - len(s) == split.sizes.n_edge[place]
                seen += 1
            assert not one.nodes["numbers"][split.sizes.n_node[members].sum() :].any()
            assert not one.globals["energy"][len(members) :].any()
    assert seen == len(split)


@pytest.mark.parametrize("step", [0, 1, 2, 6, 15, 16, 17, 29, 40])
def test_a_resumed_stream_gives_the_same_bytes(split, reference, small_windows, step):
    factory = batches(split, reference)
    with contextlib.closing(factory.training(split, seed=5)) as stream:
        for _ in range(step):
            next(stream)
        state = json.loads(json.dumps(stream.state))
        expected = [next(stream) for _ in range(25)]
    assert step < 29 or expected[0][0].epoch > 0
    with contextlib.closing(factory.training(split, seed=5, state=state)) as stream:
        assert_same_steps([next(stream) for _ in range(25)], expected)


@pytest.mark.parametrize("per_host", [1, 2])
def test_the_batches_of_all_hosts_equal_those_of_one_process(
    split, reference, small_windows, per_host
):
    single = batches(split, reference, 2 * per_host)
    hosts = [batches(split, reference, per_host, num_hosts=2, host=h) for h in range(2)]
    expected = epochs_of(single.training(split, seed=2), 2)
    parts = [epochs_of(factory.training(split, seed=2), 2) for factory in hosts]
    for epoch in range(2):
        assert len(parts[0][epoch]) == len(parts[1][epoch]) == len(expected[epoch])
        for (plan, whole), *steps in zip(expected[epoch], *(part[epoch] for part in parts)):
            for other, _ in steps:
                assert [p.tolist() for p in other.members] == [p.tolist() for p in plan.members]
            together = [
                p for factory, (other, _) in zip(hosts, steps) for p in factory.local_members(other)
            ]
            assert [p.tolist() for p in together if len(p)] == [p.tolist() for p in plan.members]
            joined = jax.tree.map(
                lambda *leaves: np.concatenate(leaves), *(batch for _, batch in steps)
            )
            assert_identical(joined, whole)


def test_in_order_yields_every_structure_once_in_order_except_for_gaps(
    split, reference, small_windows
):
    factory = batches(split, reference)
    with contextlib.closing(factory.in_order(split)) as stream:
        steps = list(stream)
    unseen = set(range(len(split)))
    size = factory.window_size(split, factory.num_micro_batches)
    windows = []
    for members in members_of(steps):
        if len(members):
            assert members[0] == min(unseen), "a batch begins with the first structure that is left"
            assert len(set(members.tolist())) == len(members) and set(members.tolist()) <= unseen
            unseen -= set(members.tolist())
            assert len(set((members // size).tolist())) == 1
            windows.append(members[0] // size)
    assert not unseen
    assert windows == sorted(windows) and len(set(windows)) > 3
    with contextlib.closing(factory.in_order(split)) as stream:
        assert_same_steps(list(stream), steps)


def test_an_empty_split_has_no_batches(split, reference):
    factory = batches(split, reference)
    with contextlib.closing(factory.in_order(split.subset(np.zeros(0, np.int64)))) as stream:
        assert list(stream) == []


def test_more_devices_than_structures(split, reference):
    few = split.subset(np.array([4, 2]))
    factory = Batches((choose_budget(few.sizes, 1),), CUTOFF, reference, 5)
    with contextlib.closing(factory.training(few, seed=0)) as stream:
        for epoch in range(3):
            plan, batch = next(stream)
            assert plan.epoch == epoch
            assert sorted(p.tolist() for p in plan.members) == [[0], [1]]
            np.testing.assert_array_equal(
                batch.n_node[:, 0, 0, 0] == factory.budgets[0].n_node, [False] * 2 + [True] * 3
            )


@pytest.mark.parametrize("properties", [(), ("stress",)])
def test_mixed_periodic_structures_have_batches_of_one_structure(tmp_path, properties):
    """Detects batches without crystals or structures that lack the arrays of stresses."""
    frames = FRAMES.replace("energy=-1.0", 'energy=-1.0 stress="1 0 0 0 2 0 0 0 3"')
    (tmp_path / "frames.xyz").write_text(frames)
    store = Store(
        convert(
            ConversionSpec(str(tmp_path / "frames.xyz"), atoms_per_shard=1),
            tmp_path / "store",
            num_processes=1,
            reject_invalid=False,
            progress=False,
        )
    )
    assert len(store.manifest["shards"]) == 3
    sizes = graph_sizes(store.take(np.arange(3)), 2.5)
    split = Split(store, np.arange(3), sizes)
    factory = Batches((choose_budget(sizes, 1),), 2.5, np.zeros(119), 2, properties=properties)
    with contextlib.closing(factory.in_order(split)) as stream:
        steps = list(stream)
    if properties:
        known = [np.isfinite(batch.globals["properties"]["stress"]) for _, batch in steps]
        assert sum(k.all((2, 3)).sum() for k in known) >= 1
    forms = {jax.tree.structure(batch) for _, batch in steps}
    assert len(forms) == 1 and all(
        "shifts" in batch.edges and "cell" in batch.globals for _, batch in steps
    )
    found = {
        int(p): (batch.globals["cell"][d, g], batch.n_edge[d, g], batch.nodes["forces"][d])
        for plan, batch in steps
        for d, members in enumerate(plan.members)
        for g, p in enumerate(members)
    }
    np.testing.assert_allclose(found[0][0], 4.2 * np.eye(3), rtol=1e-6)
    assert found[0][1] == 4 and found[1][1] == 6 and found[2][1] == 0
    assert not found[1][0].any() and np.isnan(found[2][2][0]).all()


def test_subsets_and_samples(split):
    part = split.subset(np.array([5, 1, 8]))
    np.testing.assert_array_equal(part.indices, split.indices[[5, 1, 8]])
    for name in ("n_node", "n_edge"):
        np.testing.assert_array_equal(
            getattr(part.sizes, name), getattr(split.sizes, name)[[5, 1, 8]]
        )
    assert len(part) == 3 and part.rows is split.rows
    sample = split.sample(20, seed=1)
    place_of = {int(index): place for place, index in enumerate(split.indices)}
    members = [place_of[int(index)] for index in sample.indices]
    assert len(set(members)) == 20 and members == sorted(members) and members != list(range(20))
    np.testing.assert_array_equal(sample.sizes.n_edge, split.sizes.n_edge[members])
    np.testing.assert_array_equal(split.sample(20, seed=1).indices, sample.indices)
    assert split.sample(20, seed=2).indices.tolist() != sample.indices.tolist()
    assert (
        split.sample(len(split), seed=1) is split
        and len(split.sample(len(split) - 1, seed=1)) == len(split) - 1
    )


def test_columns_are_those_of_the_store(split, store):
    some = np.array([3, 0])
    for columns, indices in (
        (split.columns(), split.indices),
        (split.columns(some), split.indices[some]),
    ):
        assert len(columns) == len(indices)
        for s, index in enumerate(indices):
            expected = store[int(index)]
            assert (
                columns[s].molecule == expected.molecule
                and columns[s].conformer == expected.conformer
            )
            np.testing.assert_array_equal(columns[s].positions, expected.positions)
    np.testing.assert_array_equal(split.columns(labels_only=True).energy, split.columns().energy)


def test_a_structure_that_does_not_fit_is_an_error(split, reference):
    largest = int(np.argmax(split.sizes.n_node))
    factory = batches(split, reference)
    factory = Batches(
        (factory.budgets[0]._replace(n_node=int(split.sizes.n_node[largest])),),
        CUTOFF,
        reference,
        1,
    )
    with (
        contextlib.closing(factory.training(split, seed=0)) as stream,
        pytest.raises(ValueError, match="does not fit"),
    ):
        next(stream)


def test_a_shard_that_disappears_during_training_is_an_error(store, reference, tmp_path):
    sizes = graph_sizes(store.take(np.arange(len(store))), CUTOFF)
    copy = Store(shutil.copytree(store.path, tmp_path / "store"))  # with no open shards
    split = Split(copy, np.arange(len(copy)), sizes)
    (copy.path / "shards" / copy.manifest["shards"][8]["file"]).unlink()
    factory = batches(split, reference)
    with (
        contextlib.closing(factory.in_order(split)) as stream,
        pytest.raises((OSError, ValueError), match="00008"),
    ):
        list(stream)

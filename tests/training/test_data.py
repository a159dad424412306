"""What a run trains on: every structure once an epoch, the same batches on all hosts and from every position."""

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
    """A store of a shard for each molecule."""
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
    """A part of the data whose numbers are neither dense nor ascending."""
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
    """The groups and batches of the first epochs: [[(group, batch), ...], ...]."""
    epochs = [[] for _ in range(count)]
    with contextlib.closing(stream):
        for group, batch in stream:
            if group.epoch == count:
                return epochs
            epochs[group.epoch].append((group, batch))


def places_of(steps):
    return [places for group, _ in steps for places in group.places]


def assert_identical(a, b):
    """Trees of the same structure and arrays of the same type, shape and bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def assert_same_steps(a, b):
    assert len(a) == len(b)
    for (group, batch), (other, other_batch) in zip(a, b):
        assert group.epoch == other.epoch
        assert [p.tolist() for p in group.places] == [p.tolist() for p in other.places]
        assert_identical(batch, other_batch)


def shape(budget, num_devices, per_device=1):
    leading = (num_devices, 1, per_device)
    return {
        "positions": (*leading, budget.n_node, 3),
        "senders": (*leading, budget.n_edge),
        "n_node": (*leading, budget.n_graph),
    }


@pytest.mark.parametrize("num_devices", [1, 2, 5])
def test_every_epoch_holds_every_structure_once_in_another_order(
    split, reference, small_windows, num_devices
):
    made = batches(split, reference, num_devices)
    assert len(split) / made._window_size(split, made._of_an_update) > 3
    epochs = epochs_of(made.training(split, seed=3), 3)
    for steps in epochs:
        np.testing.assert_array_equal(
            np.sort(np.concatenate(places_of(steps))), np.arange(len(split))
        )
        for group, batch in steps:
            assert 1 <= len(group.places) <= num_devices
            got = {
                "positions": batch.nodes["positions"].shape,
                "senders": batch.senders.shape,
                "n_node": batch.n_node.shape,
            }
            assert got == shape(made.budgets[0], num_devices)
    orders = {tuple(np.concatenate(places_of(steps)).tolist()) for steps in epochs}
    assert len(orders) == 3


def test_one_window_for_all_is_the_rule_for_small_data(split, reference):
    made = batches(split, reference, 1)
    assert made._window_size(split, made._of_an_update) >= 4096
    (steps,) = epochs_of(made.training(split, seed=0), 1)
    np.testing.assert_array_equal(np.sort(np.concatenate(places_of(steps))), np.arange(len(split)))
    assert len(steps) < 1.3 * len(split) / 3


def test_same_seed_same_batches_another_seed_others(split, reference, small_windows):
    made = batches(split, reference)
    first, again, other = (epochs_of(made.training(split, seed), 2) for seed in (3, 3, 4))
    for a, b in zip(first, again):
        assert_same_steps(a, b)
    orders = [np.concatenate(places_of(epochs[0])).tolist() for epochs in (first, other)]
    assert orders[0] != orders[1]
    # Nor is an epoch of one seed an epoch of the next.
    assert np.concatenate(places_of(first[1])).tolist() != orders[1]


def test_a_batch_holds_the_structures_that_its_group_names(split, reference, store, small_windows):
    made = batches(split, reference)
    (steps,) = epochs_of(made.training(split, seed=1), 1)
    seen = 0
    for group, batch in steps:
        for device, places in enumerate(made.of_this_host(group)):
            one = jax.tree.map(lambda x: x[device, 0, 0], batch)  # noqa: B023
            ends = np.cumsum(one.n_node)
            for g, place in enumerate(places):
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
            assert not one.nodes["numbers"][split.sizes.n_node[places].sum() :].any()
            assert not one.globals["energy"][len(places) :].any()
    assert seen == len(split)


@pytest.mark.parametrize("step", [0, 1, 2, 6, 15, 16, 17, 29, 40])
def test_a_resumed_stream_gives_the_same_bytes(split, reference, small_windows, step):
    made = batches(split, reference)
    with contextlib.closing(made.training(split, seed=5)) as stream:
        for _ in range(step):
            next(stream)
        state = json.loads(json.dumps(stream.state))
        expected = [next(stream) for _ in range(25)]
    assert step < 29 or expected[0][0].epoch > 0
    with contextlib.closing(made.training(split, seed=5, state=state)) as stream:
        assert_same_steps([next(stream) for _ in range(25)], expected)


@pytest.mark.parametrize("per_host", [1, 2])
def test_hosts_together_do_what_one_process_does(split, reference, small_windows, per_host):
    alone = batches(split, reference, 2 * per_host)
    hosts = [batches(split, reference, per_host, num_hosts=2, host=h) for h in range(2)]
    expected = epochs_of(alone.training(split, seed=2), 2)
    parts = [epochs_of(made.training(split, seed=2), 2) for made in hosts]
    for epoch in range(2):
        assert len(parts[0][epoch]) == len(parts[1][epoch]) == len(expected[epoch])
        for (group, whole), *steps in zip(expected[epoch], *(part[epoch] for part in parts)):
            for other, _ in steps:
                assert [p.tolist() for p in other.places] == [p.tolist() for p in group.places]
            together = [
                p for made, (other, _) in zip(hosts, steps) for p in made.of_this_host(other)
            ]
            assert [p.tolist() for p in together if len(p)] == [p.tolist() for p in group.places]
            joined = jax.tree.map(
                lambda *leaves: np.concatenate(leaves), *(batch for _, batch in steps)
            )
            assert_identical(joined, whole)


def test_in_order_covers_once_and_in_order_but_for_gaps(split, reference, small_windows):
    made = batches(split, reference)
    with contextlib.closing(made.in_order(split)) as stream:
        steps = list(stream)
    unseen = set(range(len(split)))
    size = made._window_size(split, made._of_an_update)
    windows = []
    for places in places_of(steps):
        if len(places):
            assert places[0] == min(unseen), "a batch begins with the first structure that is left"
            assert len(set(places.tolist())) == len(places) and set(places.tolist()) <= unseen
            unseen -= set(places.tolist())
            assert len(set((places // size).tolist())) == 1
            windows.append(places[0] // size)
    assert not unseen
    assert windows == sorted(windows) and len(set(windows)) > 3
    with contextlib.closing(made.in_order(split)) as stream:
        assert_same_steps(list(stream), steps)


def test_an_empty_part_has_no_batches(split, reference):
    made = batches(split, reference)
    with contextlib.closing(made.in_order(split.part(np.zeros(0, np.int64)))) as stream:
        assert list(stream) == []


def test_more_devices_than_structures(split, reference):
    few = split.part(np.array([4, 2]))
    made = Batches((choose_budget(few.sizes, 1),), CUTOFF, reference, 5)
    with contextlib.closing(made.training(few, seed=0)) as stream:
        for epoch in range(3):
            group, batch = next(stream)
            assert group.epoch == epoch
            assert sorted(p.tolist() for p in group.places) == [[0], [1]]
            np.testing.assert_array_equal(
                batch.n_node[:, 0, 0, 0] == made.budgets[0].n_node, [False] * 2 + [True] * 3
            )


def test_periodic_structures_among_others_have_batches_of_one_form(tmp_path):
    (tmp_path / "frames.xyz").write_text(FRAMES)
    store = Store(
        convert(
            ConversionSpec(str(tmp_path / "frames.xyz"), atoms_per_shard=1),
            tmp_path / "store",
            num_processes=1,
            refuse=False,
            progress=False,
        )
    )
    assert len(store.manifest["shards"]) == 3
    sizes = graph_sizes(store.take(np.arange(3)), 2.5)
    split = Split(store, np.arange(3), sizes)
    made = Batches((choose_budget(sizes, 1),), 2.5, np.zeros(119), 2)
    with contextlib.closing(made.in_order(split)) as stream:
        steps = list(stream)
    forms = {jax.tree.structure(batch) for _, batch in steps}
    assert len(forms) == 1 and all(
        "shifts" in batch.edges and "cell" in batch.globals for _, batch in steps
    )
    found = {
        int(p): (batch.globals["cell"][d, g], batch.n_edge[d, g], batch.nodes["forces"][d])
        for group, batch in steps
        for d, places in enumerate(group.places)
        for g, p in enumerate(places)
    }
    np.testing.assert_allclose(found[0][0], 4.2 * np.eye(3), rtol=1e-6)
    assert found[0][1] == 4 and found[1][1] == 6 and found[2][1] == 0
    assert not found[1][0].any() and np.isnan(found[2][2][0]).all()


def test_parts_and_samples(split):
    part = split.part(np.array([5, 1, 8]))
    np.testing.assert_array_equal(part.indices, split.indices[[5, 1, 8]])
    for name in ("n_node", "n_edge"):
        np.testing.assert_array_equal(
            getattr(part.sizes, name), getattr(split.sizes, name)[[5, 1, 8]]
        )
    assert len(part) == 3 and part.rows is split.rows
    sample = split.sample(20, seed=1)
    place_of = {int(index): place for place, index in enumerate(split.indices)}
    places = [place_of[int(index)] for index in sample.indices]
    assert len(set(places)) == 20 and places == sorted(places) and places != list(range(20))
    np.testing.assert_array_equal(sample.sizes.n_edge, split.sizes.n_edge[places])
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


def test_a_structure_that_does_not_fit_is_named(split, reference):
    largest = int(np.argmax(split.sizes.n_node))
    made = batches(split, reference)
    made = Batches(
        (made.budgets[0]._replace(n_node=int(split.sizes.n_node[largest])),), CUTOFF, reference, 1
    )
    with (
        contextlib.closing(made.training(split, seed=0)) as stream,
        pytest.raises(ValueError, match="does not fit"),
    ):
        next(stream)


def test_a_shard_that_is_lost_while_training_is_an_error_and_no_end(store, reference, tmp_path):
    sizes = graph_sizes(store.take(np.arange(len(store))), CUTOFF)
    copy = Store(shutil.copytree(store.path, tmp_path / "store"))  # none of its shards is open yet
    split = Split(copy, np.arange(len(copy)), sizes)
    (copy.path / "shards" / copy.manifest["shards"][8]["file"]).unlink()
    made = batches(split, reference)
    with (
        contextlib.closing(made.in_order(split)) as stream,
        pytest.raises((OSError, ValueError), match="00008"),
    ):
        list(stream)

"""Updates of several micro-batches: one plan, in one or more shapes, shared out over any devices and hosts."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax.datasets import readers, statistics
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.training import data
from mlip_jax.training.data import Batches, Split
from tests.training.test_data import assert_identical, epochs_of, places_of

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
CUTOFF = 4.0


@pytest.fixture(scope="module")
def split():
    with readers.open_data(DATA) as source:
        columns = Columns.from_structures(source)
    indices = np.random.default_rng(0).permutation(len(columns))[:60]
    return Split(columns, indices, graph_sizes(columns, CUTOFF).take(indices))


@pytest.fixture(scope="module")
def reference(split):
    return statistics.reference_energies(statistics.Summary([split.rows]), "least_squares")


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(data, "_WINDOW", 7)
    monkeypatch.setattr(data, "_WINDOW_STEPS", 1)


def in_buckets(split, reference, devices=1, micro_batches=None, hosts=1, host=0, **options):
    """Batches in several shapes."""
    small = np.argsort(split.sizes.n_edge)[: len(split) // 2]
    low, high = choose_budget(split.sizes.take(small), 1), choose_budget(split.sizes, 5)
    budgets = (low, PaddingBudget(*np.maximum(low, high).tolist()))
    return Batches(budgets, CUTOFF, reference, devices, micro_batches, hosts, host, **options)


def taken(made, split, count, state=None):
    """The first groups and batches of a stream, and its state after them."""
    with contextlib.closing(made.training(split, seed=4, state=state)) as stream:
        return [next(stream) for _ in range(count)], json.loads(json.dumps(stream.state))


def groups_of(steps):
    return [
        (group.epoch, group.progress, group.bucket, [p.tolist() for p in group.places])
        for group, _ in steps
    ]


SETUPS = [(1, 1), (2, 1), (8, 1), (3, 1), (1, 2), (2, 2), (4, 3), (1, 8)]


@pytest.mark.parametrize(("devices", "hosts"), SETUPS)
@pytest.mark.parametrize("micro_batches", [8, 5])
def test_devices_of_all_hosts_share_out_the_same_plan(
    split, reference, small_windows, devices, hosts, micro_batches
):
    """Each micro-batch of an update once, in order, the devices that are left with empty ones."""
    expected, _ = taken(in_buckets(split, reference, 1, micro_batches), split, 12)
    made = [
        in_buckets(split, reference, devices, micro_batches, hosts, host) for host in range(hosts)
    ]
    shares = [taken(batches, split, 12)[0] for batches in made]
    per_device = -(-micro_batches // (devices * hosts))
    assert {batches.per_device for batches in made} == {per_device}
    assert {group.bucket for group, _ in expected} == set(range(len(made[0].budgets)))
    for (group, _), *of_hosts in zip(expected, *shares):
        assert groups_of(of_hosts) == groups_of([(group, None)]) * hosts
        graphs = [
            jax.tree.map(lambda x: x[d, 0, k], batch)  # noqa: B023
            for _, batch in of_hosts
            for d in range(devices)
            for k in range(per_device)
        ]
        budget = made[0].budgets[group.bucket]
        for number, graph in enumerate(graphs):
            places = group.places[number] if number < len(group.places) else np.zeros(0, np.int64)
            assert_identical(graph, build_batch(split.columns(places), budget, CUTOFF, reference))
        assert len(graphs) >= micro_batches >= len(group.places)


@pytest.mark.parametrize("step", [1, 5, 11, 16])
def test_a_stream_goes_on_with_other_devices_where_it_was(split, reference, small_windows, step):
    expected = groups_of(taken(in_buckets(split, reference, 8, 8), split, 25)[0])
    state = taken(in_buckets(split, reference, 8, 8), split, step)[1]
    for devices, hosts in ((2, 1), (1, 1), (3, 2)):
        for host in range(hosts):
            made = in_buckets(split, reference, devices, 8, hosts, host)
            assert groups_of(taken(made, split, 25 - step, state)[0]) == expected[step:]


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_updates_hold_batches_of_one_shape_and_epochs_all_structures(
    split, reference, small_windows, micro_batches
):
    made = in_buckets(split, reference, 1, micro_batches)
    for epoch, steps in enumerate(epochs_of(made.training(split, seed=1), 2)):
        np.testing.assert_array_equal(
            np.sort(np.concatenate(places_of(steps))), np.arange(len(split))
        )
        progress = [group.epoch + group.progress for group, _ in steps]
        assert (
            progress == sorted(set(progress)) and progress[0] > epoch and progress[-1] == epoch + 1
        )
        for group, batch in steps:
            budget = made.budgets[group.bucket]
            assert batch.nodes["positions"].shape == (1, 1, micro_batches, budget.n_node, 3)
            for places in group.places:
                assert (
                    split.sizes.n_edge[places].sum() <= budget.n_edge
                    and len(places) <= budget.n_graph - 1
                )


@pytest.mark.parametrize(("devices", "hosts"), [(1, 1), (2, 2), (3, 1)])
def test_batches_of_resident_data_are_places_of_the_same_structures(
    split, reference, small_windows, devices, hosts
):
    for host in range(hosts):
        whole = in_buckets(split, reference, devices, 5, hosts, host)
        placed = in_buckets(split, reference, devices, 5, hosts, host, resident=True)
        for (group, batch), (other, places) in zip(
            taken(whole, split, 8)[0], taken(placed, split, 8)[0]
        ):
            assert groups_of([(group, None)]) == groups_of([(other, None)])
            budget = whole.budgets[group.bucket]
            assert places.dtype == np.int32
            assert places.shape == (devices, 1, whole.per_device, budget.n_graph - 1)
            for at in np.ndindex(devices, 1, whole.per_device):
                real = places[at][places[at] >= 0]
                assert (places[at][len(real) :] == -1).all()
                graph = jax.tree.map(lambda x: x[at], batch)  # noqa: B023
                assert_identical(graph, build_batch(split.columns(real), budget, CUTOFF, reference))


def test_batches_are_put_where_they_are_wanted(split, reference):
    made = in_buckets(split, reference, 1, 2, put=lambda batch: ("there", batch.n_node.shape[:3]))
    assert [batch for _, batch in taken(made, split, 3)[0]] == [("there", (1, 1, 2))] * 3
    with contextlib.closing(made.in_order(split)) as stream:
        assert next(stream)[1].n_node.ndim == 2, "validation is not put"


@pytest.mark.parametrize("micro_batches", [1, 2, 8, 30])
def test_updates_of_an_epoch_are_as_estimated(
    split, reference, small_windows, monkeypatch, micro_batches
):
    """The last updates of a window lack micro-batches, which counts where an epoch has few."""
    for window in (7, 40, 4096):
        monkeypatch.setattr(data, "_WINDOW", window)
        made = in_buckets(split, reference, 1, micro_batches)
        found = [len(steps) for steps in epochs_of(made.training(split, seed=0), 3)]
        assert made.num_groups(split) == pytest.approx(np.mean(found), rel=0.25)


def test_updates_of_an_epoch_are_estimated_from_a_part(split, reference, small_windows):
    made = in_buckets(split, reference, 1, 2)
    assert made.num_groups(split, most=40) == pytest.approx(made.num_groups(split), rel=0.25)
    assert made.num_groups(split, most=5) == pytest.approx(made.num_groups(split), rel=0.6)
    assert made.num_groups(split.part(np.zeros(0, np.int64))) == 0

"""Tests for steps of several micro-batches, which any number of devices and hosts share."""

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
from tests.training.test_data import assert_identical, epochs_of, members_of

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
    """Return a factory of batches with several size buckets."""
    small = np.argsort(split.sizes.n_edge)[: len(split) // 2]
    low, high = choose_budget(split.sizes.take(small), 1), choose_budget(split.sizes, 5)
    budgets = (low, PaddingBudget(*np.maximum(low, high).tolist()))
    return Batches(budgets, CUTOFF, reference, devices, micro_batches, hosts, host, **options)


def taken(factory, split, count, state=None):
    """Return the first plans and batches of a stream, and its state after them."""
    with contextlib.closing(factory.training(split, seed=4, state=state)) as stream:
        return [next(stream) for _ in range(count)], json.loads(json.dumps(stream.state))


def plans_of(steps):
    return [
        (plan.epoch, plan.progress, plan.bucket, [p.tolist() for p in plan.members])
        for plan, _ in steps
    ]


SETUPS = [(1, 1), (2, 1), (8, 1), (3, 1), (1, 2), (2, 2), (4, 3), (1, 8)]


@pytest.mark.parametrize(("devices", "hosts"), SETUPS)
@pytest.mark.parametrize("micro_batches", [8, 5])
def test_devices_of_all_hosts_share_one_plan(
    split, reference, small_windows, devices, hosts, micro_batches
):
    """Each micro-batch of a step occurs once, in order; the remaining devices get empty ones."""
    expected, _ = taken(in_buckets(split, reference, 1, micro_batches), split, 12)
    factory = [
        in_buckets(split, reference, devices, micro_batches, hosts, host) for host in range(hosts)
    ]
    shares = [taken(batches, split, 12)[0] for batches in factory]
    per_device = -(-micro_batches // (devices * hosts))
    assert {batches.per_device for batches in factory} == {per_device}
    assert {plan.bucket for plan, _ in expected} == set(range(len(factory[0].budgets)))
    for (plan, _), *of_hosts in zip(expected, *shares):
        assert plans_of(of_hosts) == plans_of([(plan, None)]) * hosts
        graphs = [
            jax.tree.map(lambda x: x[d, 0, k], batch)  # noqa: B023
            for _, batch in of_hosts
            for d in range(devices)
            for k in range(per_device)
        ]
        budget = factory[0].budgets[plan.bucket]
        for number, graph in enumerate(graphs):
            members = plan.members[number] if number < len(plan.members) else np.zeros(0, np.int64)
            assert_identical(graph, build_batch(split.columns(members), budget, CUTOFF, reference))
        assert len(graphs) >= micro_batches >= len(plan.members)


@pytest.mark.parametrize("step", [1, 5, 11, 16])
def test_a_stream_resumes_on_other_devices(split, reference, small_windows, step):
    expected = plans_of(taken(in_buckets(split, reference, 8, 8), split, 25)[0])
    state = taken(in_buckets(split, reference, 8, 8), split, step)[1]
    for devices, hosts in ((2, 1), (1, 1), (3, 2)):
        for host in range(hosts):
            factory = in_buckets(split, reference, devices, 8, hosts, host)
            assert plans_of(taken(factory, split, 25 - step, state)[0]) == expected[step:]


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_steps_have_one_size_bucket_and_epochs_all_structures(
    split, reference, small_windows, micro_batches
):
    factory = in_buckets(split, reference, 1, micro_batches)
    for epoch, steps in enumerate(epochs_of(factory.training(split, seed=1), 2)):
        np.testing.assert_array_equal(
            np.sort(np.concatenate(members_of(steps))), np.arange(len(split))
        )
        progress = [plan.epoch + plan.progress for plan, _ in steps]
        assert (
            progress == sorted(set(progress)) and progress[0] > epoch and progress[-1] == epoch + 1
        )
        for plan, batch in steps:
            budget = factory.budgets[plan.bucket]
            assert batch.nodes["positions"].shape == (1, 1, micro_batches, budget.n_node, 3)
            for members in plan.members:
                assert (
                    split.sizes.n_edge[members].sum() <= budget.n_edge
                    and len(members) <= budget.n_graph - 1
                )


@pytest.mark.parametrize(("devices", "hosts"), [(1, 1), (2, 2), (3, 1)])
def test_batches_of_resident_data_are_indices_of_the_same_structures(
    split, reference, small_windows, devices, hosts
):
    for host in range(hosts):
        whole = in_buckets(split, reference, devices, 5, hosts, host)
        placed = in_buckets(split, reference, devices, 5, hosts, host, resident=True)
        for (plan, batch), (other, members) in zip(
            taken(whole, split, 8)[0], taken(placed, split, 8)[0]
        ):
            assert plans_of([(plan, None)]) == plans_of([(other, None)])
            budget = whole.budgets[plan.bucket]
            assert members.dtype == np.int32
            assert members.shape == (devices, 1, whole.per_device, budget.n_graph - 1)
            for at in np.ndindex(devices, 1, whole.per_device):
                real = members[at][members[at] >= 0]
                assert (members[at][len(real) :] == -1).all()
                graph = jax.tree.map(lambda x: x[at], batch)  # noqa: B023
                assert_identical(graph, build_batch(split.columns(real), budget, CUTOFF, reference))


def test_training_batches_are_transferred_by_put(split, reference):
    factory = in_buckets(
        split, reference, 1, 2, put=lambda batch: ("there", batch.n_node.shape[:3])
    )
    assert [batch for _, batch in taken(factory, split, 3)[0]] == [("there", (1, 1, 2))] * 3
    with contextlib.closing(factory.in_order(split)) as stream:
        assert next(stream)[1].n_node.ndim == 2, "validation is not put"


@pytest.mark.parametrize("micro_batches", [1, 2, 8, 30])
def test_the_estimate_of_steps_per_epoch_is_right(
    split, reference, small_windows, monkeypatch, micro_batches
):
    """The last steps of a window lack micro-batches, which matters if an epoch has few steps."""
    for window in (7, 40, 4096):
        monkeypatch.setattr(data, "_WINDOW", window)
        factory = in_buckets(split, reference, 1, micro_batches)
        found = [len(steps) for steps in epochs_of(factory.training(split, seed=0), 3)]
        assert factory.steps_per_epoch(split) == pytest.approx(np.mean(found), rel=0.25)


def test_steps_per_epoch_are_estimated_from_a_sample(split, reference, small_windows):
    factory = in_buckets(split, reference, 1, 2)
    assert factory.steps_per_epoch(split, max_structures=40) == pytest.approx(
        factory.steps_per_epoch(split), rel=0.25
    )
    assert factory.steps_per_epoch(split, max_structures=5) == pytest.approx(
        factory.steps_per_epoch(split), rel=0.6
    )
    assert factory.steps_per_epoch(split.subset(np.zeros(0, np.int64))) == 0

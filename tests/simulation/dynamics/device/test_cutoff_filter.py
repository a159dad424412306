"""Tests that the model receives the edges that a list without a skin would contain."""

import types

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlip_jax import MolecularDynamics
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import evaluate
from mlip_jax.simulation.dynamics import neighbors
from mlip_jax.simulation.dynamics.device import cutoff_filter
from mlip_jax.simulation.dynamics.neighbors import NeighborCapacity
from mlip_jax.simulation.dynamics.system import make
from mlip_jax.structure import Structure
from tests.simulation.analytic import pairwise
from tests.simulation.dynamics.test_md import QUIET, crystal

CUTOFF, SKIN = 4.0, 0.8
edges_within_cutoff = jax.jit(cutoff_filter.edges_within_cutoff, static_argnums=(1, 2))


def graph_of(atoms: list[Atoms], cutoff, edges=4096):
    nodes = sum(map(len, atoms)) + 3
    structures = [
        Structure(
            a.numbers,
            a.positions,
            cell=a.cell.array if a.pbc.any() else None,
            pbc=a.pbc if a.pbc.any() else None,
        )
        for a in atoms
    ]
    return build_batch(
        Columns.from_structures(structures), PaddingBudget(nodes, edges, len(atoms) + 1), cutoff
    )


def displaced(atoms, by, seed):
    atoms = [a.copy() for a in atoms]
    rng = np.random.default_rng(seed)
    for a in atoms:
        a.positions += rng.uniform(-by, by, (len(a), 3)) / np.sqrt(3)
    return atoms


def at_later_positions(graph, atoms):
    """Return the unchanged list at the later positions."""
    positions = np.array(graph.nodes["positions"])
    positions[: sum(map(len, atoms))] = np.concatenate([a.positions for a in atoms])
    return graph._replace(nodes=graph.nodes | {"positions": positions})


def cells():
    wide, small = bulk("Ar", "fcc", a=5.4, cubic=True) * (2, 1, 1), bulk("C", "diamond", a=3.6)
    wide.pbc = (True, True, False)
    return [wide, small]


@pytest.mark.parametrize(
    "start",
    [lambda: [molecule("CH3CH2OH"), molecule("H2O"), molecule("C6H6")], cells],
    ids=["molecules", "cells"],
)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), by=st.floats(0, SKIN / 2))
def test_equals_a_list_of_the_cutoff(start, seed, by):
    before = start()
    now = displaced(before, by, seed)
    listed, fresh = graph_of(before, CUTOFF + SKIN), graph_of(now, CUTOFF)
    # exclude pairs that rounding may put on either side
    assume(
        graph_of(now, CUTOFF - 1e-4).n_edge[:-1].sum()
        == graph_of(now, CUTOFF + 1e-4).n_edge[:-1].sum()
    )
    filtered, count = edges_within_cutoff(at_later_positions(listed, now), CUTOFF, 4096)
    assert count == fresh.n_edge[:-1].sum()
    assert np.isin(np.asarray(filtered.receivers[count:]), sum(map(len, now))).all()
    np.testing.assert_array_equal(filtered.n_edge, fresh.n_edge)

    def as_set(graph):
        shifts = np.asarray(graph.edges.get("shifts", np.zeros((4096, 3), int))).astype(int)
        return [
            tuple(map(int, e))
            for e in np.column_stack([graph.receivers, graph.senders, shifts])[:count]
        ]

    assert sorted(as_set(filtered)) == sorted(as_set(fresh)) and [
        e[0] for e in as_set(filtered)
    ] == [e[0] for e in as_set(fresh)]
    forward, reverse = np.split(np.asarray(filtered.edges["pair_order"]), 2)
    assert sorted(np.concatenate([forward, reverse])) == list(range(4096))
    np.testing.assert_array_equal(
        np.asarray(filtered.receivers)[forward], np.asarray(filtered.senders)[reverse]
    )
    np.testing.assert_array_equal(
        np.asarray(filtered.senders)[forward], np.asarray(filtered.receivers)[reverse]
    )


@pytest.mark.parametrize("kind", ["tiny", "painn"])
def test_models_give_the_same_energies_and_forces(make_potential, kind):
    potential = make_potential(kind)
    before = [molecule("CH3CH2OH"), molecule("C6H6")]
    now = at_later_positions(graph_of(before, CUTOFF + SKIN), displaced(before, 0.3, 0))
    chosen, count = edges_within_cutoff(now, CUTOFF, 512)
    assert count < 512
    compiled = jax.jit(evaluate, static_argnums=(0, 3))
    whole, part = (compiled(potential.model, potential.params, g, 1.0) for g in (now, chosen))
    np.testing.assert_allclose(part.energy, whole.energy, rtol=0, atol=1e-5)
    np.testing.assert_allclose(part.forces, whole.forces, rtol=0, atol=1e-5)


def test_edges_beyond_the_capacity_and_nan_distances_are_counted():
    atoms = [molecule("C6H6")]
    graph = graph_of(atoms, CUTOFF + SKIN)
    whole = int(graph_of(atoms, CUTOFF).n_edge[0])
    assert edges_within_cutoff(graph, CUTOFF, whole - 2)[1] == whole
    lost = np.array(graph.nodes["positions"])
    lost[0] = np.nan
    filtered, _ = edges_within_cutoff(
        graph._replace(nodes=graph.nodes | {"positions": lost}), CUTOFF, 4096
    )
    assert (np.asarray(filtered.receivers) == 0).sum() == (np.asarray(graph.receivers) == 0).sum()


def test_only_the_exceeded_capacity_is_enlarged(make_potential):
    system = make([molecule("C6H6")] * 20, make_potential("tiny"))
    empty = NeighborCapacity(PaddingBudget(system.nodes, 0, 21))
    first = neighbors.enlarge_capacity(empty, system, np.array([2000, 0, 1200]))
    assert first.holds(np.array([2000, 0, 1200])) and first.near_edges < first.budget.n_edge
    closer = neighbors.enlarge_capacity(first, system, np.array([2000, 0, first.near_edges + 2]))
    assert closer.budget == first.budget and closer.near_edges > first.near_edges
    longer = neighbors.enlarge_capacity(first, system, np.array([first.budget.n_edge + 2, 0, 0]))
    assert longer.near_edges == first.near_edges and longer.budget.n_edge > first.budget.n_edge
    all_of_it = neighbors.enlarge_capacity(first, system, np.array([2000, 0, 1990]))
    assert all_of_it.near_edges == 0, "the model then gets the list as it is"
    assert all_of_it.holds(np.array([2000, 0, 3000]))


def test_a_device_with_memory_builds_the_lists_of_large_structures():
    """Detects a GPU that stops for the lists of the host above 5,792 atoms."""

    def device(platform, memory=None):
        stats = {} if memory is None else {"bytes_limit": memory}
        return types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)

    limits = [
        int(neighbors.max_entries(d) ** 0.5)
        for d in (device("cpu"), device("gpu"), device("gpu", 24 << 30), device("gpu", 141 << 30))
    ]
    assert limits == [5_792, 5_792, 19_036, 32_768]


@pytest.mark.parametrize("by", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_a_step_waits_for_a_larger_capacity(by, monkeypatch):
    """A gas that collapses: edges exceed their capacity, and no step is lost."""
    atoms = crystal((2, 2, 2), shake=0.02)
    atoms.pbc = False
    center = atoms.positions.mean(0)
    atoms.positions = center + 1.3 * (atoms.positions - center)
    atoms.set_momenta(atoms.get_masses()[:, None] * -0.03 * (atoms.positions - center))
    if by == "host":
        monkeypatch.setattr(neighbors, "suits_device", lambda *_: False)
    monkeypatch.setattr(neighbors, "_WORTHWHILE", 0.99)

    def dynamics():
        return MolecularDynamics(
            atoms,
            pairwise(cutoff=6.0),
            ensemble="nve",
            timestep=2.0,
            skin=1.5,
            record_every=1,
            frame_every=1,
            fix_com=False,
            dtype="float64",
            **QUIET,
        )

    ours = dynamics()
    first = ours.batches[0].capacity
    assert ours.lists_built_on == by and 0 < first.near_edges < first.budget.n_edge
    (trajectory,) = ours.run(30)
    last = ours.batches[0].capacity
    assert last.near_edges > first.near_edges or not last.near_edges
    assert trajectory.steps == list(range(31)) and trajectory.broken is None
    monkeypatch.setattr(neighbors, "_WORTHWHILE", 0.0)
    plain = dynamics()
    (expected,) = plain.run(30)
    assert not plain.batches[0].capacity.near_edges
    np.testing.assert_allclose(
        [f.positions for f in trajectory.frames], [f.positions for f in expected.frames], atol=1e-9
    )
    np.testing.assert_allclose(trajectory.thermo.total, expected.thermo.total, atol=1e-9)

"""Translation tests for all paths to single precision: structures up to 100 km from the origin.

The calculator and the relaxation are tested in tests/simulation, evaluations in
tests/test_library.py. Predictors, features, energies and ensembles use `build_batch`.
"""

import dataclasses

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.near_origin import LIMIT, is_far, move_near_origin
from mlip_jax.datasets.store.shards import Shard, encode, write_shard
from mlip_jax.graphs import resident
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.simulation.dynamics import h5md, neighbors, system
from mlip_jax.structure import Structure
from tests.simulation.analytic import pairwise

CELL = np.array([[5.0, 0, 0], [1.0, 6.0, 0], [0.5, -1.0, 7.0]])
FAR = [1e3, 3.3e4, 1e5]
# Å; float32 keeps 4e-6 Å at LIMIT. The positions in float64 have 1.5e-11 Å at 1e5 Å.
TOLERANCE = 3e-6


def structures(shift=0.0, scatter=0):
    """Return open, fully and partly periodic structures, shifted (Å) and scattered over images."""
    rng, images, items = np.random.default_rng(0), np.random.default_rng(1), []
    for pbc in (None, [True] * 3, [True, True, False]):
        positions = rng.random((6, 3)) @ CELL + shift * np.array([1.0, -0.7, 0.4])
        if pbc is not None:
            positions += (images.integers(-scatter, scatter + 1, (6, 3)) * pbc) @ CELL
        items.append(
            Structure(
                np.array([6, 1, 8, 1, 7, 1]),
                positions,
                forces=np.zeros((6, 3)),
                cell=None if pbc is None else CELL,
                pbc=None if pbc is None else np.array(pbc),
            )
        )
    return Columns.from_structures(items)


def lengths(graph):
    """Return the sorted lengths of the edges of a batch, computed in float32."""
    positions, index = graph.nodes["positions"], np.repeat(np.arange(4), graph.n_node)
    vectors = positions[graph.senders] - positions[graph.receivers]
    shifts = graph.edges["shifts"].astype(np.float32)
    vectors += np.einsum("ec,ecx->ex", shifts, graph.globals["cell"][index[graph.receivers]])
    return np.sort(np.linalg.norm(vectors, axis=-1))


BUDGET = PaddingBudget(n_node=24, n_edge=2048, n_graph=4)


@pytest.mark.parametrize("shift", FAR)
@pytest.mark.parametrize("scatter", [0, 1000])
def test_batches(shift, scatter):
    near, far = structures(), structures(shift, scatter)
    batches = [build_batch(columns, BUDGET, 4.0) for columns in (near, far)]
    assert batches[0].nodes["positions"].dtype == np.float32
    np.testing.assert_allclose(lengths(batches[1]), lengths(batches[0]), atol=TOLERANCE)
    np.testing.assert_array_equal(graph_sizes(far, 4.0).n_edge, graph_sizes(near, 4.0).n_edge)
    on_device = resident.collect(far, 4.0)
    np.testing.assert_array_equal(on_device.positions[:18], batches[1].nodes["positions"][:18])


def test_structures_near_the_origin_keep_their_bits():
    columns = structures(10.0)
    assert move_near_origin(columns) is columns
    mixed = Columns.concatenate([columns, structures(1e4)])
    moved = move_near_origin(mixed)
    np.testing.assert_array_equal(moved.positions[:18], columns.positions)
    assert is_far(mixed.positions) and not is_far(moved.positions)
    broken = dataclasses.replace(mixed, positions=np.where(mixed.positions > 0, np.nan, 2 * LIMIT))
    np.testing.assert_array_equal(move_near_origin(broken).positions, broken.positions)


@pytest.mark.parametrize("shift", FAR)
def test_store(tmp_path, shift):
    """The store keeps the coordinates of the file."""
    columns = structures(shift)
    write_shard(tmp_path / "far.safetensors", encode(columns))
    stored = Shard(tmp_path / "far.safetensors").columns(0, 3)
    np.testing.assert_array_equal(stored.positions, columns.positions)
    assert encode(structures(1.0))["positions"].dtype == np.float32


@pytest.mark.parametrize("shift", FAR)
@pytest.mark.parametrize("periodic", [False, True])
def test_dynamics(shift, periodic):
    """Dynamics run near the origin, and frames have the coordinates of the input."""
    columns = structures(shift)
    atoms = Atoms("CHOHNH", columns.positions[6 * periodic : 6 * periodic + 6])
    if periodic:
        atoms.set_cell(CELL)
        atoms.pbc = True
    prepared = system.make([atoms], pairwise(elements=(1, 6, 7, 8)))
    (inside,) = prepared.molecules
    assert not is_far(inside.positions)
    np.testing.assert_allclose(inside.positions + prepared.origin[0], atoms.positions, atol=1e-10)


def test_trajectories(tmp_path):
    atoms = Atoms("CHOHNH", structures(1e5).positions[:6], info={"step": 0, "time_fs": 0.0})
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    h5md.append(tmp_path / "far.h5", [atoms])
    (frame,) = h5md.read(tmp_path / "far.h5")
    np.testing.assert_array_equal(frame.positions, atoms.positions)


def test_host_lists_of_dynamics_keep_the_given_positions(monkeypatch):
    """Lattice translations of other positions would connect the wrong images."""
    given = {}
    monkeypatch.setattr(
        neighbors, "build_batch", lambda *a, **options: given.update(options) or 1 / 0
    )
    prepared = system.make([Atoms("C2", [[0, 0, 0], [0, 0, 1.5]])], pairwise(elements=(1, 6, 7, 8)))
    with pytest.raises(ZeroDivisionError):
        neighbors.on_host(
            prepared,
            prepared.padded("positions", np.float32),
            None,
            BUDGET,
            neighbors.Cutoffs(3.0, None, 0.4),
        )
    assert given["near_origin"] is False

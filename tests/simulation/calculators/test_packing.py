"""Tests that an unpacked structure equals the batch of build_batch."""

import itertools

import jax
import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.graphs.shapes import PaddingBudget, SizeBucket
from mlip_jax.simulation.calculators.packing import pack, unpack
from mlip_jax.structure import Structure

CUTOFF, LONG = 2.5, 4.0


def structure(n, periodic):
    rng = np.random.default_rng(n)
    cell, pbc = (3.2 * np.eye(3) + 0.1, np.array([True, True, False])) if periodic else (None, None)
    return Structure(
        rng.integers(1, 9, n), rng.uniform(0, 4, (n, 3)), charge=-1.0, cell=cell, pbc=pbc
    )


@pytest.mark.parametrize(
    ("periodic", "long_range", "dtype"),
    [*itertools.product([False, True], [False, True], [np.float32]), (True, True, np.float64)],
)
@pytest.mark.parametrize(("n", "spare"), [(1, 0), (9, 0), (9, 6)])
def test_unpacked_equals_build_batch(n, spare, periodic, long_range, dtype):
    s = structure(n, periodic)
    neighbors = neighbor_list(s.positions, CUTOFF, s.cell, s.pbc)
    listed = long_range_list(s.positions, LONG, s.cell, s.pbc) if long_range else None
    pairs = len(listed[0]) + spare if long_range else 0
    budget = PaddingBudget(n + 1 + spare, len(neighbors.senders) + 2 * spare, 2, pairs)
    bucket = SizeBucket(budget, periodic, long_range)
    packed = pack(
        s.numbers,
        s.positions,
        neighbors,
        bucket,
        dtype,
        charge=-1.0,
        spin=2.0,
        cell=s.cell,
        long_range=listed,
    )
    assert [a.dtype for a in packed] == [dtype, np.int32] and all(a.ndim == 1 for a in packed)
    ours = unpack(bucket, *packed)
    np.testing.assert_array_equal(ours.globals.pop("spin"), [2.0, 0.0])
    theirs = build_batch(
        Columns.from_structures([s]),
        budget,
        CUTOFF,
        dtype=dtype,
        long_range_cutoff=LONG if long_range else None,
    )
    theirs.nodes.pop("forces")
    theirs.globals.pop("energy")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        jax.tree.leaves(jax.jit(unpack, static_argnums=0)(bucket, *packed)),
        jax.tree.leaves(unpack(bucket, *packed)),
    ):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-6)

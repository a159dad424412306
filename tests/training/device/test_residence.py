"""Tests for training data on the device: its batches are those of the host, with labels."""

import dataclasses

import jax
import numpy as np
import pytest
from ase.build import molecule

from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.structure import from_ase
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.device import residence


def test_labels_of_properties_are_on_the_device():
    """Detects predictors of properties whose training waits for batches of the host."""
    columns = Columns.from_structures(map(from_ase, map(molecule, ("H2O", "CH4", "NH3", "CO2"))))
    columns = dataclasses.replace(columns, properties={"gap": np.array([1.0, np.nan, 3.0, 4.0])})
    split = Split(columns, np.array([3, 0, 1]), graph_sizes(columns, 4.0).take([3, 0, 1]))
    budget = choose_budget(split.sizes, 3)
    batches = Batches((budget,), 4.0, np.zeros(119), 1, properties=("gap", "absent"))
    build, data = residence.load(split, batches, True)
    members = np.full(budget.n_graph - 1, -1, np.int32)
    members[:2] = 2, 0
    graph = jax.jit(lambda data, members: build(data, members, 0))(data, members)
    expected = build_batch(
        columns.take(np.array([1, 3])), budget, 4.0, np.zeros(119), properties=("gap", "absent")
    )
    assert jax.tree.structure(graph) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, graph, expected)
    assert graph.globals["properties"]["gap"][1] == 4.0


def test_batches_that_the_host_must_build():
    split, batches = None, None  # are not read
    assert residence.load(split, batches, None, unsupported="align.noise") == (None, ())
    with pytest.raises(ConfigError, match="train.resident cannot be combined with align.noise"):
        residence.load(split, batches, True, unsupported="align.noise")

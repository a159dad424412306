"""Tests for the depth of So3krates."""

import jax
import numpy as np
import pytest
from ase.build import molecule

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.models.so3krates import Model, So3kratesLayer
from mlip_jax.structure import Structure


def sizes_of_features(**options):
    """Return the root mean square of ethanol's initial features after each of six layers."""
    atoms = molecule("CH3CH2OH")
    columns = Columns.from_structures([Structure(atoms.numbers, atoms.positions, source="ethanol")])
    graph = build_batch(columns, choose_budget(graph_sizes(columns, 5.0), 1), 5.0)
    model = Model(num_layers=6, **options)
    params = jax.jit(model.init)(jax.random.key(0), graph)
    apply = jax.jit(
        lambda params, graph: model.apply(
            params,
            graph,
            capture_intermediates=lambda module, _: isinstance(module, So3kratesLayer),
        )
    )
    intermediates = apply(params, graph)[1]["intermediates"]
    features = [
        np.asarray(intermediates[f"layer_{n}"]["__call__"][0][0], np.float64)[: len(atoms)]
        for n in range(6)
    ]
    return [float(np.sqrt(np.mean(f**2))) for f in features]


@pytest.mark.slow
def test_a_layer_norm_bounds_the_features_of_a_deep_model():
    assert all(0.8 < size < 1.6 for size in sizes_of_features(layer_norm_1=True))


@pytest.mark.slow
def test_without_norms_features_grow_without_bound_beyond_four_layers():
    sizes = sizes_of_features()
    assert sizes[3] < 10 and not sizes[4] < 100 and not sizes[5] < 1e6

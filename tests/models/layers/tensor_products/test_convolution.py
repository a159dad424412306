"""Tests for the equivariant convolution, against its definition written with loops over edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.tensor_products.convolution import (
    convolution_paths,
    convolve,
    num_weights,
    output_irreps,
)
from mlip_jax.models.layers.tensor_products.couplings import coupling, spherical_harmonics
from mlip_jax.models.layers.tensor_products.irreps import natural, parse, to_text
from mlip_jax.models.layers.tensor_products.linear import PathWeights
from mlip_jax.target_device import compiling_for

pytestmark = pytest.mark.usefixtures("double_precision")
SOURCES = parse("3x0e+2x1o+1x2e")
# with 1o x 2e -> 2o, a coupling whose sign depends on the version
WANTED = [irrep for _, irrep in parse("0e+1o+1e+2o")]


def test_order_of_paths_and_weights():
    """The output is sorted; weights are in the order of the loops, or in that of the output."""
    paths = convolution_paths(
        parse("3x0e+2x1o"), natural(1), [irrep for _, irrep in parse("0e+1o+1e")]
    )
    assert [(str(p.source), p.degree, str(p.target)) for p in paths] == [
        ("0e", 0, "0e"),
        ("1o", 1, "0e"),
        ("0e", 1, "1o"),
        ("1o", 0, "1o"),
        ("1o", 1, "1e"),
    ]
    assert [p.start for p in paths] == [0, 8, 3, 6, 10] and num_weights(paths) == 12
    assert to_text(output_irreps(paths)) == "5x0e+5x1o+2x1e"
    again = convolution_paths(
        parse("3x0e+2x1o"), natural(1), [irrep for _, irrep in parse("0e+1o+1e")], True
    )
    assert [p.start for p in again] == [0, 3, 5, 8, 10]


@pytest.mark.parametrize("undirected", [False, True])
@pytest.mark.parametrize("old_signs", [False, True])
def test_convolution_is_its_definition(undirected, old_signs):
    rng = np.random.default_rng(0)
    num, pairs = 4, 5
    vectors = rng.normal(size=(pairs, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    receivers, senders = rng.integers(0, num, (2, pairs))
    edge = Pairs(jnp.asarray(receivers), jnp.asarray(senders), jnp.asarray(vectors), undirected)
    paths = convolution_paths(SOURCES, natural(2), WANTED)
    x = {irrep: rng.normal(size=(num, irrep.size, channels)) for channels, irrep in SOURCES}
    filters = PathWeights(rng.normal(size=(pairs, 3)), rng.normal(size=(3, num_weights(paths))))

    @jax.jit
    def convolved(x, filters, edge):
        edge = edge._replace(undirected=undirected)
        return convolve(
            x, spherical_harmonics(edge.displacements, 2), filters, edge, paths, old_signs
        )

    found = convolved(x, filters, edge)
    expected = {
        irrep: np.zeros((num, irrep.size, channels)) for channels, irrep in output_irreps(paths)
    }
    weights, both = (
        filters.values(),
        [np.asarray(y) for y in spherical_harmonics(jnp.asarray(vectors), 2)],
    )
    for p in range(pairs):
        both_ways = [(receivers[p], senders[p], (1, 1, 1)), (senders[p], receivers[p], (1, -1, 1))]
        for i, j, signs in both_ways[: 1 + undirected]:
            harmonics = [(s * y)[p] for s, y in zip(signs, both)]
            start = dict.fromkeys(expected, 0)
            for q in paths:
                c = coupling(q.source.degree, q.degree, q.target.degree, old_signs)
                message = np.einsum(
                    "abc,au,b,u->cu",
                    c,
                    x[q.source][j],
                    harmonics[q.degree],
                    weights[p, q.start : q.start + q.channels],
                )
                expected[q.target][i, :, start[q.target] : start[q.target] + q.channels] += message
                start[q.target] += q.channels
    assert list(found) == list(expected)
    for irrep, values in expected.items():
        np.testing.assert_allclose(found[irrep], values, atol=1e-12)


def test_programs_for_an_absent_gpu_are_those_of_a_gpu():
    """Detects a form chosen by the device that is present: many small blocks, slow on a GPU."""
    paths = convolution_paths(parse("2x0e"), natural(0), natural(0))
    indices = jnp.zeros(2000, jnp.int32)
    edge = Pairs(indices, indices, None, False)
    filters = PathWeights(jnp.ones((2000, 3)), jnp.ones((3, num_weights(paths))))
    x = {irrep: jnp.ones((4, irrep.size, channels)) for channels, irrep in parse("2x0e")}

    def blocks(platform):
        with compiling_for(platform):
            jaxpr = jax.make_jaxpr(
                lambda x: convolve(x, [jnp.ones((2000, 1))], filters, edge, paths)
            )(x)
        (call,) = [e.params["call"] for e in jaxpr.eqns if "call" in e.params]
        return call.spec.block, call.spec.stored

    assert blocks("cpu") == (512, True) and blocks("gpu") == (2000, False)

"""Tests for properties read from features: symmetries, extensivity and padding."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from ase.build import molecule
from scipy.spatial.transform import Rotation

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models.layers.readouts import KINDS, POOLINGS, with_heads
from mlip_jax.potential import example_graph
from mlip_jax.structure import from_ase

CUTOFF = 4.0
BUDGET = PaddingBudget(30, 400, 5)
BACKBONES = {
    "painn": {"num_features": 8, "num_layers": 1, "num_radial": 6, "cutoff": CUTOFF},
    "equivariant_transformer": {
        "num_features": 8,
        "num_layers": 1,
        "num_heads": 2,
        "num_radial": 6,
        "cutoff": CUTOFF,
    },
    "schnet": {"num_features": 8, "num_layers": 1, "num_radial": 6, "cutoff": CUTOFF},
    "so3krates": {
        "num_features": 12,
        "num_layers": 1,
        "num_heads": 2,
        "degrees": (1, 2),
        "cutoff": CUTOFF,
    },
}
VECTORS = ("painn", "equivariant_transformer")
HEADS = {
    **{pooling: {"kind": "scalar", "pooling": pooling} for pooling in POOLINGS},
    "vector": {"kind": "vector"},
    "atom": {"kind": "atom"},
    "atom_vector": {"kind": "atom_vector"},
}


def initialized_model(name, seed=0):
    """Return a model with all heads and random parameters; initial ones are zero in the last
    layers.
    """
    heads = {k: v for k, v in HEADS.items() if name in VECTORS or k != "atom_vector"}
    model = with_heads(models.create(name, **BACKBONES[name]), heads)
    shapes, rng = (
        jax.eval_shape(model.init, jax.random.key(0), example_graph()),
        np.random.default_rng(seed),
    )
    return model, jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape), shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, graph):
    return model.apply(params, graph)


def outputs(model, params, *atoms):
    with jax.enable_x64(True):
        columns = Columns.from_structures(map(from_ase, atoms))
        graph = build_batch(columns, BUDGET, CUTOFF, dtype=np.float64)
        return jax.tree.map(np.asarray, apply(model, params, graph))


@pytest.fixture(params=BACKBONES, scope="module")
def model(request):
    return initialized_model(request.param)


def ethanol():
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def test_rotated_moved_and_permuted(model):
    atoms, turn = ethanol(), Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix()
    order = np.random.default_rng(0).permutation(len(atoms))
    turned = atoms.copy()
    turned.positions = atoms.positions @ turn.T + [3.0, -2.0, 5.0]
    turned = turned[order]
    before, after = outputs(*model, atoms), outputs(*model, turned)
    n = len(atoms)
    for name in POOLINGS:
        np.testing.assert_allclose(after[name][0], before[name][0], rtol=1e-10)
        assert abs(before[name][0]) > 1e-3
    np.testing.assert_allclose(after["vector"][0], turn @ before["vector"][0], atol=1e-9)
    np.testing.assert_allclose(after["atom"][:n], before["atom"][:n][order], rtol=1e-9)
    if "atom_vector" in before:
        np.testing.assert_allclose(
            after["atom_vector"][:n], (before["atom_vector"][:n] @ turn.T)[order], atol=1e-9
        )
        assert np.abs(before["atom_vector"]).max() > 1e-3


def test_mirrored(model):
    atoms = ethanol()
    mirrored = atoms.copy()
    mirrored.positions[:, 0] *= -1
    before, after = outputs(*model, atoms), outputs(*model, mirrored)
    np.testing.assert_allclose(after["mean"][0], before["mean"][0], rtol=1e-10)
    np.testing.assert_allclose(after["vector"][0], before["vector"][0] * [-1, 1, 1], atol=1e-9)


def test_batch_and_padding_change_nothing(model):
    atoms, other = ethanol(), molecule("CH4")
    alone, both = outputs(*model, atoms), outputs(*model, other, atoms)
    m, n = len(other), len(atoms)
    for name in (*POOLINGS, "vector"):
        np.testing.assert_allclose(both[name][1], alone[name][0], rtol=1e-9, atol=1e-10)
        assert not both[name][2:].any()
    np.testing.assert_allclose(both["atom"][m : m + n], alone["atom"][:n], rtol=1e-9)
    assert not both["atom"][m + n :].any()


def test_a_sum_grows_with_the_size_and_a_mean_does_not(model):
    atoms = ethanol()
    twice = atoms.copy()
    shifted = atoms.copy()
    shifted.positions += [50.0, 0.0, 0.0]
    twice += shifted
    one, two = outputs(*model, atoms), outputs(*model, twice)
    np.testing.assert_allclose(two["sum"][0], 2 * one["sum"][0], rtol=1e-9)
    for name in ("mean", "attention"):
        np.testing.assert_allclose(two[name][0], one[name][0], rtol=1e-9)


@pytest.mark.slow
def test_frozen_features_have_no_gradient():
    backbone = models.create("painn", **BACKBONES["painn"])
    for frozen in (False, True):
        model = with_heads(backbone, {"gap": {}}, frozen=frozen)
        _, params = initialized_model("painn")
        params = {
            "params": {
                "backbone": params["params"]["backbone"],
                "head_gap": params["params"]["head_mean"],
            }
        }
        graph = build_batch(
            Columns.from_structures([from_ase(ethanol())]), PaddingBudget(12, 200, 2), CUTOFF
        )
        grads = jax.grad(lambda p, model, graph: model.apply(p, graph)["gap"].sum())(
            jax.tree.map(np.float32, params), model, graph
        )["params"]
        largest = max(float(abs(g).max()) for g in jax.tree.leaves(grads["backbone"]))
        assert (largest == 0) == frozen
        assert max(float(abs(g).max()) for g in jax.tree.leaves(grads["head_gap"])) > 0


def test_vectors_of_atoms_require_features_of_degree_1():
    model = with_heads(
        models.create("schnet", **BACKBONES["schnet"]), {"displacement": {"kind": "atom_vector"}}
    )
    with pytest.raises(ValueError, match="no features of degree 1"):
        jax.eval_shape(model.init, jax.random.key(0), example_graph())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tensor"}, f"unknown kind of head 'gap' 'tensor'.*{KINDS[1]}"),
        ({"poling": "sum"}, "Did you mean 'pooling'"),
        ({"pooling": "max"}, "unknown pooling"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        with_heads(models.create("painn"), {"gap": options})


def test_embedding_is_the_mean_of_the_features():
    model, params = initialized_model("painn")
    atoms = ethanol()
    graph = build_batch(
        Columns.from_structures([from_ase(atoms)]), PaddingBudget(12, 200, 3), CUTOFF
    )
    params = jax.tree.map(np.float32, params)
    backbone = dataclasses.replace(model.backbone, parent=None, name=None)

    @jax.jit
    def embedding_and_features(params, graph):
        outputs = backbone.apply({"params": params["params"]["backbone"]}, graph)
        return model.apply(params, graph, method="embed"), outputs.features

    embedded, features = map(np.asarray, embedding_and_features(params, graph))
    np.testing.assert_allclose(embedded[0], features[: len(atoms), 0, 0].mean(0), rtol=1e-5)
    assert not embedded[1:].any()

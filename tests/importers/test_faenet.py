"""Tests for FAENet with the weights of the authors' code.

The fixtures tests/data/parity_faenet_*.npz are outputs of vict0rsch/faenet (commit 1f725cf) in
float64 for small models with random weights, averaged over all frames and over the proper ones.
Forces are derivatives at fixed frames. "simple": second layers, physical properties, periods and
groups, energies of all blocks concatenated, weighted atoms. "simple_plain": none of these.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.importers import faenet
from mlip_jax.models.layers import element_properties
from mlip_jax.potential import example_graph
from tests.models.test_parity import assert_agree, energies_and_forces, read_parity

DATA = Path(__file__).parents[1] / "data"
OPTIONS = {"simple": {}, "simple_plain": {"skip": "add"}}


def save(tmp_path, kind, **changes):
    """Write a weights file; return its path, the structures and the expected values."""
    state, structures, expected = read_parity(DATA / f"parity_faenet_{kind}.npz")
    np.savez(tmp_path / "weights.npz", **{**state, **changes})
    return tmp_path / "weights.npz", structures, expected


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(("frames", "prefix"), [("all", ""), ("proper", "se3_")])
def test_agrees_with_the_reference(tmp_path, kind, frames, prefix):
    path, structures, expected = save(tmp_path, kind)
    potential = faenet.load(path, frames=frames, **OPTIONS[kind])
    assert not potential.conservative
    energies, forces = energies_and_forces(potential.model, potential.params, structures)
    assert_agree(energies, np.concatenate(expected[f"{prefix}energy"]))
    assert_agree(forces, np.concatenate(expected[f"{prefix}forces"]))


@pytest.mark.slow
def test_agrees_in_single_precision(tmp_path):
    path, structures, expected = save(tmp_path, "simple")
    potential = faenet.load(path)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), potential.params)
    energies, forces = energies_and_forces(potential.model, params, structures, np.float32)
    for values, name in ((energies, "energy"), (forces, "forces")):
        reference = np.concatenate(expected[name])
        np.testing.assert_allclose(values, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_features_of_elements_are_the_published_ones(tmp_path):
    """Training from scratch mixes the same properties as the imported table was computed from."""
    path, structures, _ = save(tmp_path, "simple")
    imported = faenet.load(path)
    with np.load(DATA / "parity_faenet_simple.npz") as data:
        state = {name.removeprefix("weights/embed_block."): data[name] for name in data.files}
    np.testing.assert_allclose(
        element_properties.PROPERTIES[:86], state["phys_emb.properties"], atol=5.1e-4
    )
    # without interactions, the features are the initial ones
    table = imported.model.clone(num_layers=0, skip="none")
    model = table.clone(element_features="properties", num_period_features=8)
    params = jax.eval_shape(model.init, jax.random.key(0), example_graph())["params"]
    params = {name: imported.params["params"].get(name) for name in params}
    params["embedding"] = np.zeros((119, 18))
    params["embedding"][:85] = state["emb.weight"]
    params["period"] = state["period_embedding.weight"][np.minimum(np.arange(7) + 1, 6)]
    params["group"] = state["group_embedding.weight"][np.minimum(np.arange(20), 18)]
    for n, name in enumerate(("lin", "lin_2")):
        params[f"embed_layer_{n + 1}"] = {
            "kernel": state[f"{name}.weight"].T,
            "bias": state[f"{name}.bias"],
        }
    found, expected = (
        np.asarray(jax.jit(m.apply)({"params": p}, example_graph()).features[:2])
        for m, p in ((model, params), (table, imported.params["params"]))
    )
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_tags_are_constant(tmp_path):
    """A tag shifts the input of the first layer; the learned features make room for it."""
    with np.load(DATA / "parity_faenet_simple_plain.npz") as data:
        learned = data["weights/embed_block.emb.weight"]
    path, _, _ = save(
        tmp_path,
        "simple_plain",
        **{
            "embed_block.emb.weight": learned[:, :40],
            "embed_block.tag_embedding.weight": np.arange(24.0).reshape(3, 8),
        },
    )
    tables = [faenet.load(path, skip="add", tag=t).params["params"]["embedding"] for t in (0, 2)]
    assert np.abs(tables[0] - tables[1]).max() > 0.1


def test_lanthanides_have_no_weights(tmp_path):
    """They are beyond the end of FAENet's table of groups."""
    path, _, _ = save(tmp_path, "simple")
    known = faenet.load(path).elements
    assert {1, 57, 72, 84} <= set(known) and not {58, 71, 85} & set(known)


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("simple_plain", {}, {}, 'give skip="add" or "none"'),
        ("simple", {}, {"skip": "add"}, 'those of skip="concat"'),
        (
            "simple",
            {"interaction_blocks.0.lin_geom.weight": np.zeros((2, 2))},
            {},
            "no counterpart",
        ),
        ("simple", {"distance_expansion.offset": np.arange(20.0) ** 2}, {}, "even grid"),
    ],
)
def test_unsuitable_weights_are_reported(tmp_path, kind, changes, options, message):
    path, _, _ = save(tmp_path, kind, **changes)
    with pytest.raises(ValueError, match=message):
        faenet.load(path, **options)


def test_unknown_options_are_reported():
    model = models.create("faenet", frames="some")
    with pytest.raises(ValueError, match="some"):
        jax.eval_shape(model.init, jax.random.key(0), example_graph())

"""Tests for models with energy terms: creation from a config, and evaluation."""

import contextlib
import hashlib
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax import config as configs
from mlip_jax import defaults, models, terms
from mlip_jax.checkpoint import CheckpointError, CheckpointStore, Restored
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models.layers.heads import AtomOutputs
from mlip_jax.potential import (
    Potential,
    active_terms,
    create_model,
    evaluate,
    example_graph,
    long_range_cutoff,
)
from mlip_jax.structure import Structure

MODEL = {
    "name": "painn",
    "options": {"num_features": 8, "num_layers": 1, "num_radial": 4, "cutoff": 3.0},
}


class Harmonic(nn.Module):
    """Model with energies Z, terms x² / 2 and 3, and a prediction that is nonzero for padding."""

    @nn.compact
    def __call__(self, graph):
        x, z = graph.nodes["positions"], graph.nodes["numbers"]
        energies = z.astype(x.dtype) * self.param("one", nn.initializers.ones, ()).astype(x.dtype)
        term = 0.5 * (x**2).sum(-1)
        return AtomOutputs(
            energies,
            jnp.zeros((len(z), 1, 1, 1)),
            {"harmonic": term, "constant": term * 0 + 3.0},
            {"partial_charges": energies + 1.0},
        )


def test_terms_are_added_in_ev_and_predictions_are_masked():
    rng = np.random.default_rng(0)
    structures = [
        Structure(np.array([1, 8]), rng.normal(size=(2, 3))),
        Structure(np.array([6]), rng.normal(size=(1, 3))),
    ]
    batch = build_batch(Columns.from_structures(structures), PaddingBudget(6, 8, 4), 5.0)
    params = Harmonic().init(jax.random.key(0), example_graph())
    out = jax.jit(lambda p, graph: evaluate(Harmonic(), p, graph, 2.5))(params, batch)
    x = batch.nodes["positions"][:3]
    expected = 2.5 * np.array([1, 8, 6]) + 0.5 * (x**2).sum(1) + 3.0
    np.testing.assert_allclose(out.energies, [*expected, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(out.energy, [expected[:2].sum(), expected[2], 0, 0], rtol=1e-6)
    np.testing.assert_allclose(out.forces[:3], -x, rtol=1e-6)
    np.testing.assert_allclose(out.properties["partial_charges"], [2, 9, 7, 0, 0, 0])


def test_without_terms_the_model_is_unchanged():
    plain = models.create("painn", **MODEL["options"])
    off = defaults.train_defaults().potential
    for potential in (None, {}, off, configs.to_dict(off)):
        assert create_model(MODEL, potential) == plain
    assert long_range_cutoff(plain) is None


def test_terms_of_a_config():
    c = defaults.train_defaults().potential
    c.zbl = c.electrostatics = True
    c.electrostatics_options.damping = 3.0
    assert active_terms(c) == {"zbl": {}, "electrostatics": {"damping": 3.0, "cutoff": 12.0}}
    model = create_model(MODEL, c)
    assert model.cutoff == 3.0 and long_range_cutoff(model) == 12.0
    assert model == create_model(
        json.loads(json.dumps(MODEL)), json.loads(json.dumps(configs.to_dict(c)))
    )
    c.long_range_cutoff = float("inf")
    assert active_terms(c)["electrostatics"]["cutoff"] is None
    assert math.isinf(long_range_cutoff(create_model(MODEL, c)))
    c.electrostatics_options.cutoff = 7.0  # has precedence over long_range_cutoff
    assert long_range_cutoff(create_model(MODEL, c)) == 7.0
    c.electrostatics = False
    assert long_range_cutoff(create_model(MODEL, c)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zbll": True}, "unknown energy term 'zbll'. Did you mean 'zbl'"),
        (
            {"zbl": True, "zbl_options": {"cutof": 3.0}},
            "unknown option of term 'zbl' 'cutof'. Did you mean 'cutoff'",
        ),
        ({"zbl": False, "zbl_options": {"cutof": 3.0}}, "unknown option of term 'zbl'"),
        ({"zbl": True, "long_range_cutoff": 0.0}, "long_range_cutoff must be positive"),
        ({"zbl": True, "zbl_options": {"cutoff": 4.0}}, "the model's edges end at 3"),
    ],
)
def test_errors_of_a_config(fields, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        create_model(MODEL, fields)


def test_every_term_has_a_switch_in_the_config():
    assert sorted(configs.TERMS) == terms.names()
    c = defaults.train_defaults().potential
    for name in terms.names():
        assert c[name] is False and not c[f"{name}_options"]


def test_names_of_terms_are_checked_but_not_their_options():
    given = defaults.train_defaults()
    given.potential.zbl_options.cutoff = 2.0
    assert configs.complete(given, defaults.train_defaults()).potential.zbl_options.cutoff == 2.0
    with given.unlocked():
        given.potential.zbk = True
    with pytest.raises(configs.ConfigError, match="potential.zbk.*Did you mean 'potential.zbl'"):
        configs.complete(given, defaults.train_defaults())


def test_terms_that_are_off_do_not_change_the_identity():
    """Runs of versions without energy terms can be resumed."""
    c = defaults.train_defaults()
    c.potential.long_range_cutoff = 9.0
    assert "potential" not in configs.identity(c)
    c.potential.zbl = True
    assert configs.identity(c)["potential"]["zbl"] is True


def test_example_graph_initializes_every_term():
    model = create_model(MODEL, {name: True for name in terms.names()} | {"long_range_cutoff": 9.0})
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph()))["params"]
    assert {"model", "zbl", "electrostatics"} <= set(params)


@pytest.mark.parametrize(
    "potential", [None, {"zbl": True, "electrostatics": True, "long_range_cutoff": 8.0}]
)
def test_terms_are_restored_from_a_checkpoint(potential):
    """Checkpoints of versions without energy terms have no such entry."""
    model = create_model(MODEL, potential)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    arrays = {
        "params/" + "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    metadata = {
        "statistics": {
            "cutoff": 3.0,
            "reference_energies": [0.0] * 119,
            "energy_scale": 1.0,
            "elements": [1],
        },
        "config": {"model": MODEL} | ({} if potential is None else {"potential": potential}),
    }
    loaded = Potential.from_checkpoint(arrays, json.loads(json.dumps(metadata)))
    assert loaded.model == model and loaded.long_range_cutoff == (
        None if potential is None else 8.0
    )
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_a_folder_of_checkpoints_has_the_averaged_parameters(tmp_path, caplog):
    """Detects a force field of the parameters that the optimizer moves, which none has validated."""
    model = create_model(MODEL)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph()))
    raw = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    averaged = jax.tree.map(lambda leaf: leaf + 1, raw)
    statistics = {
        "cutoff": 3.0,
        "reference_energies": [0.0] * 119,
        "energy_scale": 1.0,
        "elements": [1],
    }
    state = {"step": np.int32(7), "params": raw, "ema": averaged, "optimizer": raw}
    with contextlib.closing(CheckpointStore(tmp_path / "run/checkpoints")) as store:
        store.save(7, state, {"config": {"model": MODEL}, "statistics": statistics})
    loaded = Potential.load(tmp_path / "run/checkpoints")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, averaged)
    assert "averaged parameters of step 7, the newest checkpoint" in caplog.text


def test_later_fields_of_models_do_not_change_digests():
    """Workdirs, calibrations and cached results of older runs used to belong to another force field.

    The values are those before PaiNN had the field charge_embedding.
    """
    text = repr(models.create("painn"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "8d998c6258266d05"
    assert "irreps" not in repr(models.create("nequip"))
    charged = models.create("painn", charge_embedding=True)
    assert charged.charge_embedding and charged != models.create("painn")


@pytest.mark.parametrize(
    ("name", "value"),
    [("config", []), ("statistics", None), ("elements", 7), ("options", {"num_features": {}})],
)
def test_metadata_of_other_types_are_an_error_with_the_path(monkeypatch, name, value):
    """A checkpoint of other people; an AttributeError or RecursionError named no file."""
    config = {"model": {"name": "schnet", "options": {"num_features": 4}}}
    statistics = {
        "reference_energies": [0.0] * 119,
        "cutoff": 5.0,
        "energy_scale": 1.0,
        "elements": [1],
    }
    metadata = {"config": config, "statistics": statistics}
    part = next(p for p in (metadata, statistics, config["model"]) if name in p)
    part[name] = value
    restored = Restored(0, {}, metadata)
    monkeypatch.setattr(CheckpointStore, "restore", lambda store: restored)
    with pytest.raises(CheckpointError, match="invalid metadata|does not fit"):
        Potential.load(Path(__file__).parent)

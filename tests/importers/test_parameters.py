"""Tests for force fields as safetensors and JSON: exact round trips, and corrupted files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from mlip_jax import models, terms
from mlip_jax.importers import load_force_field, parameters, schnetpack
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.potential import Potential, example_graph

SMALL = {"num_features": 16, "num_layers": 1, "cutoff": 4.0}
KINDS = {
    "painn": ("painn", {}),
    "schnet": ("schnet", {}),
    "equivariant_transformer": ("equivariant_transformer", {}),
    "so3krates": ("so3krates", {"degrees": (1, 2), "num_features": 16, "num_heads": 2}),
    "terms": (
        "painn",
        {"electrostatics": {"cutoff": None}, "zbl": {}, "dispersion": {"cutoff": 9.0}},
    ),
}


def random(kind):
    name, options = KINDS[kind]
    added = options if kind == "terms" else {}
    model = terms.with_terms(models.create(name, **SMALL | ({} if added else options)), added)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph()))
    return Potential(
        model,
        jax.tree.map(lambda s: np.asarray(rng.normal(size=s.shape), np.float32), shapes),
        4.0,
        rng.normal(-2e3, 1e3, 119),
        27.211386245988 / 3,
        (1, 6, 8),
        {"statistics": {"charges": [0.0]}},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_exact_round_trip(tmp_path, kind):
    potential = random(kind)
    parameters.save(potential, tmp_path / "a")
    loaded = parameters.load(tmp_path / "a")
    assert loaded.model == potential.model and loaded.digest() == potential.digest()
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(),
        loaded.params,
        potential.params,
    )
    assert jax.tree.all(same)
    for field in ("cutoff", "energy_scale", "elements", "metadata"):
        assert getattr(loaded, field) == getattr(potential, field)
    assert loaded.reference_energies.tobytes() == potential.reference_energies.tobytes()
    assert load_force_field(f"parameters:{tmp_path / 'a'}").digest() == potential.digest()


def test_imported_force_field(tmp_path):
    with np.load(Path(__file__).parents[1] / "data/parity_schnetpack_painn.npz") as data:
        kept = {k.removeprefix("weights/"): data[k] for k in data.files if k.startswith("weights/")}
    safetensors.numpy.save_file(kept, tmp_path / "painn.safetensors")
    potential = schnetpack.load(tmp_path / "painn.safetensors")
    assert (
        parameters.load(parameters.save(potential, tmp_path / "b")).digest() == potential.digest()
    )


def test_needs_no_torch(tmp_path):
    parameters.save(random("painn"), tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None; from mlip_jax.importers import parameters; "
        f"assert parameters.load({str(tmp_path)!r}).cutoff == 4.0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_corruption_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="written by mlip_jax.importers.parameters.save"):
        parameters.load(tmp_path)
    folder = parameters.save(random("painn"), tmp_path / "a")
    text = (folder / "parameters.json").read_text()
    content = (folder / "parameters.safetensors").read_bytes()
    (folder / "parameters.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match="corrupted, or belongs to another"):
        parameters.load(folder)
    (folder / "parameters.safetensors").write_bytes(content)
    for changed, message in (
        ({"version": 2}, "version 2.*reads version 1"),
        ({"format": "?"}, "not a description"),
        ({"model": {"name": "schnet", "options": SMALL}}, "does not fit the model"),
        ({"model": 3}, "parameters.json: invalid"),
        ({"elements": 1}, "parameters.json: invalid"),
    ):
        (folder / "parameters.json").write_text(json.dumps(json.loads(text) | changed))
        with pytest.raises(WeightsError, match=message):
            parameters.load(folder)
    (folder / "parameters.json").write_text("{")
    with pytest.raises(WeightsError, match="invalid JSON"):
        parameters.load(folder)
    (folder / "parameters.json").write_text(text)
    (folder / "parameters.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="parameters.safetensors"):
        parameters.load(folder)


def test_option_that_json_cannot_represent(tmp_path):
    potential = random("painn")
    model = potential.model.clone(cutoff=np.float32(4.0))
    with pytest.raises(ValueError, match="option cutoff of 'painn'.*JSON"):
        parameters.save(dataclasses.replace(potential, model=model), tmp_path)


@pytest.mark.parametrize("name", ["allegro", "equiformer", "mace", "nequip", "pace"])
def test_arguments_may_be_in_a_yaml_file(tmp_path, name):
    """Detects importers that treat the path of a file as the arguments themselves."""
    np.savez(tmp_path / "weights.npz", x=np.zeros(1))
    (tmp_path / "model.yaml").write_text("seed: 0")
    module = importlib.import_module(f"mlip_jax.importers.{name}")
    with pytest.raises(ValueError, match="lack|is not that of"):
        module.load(tmp_path / "weights.npz", tmp_path / "model.yaml")

"""Tests for loading So3krates weights of mlff; their numbers are tested in test_parity.py."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax.importers import mlff
from mlip_jax.importers.formats.weights import WeightsError

FILE = Path(__file__).parents[1] / "data" / "parity_mlff_so3krates_plain.npz"


@pytest.fixture
def saved(tmp_path):
    """Files (weights.npz, hyperparameters)."""
    with np.load(FILE) as data:
        arrays = {
            name.removeprefix("weights/"): data[name]
            for name in data
            if name.startswith("weights/")
        }
        settings = ast.literal_eval(str(data["config"]))
    np.savez(tmp_path / "weights.npz", **arrays)
    return tmp_path / "weights.npz", settings


def test_load(saved):
    path, settings = saved
    energies = np.linspace(0, 1, 119)
    potential = mlff.load(path, settings, elements=[1, 6, 8], reference_energies=energies)
    assert potential.elements == (1, 6, 8) and potential.cutoff == settings["cutoff"]
    assert potential.long_range_cutoff is None and potential.reference_energies is energies
    with np.load(path) as data:
        assert sum(p.size for p in jax.tree.leaves(potential.params)) == sum(
            data[name].size for name in data
        )
        np.testing.assert_array_equal(
            potential.params["params"]["layer_0"]["v_features"]["kernel"],
            data["layers_0/attention_block/Wv1"],
        )


def test_weights_of_another_model_are_rejected(saved):
    path, settings = saved
    with pytest.raises(WeightsError, match="not part of the model"):
        mlff.load(path, {**settings, "num_layers": settings["num_layers"] - 1}, elements=[1])
    with pytest.raises(WeightsError, match="hyperparameters belong to other weights"):
        mlff.load(path, {**settings, "num_layers": settings["num_layers"] + 1}, elements=[1])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights.pkl: no such file"):
        mlff.load(tmp_path / "weights.pkl", {}, elements=[1])


def test_an_archive_that_requires_another_unzip_is_an_error(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, kernel=np.ones(3))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 210  # the required ZIP version, times ten
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="invalid or truncated .npz file"):
        mlff.read(path)

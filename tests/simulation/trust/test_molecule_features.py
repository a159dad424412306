"""Tests for molecular features of a force field: means over atoms, caching, selection."""

from pathlib import Path

import numpy as np
import pytest

from mlip_jax import defaults
from mlip_jax.checkpoint import CheckpointError
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.datasets.selection import data_split
from mlip_jax.potential import Potential
from mlip_jax.simulation import energies
from mlip_jax.simulation.trust import molecule_features
from tests.tasks.property_runs import write_force_field

DATA = Path(__file__).parents[2] / "data/gfn2_small.hdf5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    write_force_field(path / "ff")
    return path


def options(folder, **changes):
    data = defaults.train_defaults().data
    data.path, data.directory, data.elements = str(DATA), str(folder / "data"), ("H", "C", "N", "O")
    data.num_train, data.num_valid, data.num_test = 80, 10, 10
    data.num_molecules, data.selection, data.selection_force_field = (
        5,
        "embedding",
        str(folder / "ff"),
    )
    data.update(changes)
    return data


def test_means_over_atoms(folder):
    potential, loaded = Potential.load(folder / "ff"), source.load(options(folder))
    some = loaded.indices[::-7]
    features = energies.mean_features(potential, loaded.store, some, batch_size=3)
    columns = loaded.store.take(some)
    of_atoms = energies.atom_features(potential, columns)
    expected = [of_atoms[a:b].mean(0) for a, b in zip(columns.offsets[:-1], columns.offsets[1:])]
    assert features.shape == (len(some), 8) and features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_computed_once_per_force_field_and_used_for_selection(folder, monkeypatch):
    data = options(folder)
    loaded, embed = source.load(data), molecule_features.of(data)
    train = data_split.split_data(loaded, data, embed)["train"]
    assert len(np.unique(loaded.store.index("molecule")[train])) == len(train) == 5
    drawn = data_split.split_data(loaded, options(folder, selection="random"))["train"]
    assert set(train.tolist()) != set(drawn.tolist())
    kept = list((loaded.store.path / "features").iterdir())
    assert len(kept) == 1 and kept[0].name.startswith(Potential.load(folder / "ff").digest())
    monkeypatch.setattr(molecule_features, "mean_features", None)
    for seed in (0, 1):
        other = options(folder, split_seed=seed)
        data_split.split_data(loaded, other, molecule_features.of(other))
    np.testing.assert_array_equal(data_split.split_data(loaded, data, embed)["train"], train)


def test_invalid_options_are_rejected(folder):
    with pytest.raises(ConfigError, match="requires the workdir of a trained force field"):
        molecule_features.of(options(folder, selection_force_field=""))
    with pytest.raises(CheckpointError, match="no such directory"):
        molecule_features.of(options(folder, selection_force_field=str(folder / "nothing")))
    assert molecule_features.of(options(folder, selection="maxmin")) is None
    data = options(folder, elements=None)
    with pytest.raises(ValueError, match="data.selection_force_field: .* was not trained on"):
        data_split.split_data(source.load(data), data, molecule_features.of(data))

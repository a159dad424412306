"""Fixtures for tests of data as set in config.data."""

from pathlib import Path

import pytest

from mlip_jax import defaults
from mlip_jax.datasets.store.conversion import ConversionSpec, convert

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"


@pytest.fixture
def options(tmp_path):
    """Return options(path, ...) -> config.data of a run in tmp_path/data without filters."""
    (tmp_path / "data").mkdir()

    def make(path=None, **changes):
        data = defaults.train_defaults().data
        data.directory = str(tmp_path / "data")
        data.elements = None
        if path is not None:
            data.path = str(path)
        data.update(changes)
        return data

    return make


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory):
    """A store of DATA in several shards."""
    return convert(
        ConversionSpec(str(DATA), atoms_per_shard=300),
        tmp_path_factory.mktemp("shared") / "store",
        num_processes=1,
        progress=False,
    )

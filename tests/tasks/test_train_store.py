"""Tests for training on an existing store."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.datasets.selection.split_files import load_split
from mlip_jax.datasets.store.store import Store

pytestmark = pytest.mark.slow  # whole runs

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests/data/gfn2_small.hdf5"
SMALL = {
    "data.split_seed": 1,
    "model.options.num_features": 8,
    "model.options.num_layers": 1,
    "model.options.num_radial": 6,
    "train.num_steps": 6,
    "train.batch_size": 4,
    "train.log_every": 2,
    "train.valid_every": 3,
    "train.checkpoint_every": 3,
    "optimizer.warmup_steps": 2,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-3,
}


def run(config, workdir, cwd, fields):
    """Run a command and return its exit code and output, with white space folded."""
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "mlip_jax.main",
            f"--config={REPOSITORY}/configs/{config}",
            f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in fields.items()),
        ],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env=dict(os.environ, GLIBC_TUNABLES="", PYTHONPATH=str(REPOSITORY)),
    )
    return process.returncode, " ".join((process.stdout + process.stderr).split())


def train(path, workdir):
    return run("spice.py:painn", workdir, workdir.parent, SMALL | {"data.path": path})


def convert(path, folder, **fields):
    fields = {"data.path": path, "store.atoms_per_shard": 100, "store.num_processes": 1} | fields
    code, output = run("convert.py", folder, folder.parent, fields)
    assert code == 0, output
    return Store(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with a run on the file, a store of many shards, and a run on the store."""
    folder = tmp_path_factory.mktemp("trained")
    store = convert(DATA, folder / "store")
    assert len(store.manifest["shards"]) > 5
    for path, name in ((DATA, "of_file"), (folder / "store", "of_store")):
        code, output = train(path, folder / name)
        assert code == 0, output
    return folder


def arrays(workdir):
    store = CheckpointStore(workdir / "checkpoints", read_only=True)
    restored = store.restore()
    store.close()
    return restored.arrays


def test_training_on_a_store_equals_training_on_the_file(trained):
    scores = [
        json.loads((trained / name / "metrics.json").read_text())
        for name in ("of_file", "of_store")
    ]
    for part in ("train", "valid", "test"):
        errors = [{k: v for k, v in s[part].items() if isinstance(v, int | float)} for s in scores]
        assert errors[0] == errors[1] and np.isfinite(errors[0]["energy_mae_mev_per_atom"])
        assert errors[0]["num_structures"] > 0
    parts = [load_split(trained / name / "splits.npz")[0] for name in ("of_file", "of_store")]
    for name in parts[0]:
        np.testing.assert_array_equal(parts[0][name], parts[1][name])
    expected, found = (arrays(trained / name) for name in ("of_file", "of_store"))
    assert set(expected) == set(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_given_store_is_not_converted_again(trained):
    stores = list((trained / "data" / "stores").iterdir())
    assert len(stores) == 1 and stores[0].name.startswith("gfn2_small-"), "only that of the file"


def test_a_changed_store_is_an_error(trained, tmp_path):
    """The folder of the store now contains other molecules, so the split differs."""
    changed = tmp_path / "changed.hdf5"
    shutil.copy(DATA, changed)
    with h5py.File(changed, "a") as file:
        del file["urea"], file["glycine"]
    aside = trained / "aside"
    (trained / "store").rename(aside)
    try:
        convert(changed, trained / "store")
        before = arrays(trained / "of_store")
        code, output = train(trained / "store", trained / "of_store")
        assert code != 0 and "Traceback" not in output
        assert "splits.npz: the data or the split have changed since this run was started" in output
        assert "--workdir" in output
        after = arrays(trained / "of_store")
        assert all(np.array_equal(after[k], v) for k, v in before.items())
    finally:
        shutil.rmtree(trained / "store", ignore_errors=True)
        aside.rename(trained / "store")

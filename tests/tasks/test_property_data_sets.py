"""Tests for property predictors on small files in the layout of published data sets."""

import importlib
import json

import numpy as np
import pytest

from mlip_jax.predictor import Predictor
from mlip_jax.tasks import property as task
from tests.tasks.property_runs import config

pytestmark = pytest.mark.usefixtures("blank_figures")

CASES = {
    "molecule3d-random": ("molecule3d", ("gap", "dipole"), {"data__split": "official"}, {}),
    "molecule3d-scaffold": (
        "molecule3d",
        ("gap",),
        {"data__split": "official"},
        {"split": "scaffold"},
    ),
    "qm9": ("qm9", ("gap", "polarizability", "mulliken_charges"), {}, {}),
    "qm7x": ("qm7x", ("dipole", "hirshfeld_charges"), {"data__split": "random"}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_predictor_for_each_data_set(name, tmp_path):
    reader, targets, changes, options = CASES[name]
    path, own = importlib.import_module(f"tests.datasets.readers.samples.{reader}").make(tmp_path)
    c = config(
        tmp_path, property__targets=targets, train__num_steps=6, train__batch_size=2, **changes
    )
    c.data.path, c.data.reader = str(path), reader
    c.data.reader_options = "; ".join(f"{k}={v}" for k, v in (own | options).items())
    if "polarizability" in targets:
        c.property.heads = {"polarizability": {"pooling": "attention", "weight": 0.5}}
    task.run(c, tmp_path / "run")
    scores = json.loads((tmp_path / "run/metrics.json").read_text())["scores"]
    assert all(np.isfinite(scores["train"][t]["mae"]) for t in targets)
    assert sorted(t.name for t in Predictor.load(tmp_path / "run").targets) == sorted(targets)
    if reader == "molecule3d":
        samples = importlib.import_module("tests.datasets.readers.samples.molecule3d")
        expected = samples.SCAFFOLD if options else samples.RANDOM
        assert json.loads((tmp_path / "run/split_records.json").read_text()) == {
            part: sorted(records) for part, records in expected.items()
        }

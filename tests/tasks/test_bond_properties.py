"""Tests for predictors that read bonds: from a table of SMILES to predictions, without geometries."""

import csv
import json

import ml_collections
import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets.smiles import embedding
from mlip_jax.defaults import predict_defaults
from mlip_jax.models.layers.batch_norm import STATISTICS
from mlip_jax.predictor import Predictor
from mlip_jax.simulation.trust.intervals import ValidationErrors
from mlip_jax.tasks import predict, train
from mlip_jax.tasks import property as task
from tests.tasks.property_runs import NAMES, config

pytestmark = pytest.mark.usefixtures("blank_figures")

OPTIONS = {"num_features": 8, "num_layers": 2}


def bond_config(folder, **changes):
    c = config(folder, **{"model__name": "gin_virtual", "train__num_steps": 24, **changes})
    c.data.path, c.data.reader, c.data.reader_options = str(folder / "molecules.csv"), "auto", ""
    c.model.options = ml_collections.ConfigDict(OPTIONS)
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table of molecules with an invalid SMILES, and the workdir of a run on it."""
    folder = tmp_path_factory.mktemp("bonds")
    lines = [f"{smiles},{len(smiles) / 3:.3f}" for smiles in [*NAMES.values(), "C1CC"]]
    (folder / "molecules.csv").write_text("\n".join(["smiles,gap", *lines]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "_embed_conformers", not_called)
        task.run(bond_config(folder), folder / "run")
    return folder


def not_called(*args):
    raise AssertionError("a molecule was embedded")


def test_a_run_on_a_table_of_smiles(folder):
    """Nothing is embedded, and the running statistics follow the batches."""
    scores = json.loads((folder / "run/metrics.json").read_text())
    assert scores["scores"]["test labels"]["gap"]["count"] == 6
    assert scores["intervals"]["test labels"]["gap"]["requested"] == 0.9
    predictor = Predictor.load(folder / "run")
    statistics = predictor.params[STATISTICS]["backbone"]["norm_0"]
    assert np.abs(statistics["mean"]).max() > 0.01 and np.isfinite(statistics["variance"]).all()
    assert len(ValidationErrors.load(folder / "run/intervals.npz").distance) == 6
    again = predictor.predict(["CCO", "OCC"])["gap"]
    assert again[0] == pytest.approx(again[1], rel=1e-5) and np.isfinite(again).all()


def test_predictions_of_a_file(folder, monkeypatch, caplog):
    """Molecules that fail are reported; the rest are predicted."""
    caplog.set_level("INFO")
    monkeypatch.setattr(embedding, "_embed_conformers", not_called)
    (folder / "new.smi").write_text("CCO ethanol\nC1CC bad\n[Xe]\nCC(=O)[O-].[NH4+] salt\n")
    c = predict_defaults()
    c.predictor, c.input, c.num_processes = str(folder / "run"), str(folder / "new.smi"), 1
    predict.run(c, folder / "predicted")
    with open(folder / "predicted/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["status"] for r in rows] == ["predicted", "failed", "failed", "predicted"]
    assert rows[0]["geometry"] == "not embedded" and "not trained on Xe" in rows[2]["reason"]
    report = (folder / "predicted/report.html").read_text()
    assert "1 × RDKit cannot read the SMILES …<" in report
    assert "given geometries" not in caplog.text
    expected = Predictor.load(folder / "run").predict("CCO")["gap"][0]
    assert float(rows[0]["gap"]) == pytest.approx(expected, rel=1e-4)
    c.force_field = str(folder / "run")
    with pytest.raises(ConfigError, match="the predictor reads bonds"):
        predict.run(c, folder / "relaxed")


def test_a_run_initialized_from_another_has_its_statistics(folder):
    c = bond_config(folder, init__workdir=str(folder / "run"), train__num_steps=1)
    c.optimizer.learning_rate, c.optimizer.schedule = 1e-20, "constant"
    task.run(c, folder / "second")
    first, second = (Predictor.load(folder / name).params for name in ("run", "second"))
    of_first, of_second = (p["params"]["backbone"]["layer_1_0"]["kernel"] for p in (first, second))
    np.testing.assert_allclose(of_first, of_second, rtol=1e-5)
    of_first, of_second = (p[STATISTICS]["backbone"]["norm_0"]["mean"] for p in (first, second))
    assert np.abs(of_first - of_second).max() < 0.5 * np.abs(of_first).max()  # from zero: about 0.9


def test_what_needs_positions_is_an_error(folder):
    for k, changes in enumerate(({"data__test_geometries": ("etkdg",)}, {"align__noise": 0.1})):
        with pytest.raises(ConfigError, match="gin_virtual reads the bonds"):
            task.run(bond_config(folder, **changes), folder / f"wrong-{k}")
    from mlip_jax.defaults import train_defaults

    c = train_defaults()
    c.model.name = "gin_virtual"
    with pytest.raises(ValueError, match="reads the bonds of a SMILES"):
        train.run(c, folder / "wrong")

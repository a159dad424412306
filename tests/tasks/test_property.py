"""Tests for the task `property`: training from scratch and from a force field, and its files."""

import csv
import json

import numpy as np
import pytest

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.config import ConfigError
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.potential import Potential
from mlip_jax.predictor import Predictor, begin_from, pretrained
from mlip_jax.simulation.geometry_sources import Sources
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.tasks import property as task
from mlip_jax.tasks.property_training.data import PropertyData
from tests.tasks.property_runs import NAMES, config, write_data, write_force_field

pytestmark = pytest.mark.usefixtures("blank_figures")

GEOMETRIES = ("labels", "pm3:first", "etkdg", "etkdg:2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("property")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def scratch(folder):
    """Workdir of a run from scratch, tested at three geometries."""
    task.run(
        config(folder, data__test_geometries=GEOMETRIES, train__num_steps=72), folder / "scratch"
    )
    return folder / "scratch"


def scores(workdir):
    return json.loads((workdir / "metrics.json").read_text())["scores"]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_files_of_a_run(scratch):
    found = scores(scratch)
    names = {"train", "valid", *(f"test {source}" for source in GEOMETRIES)}
    assert set(found) == names
    assert {part: of["gap"]["count"] for part, of in found.items()} == {
        "train": 12,
        "valid": 6,
        "test labels": 6,
        "test pm3:first": 6,
        "test etkdg": 6,
        "test etkdg:2": 6,  # means over two conformers
    }
    rows = table(scratch / "predictions_test_labels.csv")
    errors = [abs(float(r["gap"]) - float(r["gap_predicted"])) for r in rows]
    assert np.mean(errors) == pytest.approx(found["test labels"]["gap"]["mae"], rel=1e-4)
    by_place = table(scratch / "predictions_test_etkdg.csv")
    assert [r["gap"] for r in by_place] == [r["gap"] for r in rows]
    assert [r["gap_predicted"] for r in by_place] != [r["gap_predicted"] for r in rows]
    assert "gap" in (scratch / "report.html").read_text()
    assert table(scratch / "metrics.csv")[-1]["valid_gap_mae"]
    assert Domain.load(scratch / "domain.npz").border > 0


def test_no_molecule_is_in_two_splits_and_the_split_is_reusable(scratch, folder):
    parts = json.loads((scratch / "split_records.json").read_text())
    assert sorted(sum(parts.values(), [])) == list(range(len(NAMES)))
    other = PropertyData.load(
        config(folder, data__split_seed=5, data__held_out=str(scratch / "split_records.json")),
        _create_folder(folder / "held_out"),
    )
    records = other.loaded.store.index("record")[other.index]
    for name in ("train", "valid"):
        assert not set(records[other.splits[name]].tolist()) & set(parts["test"])


def test_elements_without_training_data_are_excluded(folder, caplog):
    """Detects molecules with such elements in the validation loss."""
    nitrogen = [k for k, name in enumerate(NAMES) if "N" in name]
    others = [k for k, name in enumerate(NAMES) if "N" not in name]
    split = {"train": others[2:], "valid": [*nitrogen[:3], others[0]], "test": nitrogen[3:]}
    (folder / "split.json").write_text(json.dumps(split))
    workdir = _create_folder(folder / "unseen")
    data = PropertyData.load(config(folder, data__split_files=str(folder / "split.json")), workdir)
    assert len(data.splits["valid"]) == 1 and len(data.splits["test"]) == 0
    assert {k: (len(u), u.structures_by_element) for k, u in data.unseen.items()} == {
        "valid": (3, {"N": 3}),
        "test": (len(nitrogen) - 3, {"N": len(nitrogen) - 3}),
    }
    assert "3 of 4 valid structures with elements that the training split lacks" in caplog.text


def _create_folder(path):
    path.mkdir(exist_ok=True)
    return path


def test_training_lowers_the_error_and_the_predictor_predicts(scratch, folder):
    assert scores(scratch)["train"]["gap"]["mae"] < 0.7 * np.std(
        [float(r["gap"]) for r in table(scratch / "predictions_train.csv")]
    )
    predictor = Predictor.load(scratch)
    data = PropertyData.load(config(folder), _create_folder(folder / "again"))
    columns = data.loaded.store.take(data.index[data.splits["test"]])
    predicted = predictor.predict(columns, batch_size=2, with_embedding=True)
    np.testing.assert_allclose(
        predicted["gap"],
        [float(r["gap_predicted"]) for r in table(scratch / "predictions_test_labels.csv")],
        rtol=1e-4,
    )
    assert predicted["embedding"].shape == (6, 8)
    atoms = [data.loaded.store[int(i)] for i in data.index[data.splits["test"]]]
    assert [a.molecule for a in atoms] == [
        r["molecule"] for r in table(scratch / "predictions_test_labels.csv")
    ]
    with pytest.raises(ValueError, match="was not trained on"):
        from ase import Atoms

        predictor.predict([Atoms("Xe")])


def test_a_finished_run_only_rewrites_its_report(scratch, folder):
    before = (scratch / "metrics.csv").read_bytes()
    task.run(config(folder, data__test_geometries=GEOMETRIES, train__num_steps=72), scratch)
    assert (scratch / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_is_tested_at_other_geometries(folder):
    task.run(config(folder, train__num_steps=6), folder / "again_tested")
    steps = (folder / "again_tested/metrics.csv").read_bytes()
    task.run(
        config(folder, train__num_steps=6, data__test_geometries=("pm3",)), folder / "again_tested"
    )
    assert "test pm3" in scores(folder / "again_tested") and "test labels" not in scores(
        folder / "again_tested"
    )
    assert (folder / "again_tested/metrics.csv").read_bytes() == steps


def test_training_from_a_force_field(folder):
    params = write_force_field(folder / "ff", name="painn")
    c = config(
        folder,
        model__name="",
        init__workdir=str(folder / "ff"),
        init__train="heads",
        train__num_steps=12,
    )
    c.model.options = {}
    task.run(c, folder / "heads")
    found = Predictor.load(folder / "heads").params["params"]
    for name, part in params["params"].items():
        for a, b in zip(_leaves(found["backbone"][name]), _leaves(part), strict=True):
            np.testing.assert_array_equal(a, b)
    assert any(x.any() for x in _leaves(found["head_gap"]["final"]))


def _leaves(tree):
    import jax

    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_fine_tuning_starts_from_all_stored_parameters(scratch, folder):
    model, arrays, _ = pretrained(scratch)
    assert model["name"] == "painn" and {k.split("/")[0] for k in arrays} == {
        "backbone",
        "head_gap",
    }
    c = config(
        folder,
        init__workdir=str(scratch),
        align__weight=0.1,
        align__noise=0.05,
        align__frames="pm3,DFT_1st",
        data__valid_geometry="pm3",
        data__test_geometries=("pm3", "labels"),
        train__num_steps=12,
        optimizer__lr_multipliers="params/backbone/*=0.1",
    )
    task.run(c, folder / "tuned")
    tuned = Predictor.load(folder / "tuned")
    assert [name for name, _ in tuned.model.heads] == ["displacement", "gap"]
    assert table(folder / "tuned/metrics.csv")[-2]["train_alignment"]
    assert set(scores(folder / "tuned")) == {"train", "valid", "test pm3", "test labels"}


@pytest.mark.slow
def test_denoising_without_properties(folder):
    c = config(
        folder,
        property__targets=(),
        align__weight=1.0,
        align__loss="mse",
        align__noise=0.05,
        data__test_geometries=(),
        train__num_steps=12,
    )
    task.run(c, folder / "denoised")
    assert float(table(folder / "denoised/metrics.csv")[-1]["valid_alignment"]) > 0
    assert json.loads((folder / "denoised/metrics.json").read_text())["test"] is None
    assert set(pretrained(folder / "denoised")[1]) and not (folder / "denoised/domain.npz").exists()


@pytest.mark.slow
def test_dens_trains_a_force_field_that_initializes_predictors(folder):
    c = config(
        folder,
        property__targets=(),
        dens__weight=0.5,
        dens__share=0.5,
        align__noise=0.05,
        data__test_geometries=(),
        train__num_steps=12,
    )
    with pytest.raises(ConfigError, match="model.options.force_encoding=True"):
        task.run(c, folder / "dens")
    c.model.options.force_encoding = True
    task.run(c, folder / "dens")
    rows = table(folder / "dens/metrics.csv")
    assert rows[-1]["valid_force_mae_mev_per_ang"] and any(row["train_denoising"] for row in rows)
    c = config(folder, model__name="", init__workdir=str(folder / "dens"), train__num_steps=6)
    c.model.options = {}
    task.run(c, folder / "after_dens")
    assert np.isfinite(scores(folder / "after_dens")["test labels"]["gap"]["mae"])


def test_a_checkpoint_that_does_not_fit_is_an_error_with_the_differences(folder, scratch):
    write_force_field(folder / "wide", name="painn", num_features=16)
    with pytest.raises(
        CheckpointError,
        match=r"wide cannot initialize this model: in 'backbone'(.|\n)*embedding: stored "
        r"\(119, 16\), expected \(119, 8\)(.|\n)*Leave config.model.name empty",
    ):
        task.run(config(folder, init__workdir=str(folder / "wide")), folder / "misfit")
    params = Predictor.load(scratch).params
    arrays = {
        k: v for k, v in pretrained(scratch)[1].items() if not k.endswith("message_0_layer_1/bias")
    }
    with pytest.raises(CheckpointError, match="missing: message_0_layer_1/bias"):
        begin_from(params, arrays, "runs/x")


def test_each_kind_of_workdir_is_opened_only_as_its_kind(folder, scratch):
    write_force_field(folder / "ff2")
    with pytest.raises(CheckpointError, match="contains a force field, not a predictor"):
        Predictor.load(folder / "ff2")
    with pytest.raises(
        CheckpointError, match="contains a predictor of properties, not a force field"
    ):
        Potential.load(scratch)


def test_relaxed_geometries_are_computed_once(folder):
    write_force_field(folder / "relaxer")
    data = PropertyData.load(config(folder), _create_folder(folder / "sources"))
    loads = []

    def load():
        loads.append(1)
        return Potential.load(folder / "relaxer")

    sources = Sources(data.loaded.store, data.index, folder / "kept", load, max_steps=3)
    first = sources.get("relaxed(pm3:first)", np.arange(4))
    files = sorted((folder / "kept").iterdir())
    again = sources.get("relaxed(pm3:first)", np.arange(4))
    assert sorted((folder / "kept").iterdir()) == files and len(files) == 1
    np.testing.assert_array_equal(
        first.rows.take(first.index).positions, again.rows.take(again.index).positions
    )
    start = sources.get("pm3:first", first.samples)
    assert (first.rows.take(first.index).numbers == start.rows.take(start.index).numbers).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"data__test_geometries": ("DFT_3rd",)},
            ConfigError,
            "unknown geometry 'DFT_3rd'.*DFT_1st, pm3",
        ),
        ({"data__test_geometries": ("relaxed(pm3)",)}, ConfigError, "set data.force_field"),
        ({"property__targets": ("gop",)}, DatasetError, "Did you mean 'gap'"),
        ({"model__name": ""}, ConfigError, "model.name and init.workdir are both empty"),
        (
            {"align__weight": 0.1, "align__noise": 0.1, "data__geometry": "pm3"},
            ConfigError,
            "Set data.geometry='labels'",
        ),
        ({"init__train": "head"}, ConfigError, "Did you mean 'heads'"),
        (
            {"align__weight": 0.1, "align__noise": 0.1, "align__loss": "mae"},
            ConfigError,
            "a model of bonds that refines positions requires 'mae'",
        ),
        (
            {"optimizer__lr_multipliers": "params/backbone"},
            ValueError,
            "optimizer.lr_multipliers must be",
        ),
        ({"property__heads": {"homo": {}}}, ConfigError, "unknown target in property.heads"),
    ],
)
def test_inconsistent_configs_are_errors(folder, tmp_path, changes, error, message):
    heads = changes.pop("property__heads", None)
    c = config(folder, **changes)
    if heads:
        c.property.heads = heads
    with pytest.raises(error, match=message):
        task.run(c, tmp_path / "run")

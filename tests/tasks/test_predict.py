"""Tests for the task `predict`: one row per molecule, resumption and uncertainty."""

import contextlib
import csv
import dataclasses
import shutil
import types

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule

from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules.arguments import molecule_records
from mlip_jax.defaults import predict_defaults
from mlip_jax.predictor import Predictor
from mlip_jax.tasks import predict
from mlip_jax.tasks import property as property_task
from mlip_jax.tasks.property_prediction.attributions import has_order_of_smiles
from mlip_jax.tasks.property_prediction.conformers import boltzmann_weights
from mlip_jax.tasks.property_prediction.ensemble import Ensemble
from mlip_jax.tasks.property_prediction.function import predict as predict_molecules
from mlip_jax.workdir import WorkdirError
from tests.tasks.property_runs import config, write_data, write_force_field

pytestmark = pytest.mark.usefixtures("blank_figures")

SMILES = ["CCO ethanol", "C methane", "C1CC bad", "CCN", "[Xe]", "c1ccccc1 benzene", "CC(=O)O"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    write_data(folder)
    property_task.run(config(folder, model__name="schnet", train__num_steps=12), folder / "gap-0")
    write_another_member(folder / "gap-0", folder / "gap-1")
    (folder / "molecules.smi").write_text("\n".join(SMILES) + "\n")
    write_force_field(folder / "ff", energy_scale=100.0)
    return folder


def write_another_member(workdir, target, **data):
    """Copy a trained predictor with other parameters, which takes less time than training one.

    Args:
      workdir: Workdir of the predictor.
      target: Workdir of the copy.
      **data: Changes of `config.data` in its checkpoint.
    """
    shutil.copytree(workdir, target)
    rng = np.random.default_rng(1)
    with contextlib.closing(CheckpointStore(target / "best")) as store:
        best = store.restore()
        best.metadata["config"]["data"] |= data
        arrays = {
            name: values + rng.normal(0, 0.02, values.shape).astype(values.dtype)
            for name, values in best.arrays.items()
        }
        store.save(best.step, arrays, best.metadata)


def run(folder, name, **changes):
    c = predict_defaults()
    c.predictor, c.input, c.num_processes = str(folder / "gap-0"), str(folder / "molecules.smi"), 1
    c.force_field = "none"
    c.update(changes)
    predict.run(c, folder / name)
    with open(folder / name / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_molecule(folder):
    rows = run(folder, "one", batch_size=2)
    assert [row["status"] for row in rows] == ["predicted"] * 2 + [
        "failed",
        "predicted",
        "failed",
    ] + ["predicted"] * 2
    assert [row["name"] for row in rows] == ["ethanol", "methane", "bad", "", "", "benzene", ""]
    assert (
        "cannot read the SMILES" in rows[2]["reason"] and "not trained on Xe" in rows[4]["reason"]
    )
    done = [row for row in rows if row["status"] == "predicted"]
    for row in done:
        expected, outside = float(row["gap_expected_error"] or "nan"), row["outside_domain"]
        assert (outside == "0" and expected >= 0) or (outside == "1" and np.isnan(expected))
    assert all(
        (float(row["domain_distance"]) > 1) == (row["outside_domain"] == "1") for row in done
    )
    report = (folder / "one/report.html").read_text()
    assert "cannot read the SMILES" in report and "benzene" in report
    # six validation molecules are too few for 90 %, but not for 60 %
    assert {row["gap_lower"] for row in rows} == {""}
    row = run(folder, "interval", limit=1, coverage=0.6)[0]
    low, gap, high = (float(row[name]) for name in ("gap_lower", "gap", "gap_upper"))
    assert low < gap < high and high - gap == pytest.approx(gap - low, rel=1e-3)
    assert "Attributions of atoms: gap" in report and "Gradient times input" in report
    # the condition of intervals is with intervals only, and failed molecules have their usual names
    condition = "not for molecules outside the domain"
    assert condition not in report and "<td>[Xe]</td><td>[Xe]</td>" in report
    assert condition in (folder / "interval/report.html").read_text()


def test_an_ensemble_has_a_mean_and_a_spread(folder):
    both = run(folder, "both", predictor=f"{folder / 'gap-0'},{folder / 'gap-1'}")
    single_runs = [
        run(folder, f"alone-{seed}", predictor=str(folder / f"gap-{seed}")) for seed in (0, 1)
    ]
    for b, *single in zip(both, *single_runs):
        if b["status"] == "predicted":
            values = [float(s["gap"]) for s in single]
            assert float(b["gap"]) == pytest.approx(np.mean(values), rel=1e-5)
            assert float(b["gap_std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-4)
    assert "gap_std" not in single_runs[0][0]


def test_a_rerun_predicts_only_new_molecules(folder, monkeypatch):
    counted, real = [], predict.Ensemble.predict
    monkeypatch.setattr(
        predict.Ensemble,
        "predict",
        lambda self, molecules, *args: (counted.extend(molecules), real(self, molecules, *args))[1],
    )
    assert len(run(folder, "more", limit=3)) == 3
    rows = run(folder, "more")
    assert len(rows) == len(SMILES) and len(counted) == 5
    assert [(row["index"], row["gap"]) for row in rows] == [
        (row["index"], row["gap"]) for row in run(folder, "more")
    ]
    with pytest.raises(WorkdirError, match="of other molecules"):
        (folder / "other.smi").write_text("CCO\n")
        molecules = (folder / "molecules.smi").read_text()
        (folder / "molecules.smi").write_text("CCCO\n" + molecules)
        try:
            run(folder, "more")
        finally:
            (folder / "molecules.smi").write_text(molecules)


def test_molecules_are_relaxed_first(folder):
    plain, relaxed = (
        run(folder, "plain"),
        run(folder, "relaxed", force_field=str(folder / "ff"), max_steps=2, fmax=1e-5),
    )
    assert plain[0]["geometry"] == "embedded" and relaxed[0]["geometry"].startswith(
        "embedded, relaxed"
    )
    assert plain[0]["gap"] != relaxed[0]["gap"]


def test_predictions_are_averages_over_conformers(folder):
    """By the energies of the force field, or plain; a molecule without conformers has failed."""
    options = {"num_conformers": 3, "force_field": str(folder / "ff"), "max_steps": 1, "limit": 3}
    plain = run(folder, "plain-mean", **options)
    weighted = run(
        folder, "weighted", conformer_weights="boltzmann", temperature=1e9, coverage=0.6, **options
    )
    assert [row["status"] for row in plain] == ["predicted", "predicted", "failed"]
    assert plain[0]["geometry"].endswith("; 3 of 3 conformers")
    # at an infinite temperature, all weights are equal
    assert float(weighted[0]["gap"]) == pytest.approx(float(plain[0]["gap"]), rel=1e-5)
    cold = run(folder, "cold", conformer_weights="boltzmann", temperature=1e-3, **options)
    assert cold[0]["gap"] != plain[0]["gap"]
    with pytest.raises(ConfigError, match="requires the energies of a force field"):
        run(folder, "without", conformer_weights="boltzmann")


def test_boltzmann_weights():
    """Energies far below zero must not overflow."""
    energies = np.array([-1e5, -1e5 + units.kB * 300 * np.log(3)])
    np.testing.assert_allclose(boltzmann_weights(energies, 300.0), [0.75, 0.25], rtol=1e-4)


def test_attributions_of_a_mean_add_up(folder):
    """Detects attributions to padding or to the atoms of other molecules of a batch."""
    predictor = Predictor.load(folder / "gap-0")
    alone = predictor.attributions(["CCO"])[0]["gap"]
    found = predictor.attributions(["C", "CCO", "c1ccccc1"])
    assert [len(f["gap"]) for f in found] == [5, 9, 12]
    np.testing.assert_allclose(found[1]["gap"], alone, rtol=1e-3, atol=1e-6)


def test_attributions_are_drawn_only_for_atoms_in_the_order_of_the_smiles():
    """Detects pictures of a SMILES with the values of a file whose atoms have another order."""
    from rdkit import Chem

    [[record]] = molecule_records("CCO")
    assert has_order_of_smiles(record)
    molecule = Chem.Mol(record.bonds)
    for order in ([2, 1, 0, 3, 4, 5, 6, 7, 8], [0, 1, 2, 8, 3, 4, 5, 6, 7]):
        bonds = Chem.RenumberAtoms(molecule, order).ToBinary()
        assert not has_order_of_smiles(dataclasses.replace(record, bonds=bonds))
    assert not has_order_of_smiles(dataclasses.replace(record, bonds=None))


def test_invalid_configs_are_errors(folder):
    for changes, message in (
        ({"predictor": ""}, "predictor is required"),
        ({"input": ""}, "input is required"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"fmax": 0.0}, "fmax must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(folder, "wrong", **changes)


def test_from_python(folder):
    found = Predictor.load(folder / "gap-0").predict([molecule("CH3CH2OH"), molecule("CH4")])
    assert found["gap"].shape == (2,) and np.isfinite(found["gap"]).all()
    # no arrays of features unless requested
    assert "embedding" not in found
    assert Predictor.load(folder / "gap-0").predict("CCO")["gap"].shape == (1,)
    columns = predict_molecules([folder / "gap-0", folder / "gap-1"], ["CCO", "C"], coverage=0.6)
    assert {"gap", "gap_std", "gap_lower", "gap_upper", "outside_domain"} <= set(columns)
    assert (columns["gap_lower"] < columns["gap_upper"]).all()
    with pytest.raises(ValueError, match="not trained on Xe"):
        predict_molecules(folder / "gap-0", ["[Xe]"])


@pytest.mark.parametrize("molecules", [[], [[]]])
def test_no_molecules_are_an_error_from_python(molecules, monkeypatch):
    """Detects a message about values to unpack."""
    monkeypatch.setattr(Ensemble, "load", lambda paths: types.SimpleNamespace(reads_positions=True))
    with pytest.raises(ValueError, match="received no molecule"):
        predict_molecules("gap", molecules)


def test_a_failed_molecule_or_conformer_does_not_stop_predictions_from_python(folder, caplog):
    groups = ["C1CC", "CCO", "[Xe]", "C"]
    found = predict_molecules(folder / "gap-0", groups)
    assert np.isnan(found["gap"]).tolist() == [True, False, True, False]
    assert "cannot read the SMILES 'C1CC'" in found["failure"][0]
    assert "not trained on Xe" in found["failure"][2] and found["failure"][1] == ""
    alone = predict_molecules(folder / "gap-0", ["CCO"])
    assert found["gap"][1] == pytest.approx(alone["gap"][0], rel=1e-4)
    ethanol, xenon = molecule("CH3CH2OH"), Atoms("Xe")
    mixed = predict_molecules(folder / "gap-0", [[ethanol, xenon, ethanol]])
    assert mixed["failure"][0] == "" and np.isfinite(mixed["gap"]).all()
    assert "predicted from 2 of 3 conformers" in caplog.text


def test_a_checkpoint_does_not_choose_the_force_field(folder):
    """Detects a checkpoint of other people that loads a file without the user's command."""
    write_another_member(folder / "gap-0", folder / "foreign", force_field="/any/file")
    with pytest.raises(ConfigError, match="--config.force_field=/any/file .*force_field=none"):
        run(folder, "chosen", predictor=str(folder / "foreign"), force_field=None)

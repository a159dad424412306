"""Tests for the task `evaluate`: errors, unknown elements, files without labels, resumption."""

import csv
import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

import mlip_jax
from mlip_jax import EnsembleCalculator, MLIPCalculator, Potential
from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.defaults import evaluate_defaults
from mlip_jax.simulation.batch_prediction import BatchPredictor, load_members
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import FILE
from mlip_jax.simulation.trust.ensemble_calibration import Calibration, Scale
from mlip_jax.structure import from_ase
from mlip_jax.tasks import evaluate
from mlip_jax.tasks.force_field_evaluation import evaluation
from mlip_jax.tasks.force_field_evaluation.data import from_atoms
from mlip_jax.workdir import WorkdirError
from tests.tasks.property_runs import write_force_field

NAMES = ["H2O", "CH4", "CH3OH", "CH3Cl", "NH3", "C2H2"]


def labelled(names=NAMES, seed=0):
    """Molecules with artificial energies and forces."""
    frames, rng = [], np.random.default_rng(0)
    for k, name in enumerate(names):
        atoms = molecule(name)
        atoms.rattle(0.05, seed=seed + k)
        atoms.info["config_type"] = "even" if k % 2 == 0 else "odd"
        forces = rng.normal(size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-10.0 * len(atoms), forces=forces)
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two force fields, the first with a domain, and a labelled file."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed in (0, 1):
        write_force_field(folder / f"ff{seed}", seed)
    known, valid = (
        Columns.from_structures(from_ase(atoms) for atoms in labelled(["H2O", "CH4", "NH3"], seed))
        for seed in (10, 20)
    )
    errors = np.full((len(valid.numbers), 3), 0.1)
    atom_domain.fit(Potential.load(folder / "ff0"), known, valid, errors).save(
        folder / "ff0" / FILE
    )
    write(folder / "data.xyz", labelled())
    return folder


def run(folder, name, path="data.xyz", force_field="ff0", **changes):
    c = evaluate_defaults()
    c.force_field = ",".join(str(folder / f) for f in force_field.split(",") if f)
    c.data.path, c.data.directory = str(folder / path), str(folder / "stores")
    c.data.reject_invalid = False
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    page = evaluate.run(c, folder / name)
    return page, json.loads((page.parent / "metrics.json").read_text())


@pytest.fixture(scope="module")
def output(folder):
    """Report and metrics of the evaluation of the labelled file."""
    return run(folder, "out", batch_atoms=10)  # several batches


def test_errors_are_those_of_the_calculator(folder, output):
    page, metrics = output
    frames = [f for f in labelled() if "Cl" not in f.get_chemical_formula()]
    calculator = MLIPCalculator(str(folder / "ff0"))
    energy, force = [], []
    predicted = read(page.parent / "predictions.xyz", ":")
    for atoms, own in zip(frames, predicted, strict=True):
        reference = atoms.get_potential_energy(), atoms.get_forces()
        plain = Atoms(atoms.numbers, atoms.positions)
        calculator.calculate(plain, ["energy", "forces", "outside_domain"])
        results = calculator.results
        assert own.get_potential_energy() == pytest.approx(results["energy"], abs=1e-5)
        np.testing.assert_allclose(own.get_forces(), results["forces"], atol=1e-5)
        np.testing.assert_allclose(own.arrays["reference_forces"], reference[1], atol=1e-7)
        assert own.info["reference_energy"] == reference[0]
        assert own.info["outside_domain"] == results["outside_domain"]
        distance = own.arrays["domain_distance"]
        # in units of the edge of the domain; those of training atoms are rounding errors
        np.testing.assert_allclose(distance, results["domain_distance"], rtol=1e-3, atol=1e-3)
        expected = np.where(results["domain_distance"] > 1, np.nan, 0.1)  # unknown outside
        np.testing.assert_allclose(own.arrays["forces_expected_error"], expected)
        energy.append(1e3 * (results["energy"] - reference[0]) / len(atoms))
        force.append(1e3 * np.abs(results["forces"] - reference[1]).ravel())
    scores = metrics["evaluated"]
    assert scores["energy_mae_mev_per_atom"] == pytest.approx(np.mean(np.abs(energy)), rel=1e-4)
    assert scores["force_mae_mev_per_ang"] == pytest.approx(np.concatenate(force).mean(), rel=1e-4)
    assert {g["label"]: g["num_structures"] for g in metrics["per_subset"]} == {"even": 3, "odd": 2}
    assert metrics["num_outside_domain"] == sum(a.info["outside_domain"] for a in predicted)


def test_states_that_training_never_saw_are_outside_the_domain(folder):
    """Detects a domain that judges ions by their geometry alone."""
    frames = [molecule("H2O"), molecule("H2O"), molecule("H2O")]
    frames[1].info["charge"], frames[2].info["num_unpaired_electrons"] = 1, 2
    result = mlip_jax.evaluate(folder / "ff0", frames)
    assert result.outside_domain[1:].all()
    calculator = MLIPCalculator(str(folder / "ff0"))
    with pytest.warns(UserWarning, match="trained only on"):
        expected = [calculator.get_property("outside_domain", atoms) for atoms in frames]
    assert result.outside_domain.tolist() == expected
    predicted = result.evaluated.predictions
    assert np.isnan(predicted.forces_expected_error[3:]).all()
    assert result.atoms()[2].info["num_unpaired_electrons"] == 2


def test_unknown_elements_are_named_and_the_rest_is_evaluated(folder, output):
    page, metrics = output
    assert metrics["skipped"] == {"unknown element Cl": 1} and metrics["num_structures"] == 5
    with open(page.parent / "skipped.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["data.xyz:3#0", "unknown element Cl"]]
    text = page.read_text()
    assert "1 × unknown element Cl" in text and "unknown (data), unknown (force field)" in text
    write(folder / "chlorine.xyz", labelled(["CH3Cl"]))
    with pytest.raises(DatasetError, match="1 × unknown element Cl. The force field knows H, C"):
        run(folder, "chlorine", "chlorine.xyz")


def test_a_rerun_repeats_only_unfinished_parts(folder, monkeypatch):
    monkeypatch.setattr(evaluation, "_PART", 2)
    data = from_atoms(labelled(), {})
    predictor = BatchPredictor(load_members(folder / "ff0"))
    before = evaluation.evaluate(data, predictor, folder / "parts")
    evaluated, real = [], BatchPredictor.predict

    def recorded(self, columns, *args):
        evaluated.append([s.numbers.tolist() for s in columns])
        return real(self, columns, *args)

    monkeypatch.setattr(BatchPredictor, "predict", recorded)
    sorted((folder / "parts").iterdir())[1].write_bytes(b"half a file")
    after = evaluation.evaluate(data, predictor, folder / "parts")
    assert evaluated == [[molecule("CH3OH").numbers.tolist()]], (
        "the other structure of the second part is CH3Cl"
    )
    assert after.skipped == before.skipped == {3: "unknown element Cl"}
    np.testing.assert_array_equal(after.predictions.energy, before.predictions.energy)
    np.testing.assert_array_equal(after.predictions.forces, before.predictions.forces)


def test_no_labels_only_predictions(folder):
    """The checks of training data would reject a file without labels."""
    frames = [molecule("H2O"), molecule("CH4")]
    cell = molecule("H2O", cell=[5, 5, 5], pbc=True)
    write(folder / "plain.xyz", [*frames, cell])
    page, metrics = run(folder, "plain", "plain.xyz", data__reject_invalid=True)
    assert metrics["evaluated"] is None and metrics["num_structures"] == 3
    assert "no reference energies" in page.read_text()
    predicted = read(page.parent / "predictions.xyz", ":")
    assert all("reference_energy" not in a.info for a in predicted)
    stress = MLIPCalculator(str(folder / "ff0")).get_property("stress", cell)
    np.testing.assert_allclose(predicted[2].get_stress(), stress, atol=1e-7)
    assert "stress" not in predicted[0].calc.results
    (page.parent / "origin.json").write_text('{"data": "another", "force_fields": []}')
    with pytest.raises(WorkdirError, match="predictions for other structures"):
        run(folder, "plain", "plain.xyz")


def test_a_file_without_labels_is_rejected_for_other_problems(folder):
    write(folder / "close.xyz", [molecule("CH4"), Atoms("OH", [[0, 0, 0], [0, 0, 0.01]])])
    with pytest.raises(DatasetError, match="shortest|distance|closer"):
        run(folder, "close", "close.xyz", data__reject_invalid=True)


def test_labels_under_another_name_are_not_ignored(folder):
    frames = [Atoms("OH2", molecule("H2O").positions, info={"dft_energy": -3.0})]
    write(folder / "named.xyz", frames)
    with pytest.raises(DatasetError, match="dft_energy"):
        run(folder, "named", "named.xyz")


@pytest.mark.parametrize(
    ("name", "text"),
    [("some.smi", "O water\nC1C bad\n"), ("some.csv", "smiles,name\nO,water\nC1C,bad\n")],
)
def test_smiles(folder, name, text):
    """Detects tables that are taken for data sets, and rejected because they lack energies."""
    pytest.importorskip("rdkit")
    (folder / name).write_text(text)
    result = mlip_jax.evaluate(folder / "ff0", folder / name)
    assert result.metrics["skipped"] == {"unusable molecule": 1}
    (atoms,) = result.atoms()
    assert atoms.info["molecule"] == "water" and atoms.get_potential_energy() == result.energies[0]
    assert [name for name, _ in result.evaluated.data.unusable] == ["bad"]


@pytest.fixture(scope="module")
def calibration(folder):
    """Calibration of the two force fields, with made-up factors."""
    calibration = Calibration(
        tuple(Potential.load(folder / f).digest() for f in ("ff0", "ff1")),
        Scale(2.0, 1e-6),
        Scale(3.0, 1e-6),
        10,
    )
    calibration.save(folder / "ensemble.json")
    return str(folder / "ensemble.json")


def test_an_ensemble_has_spread_and_expected_error(folder, calibration):
    members = f"{folder}/ff0,{folder}/ff1"
    result = mlip_jax.evaluate(members, labelled(), calibration=calibration)
    atoms = result.atoms()[0]
    calculator = EnsembleCalculator.from_workdirs(
        [folder / "ff0", folder / "ff1"], calibration=calibration
    )
    calculator.calculate(Atoms(atoms.numbers, atoms.positions))
    results = calculator.results
    for name in ("energy_std", "energy_expected_error"):
        assert atoms.info[name] == pytest.approx(results[name], rel=1e-3)
    for name in ("forces_std", "forces_expected_error"):
        np.testing.assert_allclose(atoms.arrays[name], results[name], atol=1e-5)
    assert result.metrics["expected_errors"]["num_structures"] == 5


@pytest.mark.slow  # figures
def test_report_of_an_ensemble(folder, calibration):
    page, _ = run(folder, "both", force_field="ff0,ff1", calibration=calibration)
    assert "Expected errors of the ensemble" in page.read_text()


def test_errors(folder):
    with pytest.raises(ConfigError, match="force_field is required"):
        run(folder, "none", force_field="")
    with pytest.raises(ValueError, match="occurs twice"):
        run(folder, "twice", force_field="ff0,ff0")
    with pytest.raises(DatasetError, match="no such file"):
        run(folder, "missing", "missing.xyz")

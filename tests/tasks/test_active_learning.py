"""Tests for active learning: kills at any moment, failures of the oracle, a full disk, and a real run."""

import dataclasses
import errno
import json
import logging
import random

import numpy as np
import pytest
from ase.io import read

from mlip_jax import active_learning
from mlip_jax.config import ConfigError
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.defaults import active_learning_defaults
from mlip_jax.simulation.reference.oracle import Method
from mlip_jax.simulation.reference.result_cache import ResultCache
from mlip_jax.tasks import active_learning as task
from mlip_jax.tasks.active_learning import evaluation, inputs, rounds, training
from mlip_jax.tasks.force_field_training.repeated_warnings import repeated_warnings_once
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.training.options import set_model_options
from tests.simulation.analytic import pairwise

pytest.importorskip("rdkit")
pytest.importorskip("tblite")
SMILES = "C CC CO CN C=O CC=O COC C#N CCO C=C CF CCF FC=O".split()


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def small(folder, **fields):
    """Return a config that needs seconds without training."""
    path = folder / "molecules.smi"
    path.write_text("".join(f"{s}\n" for s in SMILES))
    c = active_learning_defaults()
    c.input, c.budget, c.oracle.num_processes = str(path), 30, 1
    c.held_out.num_test, c.rounds.num_rounds, c.rounds.first_fraction = 6, 3, 0.4
    c.held_out.valid_labels = 0.15
    c.propose.kinds, c.propose.num_conformers, c.propose.per_molecule = (
        ("conformers", "modes"),
        1,
        6,
    )
    for name, value in fields.items():
        c.update_from_flattened_dict({name: value})
    return c


@pytest.fixture
def untrained(monkeypatch):
    """Replace training by two fixed force fields, which hardly differ."""
    members = [
        dataclasses.replace(
            pairwise("harmonic", (1, 6, 7, 8, 9), stiffness=stiffness, length=1.5, cutoff=4.0),
            metadata={"member": stiffness},
        )
        for stiffness in (1.0, 1.1)
    ]

    def train_members(config, folder, labeled, valid, starts, *, report):
        return members[: len(starts)]

    monkeypatch.setattr(training, "train_members", train_members)


@pytest.fixture
def calls(monkeypatch):
    """Return the list of the geometries that the oracle calculated."""
    done, calculator = [], Method.calculator

    def counted(method, atoms):
        done.append(atoms.positions.tobytes())
        return calculator(method, atoms)

    monkeypatch.setattr(Method, "calculator", counted)
    return done


def metrics_of(folder):
    """Return metrics.json without times and paths."""
    text = (folder / "metrics.json").read_text().replace(str(folder), "")
    metrics = json.loads(text)
    for evaluations in metrics["rounds"].values():
        for each in evaluations:
            each["oracle_seconds"] = 0.0
    return metrics


def test_a_run_that_is_killed_at_any_moment_labels_nothing_twice(
    tmp_path, monkeypatch, untrained, calls
):
    """Detects a stage that a rerun repeats, and a result that depends on interruptions."""
    monkeypatch.setattr(task, "write_label_report", lambda folder, *_: folder / "report.html")
    config = small(tmp_path, control="random")
    task.run(config, tmp_path / "undisturbed")
    expected, num_calls = metrics_of(tmp_path / "undisturbed"), len(calls)
    assert num_calls == len(set(calls)) and num_calls <= 2 * 30 + 6
    calls.clear()
    moment, kill_at = [0], [0]

    def tick():
        moment[0] += 1
        if moment[0] == kill_at[0]:
            raise Killed

    def interrupted(module, name):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            if module is not ResultCache:  # the calculation in progress is lost in any case
                tick()
            result = function(*args, **kwargs)
            tick()
            return result

        monkeypatch.setattr(module, name, wrapper)

    for module, name in (
        (ResultCache, "add"),
        (rounds, "write_json"),
        (rounds, "save_columns"),
        (inputs, "write_json"),
        (inputs, "save_columns"),
        (training, "train_members"),
        (task, "write_json"),
    ):
        interrupted(module, name)
    rng, kills = random.Random(0), 0
    while True:
        moment[0], kill_at[0] = 0, rng.randint(1, 14) if kills < 20 else 0
        try:
            task.run(config, tmp_path / "killed")
            break
        except Killed:
            kills += 1
    assert kills == 20
    assert len(calls) == len(set(calls)) == num_calls
    assert metrics_of(tmp_path / "killed") == expected


def test_failures_of_the_oracle_are_named_and_a_full_disk_loses_nothing(
    tmp_path, monkeypatch, untrained, calls
):
    """Detects a run that stops at a failed molecule, spends its budget on it, or loses labels."""
    create = Method.calculator

    def faulty(method, atoms):
        calculator = create(method, atoms)
        if 7 in atoms.numbers:
            raise RuntimeError("no convergence")
        return calculator

    monkeypatch.setattr(Method, "calculator", faulty)
    add, config = ResultCache.add, small(tmp_path)

    def full(self, key, result):
        if len(self) >= 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, key, result)

    monkeypatch.setattr(ResultCache, "add", full)
    with pytest.raises(OSError, match="No space left"):
        task.run(config, tmp_path / "run")
    monkeypatch.setattr(ResultCache, "add", add)
    done = len(set(calls))
    report = task.run(config, tmp_path / "run").read_text()
    stored = [c for c in calls if calls.count(c) == 1]
    assert len(calls) - len(stored) <= 2 * (len(set(calls)) - len(stored)) and done >= 9
    (last,) = metrics_of(tmp_path / "run")["rounds"]["both"][-1:]
    labels = read(tmp_path / "run" / "labels.xyz", ":")
    assert last["calls"] == 30 and len(labels) >= 20
    assert metrics_of(tmp_path / "run")["num_test_calls"] == 6
    assert all(7 not in atoms.numbers and np.isfinite(atoms.get_forces()).all() for atoms in labels)
    rounds_ = metrics_of(tmp_path / "run")["rounds"]["both"]
    failures = {name: why for evaluation in rounds_ for name, why in evaluation["failures"].items()}
    assert failures and all("no convergence" in why for why in failures.values())
    assert "no convergence" in report and report.count("<img") == 4


def test_without_further_candidates_the_report_is_that_of_the_last_round(
    tmp_path, monkeypatch, untrained
):
    """Detects a training of the same labels again, in the folder of the round without candidates."""
    monkeypatch.setattr(task, "write_label_report", lambda folder, *_: folder / "report.html")
    train, reported = training.train_members, []

    def train_members(config, folder, *args, report):
        reported.extend([folder.name] if report else [])
        return train(config, folder, *args, report=report)

    monkeypatch.setattr(training, "train_members", train_members)
    fields = {"propose.kinds": ("conformers",), "held_out.num_test": 0, "propose.per_molecule": 1}
    task.run(small(tmp_path, **fields), tmp_path / "run")
    (only,) = metrics_of(tmp_path / "run")["rounds"]["both"]
    assert reported == ["round_1"] and only["calls"] < 30


def test_the_workdir_of_a_list_that_cannot_be_used_is_that_of_the_corrected_one(tmp_path):
    """Detects a list of SMILES in the workdir that counts as a result of the run."""
    for smiles in (["C"], ["C", "CC"]):
        fields = {"oracle.num_processes": 1, "seed": len(smiles)}
        with pytest.raises(DatasetError, match=f"too few molecules: {len(smiles)}"):
            active_learning(smiles, 30, tmp_path / "run", overrides=fields)


def test_a_budget_without_training_labels_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs.labels, "check_oracle", lambda *_: 12)
    with pytest.raises(ConfigError, match="check of the oracle took 12 calculations.*Increase"):
        task.run(small(tmp_path, budget=12), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": ""}, "input is required"),
        ({"rounds.members": 1}, "at least 2"),
        ({"propose.temperatures": (900.0, 100.0)}, "ascend"),
        ({"propose.kinds": ()}, "kinds is empty"),
    ],
)
def test_contradicting_fields_are_errors(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        task.run(small(tmp_path, **fields), tmp_path / "run")


def test_a_training_does_not_change_the_config_of_the_run(tmp_path):
    """Detects options of a new model in the config of later rounds, which a resumed run lacks."""
    config = active_learning_defaults()
    config.model.name = "painn"
    c = training.training_config(config, tmp_path, 0, "")
    set_model_options(c, tmp_path)
    assert c.model.options and not config.model.options


def test_reference_energies_can_be_given(tmp_path):
    """Detects an advice of the training, --config.data.reference_energies, without effect here."""
    config = active_learning_defaults()
    config.data.reference_energies = "H=-13.6,C=-1029.4"
    c = training.training_config(config, tmp_path, 0, "")
    assert c.data.reference_energies == "H=-13.6,C=-1029.4"


def test_validation_without_any_labeled_element_is_an_error(tmp_path, monkeypatch, untrained):
    """Detects an error of the fit of the expected error after the training, without a remedy."""
    first = np.zeros(0, np.int64)
    monkeypatch.setattr(
        rounds.choice,
        "choose_first",
        lambda columns, count, rng: np.append(first, _rows_of(columns, {1, 6})[:2]),
    )
    config = small(tmp_path)
    monkeypatch.setattr(inputs, "spread_over_molecules", lambda c, n, rng: _with_others(c)[:n])
    with pytest.raises(DatasetError, match="elements with labels.*Increase the budget"):
        task.run(config, tmp_path / "run")


def test_a_diverged_force_field_is_an_error(tmp_path, monkeypatch, untrained):
    """Detects an error of the fit of the expected error, without the reason."""
    predict = evaluation.predict

    def diverged(members, columns):
        p = predict(members, columns)
        return dataclasses.replace(p, forces=np.full_like(p.forces, np.nan))

    monkeypatch.setattr(evaluation, "predict", diverged)
    with pytest.raises(TrainingError, match="no finite forces.*Lower optimizer.learning_rate"):
        task.run(small(tmp_path), tmp_path / "run")


def _rows_of(columns, elements):
    """Return the structures that consist of these elements."""
    return np.flatnonzero([set(s.numbers) <= elements for s in columns])


def _with_others(columns):
    """Return the structures with other elements than H and C."""
    return np.setdiff1d(np.arange(len(columns)), _rows_of(columns, {1, 6}))


def test_a_warning_that_several_trainings_repeat_appears_once(caplog):
    """Detects the remark on the labels in the log of each round."""
    log = logging.getLogger("mlip_jax.datasets.source")
    with repeated_warnings_once():
        for number in (1, 2):
            log.warning("labels of this run")
            log.warning("round %d", number)
            logging.getLogger("another").warning("of another package")
    assert [r.getMessage() for r in caplog.records].count("labels of this run") == 1
    assert len(caplog.records) == 5
    log.warning("labels of this run")
    assert len(caplog.records) == 6


@pytest.mark.slow
def test_a_real_run_from_python(tmp_path):
    """A run with training, dynamics, relaxations and report; the force field is a calculator."""
    config = small(tmp_path)
    result = active_learning(
        SMILES,
        30,
        tmp_path / "run",
        config=config,
        overrides={
            "model.name": "painn",
            "model.options": {"num_features": 8, "num_layers": 1, "cutoff": 4.0},
            "train.num_steps": 20,
            "rounds.members": 1,
            "choose.uncertainty": "features",
            "propose.kinds": ("conformers", "modes", "md", "relaxations"),
            "propose.md_steps": 8,
            "propose.relaxation_steps": 6,
        },
    )
    rounds_ = result.metrics["rounds"]["both"]
    assert [r["calls"] for r in rounds_][-1] == 30 and len(rounds_) == 3
    assert rounds_[-1]["expected_error"] > 0 and rounds_[-1]["test"]["num_structures"] == 6
    assert len(result.labels) == 30 and result.report.is_file()
    assert (tmp_path / "run" / "both" / "round_3" / "member_0" / "report.html").is_file()
    atoms = result.labels[0].copy()
    atoms.calc = result.calculator()
    assert np.isfinite(atoms.get_forces()).all()

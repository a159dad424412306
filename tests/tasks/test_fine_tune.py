"""Tests for the search of fine-tuning recipes: files, choice, replay, resuming and errors."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.build import molecule
from ase.io import read

from mlip_jax import config as configs
from mlip_jax import fine_tune, load
from mlip_jax.config import ConfigError
from mlip_jax.datasets import atoms_list
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.datasets.store.store import Store
from mlip_jax.defaults import fine_tune_defaults
from mlip_jax.potential import Potential
from mlip_jax.reports.fine_tuning import outcome, without_gain
from mlip_jax.simulation.energies import energies_and_forces
from mlip_jax.structure import Structure
from mlip_jax.sweeps.overrides import override
from mlip_jax.tasks import fine_tune as task
from mlip_jax.tasks.fine_tune import labels, recipes, search
from mlip_jax.tasks.fine_tune.expected_error import _interval
from mlip_jax.tasks.fine_tune.labels import TrainingFile
from mlip_jax.tasks.fine_tune.next_structures import farthest_first
from mlip_jax.tasks.fine_tune.recipes import Candidate
from mlip_jax.tasks.fine_tune.search import ENERGY, FORCE, choose, forgetting
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.workdir import WorkdirError, write_json
from tests.simulation.conftest import random_potential
from tests.tasks.runs import DATA

pytestmark = pytest.mark.usefixtures("blank_figures")

FIELDS = {
    "data.elements": ("H", "C", "N", "O"),
    "data.split": "random",
    "data.num_train": 16,
    "data.num_valid": 6,
    "data.num_test": 6,
    "recipes": ("full", "low_rank_replay"),
    "learning_rates": (1e-3,),
    "rank": 2,
    "num_steps": 4,
    "batch_size": 4,
    "curve": (8,),
    "old.path": str(DATA),
    "old.num_replay": 12,
    "old.num_probe": 5,
    "pool.num_next": 5,
    "pool.max_structures": 30,
}

POOL = [molecule(name) for name in ("H2O", "CH4", "NH3", "CO2", "C2H6", "C6H6", "CH3OH")]


def run(folder, pool=None, **changes):
    """Fine-tune a tiny SchNet, given as an object."""
    fields = FIELDS | {"data.directory": str(folder / "stores")}
    fields |= {k.replace("__", "."): v for k, v in changes.items()}
    return fine_tune(DATA, random_potential("tiny"), folder / "tuned", pool=pool, overrides=fields)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fine_tune"), POOL)


def test_the_workdir_is_that_of_the_chosen_force_field(result):
    """Detects a result that other commands cannot load, or that of another candidate."""
    folder = result.workdir
    name = result.metrics["chosen"]["name"]
    assert load(folder).potential.digest() == Potential.load(folder / "runs" / name).digest()
    assert result.model.digest() == load(folder).potential.digest()
    rows = {r["run"]: r for r in result.metrics["candidates"] if r["run"].startswith("runs/")}
    assert len(rows) == 2 and all(r["steps"] == 4 for r in rows.values())
    assert rows[f"runs/{name}"]["valid"][FORCE] == min(r["valid"][FORCE] for r in rows.values())
    assert [p["labels"] for p in result.metrics["curve"]] == [0, 8, 16]
    assert (folder / "report.html").is_file() and result.domain is not None
    before, after = (result.metrics[k]["valid"][FORCE] for k in ("before", "after"))
    text = (folder / "report.html").read_text()
    assert ("Training has not reduced the validation error" in text) == (after >= before)
    expected = result.metrics["expected_error"]
    assert expected["force"]["mean"] == pytest.approx(result.metrics["after"]["test"][FORCE], 1e-6)
    assert expected["force"]["low"] <= expected["force"]["mean"] <= expected["force"]["high"]


def test_the_next_structures_have_no_labels(result):
    frames = read(result.workdir / "next_structures.xyz", index=":")
    assert len(frames) == 5 and all(f.calc is None for f in frames)
    formulas = {f.get_chemical_formula() for f in frames}
    assert len(formulas) == 5 and formulas <= {f.get_chemical_formula() for f in POOL}
    assert all(f.info["domain_distance"] > 0 for f in frames)


def test_replayed_structures_have_labels_of_the_initial_force_field_at_new_zeros(result):
    """Detects energies of the old domain at the old zeros, which would change the old domain."""
    frames = read(result.workdir / "data/labels_16.traj", index=":")
    splits = {
        kind: json.loads((result.workdir / f"data/labels_16{kind}.json").read_text())
        for kind in ("", "_replay")
    }
    assert len(splits[""]["train"]) == 16 and splits[""]["valid"] == splits["_replay"]["valid"]
    assert set(splits[""]["train"]) < set(splits["_replay"]["train"])
    assert len(splits["_replay"]["train"]) == 16 + 12
    initial, tuned = random_potential("tiny"), result.model
    store = Store(next((result.workdir.parent / "stores/stores").glob(f"{DATA.stem}-*")))
    originals = store.take(np.arange(len(store)))
    for number in splits["_replay"]["train"][-12:]:
        replayed = Columns.from_structures(
            atoms_list.from_atoms([frames[number]], molecule_key="molecule")[0]
        )
        (original,) = (
            originals.take(np.array([k]))
            for k, s in enumerate(originals)
            if len(s) == len(replayed.numbers)
            and np.allclose(s.positions, replayed.positions, atol=1e-5)
        )
        # the file has labels, which are kept; what the model has to learn must not change
        remainder = original.energy - sum_reference(initial.reference_energies, original)
        assert replayed.energy - sum_reference(tuned.reference_energies, replayed) == pytest.approx(
            remainder, abs=1e-6
        )
        np.testing.assert_allclose(replayed.forces, original.forces, atol=1e-6)


def test_a_finished_run_trains_nothing_again(result, monkeypatch):
    calls = []
    monkeypatch.setattr(search, "fit", lambda *args: calls.append(args))
    pool = result.workdir / "data" / "pool.traj"
    written = pool.stat().st_mtime_ns  # a later time would convert the pool into another store
    again = run(result.workdir.parent, POOL)
    assert not calls and again.metrics == result.metrics
    assert pool.stat().st_mtime_ns == written
    # an interruption before the last training: only that one is repeated
    path = result.workdir / "search.json"
    journal = json.loads(path.read_text())
    (curve,) = (name for name in journal["runs"] if name.startswith("curve/"))
    removed = journal["runs"].pop(curve)
    path.write_text(json.dumps(journal))
    again = run(result.workdir.parent, POOL)
    assert [str(folder) for _, folder in calls] == [str(result.workdir / curve)]
    point = next(iter(removed.values()))
    assert again.metrics["curve"][1] == {"labels": 8, **point["test"]}


def of_formulas(*formulas):
    """Return structures of these molecules without labels."""
    return Columns.from_structures(atoms_list.from_atoms([molecule(f) for f in formulas])[0])


def load_domain(monkeypatch, columns, num_train):
    """Return the NewDomain of structures; the validation and test structures are the last four."""
    parts = {"train": np.arange(num_train), "valid": np.arange(num_train, num_train + 2)}
    parts["test"] = np.arange(num_train + 2, len(columns))
    store = SimpleNamespace(take=columns.take, digest=lambda: "")
    data = SimpleNamespace(store=store, notes=(), name="mine", level_of_theory="DFT")
    monkeypatch.setattr(labels.source, "load", lambda config: data)
    monkeypatch.setattr(labels.data_split, "split_data", lambda *_: parts)
    return labels.NewDomain.load(fine_tune_defaults(), random_potential("tiny"))


def test_few_labels_contain_every_element(monkeypatch):
    """Detects a learning curve whose energies have the old zero for an element without a label."""
    columns = of_formulas(*["H2O"] * 30, "CH4", "NH3", *["H2O"] * 4)
    new = load_domain(monkeypatch, columns, 32)
    assert set(new.splits["train"].take(np.arange(3)).numbers) == {1, 6, 7, 8}
    assert new.covers_elements(3) and not new.covers_elements(2)


def test_elements_without_training_labels_are_not_evaluated(monkeypatch, caplog):
    """Detects energy errors of thousands of eV: the reference energy of N is that of the start."""
    columns = of_formulas(*["H2O"] * 6, "H2O", "H2O", "NH3", "H2O")
    new = load_domain(monkeypatch, columns, 6)
    assert [len(new.splits[name]) for name in ("train", "valid", "test")] == [6, 2, 1]
    assert "1 of 2 test structures with elements" in new.notes[0] and "N: 1" in caplog.text
    with pytest.raises(DatasetError, match="requires at least 2 valid structures, received 1"):
        load_domain(monkeypatch, of_formulas(*["H2O"] * 6, "NH3", "H2O", "H2O", "H2O"), 6)


@pytest.mark.parametrize(("share", "num_new"), [(0.5, 12), (0.75, 4), (0.9, 4)])
def test_the_share_of_old_structures_in_replay(tmp_path, share, num_new):
    """Detects a share of new structures, and a training split without them."""
    new = labels.NewDomain(
        {n: of_formulas(*["H2O"] * 4) for n in ("train", "valid", "test")}, *"abc"
    )
    file = TrainingFile(tmp_path / "labels_4.traj", 4, np.zeros(119), (1, 8))
    file.write(new, of_formulas(*["CH4"] * 12), random_potential("tiny"), share)
    frames = read(file.path, ":")
    train = json.loads((tmp_path / "labels_4_replay.json").read_text())["train"]
    formulas = [frames[k].get_chemical_formula() for k in train]
    assert formulas.count("CH4") == 12 and formulas.count("H2O") == num_new


def test_labels_of_the_old_domain_that_are_missing_are_predictions():
    initial = random_potential("tiny")
    water = Columns.from_structures(atoms_list.from_atoms([molecule("H2O")])[0])
    old = task.old_domain.OldDomain.create(water, water, "a test", initial)
    energy, forces = energies_and_forces(initial, water, np.arange(1))
    for part in (old.replay, old.probe):
        np.testing.assert_allclose(part.energy, energy)
        np.testing.assert_allclose(part.forces, forces)
    assert not old.is_labelled
    truth = Columns.from_structures(
        [Structure(water.numbers, water.positions, 1.0, np.ones((3, 3)))]
    )
    labelled = task.old_domain.OldDomain.create(water, truth, "a test", initial, replace=True)
    assert labelled.is_labelled and labelled.probe.energy[0] == 1.0
    np.testing.assert_allclose(labelled.replay.energy, energy)


def test_replayed_molecules_are_not_in_the_test_of_forgetting():
    """Detects an error in the old domain that is small because its molecules are replayed."""
    names = np.array([f"molecule {k % 7}" for k in range(70)], object)
    probe, replay = task.old_domain.separate_probe(names, seed=0)
    assert len(probe) == 20 and sorted([*probe, *replay]) == list(range(70))
    assert not set(names[probe]) & set(names[replay])
    probe, replay = task.old_domain.separate_probe(names[:1].repeat(9), seed=0)
    assert len(probe) == 3 and sorted([*probe, *replay]) == list(range(9))
    run = RunData(Path(), SimpleNamespace(index=lambda name: np.array([1, 1, 2, 3])), {})
    run.parts.update(train=np.array([0]), test=np.array([1, 2]))
    assert task.old_domain.test_rows(run).tolist() == [2]
    run.parts.update(train=np.array([0, 3]), test=np.array([1]))
    assert task.old_domain.test_rows(run).tolist() == [1]


def test_predictions_that_are_not_finite_are_no_missing_labels():
    """Detects a diverged force field that is judged by the structures it can predict."""
    water = Columns.from_structures(atoms_list.from_atoms([molecule("H2O")] * 2)[0])
    assert set(search.errors(water, np.zeros(2), np.zeros((6, 3))).values()) == {None}
    labelled = dataclasses.replace(water, energy=np.zeros(2), forces=np.zeros((6, 3)))
    found = search.errors(labelled, np.array([0.0, np.nan]), np.zeros((6, 3)))
    assert np.isnan(found[search.ENERGY]) and found[FORCE] == 0.0


def test_other_data_in_the_same_workdir_are_an_error(result, monkeypatch):
    """Detects results of earlier labels with the test structures of a changed file."""
    monkeypatch.setattr(Store, "digest", lambda self: "another")
    with pytest.raises(WorkdirError, match="another fine-tuning"):
        run(result.workdir.parent, POOL)


def test_a_recipe_that_fails_is_not_chosen(tmp_path, monkeypatch):
    def fail(config, workdir):
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(search, "fit", fail)
    with pytest.raises(TrainingError, match="all candidates failed.*full_0.001.*not finite"):
        run(tmp_path, curve=())
    journal = json.loads((tmp_path / "tuned/search.json").read_text())
    assert journal["runs"]["runs/full_0.001"]["4"]["failure"] == "the loss is not finite"


class TimedSearch(search.RecipeSearch):
    """Search whose trainings take no time, and which has time for some of them."""

    def __init__(self, errors, max_trainings):
        self.config = override(fine_tune_defaults(), {"num_steps": 100})
        self.files, self.out_of_time = {16: None}, False
        self.errors, self.left, self.results = errors, max_trainings, {}

    metric = FORCE

    def train(self, candidate, num_labels, steps):
        if not self.left:
            self.out_of_time = True
            return None
        self.left -= 1
        error = self.errors[candidate.learning_rate, steps]
        self.results[candidate] = result_with(error, 0.0) | {"steps": steps}
        return self.results[candidate]

    def latest(self, candidate, num_labels):
        return self.results[candidate]


@pytest.mark.parametrize(
    ("max_trainings", "expected"),
    [
        (9, [(2.0, 100, 5.0), (3.0, 100, 6.0)]),
        (4, [(3.0, 100, 6.0), (2.0, 25, 8.0), (1.0, 25, 9.0)]),
    ],
)
def test_a_limit_of_the_time_ends_the_search_with_the_best_so_far(max_trainings, expected):
    """Detects a choice by the order of an earlier round, or a result without its last training."""
    errors = {(1.0, 25): 9.0, (2.0, 25): 8.0, (3.0, 25): 7.0, (2.0, 100): 5.0, (3.0, 100): 6.0}
    candidates = [Candidate("full", rate) for rate in (1.0, 2.0, 3.0)]
    ranked = TimedSearch(errors, max_trainings).run(candidates, 0)
    found = [(c.learning_rate, r["steps"], r["valid"][FORCE]) for c, r in ranked]
    assert found == expected


def result_with(valid, probe):
    return {"valid": {FORCE: valid}, "probe_choice": {FORCE: probe}}


def test_forgetting_limits_the_choice():
    full, replay = Candidate("full", 1e-3), Candidate("full_replay", 1e-3)
    ranked = [(full, result_with(10.0, 90.0)), (replay, result_with(12.0, 63.0))]
    before = {FORCE: 60.0}
    assert forgetting(before, {FORCE: 63.0}) == pytest.approx(0.05)
    assert choose(ranked, before, None)[0] == full
    assert choose(ranked, before, 0.2)[0] == replay
    assert choose(ranked, before, 0.01)[0] == replay  # forgets least
    assert choose(ranked, {}, 0.2)[0] == full  # no labels


def test_reported_forgetting_is_of_molecules_that_have_not_chosen(tmp_path):
    """Detects a forgetting below max_forgetting only because the same structures chose."""
    probe = of_formulas("H2O", "H2O", "CH4", "CH4", "NH3", "CO2")
    old = task.old_domain.OldDomain(None, probe, "a test", True)
    for limit, num_choice in ((None, 0), (0.2, 2)):
        config = override(fine_tune_defaults(), {"max_forgetting": limit})
        found = search.RecipeSearch(config, tmp_path, "", None, None, old, {})
        choice = () if found.probe_choice is None else found.probe_choice.molecule
        assert len(set(choice)) == num_choice and len(choice) + len(found.probe) == 6
        assert not set(choice) & set(found.probe.molecule)


def test_a_search_of_an_older_version_resumes_with_its_whole_probe(tmp_path):
    """Detects a KeyError, or forgetting that compares two sets of structures."""
    results = {"10": {"valid": {FORCE: 9.0}, "probe": {FORCE: 63.0}, "seconds": 1.0}}
    write_json(tmp_path / search.JOURNAL, {"seconds": 1.0, "runs": {"runs/a": results}})
    probe = of_formulas("H2O", "CH4")
    old = task.old_domain.OldDomain(None, probe, "a test", True)
    config = override(fine_tune_defaults(), {"max_forgetting": 0.2})
    found = search.RecipeSearch(config, tmp_path, "", None, None, old, {})
    assert found.probe_choice is None and len(found.probe) == 2
    before = search.decisive_errors({"probe": {FORCE: 60.0}, "probe_choice": {FORCE: None}})
    ranked = [(Candidate("full", rate), r) for rate, r in ((1e-3, results["10"]),)]
    assert choose(ranked, before, 0.2)[1] == results["10"]


def test_the_log_ends_with_the_outcome():
    """Detects a log that ends without the recipe, the errors, or a command to continue with."""
    metrics = {
        "chosen": {"recipe": "full_replay", "rate": 3e-4},
        "before": {"test": {FORCE: 346.8, ENERGY: None}, "probe": {FORCE: 59.7}},
        "after": {"test": {FORCE: 42.6, ENERGY: None}, "probe": {FORCE: 68.7}},
        "forgetting": 0.15,
        "candidates": [{"run": "runs/a"}, {"run": "runs/b"}, {"run": "curve/a"}],
    }
    lines = outcome(metrics, Path("runs/tuned"))
    assert lines[:3] == [
        "chosen of 2 candidates: recipe full_replay, learning rate 0.0003",
        "new domain, test: 347 → 42.6 meV/Å",
        "old domain: 59.7 → 68.7 meV/Å (+15 %)",
    ]
    assert lines[3].endswith("mlip-jax relax molecules.smi --force_field=runs/tuned")
    metrics["after"]["probe"][FORCE] = None
    assert len(outcome(metrics, Path("runs/tuned"))) == 3


def test_the_last_round_has_a_candidate_with_and_one_without_replay():
    ranked = [Candidate("full", r) for r in (1.0, 2.0, 3.0)] + [Candidate("full_replay", 1.0)]
    assert recipes.survivors(ranked, 2) == [ranked[0], ranked[3]]
    assert recipes.survivors(ranked[:3], 2) == ranked[:2]
    assert recipes.total_steps(10, 100) == 10 * 25 + 2 * 75
    assert recipes.total_steps(2, 100) == 200


def test_freezing_covers_embeddings_and_the_first_half_of_the_layers():
    names = ("embedding", "update_0/layer_1", "update_1/layer_0", "message_1", "energy/final")
    params = {"params": {name: {"kernel": jnp.ones(2)} for name in names}}
    expected = {"params/embedding/kernel", "params/update_0/layer_1/kernel"}
    assert set(recipes.early_parameters(params)) == expected
    # of a model without and with energy terms
    for kind in ("painn", "charged"):  # the second one has energy terms
        potential = random_potential(kind)
        frozen = recipes.early_parameters(potential.params)
        assert frozen and len(frozen) < len(jax.tree.leaves(potential.params))
    assert "embeddings, which the new elements Cl" in recipes.unsuitable(
        "low_rank", params, ["Cl"], True
    )
    assert recipes.unsuitable("full", params, ["Cl"], True) == ""
    assert "no structures of the old" in recipes.unsuitable("full_replay", params, [], False)


def test_intervals_are_of_molecules():
    """Detects an interval of correlated conformations, which would be far too narrow."""
    values, groups = np.repeat(np.arange(10.0), 50), np.repeat(np.arange(10), 50)
    wide, narrow = (
        _interval(values, g, None, 0, known=np.full(500, True)) for g in (groups, np.arange(500))
    )
    assert wide["mean"] == narrow["mean"] == 4.5
    assert wide["high"] - wide["low"] > 4 * (narrow["high"] - narrow["low"])


def test_a_prediction_that_is_not_finite_leaves_no_expected_error(caplog):
    """Detects an expected error of only those structures that the force field can predict."""
    labels = np.array([0.0, 0.0, np.nan])
    predicted = {"nan": np.array([1.0, np.nan, 1.0]), "finite": np.array([1.0, 3.0, np.nan])}
    found = {
        name: _interval(values, np.arange(3), None, 0, known=np.isfinite(labels))
        for name, values in predicted.items()
    }
    assert found["nan"] is None and "1 of 2 test structures" in caplog.text
    assert found["finite"]["mean"] == 2.0


def test_farthest_structures_come_first():
    known, candidates = np.array([[0.0]]), np.array([[1.0], [9.0], [8.9], [-5.0]])
    assert farthest_first(known, candidates, 3).tolist() == [1, 3, 0]
    assert len(farthest_first(known, candidates, 9)) == 4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ConfigError, "data.path is required"),
        ({"data.path": str(DATA), "force_field": "runs/a,runs/b"}, ConfigError, "one force field"),
        ({"data.path": str(DATA), "recipes": ()}, ConfigError, "must not be empty"),
    ],
)
def test_wrong_configs_are_rejected_before_any_work(tmp_path, fields, error, message):
    config = override(fine_tune_defaults(), fields)
    with pytest.raises(error, match=message):
        task.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert configs.complete(config, fine_tune_defaults()).num_steps == 1_000


def test_wrong_data_are_rejected_with_the_reason(tmp_path):
    """Structures without labels, too few labels, and an element that the model cannot have."""
    initial = random_potential("tiny")
    with pytest.raises(DatasetError, match="no energies or forces"):
        fine_tune([molecule("H2O")] * 3, initial, tmp_path / "a")
    with pytest.raises(DatasetError, match="requires at least 4 train structures, received 2"):
        run(tmp_path, data__num_train=2)


def test_reference_energies_are_those_of_all_known_elements(tmp_path):
    reference = np.zeros(119)
    reference[[1, 16]] = -0.1, -7.25
    file = TrainingFile(tmp_path / "labels_3.traj", 3, reference, (1, 16))
    fields = file.fields(True, "GFN2-xTB; tblite")
    assert fields["reference_energies"] == "H=-0.1,S=-7.25"
    assert fields["split_files"].endswith("labels_3_replay.json")


def test_a_search_without_gain_is_reported():
    """Detects a fine-tuned force field that is worse than its start, without a word about it."""
    metrics = {"metric": FORCE, "before": {"valid": {FORCE: 42.5}}}
    metrics["after"] = {"valid": {FORCE: 44.4}}
    assert "42.5" in (text := without_gain(metrics)) and "44.4" in text and "meV/Å" in text
    assert not without_gain(metrics | {"after": {"valid": {FORCE: 30.0}}})
    assert not without_gain(metrics | {"before": {"valid": {FORCE: None}}})

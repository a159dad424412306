"""Tests for the report of a predictor: errors, domain, and kinds of properties."""

import csv
import dataclasses
import json
import os

import numpy as np
import pytest

from mlip_jax.datasets.property_data import Target
from mlip_jax.datasets.unseen_elements import UnseenElements
from mlip_jax.reports import intervals
from mlip_jax.reports.domain import roc
from mlip_jax.reports.force2geo import paper, seeds
from mlip_jax.reports.property import PredictedProperties, score, write_property_report
from mlip_jax.reports.unseen import UnseenStructures

TARGETS = (Target("gap", "scalar"), Target("dipole", "vector"), Target("charges", "atom"))


def outcome(count=40, seed=0, distance=True):
    rng = np.random.default_rng(seed)
    n = rng.integers(2, 6, count)
    labels = {
        "gap": rng.normal(size=count),
        "dipole": rng.normal(size=(count, 3)),
        "charges": rng.normal(size=n.sum()),
    }
    labels["gap"][3] = np.nan
    predicted = {k: v + 0.1 * rng.normal(size=v.shape) for k, v in labels.items()}
    return PredictedProperties(
        np.array([f"m{i}<" for i in range(count)], object),
        n,
        labels,
        predicted,
        rng.random(count) if distance else None,
    )


def test_the_coverage_of_intervals_is_uncertain_if_all_labels_are_covered():
    """Detects a margin of 0 % for 39 of 39 labels."""
    wide = dataclasses.replace(outcome(), half_width={"gap": np.full(40, 9.0)}, coverage=0.9)
    numbers = intervals.metrics({"test labels": wide})
    measured = numbers["test labels"]["gap"]
    assert measured["coverage"] == 1.0 and measured["coverage_high"] == 1.0
    assert measured["coverage_low"] == pytest.approx(0.910, abs=1e-3)
    (_, _, table) = intervals.section(numbers, TARGETS)
    assert "100.0 % (91.0 to 100.0 %)" in str(table)


def test_absolute_errors_are_means_per_structure():
    o = outcome()
    np.testing.assert_allclose(
        o.absolute("dipole"), np.abs(o.predicted["dipole"] - o.labels["dipole"]).mean(1)
    )
    ends = np.cumsum(o.n_atoms)
    error = np.abs(o.predicted["charges"] - o.labels["charges"])
    np.testing.assert_allclose(
        o.absolute("charges"), [error[e - k : e].mean() for k, e in zip(o.n_atoms, ends)]
    )
    result = score(o.absolute("gap"))
    assert result["count"] == 39 and result["mae"] == pytest.approx(np.nanmean(o.absolute("gap")))
    assert score(np.array([np.nan]))["count"] == 0
    # sample standard deviation sqrt(2) of 1 and 3, over sqrt(2); one value has none
    assert score(np.array([1.0, 3.0]))["stderr"] == pytest.approx(1.0)
    assert np.isnan(score(np.array([1.0]))["stderr"])


def test_report_and_files(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,train_loss,valid_loss,train_gap_mae,valid_gap_mae\n1,2,3,0.5,0.6\n"
    )
    info = {
        "config": {
            k: {"a": 1}
            for k in ("data", "property", "init", "align", "model", "optimizer", "train")
        },
        "statistics": {"num_structures": 3, "level_of_theory": "x"},
        "versions": {"jax": "1"},
        "updates": 9,
    }
    write_property_report(
        tmp_path,
        {"train": outcome(), "test labels": outcome(seed=1)},
        TARGETS,
        title="gap & more",
        metrics_csv=tmp_path / "metrics.csv",
        seconds=3.0,
        notes=["a note"],
        best_step=5,
        info=info,
        unseen_structures={
            "valid": UnseenStructures(UnseenElements(np.arange(9) > 2, {"Br": 3, "I": 1}))
        },
    )
    html, numbers = (
        (tmp_path / "report.html").read_text(),
        json.loads((tmp_path / "metrics.json").read_text()),
    )
    assert (
        "gap &amp; more" in html
        and "a note" in html
        and "m7&lt;" in html
        and html.count("<img") >= 4
    )
    assert numbers["test"]["gap_mae"] == numbers["scores"]["test labels"]["gap"]["mae"]
    assert 0 < numbers["domain_auc"]["gap"] < 1
    assert "Br: 3, I: 1" in html and "energy MAE" not in html
    assert numbers["unseen_elements"]["valid"]["num_structures_of_split"] == 9
    with open(tmp_path / "predictions_test_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and set(rows[0]) == {
        "molecule",
        "n_atoms",
        "gap",
        "gap_predicted",
        "dipole_absolute_error",
        "charges_absolute_error",
    }


def test_roc_of_small_examples():
    absolute = np.array([0.1, 0.2, 0.3, 0.9])
    assert roc(np.array([1.0, 2.0, 3.0, 4.0]), absolute, 0.25)[2] == 1.0
    assert roc(np.array([4.0, 3.0, 2.0, 1.0]), absolute, 0.25)[2] == 0.0
    assert roc(np.ones(4), absolute, 0.25)[2] == pytest.approx(0.5)
    assert np.isnan(roc(np.ones(0), np.ones(0))[2])


def test_verdicts_of_the_paper(tmp_path):
    def spread(*values):
        return seeds.spread({str(i): v for i, v in enumerate(values)})

    one, other = spread(0.40, 0.41, 0.42), spread(0.48, 0.49, 0.50)
    assert "holds" in seeds.verdict("x", one, other)
    assert "does not hold" in seeds.verdict("x", other, one)
    assert "undecided" in seeds.verdict("x", one, spread(0.3, 0.5, 0.45))
    # each predictor is slightly better for the same seed
    near = spread(0.395, 0.405, 0.416)
    assert "undecided" in seeds.verdict("x", near, one)
    assert "holds" in seeds.verdict("x", near, one, paired=True)
    assert "single seed" in seeds.verdict("x", spread(0.3), other)
    assert np.isnan(seeds.gain(spread(0.3), other)[0])
    assert seeds.gain(one, other)[0] == pytest.approx(100 * (1 - 0.41 / 0.49))
    for name, mae in (
        ("scratch-0", 0.5),
        ("scratch-1", 0.6),
        ("force2prop-0", 0.4),
        ("waiting-0", 0.1),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(
            json.dumps({"scores": {"test labels": {"gap": {"mae": mae}}}})
        )
        if name != "waiting-0":
            (tmp_path / name / "done.json").write_text("{}")
    result = seeds.read(tmp_path)
    assert result["scratch"]["labels"].mean == pytest.approx(0.55) and "waiting" not in result
    html = paper.write_paper_report(tmp_path).read_text()
    assert "0.550 ± 0.071" in html and "not measured" in html
    assert html.index("<td>SphereNet</td>") < html.index("Origin of the geometries")
    # the spread of a single seed was written as NaN, which is not JSON
    content = json.loads((tmp_path / "paper.json").read_text(), parse_constant=pytest.fail)
    assert content["force2prop"]["labels"]["std"] is None


def test_processes_of_a_sweep_may_write_its_report_concurrently(tmp_path, monkeypatch):
    other, replace = iter([True]), os.replace

    def replace_after_the_other_process(*paths):
        if next(other, False):
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: -1)
                paper.write_paper_report(tmp_path)
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_after_the_other_process)
    assert paper.write_paper_report(tmp_path).is_file()
    assert not list(tmp_path.glob(".*"))

"""Tests for the report of a diversity study: averages over seeds, curves, and findings."""

import csv
import json

import numpy as np
import pytest

from mlip_jax.reports.diversity import report
from mlip_jax.reports.diversity.findings import findings
from mlip_jax.reports.diversity.generalization import NAMES, Errors, by_distance, summary

EDGES = [0.0, 0.5, 1.0, 2.0]


def write_run(folder, n_s, n_c, seed, values, model="painn", **changes):
    """Write the result of a run; `values` are means by metric."""
    metrics = {name: {"energy_mae_mev": values.get(name)} for name in NAMES}
    content = {
        "train": {"num_molecules": n_s, "num_conformers": n_c, "seed": seed, "model": model},
        "metrics": metrics,
        # only four conformers in the last bin, which are too few for a mean
        "by_rmsd": {
            "edges_ang": EDGES,
            "count": [40, 5, 4],
            "energy_mae_mev": [10.0 + seed, 20.0 + seed, 900.0],
        },
        "notes": ["A note."],
        "level_of_theory": "GFN2-xTB",
    } | changes
    path = folder / f"{model}-{n_s}-{n_c}-{seed}"
    path.mkdir(parents=True)
    (path / "diversity.json").write_text(json.dumps(content))


def study(folder, seeds=(0, 1, 2)):
    """Write runs whose structural errors only depend on n_s and conformational errors on n_c."""
    for n_s, n_c in [(400, 1), (200, 2), (100, 4), (100, 1), (100, 2), (99, 4)]:
        for seed in seeds:
            structural, conformational = 1000 / np.sqrt(n_s), 100 / np.sqrt(n_c)
            write_run(
                folder,
                n_s,
                n_c,
                seed,
                {
                    "iid_s": structural + seed,
                    "ood_s": 3 * structural + seed,
                    "iid_c": conformational + seed,
                    "ood_c": 1.5 * conformational + seed,
                    "unseen_c": conformational + seed,
                },
            )


def test_averages_are_grouped_by_structures_and_by_molecules(tmp_path):
    study(tmp_path)
    results = report.read_results([tmp_path, tmp_path])  # the same sweep counts once
    assert len(results) == 18
    points = report.points(results, "energy_mae_mev")
    assert [(p.num_molecules, p.num_conformers, p.runs) for p in points] == [
        (99, 4, 3),
        (100, 1, 3),
        (100, 2, 3),
        (100, 4, 3),
        (200, 2, 3),
        (400, 1, 3),
    ]
    mean, std = points[-1].metrics["iid_s"]
    assert mean == pytest.approx(51) and std == pytest.approx(1)
    assert points[0].by_rmsd == {
        0: (pytest.approx(11), pytest.approx(1)),
        1: (pytest.approx(21), pytest.approx(1)),
    }
    fixed = report.budgets(points)
    assert {
        n: [(p.num_molecules, p.num_conformers) for p in group] for n, group in fixed.items()
    } == {400: [(400, 1), (200, 2), (100, 4), (99, 4)]}  # 99 x 4 counts as 400
    assert {n: len(group) for n, group in report.molecule_sets(points).items()} == {100: 3}


def test_findings_follow_from_the_numbers(tmp_path):
    study(tmp_path)
    points = report.points(report.read_results([tmp_path]), "energy_mae_mev")
    result = findings(report.budgets(points), report.molecule_sets(points))
    verdicts = {
        key: [f.verdict for f in result if key in f.text]
        for key in (
            "OOD-S is larger than IID-S",
            "more molecules reduce the IID-S error",
            "more conformers reduce the IID-C error",
            "a balance",
            "conformers reduce IID-C",
            "conformers reduce IID-S",
        )
    }
    assert verdicts == {
        "OOD-S is larger than IID-S": ["confirmed"],
        "more molecules reduce the IID-S error": ["confirmed"],
        "more conformers reduce the IID-C error": ["confirmed"],
        "a balance": ["confirmed"],
        "conformers reduce IID-C": ["confirmed"],
        "conformers reduce IID-S": ["undecided"],
    }


def test_findings_of_single_seeds_are_undecided(tmp_path):
    study(tmp_path, seeds=(0,))
    points = report.points(report.read_results([tmp_path]), "energy_mae_mev")
    assert points[0].metrics["iid_s"][1] is None and points[0].counts["iid_s"] == 1
    result = findings(report.budgets(points), report.molecule_sets(points))
    assert {f.verdict for f in result if "balance" not in f.text} == {"undecided"}


def test_page_and_table(tmp_path):
    study(tmp_path / "sweep")
    bits = np.random.default_rng(0).integers(0, 2, (3, 9, 2048)).astype(np.uint8)
    np.savez(
        tmp_path / "sweep/painn-400-1-0/fingerprints.npz",
        **{
            name: np.packbits(rows, axis=1) for name, rows in zip(("train", "iid_s", "ood_s"), bits)
        },
    )
    # a run without the other metrics
    write_run(tmp_path / "sweep", 100, 1, 0, {"iid_s": 7.0}, model="so3krates")
    path = report.write_report(tmp_path / "report", report.read_results([tmp_path / "sweep"]))
    text = path.read_text()
    assert "so3krates" in text and "painn" in text and "A note." in text and "Confirmed:" in text
    # by N, by n_s, by distance, and the map; a single run of so3krates has no curve
    assert text.count("<figure") == 4
    rows = list(csv.DictReader(open(tmp_path / "report/diversity.csv")))
    assert len(rows) == 7 and rows[-1]["ood_s_mean"] == "" and float(rows[-1]["iid_s_mean"]) == 7


def test_unreadable_results_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no diversity.json of a completed run"):
        report.read_results([tmp_path])
    write_run(tmp_path, 10, 1, 0, {})
    with pytest.raises(ValueError, match="metric must be one of"):
        report.write_report(tmp_path, report.read_results([tmp_path]), "loss")
    (tmp_path / "painn-10-1-0/diversity.json").write_text("{")
    with pytest.raises(ValueError, match="painn-10-1-0/diversity.json: corrupted"):
        report.read_results([tmp_path])


def test_errors_of_energies_and_of_energy_differences():
    predicted, n_atoms = np.array([0.1, 0.3, -0.2, 0.5]), np.array([2, 2, 4, 5])
    errors = Errors(np.zeros(4), predicted, n_atoms, np.array(["a", "a", "b", "c"]))
    result = summary(errors)
    assert result["energy_mae_mev"] == pytest.approx(275) and result["num_molecules"] == 3
    assert result["energy_mae_mev_per_atom"] == pytest.approx((50 + 150 + 50 + 100) / 4)
    # only of "a": the other molecules have one structure
    assert result["relative_mae_mev"] == pytest.approx(100)
    assert summary(errors.take(np.zeros(0, int)))["energy_mae_mev"] is None


def test_force_errors_are_weighted_by_atoms():
    """The mean is over all force components; structures without labels do not count."""
    force_error = np.array([0.1, 0.4, np.nan])
    errors = Errors(np.zeros(3), np.ones(3), np.array([3, 1, 5]), np.arange(3), force_error)
    assert summary(errors)["force_mae_mev_per_ang"] == pytest.approx(175)
    assert summary(errors.take(np.array([2])))["force_mae_mev_per_ang"] is None
    result = by_distance(errors, np.array([0.1, 0.6, 1.5]), np.array(EDGES))
    assert result["force_mae_mev_per_ang"] == [pytest.approx(100), pytest.approx(400), None]
    json.dumps(result, allow_nan=False)


def test_runs_with_forces_and_runs_of_earlier_versions(tmp_path):
    """Results without force errors are read; runs with other selections or betas are separate."""
    study(tmp_path)
    bins = {
        "edges_ang": EDGES,
        "count": [9, 9, 0],
        "energy_mae_mev": [1.0, 2.0, None],
        "force_mae_mev_per_ang": [30.0, None, None],
    }
    for seed in (0, 1):
        train = {
            "num_molecules": 400,
            "num_conformers": 1,
            "seed": seed,
            "model": "painn",
            "selection": "embedding",
            "beta": 0.9,
        }
        write_run(
            tmp_path / "with",
            400,
            1,
            seed,
            {},
            train=train,
            by_rmsd=bins,
            metrics={
                "iid_s": {"energy_mae_mev": 5.0, "force_mae_mev_per_ang": 40.0 + seed},
                "ood_s": None,
            },
        )
    results = report.read_results([tmp_path, tmp_path / "with"])
    assert (
        sorted({r.model for r in results}) == ["painn", "painn, embedding, beta 0.9"]
        and len(results) == 20
    )
    report.write_report(tmp_path / "report", results, "force_mae_mev_per_ang")
    rows = list(csv.DictReader(open(tmp_path / "report/diversity.csv")))
    assert len(rows) == 1 and float(rows[0]["iid_s_mean"]) == 40.5
    (point,) = report.points([r for r in results if "beta" in r.model], "force_mae_mev_per_ang")
    assert set(point.by_rmsd) == {0} and point.by_rmsd[0][0] == 30
    with pytest.raises(
        ValueError,
        match="no run has the metric 'force_mae_mev_per_ang': only runs trained on forces",
    ):
        report.write_report(
            tmp_path / "none", report.read_results([tmp_path]), "force_mae_mev_per_ang"
        )


def test_bins_of_distance():
    errors = Errors(np.zeros(5), np.array([1.0, 2, 3, 4, 5]), np.ones(5), np.arange(5))
    result = by_distance(errors, np.array([0.0, 0.49, 0.5, 9.0, np.nan]), np.array(EDGES))
    assert result["count"] == [2, 1, 1] and result["energy_mae_mev"] == [1500, 3000, 4000]
    assert result["relative_mae_mev"] == [None] * 3
    json.dumps(result, allow_nan=False)


def test_standard_errors_are_those_of_the_runs_with_the_metric(tmp_path):
    """Detects a standard error that also counts the runs without the metric."""
    for seed in range(18):
        known = {"iid_s": 10.0 + seed % 2, "ood_s": 11.0 + seed % 2} if seed < 2 else {}
        write_run(tmp_path, 100, 1, seed, known | {"iid_c": 1.0})
    points = report.points(report.read_results([tmp_path]), "energy_mae_mev")
    assert points[0].runs == 18 and points[0].counts["iid_s"] == 2
    # the difference of 1 is 1.4 standard errors of two runs, and 4.2 of eighteen
    (finding,) = [f for f in findings({}, {100: points}) if "beyond the training" in f.text][:1]
    assert finding.verdict == "undecided"


def test_different_runs_with_the_same_sizes_and_seed_are_not_merged_silently(tmp_path, caplog):
    for sweep, digest in (("a", "x"), ("b", "x"), ("c", "y")):
        write_run(tmp_path / sweep, 100, 1, 0, {"iid_s": 1.0}, force_field=digest)
    assert len(report.read_results([tmp_path / "a", tmp_path / "b"])) == 1 and not caplog.text
    report.read_results([tmp_path / "a", tmp_path / "c"])
    assert "is another force field" in caplog.text

"""Tests for the table of a sweep: scores of the runs, and averages over seeds."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_jax.reports.sweep import (
    SCORES,
    Row,
    SeedAverage,
    draw,
    duration,
    over_seeds,
    read_scores,
    write_table,
)


def row(name, state="done", seconds=60.0, energy=None, force=None, **values):
    scores = (
        {}
        if energy is None
        else dict.fromkeys(SCORES)
        | {
            "test_energy_mae_mev_per_atom": energy,
            "test_force_mae_mev_per_ang": force,
            "training_seconds": 50.0,
            "best_step": 8,
        }
    )
    return Row(name, values, state, seconds, scores)


@pytest.fixture
def rows():
    return [
        row("a", model="painn", seed=0, energy=10.0, force=100.0),
        row("b", model="painn", seed=1, energy=12.0, force=104.0),
        row("c", model="sch|net", seed=0, energy=20.0, force=90.0),
        row("d", "failed", model="sch|net", seed=1),
        row("e", "waiting", None, model="so3krates", seed=0),
    ]


def test_scores_are_those_of_the_run(tmp_path):
    assert read_scores(tmp_path) == {}
    metrics = {
        "test": {"energy_mae_mev_per_atom": 1.5, "energy_slope_mev_per_atom": None},
        "valid": {"force_rmse_mev_per_ang": 7.0},
        "train": None,
        "seconds": 99.0,
        "unseen_elements": {"test": {"num_structures": 3, "elements": {"F": 3}}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    for step in ("8", "16", "9", "24.replaced"):
        (tmp_path / "best" / step).mkdir(parents=True)
    scores = read_scores(tmp_path)
    assert {k: v for k, v in scores.items() if v is not None} == {
        "test_energy_mae_mev_per_atom": 1.5,
        "valid_force_rmse_mev_per_ang": 7.0,
        "test_unseen_structures": 3,
        "training_seconds": 99.0,
        "best_step": 16,
    }
    (tmp_path / "metrics.json").write_text(json.dumps({"test": None, "seconds": 3.0}))
    assert read_scores(tmp_path)["test_energy_mae_mev_per_atom"] is None


def test_unreadable_scores_are_reported(tmp_path, caplog):
    (tmp_path / "metrics.json").write_text('{"test": ')
    assert read_scores(tmp_path) == {} and "not valid JSON" in caplog.text
    (tmp_path / "metrics.json").write_text('{"test": 7, "unseen_elements": [1], "seconds": "<b>"}')
    assert not any(read_scores(tmp_path).values())


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_mean_and_deviation_over_seeds(errors):
    rows = [row(str(i), seed=i, energy=e, force=1.0) for i, e in enumerate(errors)]
    (group,) = over_seeds([*rows, row("failed", "failed", seed=99)])
    mean, std = group.scores["test_energy_mae_mev_per_atom"]
    assert (group.num_done, group.num_rows) == (len(errors), len(errors) + 1)
    np.testing.assert_allclose(
        [mean, std], [np.mean(errors), np.std(errors, ddof=1)], rtol=1e-9, atol=1e-6
    )


def test_only_rows_that_differ_in_the_seed_are_averaged(rows):
    painn, schnet, so3krates = over_seeds(rows)
    assert painn.values == {"model": "painn"} and painn.num_done == painn.num_rows == 2
    # a single value has no standard deviation
    assert schnet.scores["test_energy_mae_mev_per_atom"] == (20.0, None)
    assert so3krates == SeedAverage({"model": "so3krates"}, 0, 1, {})
    assert over_seeds([rows[0], rows[2], rows[4]]) == []


def test_csv_has_a_row_for_each_variant(tmp_path, rows):
    write_table(tmp_path, rows, "title")
    with open(tmp_path / "sweep.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [r["name"] for r in table] == list("abcde")
    assert [r["state"] for r in table] == ["done", "done", "done", "failed", "waiting"]
    assert (
        table[1]["model"] == "painn"
        and table[1]["seed"] == "1"
        and float(table[1]["best_step"]) == 8
    )
    assert float(table[1]["test_force_mae_mev_per_ang"]) == 104.0 and table[4]["seconds"] == ""
    with open(tmp_path / "sweep_seeds.csv", newline="", encoding="utf-8") as file:
        seeds = list(csv.DictReader(file))
    assert (
        float(seeds[0]["test_energy_mae_mev_per_atom_mean"]) == 11.0
        and seeds[1]["num_seeds"] == "2"
    )


def test_markdown_is_a_table(tmp_path, rows):
    write_table(tmp_path, rows, "title")
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "3 done, 1 failed, 1 waiting." in text and "11.00 ± 1.41" in text and "sch\\|net" in text
    first = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")][:7]
    assert len({line.count("|") for line in first}) == 1


def test_picture_has_a_line_for_each_group(tmp_path, rows):
    write_table(tmp_path, rows, "title")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    energy, force = draw(rows).axes
    assert [t.get_text() for t in energy.get_yticklabels()] == ["painn", "sch|net", "so3krates"]
    assert (
        sorted(energy.lines[0].get_xdata()) == [10.0, 12.0]
        and energy.lines[1].get_xdata()[0] == 11.0
    )
    assert force.get_xlim()[0] == 0 and force.get_xlim()[1] > 104.0


def test_without_scores_there_is_no_picture(tmp_path):
    write_table(tmp_path, [row("a", "waiting", None, cutoff=4.0)], "title")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep.csv", "sweep.md"]


@pytest.mark.parametrize(
    "seconds, text", [(None, "-"), (0.4, "0:00:00"), (3599.6, "1:00:00"), (90061, "25:01:01")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text

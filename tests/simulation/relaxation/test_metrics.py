"""Tests for the metrics of relaxations: golden numbers, and undefined values."""

import numpy as np
import pytest
from ase import units

from mlip_jax.simulation.relaxation import metrics
from mlip_jax.simulation.relaxation.metrics import KCAL_PER_MOL, Limits, Outcomes

NAN = np.nan


def outcomes(rows):
    """Return the outcomes of rows (E_start, E_relaxed, E_opt, fmax, failed)."""
    columns = [np.array(c, float) for c in zip(*rows)]
    return Outcomes(*columns[:4], columns[4].astype(bool))


# Energies in units of kcal/mol, below the start.
CASES = {
    "good": (0.0, -9.5, -10.0, 0.04, False),
    "halfway": (0.0, -5.0, -10.0, 0.3, False),
    "below the minimum": (0.0, -12.0, -10.0, 0.01, False),
    "risen": (0.0, 5.0, -10.0, 2.0, False),
    "risen a little, from a good start": (0.0, 0.2, -0.5, 0.2, False),
    "flew apart, by its own word": (0.0, -4.0, -10.0, 0.01, True),
    "the oracle fails at its end": (0.0, NAN, -10.0, NAN, False),
    "starts at the minimum and stays": (0.0, 0.001, 0.0, 0.01, False),
    "starts at the minimum and leaves": (0.0, 3.0, 0.0, 0.6, False),
    "starts below the reference": (0.0, -0.5, 2.0, 0.02, False),
    "the oracle fails at the start": (NAN, -5.0, -10.0, 0.01, False),
    "the oracle has no minimum": (0.0, -5.0, NAN, 0.01, False),
}
EXPECTED = {  # percentage, evaluable, diverged, success, force converged
    "good": (95.0, 1, 0, 1, 1),
    "halfway": (50.0, 1, 0, 0, 0),
    "below the minimum": (120.0, 1, 0, 1, 1),
    "risen": (-50.0, 1, 1, 0, 0),
    "risen a little, from a good start": (-40.0, 1, 1, 1, 0),
    "flew apart, by its own word": (40.0, 1, 1, 0, 0),
    "the oracle fails at its end": (NAN, 1, 1, 0, 0),
    "starts at the minimum and stays": (NAN, 1, 0, 1, 1),
    "starts at the minimum and leaves": (NAN, 1, 1, 0, 0),
    "starts below the reference": (NAN, 1, 0, 1, 1),
    "the oracle fails at the start": (NAN, 0, 0, 0, 0),
    "the oracle has no minimum": (NAN, 0, 0, 0, 0),
}
ALL = outcomes([(*(KCAL_PER_MOL * np.array(row[:3])), *row[3:]) for row in CASES.values()])


def test_golden_cases():
    computed = zip(
        metrics.percentage(ALL),
        metrics.evaluable(ALL),
        metrics.diverged(ALL),
        metrics.succeeded(ALL),
        metrics.force_converged(ALL),
    )
    for name, row in zip(CASES, computed):
        np.testing.assert_allclose(np.array(row, float), EXPECTED[name], atol=1e-9, err_msg=name)
    assert KCAL_PER_MOL == units.kcal / units.mol == pytest.approx(0.0433641, abs=1e-7)


def test_means_are_over_the_documented_molecules():
    summary = metrics.summarize(ALL, num_bootstrap=50)
    assert summary["mean_percentage"].value == pytest.approx((95 + 50 + 120) / 3)
    assert summary["mean_percentage"].count == 3
    assert summary["mean_percentage_of_all"].value == pytest.approx(
        (95 + 50 + 120 - 50 - 40 + 40) / 6
    )
    assert {
        name: (summary[name].value, summary[name].count)
        for name in ("success_rate", "divergence_rate", "force_convergence_rate")
    } == {
        "success_rate": (50.0, 10),
        "divergence_rate": (50.0, 10),
        "force_convergence_rate": (40.0, 10),
    }
    residuals = [0.5, 5.0, -2.0, 0.001, -2.5]  # over molecules that did not diverge
    assert summary["mean_residual"].value == pytest.approx(np.mean(residuals))
    assert summary["median_residual"].value == pytest.approx(0.001)
    assert set(summary) == set(metrics.MEASURES)


def test_limits_are_strict_and_can_be_set():
    one = KCAL_PER_MOL
    o = outcomes([(10 * one, one, 0.0, 0.05, False), (10 * one, 0.999 * one, 0.0, 0.0499, False)])
    np.testing.assert_array_equal(metrics.succeeded(o), [False, True])
    np.testing.assert_array_equal(metrics.force_converged(o), [False, True])
    loose = Limits(chemical_accuracy=2.0, fmax=0.1)
    assert metrics.succeeded(o, loose).all() and metrics.force_converged(o, loose).all()
    assert np.isnan(metrics.percentage(o, Limits(min_gap=1.0))).all()


def test_rounding_is_not_divergence():
    o = outcomes([(0.0, 5e-6, -1.0, 1.0, False), (0.0, 5e-5, -1.0, 1.0, False)])
    np.testing.assert_array_equal(metrics.diverged(o), [False, True])
    assert (metrics.percentage(o) < 0).all()


def test_baselines_are_0_and_100_percent():
    rng = np.random.default_rng(0)
    start, opt = rng.normal(5, 1, 20), rng.normal(-5, 1, 20)
    no = np.zeros(20, bool)
    assert np.allclose(metrics.percentage(Outcomes(start, start, opt, opt, no)), 0)
    own = metrics.summarize(Outcomes(start, opt, opt, np.full(20, 0.03), no), num_bootstrap=20)
    assert {k: own[k].value for k in ("mean_percentage", "success_rate", "divergence_rate")} == {
        "mean_percentage": 100.0,
        "success_rate": 100.0,
        "divergence_rate": 0.0,
    }


def test_the_bootstrap_error_equals_the_standard_error():
    values = np.random.default_rng(1).normal(3, 2, 400)
    every = np.ones(400, bool)
    estimate = metrics.bootstrap_means(
        {"x": (values, every), "half": (values, np.arange(400) < 200)}, 2000
    )
    assert estimate["x"].stderr == pytest.approx(values.std() / 20, rel=0.1)
    assert estimate["half"].stderr == pytest.approx(values[:200].std() / 200**0.5, rel=0.1)
    assert estimate["x"].low < values.mean() < estimate["x"].high
    assert estimate["x"].high - estimate["x"].low == pytest.approx(
        2 * 1.96 * estimate["x"].stderr, rel=0.1
    )


def test_the_bootstrap_does_not_depend_on_blocks_of_memory(monkeypatch):
    measures = {"x": (np.arange(7.0), np.array([1, 1, 0, 1, 1, 0, 1], bool))}
    whole = metrics.bootstrap_means(measures, 100)
    monkeypatch.setattr(metrics, "_BLOCK", 30)
    assert metrics.bootstrap_means(measures, 100) == whole


@pytest.mark.parametrize("rows", [[], [(NAN, NAN, NAN, NAN, True)], [(0.0, NAN, -1.0, NAN, True)]])
def test_nothing_to_average_is_nan(rows):
    o = outcomes(rows) if rows else Outcomes(*np.zeros((4, 0)), np.zeros(0, bool))
    summary = metrics.summarize(o, num_bootstrap=5)
    assert np.isnan(summary["mean_percentage"].value) and summary["mean_percentage"].count == 0
    assert np.isnan(summary["median_residual"].value)


def test_bad_arguments():
    with pytest.raises(ValueError, match="same shape"):
        Outcomes(np.zeros(2), np.zeros(3), np.zeros(2), np.zeros(2), np.zeros(2, bool))
    with pytest.raises(ValueError, match="num_bootstrap"):
        metrics.summarize(ALL, num_bootstrap=1)

"""Tests for the report on a label budget: learning curves, budget, calibration, worst molecules."""

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.reports.label_budget.report import write_label_report
from mlip_jax.structure import Structure


def evaluation(number, error, expected):
    names = ["CCO", "CCO", "CS"]
    return {
        "round": number,
        "num_labels": 50 * number,
        "num_molecules": 20,
        "calls": 60 * number,
        "oracle_seconds": 30.0 * number,
        "expected_error": expected,
        "kinds": {"modes": 30, "md": 20},
        "per_molecule": {"2": 10, "3": 10},
        "failures": {f"round {number} 3: CS, md": "took longer than 60 s"},
        "valid": {"force_mae": expected},
        "force_field": ["a"],
        "test": {
            "force_mae": error,
            "force_p95": 2 * error,
            "energy_mae": 0.01,
            "expected_force_mae": expected,
            "structures": {
                "molecule": names,
                "kind": ["modes", "md", "modes"],
                "force_error": [error, error, 3 * error],
                "expected_force_error": [expected, expected, 2 * expected],
                "worst_atom": ["C(C, H, H, H)", "O(C, H)", "S(C, H)"],
            },
        },
    }


def test_the_report_shows_curves_budget_calibration_and_worst_molecules(tmp_path):
    """Detects a section that is lost, and eV/Å that are shown as meV/Å."""
    metrics = {
        "strategy": "both",
        "rounds": {
            "both": [evaluation(1, 0.4, 0.3), evaluation(2, 0.2, 0.18)],
            "random": [evaluation(1, 0.4, 0.3), evaluation(2, 0.3, 0.25)],
        },
        "comparison": {"random": {"ratio": 0.7071}},
    }
    test = Columns.from_structures(
        Structure(np.array([6, 1], np.int32), np.array([[0, 0, 0], [1.1, 0, 0]]), molecule=name)
        for name in ("CCO", "CCO", "CS")
    )
    pool = {"unusable": {"c1ccX": "RDKit cannot read it"}}
    path = write_label_report(tmp_path, metrics, test, pool, {"Settings": {"budget": 100}})
    text = path.read_text()
    for part in (
        *("Learning curve", "How the budget was spent", "Expected error", "Failures"),
        *("What the force field does not know", "S(C, H)", "took longer than 60 s", "c1ccX"),
        *("0.707", "test force error", "200.0", "0.900"),
    ):
        assert part in text, part
    assert text.count("<img") == 4

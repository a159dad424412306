"""The figures of a search for minima beside the reference method."""

import numpy as np
import pytest
from ase import units

from mlip_jax.reports.minima import (
    MoleculeMinima,
    ReferenceMinimum,
    ReportedMinimum,
    metrics,
    write_minima_report,
)

EV = units.kcal / units.mol  # a kcal/mol


def judged(own, there, relaxed):
    found = MoleculeMinima(
        0,
        "water",
        numbers=[8, 1, 1],
        new=[3],
        relaxed=[5],
        minima=[
            ReportedMinimum(EV * e, (np.eye(3) + 0.1 * k).tolist(), k % 2, 1)
            for k, e in enumerate(own)
        ],
    )
    return found, [
        ReferenceMinimum(found, k, EV * a, EV * b) for k, (a, b) in enumerate(zip(there, relaxed))
    ]


def test_metrics(tmp_path):
    found, judgements = judged([0.0, 1.0, 2.0], [-100.0, -98.0, -99.0], [-101.0, -101.5, -100.0])
    content = metrics([found, MoleculeMinima(1, "bad", "cannot be read")], judgements)
    one = content["by_molecule"][0]["judged"]
    assert one["relative_mae_kcal_mol"] == pytest.approx(2 / 3)  # -1, 0, 1 against -1, 1, 0
    assert one["rank_correlation"] == pytest.approx(0.5)
    assert one["lowest_above_best_kcal_mol"] == pytest.approx(0.5) and not one["lowest_is_best"]
    assert content["without_minima"] == 1 and content["judged"]["molecules"] == 1
    report = write_minima_report(
        tmp_path, [found], judgements, title="Minima", info={"Search": {"rounds": 1}}
    )
    assert report.read_text().count("<img") == 3


def test_what_the_reference_method_cannot_do_is_left_out():
    found, judgements = judged([0.0, 1.0], [-100.0, float("nan")], [-101.0, -101.5])
    assert metrics([found], judgements)["judged"] is None


def test_it_comes_back():
    found, _ = judged([0.0, 1.0], [0.0, 0.0], [0.0, 0.0])
    assert MoleculeMinima.from_json(found.to_json()) == found

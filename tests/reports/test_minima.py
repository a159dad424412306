"""Tests for the metrics of a search for minima against the reference method."""

import numpy as np
import pytest
from ase import Atoms, units

from mlip_jax.reports.minima.report import write_minima_report
from mlip_jax.reports.minima.results import (
    MoleculeMinima,
    ReferenceMinimum,
    ReportedMinimum,
    metrics,
)
from mlip_jax.simulation.relaxation.minima import _bare
from mlip_jax.simulation.relaxation.minima_result import MinimaResult, Minimum

EV = units.kcal / units.mol  # eV per kcal/mol


def with_references(predicted, reference, relaxed):
    molecule = MoleculeMinima(
        0,
        "water",
        numbers=[8, 1, 1],
        new=[3],
        relaxed=[5],
        minima=[
            ReportedMinimum(EV * e, (np.eye(3) + 0.1 * k).tolist(), k % 2, 1)
            for k, e in enumerate(predicted)
        ],
    )
    return molecule, [
        ReferenceMinimum(molecule, k, EV * a, EV * b)
        for k, (a, b) in enumerate(zip(reference, relaxed))
    ]


def test_metrics(tmp_path):
    molecule, references = with_references(
        [0.0, 1.0, 2.0], [-100.0, -98.0, -99.0], [-101.0, -101.5, -100.0]
    )
    content = metrics([molecule, MoleculeMinima(1, "bad", "cannot be read")], references)
    one = content["by_molecule"][0]["judged"]
    assert one["relative_mae_kcal_mol"] == pytest.approx(2 / 3)  # -1, 0, 1 against -1, 1, 0
    assert one["rank_correlation"] == pytest.approx(0.5)
    assert one["lowest_above_best_kcal_mol"] == pytest.approx(0.5) and not one["lowest_is_best"]
    assert content["without_minima"] == 1 and content["judged"]["molecules"] == 1
    report = write_minima_report(
        tmp_path,
        [molecule],
        references,
        title="Minima",
        info={"Search": {"rounds": 1}},
        notes=["outside the domain"],
    )
    assert report.read_text().count("<img") == 3 and "outside the domain" in report.read_text()


def test_failures_of_the_reference_method_are_excluded():
    molecule, references = with_references([0.0, 1.0], [-100.0, float("nan")], [-101.0, -101.5])
    assert metrics([molecule], references)["judged"] is None


def test_minima_keep_masses():
    """Detects isotopes that are lost in a search for minima."""
    heavy = Atoms("OHH", np.eye(3), masses=[None, 2.0141, 2.0141], momenta=np.ones((3, 3)))
    bare = _bare(heavy)
    assert not bare.has("momenta") and bare.get_masses()[1] == 2.0141
    result = MinimaResult([Minimum(bare, -1.0, 0)], [1], [1], {})
    molecule = MoleculeMinima.from_result(0, "heavy water", "", result)
    assert molecule.minima[0].to_atoms(molecule).get_masses()[2] == 2.0141


def test_json_round_trip():
    molecule, _ = with_references([0.0, 1.0], [0.0, 0.0], [0.0, 0.0])
    assert MoleculeMinima.from_json(molecule.to_json()) == molecule


def test_minima_keep_charge_and_unpaired_electrons():
    """Detects reference energies of another state than that of the force field."""
    molecule = MoleculeMinima(0, "O2", "", [8, 8], 1.0, unpaired=2)
    minimum = ReportedMinimum(0.0, [[0, 0, 0], [0, 0, 1.2]], 0, 1)
    info = minimum.to_atoms(MoleculeMinima.from_json(molecule.to_json())).info
    assert info == {"charge": 1.0, "num_unpaired_electrons": 2}

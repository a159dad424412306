"""Tests for the task `stability`: cold argon clusters survive, weakly bound dimers break."""

import csv
import json
import types

import pytest
from ase import Atoms
from ase.io import write

from mlip_jax.config import ConfigError
from mlip_jax.defaults import stability_defaults
from mlip_jax.simulation.dynamics import batch as dynamics
from mlip_jax.simulation.dynamics.outputs import DynamicsOutputs
from mlip_jax.tasks import stability
from tests.simulation.analytic import pairwise


def options(path, **changes):
    config = stability_defaults()
    config.input, config.force_field, config.relax_first = str(path), "springs", False
    config.temperatures, config.replicas, config.picoseconds, config.nve_picoseconds = (
        (10.0, 30_000.0),
        3,
        0.1,
        0.05,
    )
    config.record_every, config.restart_seconds = 5, 0.0
    for name, value in changes.items():
        config[name] = value
    return config


def test_hot_molecules_break_and_a_stopped_run_resumes(tmp_path, monkeypatch, caplog):
    path = tmp_path / "dimers.xyz"
    write(path, [Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), Atoms("H2", [[0, 0, 0], [0, 0, 0.7]])])
    monkeypatch.setattr(
        stability,
        "load_mean_force_field",
        lambda text: pairwise("harmonic", length=0.74, stiffness=20.0),
    )
    monkeypatch.setattr(dynamics, "DISPATCH_SECONDS", 0.01)
    outside = types.SimpleNamespace(message=lambda all_, name: f"{len(all_)} are outside")
    monkeypatch.setattr(stability, "TrustCheck", types.SimpleNamespace(load=lambda *given: outside))
    write_files, calls = DynamicsOutputs.write, []

    def fails(self, *arguments):
        calls.append(0)
        write_files(self, *arguments)
        if len(calls) == 3:
            raise SystemExit

    monkeypatch.setattr(DynamicsOutputs, "write", fails)
    with pytest.raises(SystemExit):
        stability.run(options(path), tmp_path / "run")
    report = stability.run(options(path), tmp_path / "run")
    stability.run(options(path), tmp_path / "whole")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "2 are outside" in caplog.text  # the domain of the force field used to be ignored
    cold, hot = metrics["temperatures"]
    assert (cold["survived"], cold["replicas"], hot["survived"]) == (6, 6, 0)
    assert (
        metrics["highest_stable_temperature_k"] == 10
        and 0 < hot["first_break_ps"] <= hot["mean_time_to_break_ps"]
    )
    assert (
        abs(metrics["molecules"][0]["drift_mev_per_atom_per_ps"]) < 50
        and metrics["molecules"][0]["broken"] == 3
    )
    page = report.read_text()
    assert page.count("<img") == 1 and "Reasons of breaks" in page
    table = (tmp_path / "run/stability.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 12 and rows[0]["broke_at_ps"] == "" and "H0–H1" in rows[-1]["reason"]
    assert table == (tmp_path / "whole/stability.csv").read_text()


def test_comparison_with_the_reference_method(tmp_path, monkeypatch):
    path = tmp_path / "dimers.xyz"
    write(path, [Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), Atoms("Ar2", [[0, 0, 0], [0, 0, 0.75]])])
    monkeypatch.setattr(
        stability,
        "load_mean_force_field",
        lambda text: pairwise("harmonic", length=0.74, stiffness=20.0),
    )
    changes = dict(
        compare_picoseconds=0.2,
        nve_picoseconds=0.0,
        temperatures=(10.0,),
        replicas=1,
        picoseconds=0.01,
        bond_range=(0.1, 4.0),
        compare_temperature=100.0,
        trajectory_format="hdf5",
    )
    config = options(path, **changes)
    config.oracle.method, config.oracle.num_processes = "ase.calculators.emt:EMT", 1
    page = stability.run(config, tmp_path / "run").read_text()
    # EMT knows no argon
    (compared,) = json.loads((tmp_path / "run/metrics.json").read_text())["compared"]
    assert (
        compared["name"] == "H2"
        and 0 <= compared["spectrum_overlap"] <= 1
        and compared["temperature_k"] > 0
    )
    assert (
        0 <= compared["distances_overlap"] <= 1 and "Comparison with the reference method" in page
    )
    reference_file = tmp_path / "run/compared/reference/0.npz"
    before = reference_file.stat().st_mtime_ns
    (tmp_path / "run/report.html").unlink()
    stability.run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run/metrics.json").read_text())["compared"] == [compared]
    assert reference_file.stat().st_mtime_ns == before


def test_invalid_settings_are_errors(tmp_path):
    for changes, words in [
        ({"force_field": ""}, "force_field is required"),
        ({"picoseconds": 0.0}, "picoseconds"),
        ({"temperatures": ()}, "temperatures"),
        ({"replicas": 0}, "replicas"),
        ({"compare_picoseconds": -1.0}, "compare_picoseconds"),
        ({"trajectory_format": "xyz"}, "trajectory_format 'xyz'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            stability.run(options(tmp_path / "none.xyz", **changes), tmp_path / "run")

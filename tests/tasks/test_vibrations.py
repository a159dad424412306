"""Tests for the task `vibrations`: its files, molecules without a result, and resumption."""

import csv

import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import read, write

from mlip_jax.config import ConfigError
from mlip_jax.defaults import vibrations_defaults
from mlip_jax.tasks import vibrations
from tests.simulation.analytic import pairwise


def options(path, **changes):
    config = vibrations_defaults()
    config.input, config.force_field, config.num_processes = str(path), "springs", 1
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.fixture
def springs(monkeypatch):
    potential = pairwise("harmonic", length=0.74, stiffness=20.0)
    monkeypatch.setattr(vibrations, "load_mean_force_field", lambda text: potential)
    monkeypatch.setattr(
        vibrations.TrustCheck, "load", lambda given, p: vibrations.TrustCheck((p,), (None,))
    )


def test_files_of_a_run_and_its_resumption(tmp_path, monkeypatch, springs):
    pair = Atoms("H2", [[0, 0, 0], [0, 0, 0.9]])
    write(tmp_path / "in.xyz", [pair, molecule("CH4")])
    report = vibrations.run(options(tmp_path / "in.xyz"), tmp_path / "run")
    thermo = list(csv.DictReader((tmp_path / "run/thermochemistry.csv").open()))
    (mode,) = csv.DictReader((tmp_path / "run/vibrations.csv").open())
    assert float(thermo[0]["zero_point_energy_ev"]) == pytest.approx(
        float(mode["frequency_per_cm"]) / 8065.544 / 2, rel=1e-5
    )
    assert thermo[0]["symmetry_number"] == "2" and "not trained on C" in thermo[1]["reason"]
    (frame,) = read(tmp_path / "run/modes/000000.xyz", ":")
    assert frame.arrays["mode"].shape == (2, 3)
    page = report.read_text()
    assert "Thermochemistry" in page and "Molecules without a result" in page
    monkeypatch.setattr(vibrations, "analyze", None)  # a second run computes nothing again
    assert vibrations.run(options(tmp_path / "in.xyz"), tmp_path / "run") == report


def test_invalid_configs_are_errors(tmp_path):
    for changes, message in (
        ({"isotopes": "H:2"}, "isotopes"),
        ({"isotopes": "D=2"}, "isotopes"),
        ({"force_field": ""}, "force_field is required"),
    ):
        with pytest.raises(ConfigError, match=message):
            vibrations.run(options(tmp_path / "in.xyz", **changes), tmp_path / "run")

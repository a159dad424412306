"""Tests for the task `crystal`: files, resumption and report."""

import csv
import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

from mlip_jax.config import ConfigError
from mlip_jax.defaults import crystal_defaults
from mlip_jax.reports.simulations.crystal import ReportedCrystal, write_crystal_report
from mlip_jax.tasks import crystal
from tests.simulation.analytic import pairwise


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_crystals_of_a_file(tmp_path, monkeypatch):
    potential = pairwise(depth=0.1, length=2.4, cutoff=4.6)
    monkeypatch.setattr(crystal, "load_mean_force_field", lambda text: potential)
    write(tmp_path / "in.xyz", [bulk("Ar", "fcc", a=3.9), Atoms("Ar2", [[0, 0, 0], [0, 0, 2.7]])])
    config = crystal_defaults()
    config.input, config.force_field = str(tmp_path / "in.xyz"), "argon"
    config.mesh, config.supercell_length = 3, 9.3
    report = crystal.run(config, tmp_path / "run")
    first, second = rows(tmp_path / "run/crystals.csv")
    assert float(first["bulk_modulus_gpa"]) > 1 and "not periodic" in second["reason"]
    assert len(rows(tmp_path / "run/equations_of_state.csv")) == 9
    assert read(tmp_path / "run/relaxed.xyz").cell.volume == pytest.approx(
        float(first["volume_ang3"]), rel=1e-5
    )
    assert np.load(tmp_path / "run/phonons/000000.npz")["mesh"].shape == (27, 3)
    before = report.read_text()
    monkeypatch.setattr(crystal, "analyze_crystals", lambda given, *_: iter(()))
    crystal.run(config, tmp_path / "run")  # nothing is left to do
    assert report.read_text() == before
    config.num_volumes = 3
    with pytest.raises(ConfigError, match="num_volumes"):
        crystal.run(config, tmp_path / "other")


def test_a_missing_force_field_suggests_a_published_one(tmp_path):
    config = crystal_defaults()
    with pytest.raises(ConfigError, match=r"sevennet-0 \(pip install --no-deps sevenn\)"):
        crystal.run(config, tmp_path / "run")
    config.force_field = "argon"
    with pytest.raises(ConfigError, match="input is required"):
        crystal.run(config, tmp_path / "run")


def test_report(tmp_path):
    """The report shows results and reasons."""
    volumes = [40.0, 41.0, 42.0]
    crystals = [
        ReportedCrystal(
            0,
            "NaCl",
            n_atoms=2,
            energy=-7.0,
            cell=[4.0, 4.0, 4.0, 60.0, 60.0, 60.0],
            volume=41.0,
            volumes=volumes,
            energies=[-6.9, -7.0, -6.9],
            curve=[volumes, [-6.9, -7.0, -6.9]],
            bulk_modulus=25.0,
            lowest_frequency=-1.0,
            distances=[0.0, 1.0],
            ticks=[[0.0, "G"], [1.0, "X"]],
            bands=[[0.0, 1.0], [2.0, 3.0]],
        ),
        ReportedCrystal(1, "KCl", reason="it is not periodic in three directions"),
    ]
    text = write_crystal_report(tmp_path, crystals, title="Crystals", info={}).read_text()
    assert "not periodic" in text and text.count("<img") + text.count("<svg") >= 1
    assert json.loads((tmp_path / "metrics.json").read_text())["with_imaginary_modes"] == 1

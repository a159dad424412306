"""Tests for the task `minima`: its files, resumption and errors."""

import csv
import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import read, write

from mlip_jax.config import ConfigError
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.defaults import minima_defaults
from mlip_jax.tasks import minima
from tests.simulation.analytic import pairwise


def options(path, **changes):
    config = minima_defaults()
    config.input, config.force_field, config.batch_molecules = str(path), "springs", 1
    (
        config.search.rounds,
        config.search.replicas,
        config.search.picoseconds,
        config.search.frames,
    ) = 1, 1, 0.005, 1
    config.oracle.method, config.oracle.num_processes = "ase.calculators.emt:EMT", 1
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


@pytest.fixture
def springs(monkeypatch):
    monkeypatch.setattr(
        minima,
        "load_mean_force_field",
        lambda text: pairwise("harmonic", length=0.74, stiffness=20.0),
    )


def dimers(folder, *others):
    path = folder / "dimers.xyz"
    write(path, [Atoms("H2", [[0, 0, 0], [0, 0, d]]) for d in (0.77, 0.70)] + list(others))
    return path


@pytest.mark.slow
def test_a_killed_search_resumes(tmp_path, monkeypatch, springs):
    path = dimers(tmp_path, molecule("CH4"))
    search, calls = minima.find_minima, []

    def fails(starts, *arguments, **rest):
        calls.append(len(starts))
        if len(calls) == 2:
            raise SystemExit
        return search(starts, *arguments, **rest)

    monkeypatch.setattr(minima, "find_minima", fails)
    with pytest.raises(SystemExit):
        minima.run(options(path), tmp_path / "run")
    report = minima.run(options(path), tmp_path / "run")
    # the first molecule once, the second twice, methane never (carbon is unknown)
    assert calls == [1, 1, 1]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["molecules"], metrics["without_minima"], metrics["minima"]) == (3, 1, 2)
    assert "C" in metrics["by_molecule"][2]["failure"] and metrics["judged"] is None
    frames = read(tmp_path / "run/minima.xyz", ":")
    np.testing.assert_allclose([a.get_distance(0, 1) for a in frames], 0.74, atol=2e-3)
    assert [a.info["molecule"] for a in frames] == [0, 1]
    rows = list(csv.DictReader((tmp_path / "run/minima.csv").open()))
    assert [r["rank"] for r in rows] == ["0", "0"] and float(rows[0]["relative_energy_ev"]) == 0.0
    page = report.read_text()
    assert "Energies of the minima" in page and "trained on C" in page and page.count("<img") == 1


def test_comparison_with_the_reference_method(tmp_path, springs):
    config = options(dimers(tmp_path), num_reference_minima=2)
    page = minima.run(config, tmp_path / "run").read_text()
    assert "Comparison with the reference method" in page
    # one minimum per molecule has no rank correlation
    assert json.loads((tmp_path / "run/metrics.json").read_text())["judged"] is None

    # an older version wrote the same workdir with the former names of the fields, and resumes
    stored = json.loads((tmp_path / "run/config.json").read_text())
    stored["judged"] = stored.pop("num_reference_minima")
    stored["batch"] = stored.pop("batch_molecules")
    (tmp_path / "run/config.json").write_text(json.dumps(stored))
    (tmp_path / "run/report.html").unlink()
    del config.num_reference_minima
    config.judged = 2
    assert (
        minima.run(config, tmp_path / "run")
        .read_text()
        .count("Comparison with the reference method")
        == 1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"force_field": ""}, "force_field is required"),
        ({"num_conformers": 0}, "num_conformers must be at least 1"),
        ({"search__rounds": -1}, "search.rounds must be"),
        ({"num_reference_minima": 1, "oracle__method": "GFN3"}, "unknown oracle.method 'GFN3'"),
    ],
)
def test_invalid_settings_are_errors(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        minima.run(options(dimers(tmp_path), **changes), tmp_path / "run")


def test_a_file_without_usable_molecules_is_an_error(tmp_path, springs):
    path = tmp_path / "methane.xyz"
    write(path, molecule("CH4"))
    with pytest.raises(
        DatasetError, match="no minimum of any molecule was found; the first: .*not trained on C"
    ):
        minima.run(options(path), tmp_path / "run")

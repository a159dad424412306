"""Tests for the task `neb`: files, resumption, reading of paths and report."""

import csv
import json

import pytest
from ase.io import read, write

from mlip_jax.config import ConfigError
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.defaults import neb_defaults
from mlip_jax.reports.simulations.reactions import ReportedPath, write_reaction_report
from mlip_jax.tasks import neb
from tests.simulation.analytic import pairwise
from tests.simulation.reactions.test_neb import cluster


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_paths_of_a_file(tmp_path, monkeypatch):
    potential = pairwise(depth=0.2, length=2.4, cutoff=5.5)
    monkeypatch.setattr(neb, "load_mean_force_field", lambda text: potential)
    path = cluster(fixed=(0, 1, 2, 3))
    other = path[-1][[1, 0, 2, 3, 4]]
    other.numbers[0] = 1
    write(tmp_path / "in.xyz", [path[0], path[-1], path[0], other])
    config = neb_defaults()
    config.input, config.force_field, config.num_images = str(tmp_path / "in.xyz"), "argon", 3
    report = neb.run(config, tmp_path / "run")
    first, second = rows(tmp_path / "run/barriers.csv")
    assert first["status"] == "converged" and float(first["barrier_ev"]) > 0.03
    assert second["status"] == "failed" and "other atoms" in second["reason"]
    assert len(read(tmp_path / "run/paths.xyz", ":")) == 5
    monkeypatch.setattr(neb, "find_paths", lambda given, *_: iter(()))
    assert neb.run(config, tmp_path / "run") == report


def test_structures_of_one_name_are_a_path(tmp_path):
    frames = cluster()
    for k, frame in enumerate(frames):
        frame.info["name"] = "hop" if k < 3 else "roll"
    write(tmp_path / "a.xyz", frames)
    assert [(n, len(p)) for n, p in neb.read_paths(tmp_path / "a.xyz")] == [("hop", 3), ("roll", 2)]
    for frame in frames:
        del frame.info["name"]
    write(tmp_path / "b.xyz", frames[:4])
    assert [len(p) for _, p in neb.read_paths(tmp_path / "b.xyz")] == [2, 2]
    write(tmp_path / "c.xyz", frames)
    with pytest.raises(DatasetError, match="expected two per reaction"):
        neb.read_paths(tmp_path / "c.xyz")


def test_a_missing_force_field_suggests_published_ones(tmp_path):
    with pytest.raises(ConfigError, match="force_field=so3lr for molecules.*published.py"):
        neb.run(neb_defaults(), tmp_path / "run")


def test_report(tmp_path):
    """The report shows barriers and reasons."""
    paths = [
        ReportedPath(
            0, "hop", "converged", barrier=0.5, distances=[0, 1, 2], energies=[0, 0.5, 0.1]
        ),
        ReportedPath(1, "roll", "failed", "image 1 has other atoms"),
    ]
    text = write_reaction_report(tmp_path, paths, title="Paths", info={}).read_text()
    assert "0.5000" in text and "other atoms" in text
    assert json.loads((tmp_path / "metrics.json").read_text())["failed"] == 1

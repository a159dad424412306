"""Tests that tasks whose molecules all fail write their results and then end with an error."""

from types import SimpleNamespace

import pytest
from ase import Atoms
from ase.io import write

from mlip_jax import defaults
from mlip_jax.datasets.builtin import conformer_sets
from mlip_jax.reports.simulations.stability import Replica
from mlip_jax.simulation.crystals.analysis import CrystalAnalysis
from mlip_jax.simulation.reactions.neb import ReactionPath
from mlip_jax.tasks import crystal, force2geo_eval, generate_conformers, neb, stability


@pytest.fixture
def patch(monkeypatch):
    """Return a function that replaces functions of a module by their results."""

    def patch(module, **results):
        for name, result in results.items():
            monkeypatch.setattr(module, name, lambda *_, _result=result, **__: _result)

    return patch


def test_conformers(tmp_path, patch):
    patch(conformer_sets, generate_conformers=[])
    config = defaults.conformers_defaults()
    config.smiles = "molecules.smi"
    with pytest.raises(RuntimeError, match="no conformer of any molecule of molecules.smi"):
        generate_conformers.run(config, tmp_path)
    assert (tmp_path / "summary.json").is_file()


@pytest.mark.parametrize("broke_at", [0.1, None])
def test_stability(tmp_path, patch, broke_at, monkeypatch):
    trusted = SimpleNamespace(message=lambda *_: "")
    monkeypatch.setattr(stability.TrustCheck, "load", lambda *_: trusted)
    replicas = [Replica(0, 300.0, 0.2, "a bond broke"), Replica(0, 300.0, broke_at, "")]
    patch(
        stability,
        load_mean_force_field=SimpleNamespace(
            digest=lambda: "", origin_of_forces="", cutoff=5.0, metadata={}
        ),
        read_all=([[None]], ["water"]),
        fingerprint={},
        run_settings={},
        _relax_molecules=None,
        _run_nve=([0.0], 1.0),
        _run_langevin=(replicas, 1.0),
        _compare_with_reference=[],
        write_stability_report=tmp_path / "report.html",
    )
    patch(stability.TrustCheck, load=SimpleNamespace(message=lambda *_: ""))
    config = defaults.stability_defaults()
    config.force_field, config.input = "runs/spice", "molecules.smi"
    if broke_at is None:
        assert stability.run(config, tmp_path) == tmp_path / "report.html"
        return
    with pytest.raises(RuntimeError, match="all 2 replicas broke"):
        stability.run(config, tmp_path)
    assert (tmp_path / "stability.csv").is_file()


@pytest.mark.parametrize(
    ("task", "config", "search", "failure", "table"),
    [
        (
            crystal,
            defaults.crystal_defaults(),
            "analyze_crystals",
            CrystalAnalysis(Atoms("H"), "a reason"),
            crystal.TABLE,
        ),
        (
            neb,
            defaults.neb_defaults(),
            "find_paths",
            ReactionPath([], "failed", "a reason"),
            neb.TABLE,
        ),
    ],
)
def test_crystals_and_reactions(tmp_path, patch, task, config, search, failure, table):
    """Also detects formulas in the tables, and folders of the workdir that are links."""
    frames = [Atoms("H", info={"name": "=1+1"}), Atoms("H", info={"name": "=1+1"})]
    write(tmp_path / "in.xyz", frames[: 2 if task is neb else 1])
    patch(
        task,
        **{
            search: [(0, failure)],
            "load_mean_force_field": SimpleNamespace(
                digest=lambda: "", origin_of_forces="", cutoff=5.0, metadata={}
            ),
        },
    )
    patch(task.TrustCheck, load=SimpleNamespace(message=lambda *_: ""))
    config.force_field, config.input = "runs/spice", str(tmp_path / "in.xyz")
    with pytest.raises(RuntimeError, match="all 1 .* failed"):
        task.run(config, tmp_path / "run")
    assert "'=1+1" in (tmp_path / "run" / table).read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / task.PARTS).symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic link"):
        task.run(config, tmp_path / "linked")


@pytest.mark.parametrize("status", ["diverged", "converged"])
def test_force2geo(tmp_path, patch, status):
    patch(
        force2geo_eval,
        load_force_field=None,
        choose_starts=([], []),
        evaluate_starts=None,
        relax={"a": {"status": "failed"}, "b": {"status": status}},
        evaluate_relaxed=None,
        write_report=tmp_path / "report.html",
        _compare_levels=[],
        _settings={},
        Oracle=None,
    )
    config = defaults.force2geo_defaults()
    config.force_field = "runs/spice"
    if status == "converged":
        assert force2geo_eval.run(config, tmp_path) == tmp_path / "report.html"
        return
    with pytest.raises(RuntimeError, match="all relaxations failed or diverged"):
        force2geo_eval.run(config, tmp_path)

"""Tests for the task `force2geo_eval`, with relaxers whose answers are known."""

import csv
import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.config import ConfigError
from mlip_jax.configs.force2geo_eval import get_config
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.readers import spice
from mlip_jax.datasets.selection.split_files import save_split
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store
from mlip_jax.defaults import force2geo_defaults
from mlip_jax.potential import create_model, example_graph
from mlip_jax.simulation.reference import oracle
from mlip_jax.simulation.relaxation.metrics import KCAL_PER_MOL
from mlip_jax.simulation.relaxation.relax import relax
from mlip_jax.tasks import force2geo_eval
from mlip_jax.tasks.relaxation_evaluation import evaluation
from mlip_jax.workdir import WorkdirError

DATA = Path(__file__).parents[1] / "data" / "gfn2_small.hdf5"
MODEL = {
    "name": "painn",
    "options": {"num_features": 8, "num_layers": 1, "num_radial": 4, "cutoff": 3.0},
}
REAL_RELAXER = evaluation.make_relaxer
TEST = ("formamide", "methyl-amine", "oxirane", "urea", "glycolic-acid", "acrylic-acid")
ELEMENTS = [1, 6, 7, 8]


def named(path):
    """Write the small data set as extended XYZ and return the names of its molecules."""
    frames = []
    with spice.Reader(DATA) as reader:
        for s in reader:
            atoms = Atoms(
                s.numbers,
                s.positions,
                info={
                    "molecule": s.source.split(":")[1],
                    "smiles": s.smiles,
                    "charge": s.charge,
                    "config_type": "sampled",
                },
            )
            atoms.calc = SinglePointCalculator(atoms, energy=s.energy, forces=s.forces)
            frames.append(atoms)
    write(path, frames, format="extxyz")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Write a workdir like that of a training run: a checkpoint, and a split of a store."""
    folder = tmp_path_factory.mktemp("trained")
    convert(
        ConversionSpec(
            str(named(folder / "data.xyz")), "ase", {"molecule_key": "molecule"}, dtype="float64"
        ),
        folder / "store",
        num_processes=1,
        progress=False,
    )
    store = Store(folder / "store")
    names = np.array([store[i].molecule for i in range(len(store))])
    rest = [n for n in dict.fromkeys(names.tolist()) if n not in TEST]
    parts = {
        "train": np.flatnonzero(np.isin(names, rest[:-2])),
        "valid": np.flatnonzero(np.isin(names, rest[-2:])),
        "test": np.flatnonzero(np.isin(names, TEST)),
    }
    (folder / "run").mkdir()
    save_split(folder / "run" / "splits.npz", parts, {"store": str(folder / "store")})
    model = create_model(MODEL)
    checkpoints = CheckpointStore(folder / "run" / "best")
    # the initialization would take longer to compile than the tests take
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph()))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    checkpoints.save(
        1,
        {"params": params},
        {
            "config": {"model": MODEL},
            "statistics": {
                "cutoff": 3.0,
                "reference_energies": [0.0] * 119,
                "energy_scale": 1.0,
                "elements": ELEMENTS,
                "level_of_theory": "GFN2-xTB",
            },
        },
    )
    checkpoints.close()
    return folder / "run"


class Relaxer:
    """Fake relaxer whose result depends on the name of a molecule, and which records the names."""

    asked: list = []
    stop_after = None

    def __init__(self, potential, options):
        assert tuple(potential.elements) == tuple(ELEMENTS) and options.fmax == 0.05

    def stream(self, molecules):
        for number, (name, atoms) in enumerate(reversed(list(molecules))):  # in another order
            if number == type(self).stop_after:
                raise KeyboardInterrupt
            type(self).asked.append(name)
            yield name, self.relax(name, atoms)

    @staticmethod
    def relax(name, atoms):
        status, reason = "converged", ""
        if name in ("formamide", "methyl-amine"):  # as the oracle would
            atoms.calc = oracle.Method().calculator(atoms)
            oracle.minimize_atoms(atoms, {"fmax": 0.01, "max_steps": 200, "maxstep": 0.2})
            atoms.calc = None
        elif name == "oxirane":
            status, reason = "diverged", "atoms 0 and 1 fused"
            atoms.positions *= 0.8
        elif name == "urea":
            status, reason = "failed", "something is wrong with it"
        elif name == "glycolic-acid":
            atoms.positions *= 1.15
        elif name == "acrylic-acid":
            status = "diverged"
            atoms.positions[0] = np.nan
        return types.SimpleNamespace(
            atoms=atoms,
            status=status,
            reason=reason,
            steps=7,
            energy_start=-1.0,
            energy=-2.0,
            fmax_start=3.0,
            fmax=0.04,
        )


@pytest.fixture(autouse=True)
def relaxer(monkeypatch):
    monkeypatch.setattr(evaluation, "make_relaxer", Relaxer)
    Relaxer.asked, Relaxer.stop_after = [], None


def evaluate(workdir, force_field, **changes):
    config = force2geo_defaults()
    config.force_field = str(force_field)
    config.oracle.num_processes = 1
    config.metrics.num_bootstrap = 30
    config.data.directory = str(workdir.parent / "data")
    for name, value in changes.items():
        part, field = name.split("__")
        config[part][field] = value
    return force2geo_eval.run(config, workdir)


def rows(workdir):
    with open(workdir / "results.csv", newline="") as file:
        return {(r["force_field"], r["molecule"]): r for r in csv.DictReader(file)}


def test_the_report_of_relaxations_with_known_outcomes(trained, tmp_path, monkeypatch):
    report = evaluate(tmp_path / "run", trained)
    found = rows(report.parent)
    assert {name for _, name in found} == set(TEST) == set(Relaxer.asked)
    percentage = {name: r["percentage"] for (_, name), r in found.items()}
    assert all(99.0 < float(percentage[name]) < 101.0 for name in ("formamide", "methyl-amine"))
    assert (
        percentage["urea"] == percentage["acrylic-acid"] == ""
        and float(percentage["glycolic-acid"]) < 0
    )
    flags = {
        name: tuple(int(r[k]) for k in ("judged", "diverged", "success", "force_converged"))
        for (_, name), r in found.items()
    }
    assert flags == dict.fromkeys(("formamide", "methyl-amine"), (1, 0, 1, 1)) | dict.fromkeys(
        ("oxirane", "urea", "glycolic-acid", "acrylic-acid"), (1, 1, 0, 0)
    )
    numbers = json.loads((report.parent / "metrics.json").read_text())
    mine = numbers["force_fields"]["run"]
    assert [
        mine[k]["value"] for k in ("success_rate", "divergence_rate", "force_convergence_rate")
    ] == pytest.approx([100 / 3, 200 / 3, 100 / 3])
    assert mine["mean_percentage"]["count"] == 2 and mine["status"] == {
        "converged": 3,
        "diverged": 2,
        "failed": 1,
    }
    assert numbers["baselines"]["start geometries"]["mean_percentage"]["value"] == 0
    own = numbers["baselines"]["GFN2-xTB itself"]
    assert own["mean_percentage"]["value"] == own["success_rate"]["value"] == 100
    text = report.read_text()
    assert all(
        words in text
        for words in ("57.37", "fused", "something is wrong with it", "PaiNN on PubChemQCR")
    )
    start = {a.info["name"]: a for a in read(report.parent / "geometries" / "start.xyz", ":")}
    ends = {a.info["name"]: a for a in read(report.parent / "geometries" / "0_run.xyz", ":")}
    assert set(start) == set(TEST) and set(ends) == set(TEST) - {"urea", "acrylic-acid"}
    np.testing.assert_allclose(
        ends["glycolic-acid"].positions, 1.15 * start["glycolic-acid"].positions, atol=1e-6
    )
    r = found["run", "oxirane"]
    energies = [float(r[f"energy_{k}_ev"]) for k in ("start", "relaxed", "opt")]
    assert float(r["percentage"]) == pytest.approx(
        100 * (energies[0] - energies[1]) / (energies[0] - energies[2]), rel=1e-4
    )
    assert float(r["residual_kcal_per_mol"]) == pytest.approx(
        (energies[1] - energies[2]) / KCAL_PER_MOL, rel=1e-4
    )


def test_a_stopped_run_resumes_without_repetition(trained, tmp_path, monkeypatch):
    Relaxer.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "run", trained)
    first = list(Relaxer.asked)
    assert len(first) == 2
    Relaxer.stop_after = None
    report = evaluate(tmp_path / "run", trained)
    assert sorted(Relaxer.asked) == sorted(TEST) and Relaxer.asked[:2] == first
    whole, Relaxer.asked = report.read_text(), []
    monkeypatch.setattr(oracle, "_work", None)  # cannot be called
    assert evaluate(tmp_path / "run", trained, oracle__num_processes=3).read_text() != ""
    assert not Relaxer.asked and rows(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").exists() and "<html" in whole
    with pytest.raises(WorkdirError, match="fmax"):
        evaluate(tmp_path / "run", trained, relax__fmax=0.01)


def test_the_batched_relaxation(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "make_relaxer", REAL_RELAXER)
    report = evaluate(tmp_path / "run", trained, data__num_molecules=3, relax__max_steps=4)
    found = rows(report.parent)
    assert len(found) == 3 and {r["status"] for r in found.values()} <= {
        "converged",
        "step limit",
        "diverged",
    }
    assert {int(r["steps"]) for r in found.values()} <= {0, 1, 2, 3, 4}
    start, end = (
        read(report.parent / "geometries" / f"{name}.xyz", ":") for name in ("start", "0_run")
    )
    for a, b, again in zip(
        start, end, relax(start, str(trained), fmax=0.05, max_steps=4), strict=True
    ):
        assert again.steps == int(found["run", a.info["name"]]["steps"]) > 0
        np.testing.assert_allclose(b.positions, again.atoms.positions, atol=1e-4)
    assert any(not np.allclose(a.positions, b.positions, atol=1e-3) for a, b in zip(start, end))


def test_several_force_fields_share_the_oracle(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "other")
    names = f"first={trained},second={tmp_path / 'other'}"
    report = evaluate(
        tmp_path / "run",
        names,
        data__num_molecules=3,
        data__first="urea",
        oracle__cache=str(tmp_path / "cache.jsonl"),
        oracle__method="GFN1-xTB",
    )
    numbers = json.loads((report.parent / "metrics.json").read_text())
    assert list(numbers["force_fields"]) == ["first", "second"] and numbers["num_molecules"] == 3
    assert {n for f, n in rows(report.parent) if f == "second"} == {
        n for f, n in rows(report.parent) if f == "first"
    }
    assert ("first", "urea") in rows(report.parent)
    assert len(Relaxer.asked) == 3  # the same parameters are the same force field
    assert (
        not (report.parent / "oracle.jsonl").exists() and (tmp_path / "cache.jsonl").stat().st_size
    )
    assert "second was trained on GFN2-xTB labels, but the oracle is GFN1-xTB" in report.read_text()


def test_training_molecules_are_excluded(trained, tmp_path):
    smiles = tmp_path / "mine.smi"
    smiles.write_text(
        "C1CO1 oxirane\nNCC(=O)O glycine\nCC(=O)[O-] acetate\nCS thiol\nCO methanol\n"
    )
    evaluate(tmp_path / "run", trained, data__path=str(smiles))
    assert {n for _, n in rows(tmp_path / "run")} == {"oxirane", "methanol"}
    left_out = json.loads((tmp_path / "run" / "left_out.json").read_text())
    assert set(left_out) == {"glycine", "acetate", "thiol"} and "training" in left_out["glycine"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "because it is in the training or validation split of a force field: 2." in page
    evaluate(
        tmp_path / "all",
        trained,
        data__path=str(smiles),
        data__allow_seen=True,
        data__selection="all",
    )
    found = rows(tmp_path / "all")
    assert {n: r["seen_in_training"] for (_, n), r in found.items()} == {
        "oxirane": "0",
        "glycine": "1",
        "acetate": "1",
        "methanol": "0",
    }
    assert "2 of 4 molecules were in the training" in (tmp_path / "all" / "report.html").read_text()
    smiles.write_text("NCC(=O)O glycine\n")
    with pytest.raises(DatasetError, match="none of 1 molecules"):
        evaluate(tmp_path / "none", trained, data__path=str(smiles))


def test_a_force_field_with_unknown_data_is_reported(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "moved")
    (tmp_path / "moved" / "splits.npz").unlink()
    smiles = tmp_path / "mine.smi"
    smiles.write_text("CO methanol\n")
    report = evaluate(tmp_path / "run", tmp_path / "moved", data__path=str(smiles))
    assert "The training data of moved are unknown" in report.read_text()
    with pytest.raises(DatasetError, match="config.data.path"):
        evaluate(tmp_path / "own", tmp_path / "moved")


def test_a_reference_geometry_of_the_data(trained, tmp_path):
    report = evaluate(
        tmp_path / "run",
        trained,
        data__reference="data",
        data__reference_stage="sampled",
        data__stage="sampled",
    )
    found = {n: r for (_, n), r in rows(report.parent).items()}
    assert "oxirane" in found and all(r["oracle_steps"] == "" for r in found.values())
    assert (
        "reference geometries"
        in json.loads((report.parent / "metrics.json").read_text())["baselines"]
    )
    with pytest.raises(ConfigError, match="reference_stage"):
        evaluate(tmp_path / "other", trained, data__reference="data")


@pytest.mark.parametrize(
    "text, message",
    [(None, "force_field is required"), ("a=x,a=y", "different names"), ("a=", "different names")],
)
def test_invalid_lists_of_force_fields_are_errors(text, message):
    with pytest.raises(ConfigError, match=message):
        force2geo_eval.force_fields(text)


def test_options_are_checked_first(tmp_path):
    for changes, message in (
        ({"oracle__method": "GFN3"}, "GFN2-xTB"),
        ({"metrics__num_bootstrap": 1}, "num_bootstrap"),
        ({"data__reference": "dta"}, "Did you mean 'data'"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(tmp_path / "run", "nowhere", **changes)
    assert get_config().to_dict() == force2geo_defaults().to_dict()

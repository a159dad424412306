"""Tests for the task `diversity`: a small study from the sweep to the report."""

import json
import subprocess
import sys

import numpy as np
import pytest
from ase import Atoms

pytest.importorskip("rdkit")

from mlip_jax import MLIPCalculator
from mlip_jax.configs import diversity_n_fixed, diversity_ns_fixed
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.reports.diversity.generalization import NAMES
from mlip_jax.sweeps.variants import load
from mlip_jax.tasks.force_field_training.preparation import energy_only
from tests.tasks.runs import DATA, REPOSITORY, environment

SETTINGS = {
    "data.path": DATA,
    "data.charge": "nan",
    "data.min_conformers": 4,
    "data.elements": None,
    "diversity.ood_path": REPOSITORY / "tests/data/spice_1.1.4_small.hdf5",
    "diversity.rmsd_threshold": 0.15,
    "diversity.num_processes": 1,
    "model.options.num_features": 8,
    "model.options.num_layers": 1,
    "train.num_steps": 20,
    "train.batch_size": 4,
    "train.valid_every": 10,
    "train.checkpoint_every": 10,
}


def command(config, workdir, *flags):
    fields = [f"--config.{k}={v}" for k, v in SETTINGS.items() if v is not None]
    return [
        sys.executable,
        "-m",
        "mlip_jax.main",
        f"--config={config}",
        f"--workdir={workdir}",
        *fields,
        *flags,
    ]


@pytest.mark.parametrize(
    "module, first, last",
    [
        (diversity_n_fixed, "N50000-c1-s0", "N3200000-c16-s2"),
        (diversity_ns_fixed, "S12500-c1-s0", "S100000-c16-s2"),
    ],
)
def test_published_grids(module, first, last):
    config = module.get_config()
    variants = load(module.__file__, config)
    assert len(variants) == 60 and variants[0].name == first and variants[-1].name == last
    c = variants[-1].config
    assert c.seed == c.data.split_seed == 2 and c.data.num_conformers == 16 == c.data.min_conformers
    assert c.data.num_molecules == (200_000 if module is diversity_n_fixed else 100_000)
    assert (c.model.name, c.model.options.num_layers, c.model.options.num_features) == (
        "equivariant_transformer",
        8,
        128,
    )
    assert c.loss.beta == c.loss.beta_end == 0 and c.loss.penalty == "mse"
    assert (c.optimizer.learning_rate, c.optimizer.learning_rate_end) == (1e-4, 1e-8)


def test_one_number_scales_the_grids():
    variants = load(
        f"{diversity_n_fixed.__file__}:scale=0.08,grid=2,model=painn",
        diversity_n_fixed.get_config("scale=0.08,grid=2,model=painn"),
    )
    assert len(variants) == 30
    assert {v.config.data.num_molecules * v.config.data.num_conformers for v in variants} == {
        4000,
        16000,
    }
    assert {v.config.model.name for v in variants} == {"painn"}
    assert {
        v.overrides["data.num_molecules"]
        for v in load(
            f"{diversity_ns_fixed.__file__}:scale=0.04", diversity_ns_fixed.get_config("scale=0.04")
        )
    } == {500, 1000, 2000, 4000}
    text = "scale=0.08,grid=1,conformers=4,seeds=2"
    few = load(f"{diversity_n_fixed.__file__}:{text}", diversity_n_fixed.get_config(text))
    assert [v.name for v in few] == [f"N4000-c{c}-s{s}" for c in (1, 2, 4) for s in (0, 1)]
    assert {v.config.data.min_conformers for v in few} == {4}
    assert (
        len(load(f"{diversity_ns_fixed.__file__}:{text}", diversity_ns_fixed.get_config(text))) == 6
    )
    assert {
        diversity_ns_fixed.get_config(f"selection={s}").data.selection
        for s in ("maxmin", "embedding")
    } == {"maxmin", "embedding"}
    energies_only, both = diversity_n_fixed.get_config(), diversity_ns_fixed.get_config("beta=0.9")
    assert (energies_only.data.require, both.data.require) == ("energy", "both")
    assert both.loss.beta == both.loss.beta_end == 0.9
    assert energy_only(energies_only) and not energy_only(both)
    for text, message in (
        ("beta=1", "beta, the weight of forces, must be"),
        ("selection=maxmim", "Did you mean 'maxmin'"),
        ("conformers=3", "one of 1, 2, 4, 8, 16"),
        ("seeds=4", "seeds from 1 to 3"),
        ("size=2", "unknown name 'size'"),
        ("scale=2", "at most 1"),
        ("grid=5", "from 1 to 4"),
        ("model=pain", "Did you mean 'painn'"),
    ):
        with pytest.raises(ValueError, match=message):
            diversity_n_fixed.get_config(text)


@pytest.mark.slow
def test_a_study_from_the_sweep_to_the_report(tmp_path):
    """Two variants with two seeds; a complete run is not repeated; the metrics use the right sets.

    Another variant is trained on forces.
    """
    config = tmp_path / "small.py"
    config.write_text(
        "from mlip_jax.configs import diversity_n_fixed\n"
        "def get_config():\n    return diversity_n_fixed.get_config('model=painn')\n"
        "def sweep():\n    return [{'name': f'c{c}-s{s}', 'data.num_molecules': n, 'data.num_conformers': c, 'seed': s}"
        " for n, c in ((8, 1), (4, 2)) for s in (0, 1)] + [{'name': 'forces', 'data.num_molecules': 4, "
        "'data.num_conformers': 2, 'loss.beta': 0.9, 'loss.beta_end': 0.9}]\n"
    )
    run = command(config, tmp_path / "sweep", "--sweep", f"--config.data.directory={tmp_path}/data")
    for arguments in (["--sweep_index=0"], [], []):
        subprocess.run(
            [*run, *arguments], env=environment(), check=True, capture_output=True, timeout=900
        )
    log = (tmp_path / "sweep/c1-s0/log.txt").read_text()
    # the variant that was complete was not run again
    assert log.count("evaluating the best checkpoint") == 1
    for name, n_s, n_c in (("c1-s0", 8, 1), ("c2-s1", 4, 2), ("forces", 4, 2)):
        _check_result(tmp_path / "sweep" / name, n_s, n_c)
    _check_forces(tmp_path / "sweep")
    report = [
        sys.executable,
        "-m",
        "mlip_jax.main",
        f"--config={REPOSITORY}/configs/diversity_report.py",
        f"--workdir={tmp_path}/report",
        f"--config.sweeps={tmp_path}/sweep",
    ]
    subprocess.run(report, env=environment(), check=True, capture_output=True, timeout=300)
    assert "OOD-S" in (tmp_path / "report/diversity.html").read_text()
    assert len((tmp_path / "report/diversity.csv").read_text().splitlines()) == 4
    subprocess.run(
        [*report, "--config.metric=force_mae_mev_per_ang"],
        env=environment(),
        check=True,
        capture_output=True,
        timeout=300,
    )
    rows = (tmp_path / "report/diversity.csv").read_text().splitlines()
    assert len(rows) == 2 and rows[1].startswith('"painn, beta 0.9",4,2,1,')


def _check_forces(sweep):
    """Only the run that was trained on forces has force errors, and they equal the calculator's."""
    of = {
        name: json.loads((sweep / name / "diversity.json").read_text())["metrics"]
        for name in ("c2-s0", "forces")
    }
    assert all(m is None or m["force_mae_mev_per_ang"] is None for m in of["c2-s0"].values())
    data, calculator = RunData.load(sweep / "forces"), MLIPCalculator.from_workdir(sweep / "forces")
    with (
        np.load(sweep / "c2-s0/diversity.npz") as energies_only,
        np.load(sweep / "forces/diversity.npz") as found,
    ):
        assert set(found.files) - set(energies_only.files) == {"force_error"}
        arrays = {name: found[name] for name in found.files}
    for name in ("unseen_c", "iid_s"):
        here = arrays["set"] == name
        wrong = []
        for s, error in zip(arrays["structure"][here], arrays["force_error"][here]):
            structure = data.store[s]
            atoms = Atoms(structure.numbers, structure.positions, info={"charge": structure.charge})
            wrong.append(
                np.abs(calculator.get_property("forces", atoms) - structure.forces).ravel()
            )
            assert error == pytest.approx(wrong[-1].mean(), rel=1e-3)
        assert of["forces"][name]["force_mae_mev_per_ang"] == pytest.approx(
            1e3 * np.concatenate(wrong).mean(), rel=1e-3
        )


def _check_result(workdir, n_s, n_c):
    result, data = json.loads((workdir / "diversity.json").read_text()), RunData.load(workdir)
    assert (result["train"]["num_molecules"], result["train"]["num_conformers"]) == (n_s, n_c)
    molecule, train = np.asarray(data.store.index("molecule")), data.parts["train"]
    with np.load(workdir / "diversity.npz") as found:
        of = {name: found["structure"][found["set"] == name] for name in NAMES}
        rmsd = {name: found["rmsd"][found["set"] == name] for name in NAMES}
        for name in NAMES:
            here = found["set"] == name
            error = 1e3 * np.abs(found["predicted"] - found["energy"])[here]
            assert result["metrics"][name]["num_structures"] == here.sum()
            assert not here.any() or result["metrics"][name]["energy_mae_mev"] == pytest.approx(
                error.mean()
            )
    elements = set(np.concatenate([data.store[s].numbers for s in train]).tolist())
    assert set(of["iid_s"]) == {
        s for s in data.parts["test"] if set(data.store[s].numbers.tolist()) <= elements
    }
    assert not np.isin(molecule[of["iid_s"]], molecule[train]).any()
    # 6 minus the 4 that were moved
    assert len(of["unseen_c"]) == 2 * n_s and not np.isin(of["unseen_c"], train).any()
    assert set(molecule[of["unseen_c"]]) == set(molecule[train])
    assert (
        set(of["iid_c"]) | set(of["ood_c"]) == set(of["unseen_c"])
        and np.isfinite(rmsd["unseen_c"]).all()
    )
    assert (rmsd["iid_c"] <= 0.15).all() and (rmsd["ood_c"] > 0.15).all()

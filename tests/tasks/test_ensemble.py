"""Tests for the task `ensemble`: expected errors agree with actual errors."""

import json
import shutil

import numpy as np
import pytest
from ase import Atoms

from mlip_jax import EnsembleCalculator
from mlip_jax.config import ConfigError
from mlip_jax.configs import ensemble as config_file
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import splits
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.selection.split_files import save_split
from mlip_jax.potential import Potential
from mlip_jax.reports.ensemble import scores
from mlip_jax.simulation.trust import ensemble_calibration, ensemble_structures
from mlip_jax.simulation.trust.ensemble_calibration import Calibration
from mlip_jax.tasks import ensemble
from tests.tasks import runs

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two members with different seeds, and a copy of the second one with another split."""
    root = tmp_path_factory.mktemp("ensemble")
    # more structures than exist
    shares = dict(data__num_train=200, data__num_valid=100, data__num_test=100)
    longer = dict(
        train__num_steps=120,
        train__valid_every=60,
        train__checkpoint_every=120,
        optimizer__learning_rate=5e-3,
    )
    for seed in (0, 1):
        code, output = runs.run(
            root / f"m{seed}",
            model="schnet",
            seed=seed,
            data__split_seed=0,
            data__directory=root / "data",
            report__max_domain=0,
            **shares,
            **longer,
        )
        assert code == 0, output
    shutil.copytree(root / "m1", root / "m2")
    store = RunData.load(root / "m0").store
    other = splits.split(
        "molecule", (200, 100, 100), seed=1, molecule=np.asarray(store.index("molecule"))
    )
    save_split(root / "m2/splits.npz", other, {"store": str(store.path)})
    return root


def run(folder, members, **changes):
    c = config_file.get_config()
    c.members = ",".join(str(folder / m) for m in members)
    c.update(changes)
    out = folder / f"out-{'-'.join(members)}-{len(changes)}"
    return ensemble.run(c, out), out


def test_expected_errors_agree_with_actual_errors(folder):
    page, out = run(folder, ("m0", "m1"))
    found = json.loads((out / "ensemble.json").read_text())
    data = RunData.load(folder / "m0")
    members = [Potential.load(folder / m) for m in ("m0", "m1")]
    assert found["members"] == [m.digest() for m in members] and found["num_structures"] == len(
        data.parts["valid"]
    )
    calculator = EnsembleCalculator.from_workdirs([folder / "m1", folder / "m0"], calibration=out)
    z = {"energy": [], "forces": []}
    for s in data.parts["valid"]:
        structure = data.store[s]
        atoms = Atoms(structure.numbers, structure.positions, info={"charge": structure.charge})
        calculator.calculate(atoms)
        r = calculator.results
        z["energy"].append((r["energy"] - structure.energy) / r["energy_expected_error"])
        z["forces"].append(
            ((r["forces"] - structure.forces) / r["forces_expected_error"][:, None]).ravel()
        )
    for name, values in z.items():
        spread = np.sqrt(np.mean(np.concatenate([np.ravel(v) for v in values]) ** 2))
        assert spread == pytest.approx(1, abs=0.02)
        of = found["scores"]["calibration"][name]
        assert of["z_rms"] == pytest.approx(1) and 0 <= of["roc_auc"] <= 1
        assert 0.2 < found["scores"]["test"][name]["z_rms"] < 5
    text = page.read_text()
    assert text.count("<figure") == 4 and "area under the ROC curve" in text
    assert "http" not in text.replace("http-equiv", "") and 'src="data:' in text  # self-contained
    assert Calibration.load(out).energy.factor == found["energy"]["factor"]


def test_training_structures_of_members_are_excluded(folder):
    _, out = run(folder, ("m0", "m2"))
    parts = {m: RunData.load(folder / m) for m in ("m0", "m2")}
    molecule = np.asarray(parts["m0"].store.index("molecule"))
    valid, trained = parts["m0"].parts["valid"], parts["m2"].parts["train"]
    left = ~np.isin(molecule[valid], molecule[trained])
    assert 0 < left.sum() < len(valid)
    members = [Potential.load(folder / m) for m in ("m0", "m2")]
    paths = [folder / "m0", folder / "m2"]
    store, chosen, notes = ensemble_structures.held_out(paths, members, "valid", 1000)
    known = set(members[0].elements) & set(members[1].elements)
    assert chosen.tolist() == [s for s in valid[left] if set(store[s].numbers.tolist()) <= known]
    assert "members were trained on them" in notes[0]
    assert notes[0] in json.loads((out / "ensemble.json").read_text())["notes"]
    assert "members were trained on them" in (out / "report.html").read_text()
    assert len(ensemble_structures.held_out(paths, members, "valid", 3)[1]) == 3
    with pytest.raises(DatasetError, match="split 'nothing' contains no structure"):
        ensemble_structures.held_out(paths, members, "nothing", 3)


def test_a_member_without_its_data(folder):
    shutil.copytree(folder / "m1/best", folder / "moved/best")
    members = [Potential.load(folder / m) for m in ("m0", "moved")]
    _, chosen, notes = ensemble_structures.held_out(
        [folder / "m0", folder / "moved"], members, "valid", 1000
    )
    assert (
        len(chosen)
        and "moved has another data set than m0, or one that cannot be found" in notes[0]
    )


def test_scores_without_labels_of_a_kind(folder):
    members = [Potential.load(folder / m) for m in ("m0", "m1")]
    store, chosen, _ = ensemble_structures.held_out(
        [folder / "m0", folder / "m1"], members, "test", 8
    )
    found = ensemble_calibration.evaluate(members, store, chosen)
    found.force_error[:] = np.nan
    metrics = scores(Calibration.fit(members, found), found)
    assert (
        metrics["forces"] is None
        and metrics["energy"]["z_rms"] == pytest.approx(1)
        and metrics["num_structures"] == 8
    )


def test_errors(folder):
    for members, message in (
        ((), "at least two training runs"),
        (("m0",), "at least two training runs"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(folder, members)
    with pytest.raises(ValueError, match="all different"):
        run(folder, ("m0", "m0"))
    with pytest.raises(ConfigError, match="max_structures"):
        run(folder, ("m0", "m1"), max_structures=0)

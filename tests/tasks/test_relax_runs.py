"""Tests for runs of `relax` with a small force field: killed, stopped, and in several processes."""

import csv
import os
import signal
import subprocess

import numpy as np
import pytest
from ase.io import read

from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.simulation.relaxation import journal
from mlip_jax.simulation.relaxation.outputs import LAYOUT
from tests.simulation.conftest import (  # a fixture
    ELEMENTS,
    MODELS,
    OPTIONS,
    morse_potential,  # noqa: F401
)
from tests.tasks.runs import REPOSITORY, ForkedRun, environment, finish, wait_for
from tests.tasks.test_train_processes import process_one

MOLECULES = 60


@pytest.fixture(scope="module")
def force_field(tmp_path_factory, request):
    """Workdir like that of a training run."""
    potential = request.getfixturevalue("morse_potential")
    folder = tmp_path_factory.mktemp("force_field")
    store = CheckpointStore(folder / "best")
    options = {k: v for k, v in OPTIONS["tiny"].items()}
    store.save(
        1,
        {"params": potential.params},
        {
            "config": {"model": {"name": MODELS["tiny"], "options": options}},
            "statistics": {
                "cutoff": potential.cutoff,
                "reference_energies": potential.reference_energies.tolist(),
                "energy_scale": potential.energy_scale,
                "elements": list(ELEMENTS),
                "charges": [0.0],
                "level_of_theory": "Morse",
            },
        },
    )
    store.close()
    return folder


@pytest.fixture(scope="module")
def molecules(tmp_path_factory):
    """Extended XYZ file of distorted methanol molecules, and some that cannot be relaxed."""
    from ase.build import molecule

    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("molecules") / "mols.xyz"
    with open(path, "w") as file:
        for i in range(MOLECULES):
            atoms = molecule("CH3OH")
            positions = atoms.positions + rng.normal(0, 0.08, (6, 3))
            symbols = list(atoms.symbols)
            if i == 3:
                positions[2] = positions[1] + [0, 0, 0.01]  # overlap
            if i == 5:
                symbols[0] = "Br"
            if i == 7:
                positions[4, 1] = np.nan
            if i == 9:
                symbols, positions = symbols[:1], positions[:1]
            lines = [f"{s} {x} {y} {z}" for s, (x, y, z) in zip(symbols, positions)]
            file.write("\n".join([str(len(symbols)), f"name=mol{i}", *lines]) + "\n")
    return path


def arguments(workdir, force_field, molecules, **changes):
    # float64 and small batches: results do not depend on the batch, and runs can be interrupted
    fields = {
        "force_field": force_field,
        "input": molecules,
        "dtype": "float64",
        "batch_atoms": 16,
        "trajectory_every": 1,
        "num_processes": 1,
        "max_steps": 1000,
        "fmax": 0.0005,
    } | changes
    return [
        f"--config={REPOSITORY}/configs/relax.py",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in fields.items()),
    ]


def start(*inputs, processes=1, **changes):
    if processes == 1:
        return ForkedRun(inputs[0].parent, arguments(*inputs, **changes))
    command = [str(REPOSITORY / "launch/local.sh"), "-n", str(processes), "--"]
    return subprocess.Popen(
        [*command, *arguments(*inputs, **changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(1),
        start_new_session=True,
        cwd=inputs[0].parent,
    )


def recorded(workdir):
    """Return the indices of all lines of all part files, in any order."""
    return [
        line.index
        for path in sorted((workdir / "parts").glob("*.csv"))
        for line in journal.read_part(path, LAYOUT)
    ]


def rows(workdir):
    with open(workdir / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_alike(workdir, expected):
    ours, theirs = rows(workdir), rows(expected)
    assert len(ours) == len(theirs) == MOLECULES
    for a, b in zip(ours, theirs):
        for column in ("index", "name", "status", "reason", "steps", "n_atoms"):
            assert a[column] == b[column]
        for column in ("energy_start_ev", "energy_ev", "fmax_ev_per_ang", "rmsd_ang"):
            np.testing.assert_allclose(
                *(float(r[column] or "nan") for r in (a, b)), rtol=1e-7, atol=1e-7
            )
    for a, b in zip(*(read(w / "relaxed.xyz", ":") for w in (workdir, expected)), strict=True):
        assert a.info["index"] == b.info["index"]
        np.testing.assert_allclose(a.positions, b.positions, atol=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, force_field, molecules):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, output = finish(start(workdir, force_field, molecules))
    assert code == 0, output
    return workdir, output


def test_whole_run(uninterrupted):
    workdir, output = uninterrupted
    found = {int(r["index"]): r for r in rows(workdir)}
    assert sorted(found) == list(range(MOLECULES)) and sorted(recorded(workdir)) == list(
        range(MOLECULES)
    )
    bad = {3: "overlap", 5: "not trained on Br", 7: "mols.xyz structure 7: 1 of 6 atoms have NaN"}
    for index, words in bad.items():
        assert found[index]["status"] == "failed" and words in found[index]["reason"]
    good = [r for i, r in found.items() if i not in bad and i != 9]
    assert all(r["status"] == "converged" and float(r["fmax_ev_per_ang"]) < 0.0005 for r in good)
    assert all(
        float(r["energy_ev"]) < float(r["energy_start_ev"]) and float(r["rmsd_ang"]) > 0.01
        for r in good
    )
    frames = read(workdir / "trajectories.xyz", ":")
    of_first = [a for a in frames if a.info["index"] == 0]
    assert len(of_first) == int(found[0]["steps"]) + 1
    np.testing.assert_allclose(
        [of_first[0].get_potential_energy(), of_first[-1].get_potential_energy()],
        [float(found[0][k]) for k in ("energy_start_ev", "energy_ev")],
    )
    assert (
        f"{MOLECULES} molecules: {len(good)} converged" in output
        or found[9]["status"] == "converged"
    )
    assert (workdir / "report.html").read_text().count("<img") > 1


@pytest.mark.slow
def test_killed_stopped_and_finished_by_two_processes(
    tmp_path, force_field, molecules, uninterrupted
):
    workdir = tmp_path / "run"
    process = start(workdir, force_field, molecules)
    # as soon as the first batch of results is on disk
    wait_for(lambda: len(recorded(workdir)) > 3, process)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    killed = recorded(workdir)
    process = start(workdir, force_field, molecules)
    wait_for(lambda: len(recorded(workdir)) > len(killed), process)
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process)
    stopped = recorded(workdir)
    assert code == 75 and "Rerun the same command to resume" in output, output
    assert f"resuming: {len(killed)} of {MOLECULES} molecules are done" in output
    assert 3 < len(killed) < len(stopped) < MOLECULES
    code, output = finish(start(workdir, force_field, molecules, processes=2))
    assert code == 0, output
    # each molecule once, before the results are merged
    assert sorted(recorded(workdir)) == list(range(MOLECULES))
    assert_alike(workdir, uninterrupted[0])


@pytest.mark.slow
def test_two_processes_end_if_one_is_killed(tmp_path, force_field, molecules, uninterrupted):
    workdir = tmp_path / "run"
    process = start(workdir, force_field, molecules, processes=2)
    wait_for(lambda: len(recorded(workdir)) > 2, process)
    os.kill(process_one(workdir), signal.SIGKILL)
    code, output = finish(process, timeout=60)
    assert code not in (0, 75) and "process 1" in output, output
    assert 2 < len(recorded(workdir)) < MOLECULES
    code, output = finish(start(workdir, force_field, molecules, processes=3))
    assert code == 0, output
    assert sorted(recorded(workdir)) == list(range(MOLECULES))
    assert_alike(workdir, uninterrupted[0])


@pytest.mark.slow
def test_smiles_to_sdf(tmp_path, force_field):
    path = tmp_path / "mols.smi"
    path.write_text("CO methanol\nC1CC broken\nCO\nC1#CC1 strained\nCBr\n")
    workdir = tmp_path / "run"
    code, output = finish(start(workdir, force_field, path, num_processes=2))
    assert code == 0, output
    found = rows(workdir)
    assert [r["status"] == "failed" for r in found] == [False, True, False, True, True]
    assert (
        "line 2" in found[1]["reason"]
        and "geometry" in found[3]["reason"]
        and "Br" in found[4]["reason"]
    )
    from rdkit import Chem

    relaxed = list(Chem.SDMolSupplier(str(workdir / "relaxed.sdf"), removeHs=False))
    frames = read(workdir / "relaxed.xyz", ":")
    for molecule, atoms in zip(relaxed, frames, strict=True):
        np.testing.assert_allclose(
            molecule.GetConformer().GetPositions(), atoms.positions, atol=1e-4
        )
        assert Chem.MolToSmiles(Chem.RemoveHs(molecule)) == "CO"
    # the same SMILES
    np.testing.assert_allclose(frames[0].positions, frames[1].positions, atol=1e-6)


def test_errors_are_a_single_message(tmp_path, force_field, molecules):
    (tmp_path / "empty.smi").write_text("# nothing\n")
    for inputs, changes, words in (
        ((force_field, tmp_path / "empty.smi"), {}, "empty.smi: contains no molecules"),
        ((force_field, molecules), {"optimizer": "bfgz"}, "bfgs"),
    ):
        code, output = finish(start(tmp_path / "run", *inputs, **changes))
        assert code == 1 and words in output and "Traceback" not in output, output

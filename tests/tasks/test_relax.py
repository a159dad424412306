"""Tests for the task `relax` with a fake relaxer: each molecule once, despite interruptions."""

import csv
import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.units import GPa

from mlip_jax import MLIPCalculator, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.defaults import relax_defaults
from mlip_jax.simulation.relaxation import journal, merge
from mlip_jax.simulation.relaxation.journal import JournalError
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import FILE
from mlip_jax.structure import from_ase
from mlip_jax.tasks import relax
from mlip_jax.workdir import WorkdirError
from tests.simulation.analytic import pairwise
from tests.simulation.conftest import random_potential

SMILES = ["CCO", "C1CC", "C", "CC(=O)[O-]", "N", "CCC", "C1#CC1", "O", "CCN", "CS", "C=C", "CO"]
BAD = {1, 6}


@dataclasses.dataclass(frozen=True)
class Result:
    atoms: Atoms
    status: str
    reason: str
    steps: int
    energy_start: float
    energy: float
    fmax_start: float
    fmax: float
    frames: list | None


class Counting:
    """Fake relaxer that moves atoms by an amount that depends only on the molecule.

    It records its molecules and finishes them out of order, like the slots of a device.
    """

    num_compiles = 1

    def __init__(self, frames=False, stop_after=None, error=None):
        self.seen, self._frames, self._left, self._error = [], frames, stop_after, error

    def stream(self, molecules):
        molecules, slots = iter(molecules), []
        while True:
            slots += itertools.islice(molecules, 3 - len(slots))
            if not slots:
                return
            key, atoms = slots.pop(len(self.seen) % len(slots))
            if self._left is not None:
                if self._left == 0:
                    raise self._error
                self._left -= 1
            self.seen.append(key)
            yield key, self._relaxed(atoms)

    def _relaxed(self, atoms):
        end = atoms.copy()
        end.positions *= 1.01
        n = len(atoms)
        frames = [atoms.copy(), end.copy()] if self._frames else None
        for frame in frames or ():
            frame.calc = SinglePointCalculator(frame, energy=-1.0, forces=np.zeros((n, 3)))
        failed = n == 1
        status = (
            "failed"
            if failed
            else "diverged"
            if n == 4
            else "step limit"
            if n == 6
            else "converged"
        )
        return Result(
            atoms if failed else end,
            status,
            "a single atom" if failed else "",
            n,
            -float(n),
            -n - n / 7,
            1.0,
            0.01,
            frames,
        )


def options(path, **changes):
    config = relax_defaults()
    config.input, config.force_field, config.num_processes = str(path), "tiny", 1
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.fixture
def run_task(tmp_path, monkeypatch):
    """Function run(relaxer, **config changes) that relaxes twelve molecules."""
    path = tmp_path / "mols.smi"
    path.write_text("".join(f"{s} name{i}\n" for i, s in enumerate(SMILES)))
    monkeypatch.setattr(
        relax,
        "load_mean_force_field",
        lambda text: random_potential("tiny", 1 if text == "other" else 0),
    )
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def run(relaxer, workdir="run", input=path, drawn=False, **changes):
        monkeypatch.setattr(relax, "_relaxer", lambda config, potential: relaxer)
        if not drawn:  # which takes most of the time of such a run
            monkeypatch.setattr(
                relax, "write_relaxation_report", lambda workdir, *_, **__: workdir / "report.html"
            )
        return relax.run(options(input, **changes), tmp_path / workdir)

    return run


def outputs(workdir):
    names = ("results.csv", "relaxed.xyz", "relaxed.sdf", "trajectories.xyz")
    return {name: (workdir / name).read_bytes() for name in names if (workdir / name).exists()}


def rows(workdir):
    with open(workdir / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_results(run_task, tmp_path):
    relaxer = Counting(frames=True)
    report = run_task(relaxer, drawn=True, trajectory_every=1)
    assert report == tmp_path / "run/report.html" and report.stat().st_size > 10_000
    assert sorted(relaxer.seen) == [i for i in range(12) if i not in BAD]
    found = rows(tmp_path / "run")
    assert [int(r["index"]) for r in found] == list(range(12)) and [
        r["smiles"] for r in found
    ] == SMILES
    assert [r["name"] for r in found] == [f"name{i}" for i in range(12)]
    statuses = {int(r["index"]): r["status"] for r in found}
    assert statuses == {
        0: "converged",
        1: "failed",
        2: "converged",
        3: "converged",
        4: "diverged",
        5: "converged",
        6: "failed",
        7: "converged",
        8: "converged",
        9: "step limit",
        10: "step limit",
        11: "step limit",
    }
    assert (
        "line 2" in found[1]["reason"]
        and "line 7" in found[6]["reason"]
        and found[1]["energy_ev"] == ""
    )
    assert float(found[3]["charge"]) == -1 and float(found[0]["energy_ev"]) == -9 - 9 / 7
    frames = read(tmp_path / "run/relaxed.xyz", ":")
    assert [a.info["index"] for a in frames] == [i for i in range(12) if i not in BAD]
    assert all(len(a) == int(found[a.info["index"]]["n_atoms"]) for a in frames)
    assert len(read(tmp_path / "run/trajectories.xyz", ":")) == 20
    assert (tmp_path / "run/relaxed.sdf").read_text().count("$$$$") == 10
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["molecules"] == 12 and metrics["failed"] == 2 and metrics["step_limit"] == 3
    text = report.read_text()
    assert (
        "before and after" in text
        and "RDKit cannot read" in text
        and "Relaxation of mols.smi with tiny" in text
    )


def test_a_second_run_changes_nothing(run_task, tmp_path):
    run_task(Counting())
    before = outputs(tmp_path / "run")
    again = Counting()
    run_task(again)
    assert again.seen == [] and outputs(tmp_path / "run") == before


@pytest.mark.parametrize("error", [SystemExit(75), KeyboardInterrupt(), MemoryError()])
def test_interrupted_runs_relax_each_molecule_once_with_the_same_results(run_task, tmp_path, error):
    run_task(Counting(frames=True), "whole", trajectory_every=1)
    starts = []
    while True:
        relaxer = Counting(frames=True, stop_after=len(starts) % 3, error=error)
        starts.append(relaxer)
        try:
            run_task(relaxer, trajectory_every=1)
            break
        except type(error):
            assert len(starts) < 30
    seen = list(itertools.chain.from_iterable(r.seen for r in starts))
    assert len(starts) > 5 and sorted(seen) == [i for i in range(12) if i not in BAD]
    assert outputs(tmp_path / "run") == outputs(tmp_path / "whole")


def test_truncated_results_are_recomputed(run_task, tmp_path):
    run_task(Counting(), "whole")
    run_task(Counting())
    lines = (tmp_path / "run/parts/part-0.csv").read_bytes().splitlines(keepends=True)
    os.truncate(tmp_path / "run/parts/part-0.csv", sum(map(len, lines[:-3])) + 5)
    (tmp_path / "run/results.csv").unlink()
    again = Counting()
    run_task(again)
    assert 1 <= len(again.seen) <= 3 and outputs(tmp_path / "run") == outputs(tmp_path / "whole")


def test_processes_share_the_work_and_any_number_resumes(run_task, tmp_path, monkeypatch):
    """Three processes, two of which finish, are followed by two, then by one."""
    run_task(Counting(), "whole")
    seen = []

    def process(index, count, relaxer):
        with monkeypatch.context() as m:
            m.setattr(distributed, "index", lambda: index)
            m.setattr(distributed, "count", lambda: count)
            m.setattr(distributed, "leader", lambda: index == 0)
            m.setattr(relax, "_finish", lambda *_: None)
            config = options(tmp_path / "mols.smi")
            relax.relax_share(config, tmp_path / "run/parts", relaxer, 12)
        seen.extend(relaxer.seen)
        return relaxer.seen

    assert process(0, 3, Counting()) == [0, 9, 3]  # 6 does not embed
    with pytest.raises(SystemExit):
        process(2, 3, Counting(stop_after=1, error=SystemExit(75)))
    seen.append(2)
    assert process(1, 3, Counting()) == [4, 10, 7]
    assert process(1, 2, Counting()) == [5, 11] and process(0, 2, Counting()) == [8]
    run_task(Counting(stop_after=0, error=AssertionError("all is done")))
    assert sorted(seen) == [i for i in range(12) if i not in BAD]
    assert outputs(tmp_path / "run") == outputs(tmp_path / "whole")
    assert [p.name for p in sorted((tmp_path / "run/parts").glob("*.csv"))] == [
        f"part-{i}.csv" for i in range(3)
    ]


def test_conformers(run_task, tmp_path):
    relaxer = Counting()
    run_task(relaxer, num_conformers=2)
    assert len(rows(tmp_path / "run")) == 24 and len(relaxer.seen) == 20
    a, b = read(tmp_path / "run/relaxed.xyz", ":2")
    assert np.abs(a.positions - b.positions).max() > 1e-3 and a.info["smiles"] == b.info["smiles"]


def test_a_limit_can_be_raised(run_task, tmp_path):
    run_task(Counting(), "whole")
    some = Counting()
    run_task(some, limit=3)
    assert sorted(some.seen) == [0, 2] and len(rows(tmp_path / "run")) == 3
    rest = Counting()
    run_task(rest)
    assert not set(some.seen) & set(rest.seen) and outputs(tmp_path / "run") == outputs(
        tmp_path / "whole"
    )
    run_task(Counting(), limit=5)
    assert len(rows(tmp_path / "run")) == 5


def test_formats(run_task, tmp_path):
    run_task(Counting(), formats=("xyz",))
    assert set(outputs(tmp_path / "run")) == {"results.csv", "relaxed.xyz"}
    with pytest.raises(WorkdirError, match="formats"):
        run_task(Counting())
    path = tmp_path / "mols.xyz"
    path.write_text("3\n\nO 0 0 0\nH 0 0 1\nH 0 1 0\n")
    run_task(Counting(), "bonds", input=path)
    assert set(outputs(tmp_path / "bonds")) == {"results.csv", "relaxed.xyz"}


def test_a_file_without_usable_molecules(run_task, tmp_path):
    path = tmp_path / "bad.smi"
    path.write_text("C1CC\nX\n")
    with pytest.raises(RuntimeError, match="all 2 molecules failed or diverged.*results.csv"):
        run_task(Counting(), input=path, drawn=True)  # for the exit code; the report is written
    assert "No molecule was relaxed" in (tmp_path / "run/report.html").read_text()
    assert [r["status"] for r in rows(tmp_path / "run")] == ["failed"] * 2


def test_invalid_molecules_among_valid_ones(run_task, tmp_path, caplog):
    """Unreadable molecules fail with their index; the relaxation checks the others."""
    caplog.set_level("WARNING", "mlip_jax")
    path = tmp_path / "mixed.xyz"
    path.write_text(
        "1\n\nHe 0 0 0\n2\n\nH 0 0 0\nH 0 0 nan\n2\n\nH 0 0 0\nH 0 0 0.01\n1\n\nQq 0 0 0\n"
        "3\nname=water\nO 0 0 0\nH 0 0 1\nH 0 1 0\n"
    )
    relaxer = Counting()
    run_task(relaxer, input=path)
    assert sorted(relaxer.seen) == [0, 2, 4]
    found = rows(tmp_path / "run")
    assert [r["status"] for r in found] == ["failed", "failed", "converged", "failed", "converged"]
    assert [r["reason"] for r in found][:2] == [
        "a single atom",
        "mixed.xyz structure 1: 1 of 2 atoms have NaN or infinite coordinates, the first of them "
        "atom 1",
    ]
    assert "mixed.xyz line 12" in found[3]["reason"] and found[4]["name"] == "water"
    assert len(read(tmp_path / "run/relaxed.xyz", ":")) == 2
    assert "failed: 1, for example " in caplog.text and "a single atom" in caplog.text


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"input": ""}, "--config.input=molecules.smi"),
        ({"force_field": ""}, "--config.force_field=runs/spice"),
        ({"fmax": 0.0}, "fmax must be positive"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"num_conformers": 0}, "num_conformers"),
        ({"limit": 0}, "limit"),
        ({"formats": ("xyzz",)}, "Did you mean 'xyz'"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_invalid_configs_are_errors(run_task, tmp_path, changes, words):
    config = relax_defaults()
    config.unlock()
    for name, value in ({"input": "x.smi", "force_field": "tiny"} | changes).items():
        config[name] = value
    with pytest.raises(ConfigError, match=words):
        relax.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("empty.smi", "contains no molecules"),
        ("empty.xyz", "contains no molecules"),
        ("empty.csv", "is empty"),
        ("missing.smi", "no such file"),
    ],
)
def test_files_without_molecules_release_the_workdir(run_task, tmp_path, name, words):
    path = tmp_path / name
    if "missing" not in name:
        path.write_text("")
    with pytest.raises(DatasetError, match=words):
        run_task(Counting(), input=path)
    run_task(Counting())
    assert len(rows(tmp_path / "run")) == 12


def test_other_molecules_force_fields_and_settings_are_errors(run_task, tmp_path):
    run_task(Counting(), limit=2)
    with pytest.raises(WorkdirError, match="fmax: 0.005 -> 0.01"):
        run_task(Counting(), fmax=0.01)
    content = (tmp_path / "mols.smi").read_text()
    (tmp_path / "mols.smi").write_text(content.replace("CCO", "CCS"))
    with pytest.raises(
        WorkdirError, match="other molecules or with another force field:\n  input.digest"
    ):
        run_task(Counting())
    (tmp_path / "mols.smi").write_text(content)
    run_task(Counting(), num_processes=2, batch_atoms=99)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["force_field"] = "other"  # the same name, but other parameters
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(WorkdirError, match="force_field: "):
        run_task(Counting(), force_field="other")


def test_an_error_of_the_relaxation_is_raised_and_keeps_finished_results(run_task, tmp_path):
    with pytest.raises(ValueError, match="device"):
        run_task(Counting(stop_after=4, error=ValueError("the device is gone")))
    assert len(journal.finished(tmp_path / "run/parts", relax.LAYOUT)) >= 4
    rest = Counting()
    run_task(rest)
    assert len(rest.seen) == 6


def test_a_full_disk_is_an_error(run_task, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(journal, "MAX_WAITING_BYTES", 0)
        m.setattr(os, "pwrite", full)
        with pytest.raises(JournalError, match="No space left on device"):
            run_task(Counting())
    run_task(Counting())
    assert len(rows(tmp_path / "run")) == 12


def test_molecules_without_a_result_are_an_error(run_task):
    class Losing(Counting):
        def stream(self, molecules):
            yield from itertools.islice(super().stream(molecules), 3)

    with pytest.raises(RuntimeError, match="molecules without a result"):
        run_task(Losing())


def test_force_fields_by_name(tmp_path, monkeypatch):
    from mlip_jax.importers import schnetpack, so3lr

    monkeypatch.setattr(schnetpack, "load", lambda path: ("schnetpack", path))
    monkeypatch.setattr(so3lr, "load", lambda path: ("so3lr", path))
    assert relax.load_mean_force_field("schnetpack:a:b.safetensors") == (
        "schnetpack",
        "a:b.safetensors",
    )
    assert relax.load_mean_force_field("so3lr:params.pkl") == ("so3lr", "params.pkl")
    with pytest.raises(RuntimeError, match="no such directory"):
        relax.load_mean_force_field(str(tmp_path / "missing:x"))


def test_force_fields_have_different_digests():
    a, b = random_potential("tiny", 0), random_potential("tiny", 1)
    assert a.digest() == dataclasses.replace(a).digest() != b.digest()
    assert dataclasses.replace(a, energy_scale=2.0).digest() != a.digest()


def test_sigterm_during_the_relaxation(run_task, tmp_path):
    """As in a run, the signal raises SystemExit at any point."""

    class Terminated(Counting):
        def _relaxed(self, atoms):
            if len(self.seen) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._relaxed(atoms)

    first, rest = Terminated(), Counting()
    with distributed.ended_by_signals(), pytest.raises(SystemExit) as ended:
        run_task(first)
    assert ended.value.code == distributed.EXIT_REQUEUE
    run_task(rest)
    assert len(first.seen) == 5 and sorted(first.seen[:4] + rest.seen) == [
        i for i in range(12) if i not in BAD
    ]


def test_molecules_outside_the_domain_are_reported(run_task, tmp_path, monkeypatch):
    """The cells agree with the calculator, and are empty for molecules without a geometry."""
    run_task(Counting(), "unknown", drawn=True)
    # without a domain, only the charge is known to be outside
    for row in rows(tmp_path / "unknown"):
        ion = row["charge"] not in ("", "0", "0.0")
        assert (row["domain_distance"], row["outside_domain"]) == ("", "1" if ion else "")
    potential, frames = random_potential("tiny"), read(tmp_path / "unknown/relaxed.xyz", ":")
    some = Columns.from_structures(from_ase(a) for a in frames[:6])
    domain = atom_domain.fit(potential, some, some, np.zeros((len(some.numbers), 3)))
    (tmp_path / "trained").mkdir()
    domain.save(tmp_path / "trained" / FILE)
    monkeypatch.setattr(merge, "_BLOCK", 8)
    report = run_task(
        Counting(), force_field=str(tmp_path / "trained"), formats=("sdf",), drawn=True
    )
    found, calculator = rows(tmp_path / "run"), MLIPCalculator(potential, domain=domain)
    by_index = {atoms.info["index"]: atoms for atoms in frames}
    assert len(found) == 12 and len(by_index) == 10
    for row in found:
        if row["status"] == "failed":
            assert row["domain_distance"] == row["outside_domain"] == ""
            continue
        atoms = by_index[int(row["index"])]
        distance = calculator.get_property("domain_distance", atoms).max()
        assert float(row["domain_distance"]) == pytest.approx(distance, rel=1e-3)
        assert row["outside_domain"] == str(int(calculator.get_property("outside_domain", atoms)))
    outside = sum(row["outside_domain"] == "1" for row in found)
    assert 0 < outside < 10 and "outside the domain" in report.read_text()
    assert json.loads((tmp_path / "run/metrics.json").read_text())["outside_domain"] == outside


def test_part_files_are_not_outputs(run_task, tmp_path):
    run_task(Counting(), drawn=True)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.json",
        "origin.json",
        "parts",
        "results.csv",
        "relaxed.xyz",
        "relaxed.sdf",
        "report.html",
        "metrics.json",
    }
    assert Path(tmp_path / "run/parts/part-0.csv").exists()


@pytest.mark.slow
def test_cells_of_crystals_and_molecules_of_one_file(tmp_path, monkeypatch):
    """The command relaxes cells, writes them with their stress, and resumes."""
    potential = pairwise(depth=0.05, length=2.6, cutoff=5.0)
    monkeypatch.setattr(relax, "load_mean_force_field", lambda text: potential)
    crystal = Atoms("Ar2", [[0, 0, 0], [1.9, 2.0, 2.1]], cell=[3.8, 4, 4.2], pbc=True)
    pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 3.0]])
    path = tmp_path / "crystals.xyz"
    write(path, [crystal, pair, crystal])
    config = options(path, cell="frechet", scalar_pressure=0.01, fmax=0.01, dtype="float64")
    report = relax.run(config, tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [r["status"] for r in found] == ["converged"] * 3
    assert found[1]["volume_ang3"] == found[1]["pressure_gpa"] == ""
    frames = read(tmp_path / "run/relaxed.xyz", ":")
    for k in (0, 2):
        assert float(found[k]["volume_ang3"]) == pytest.approx(frames[k].cell.volume, rel=1e-6)
        assert float(found[k]["pressure_gpa"]) == pytest.approx(0.01 / GPa, abs=0.1)
        assert -frames[k].get_stress()[:3].mean() / GPa == pytest.approx(0.01 / GPa, abs=0.1)
    assert "pressure of the relaxed structure" in report.read_text()
    before = outputs(tmp_path / "run")
    relax.run(config, tmp_path / "run")
    assert outputs(tmp_path / "run") == before
    with pytest.raises(ConfigError, match="fixes all components"):
        relax.run(options(path, cell="unitcell", mask=(0,) * 6), tmp_path / "other")

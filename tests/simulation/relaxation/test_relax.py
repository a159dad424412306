"""Tests for batched relaxation: each result equals that of ASE, independent of the batch."""

import dataclasses
import logging
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms, FixBondLength
from ase.optimize import BFGS

from mlip_jax import MLIPCalculator, Relaxer, executors, relax
from mlip_jax.simulation import device_memory
from mlip_jax.simulation.relaxation import compiled, pool
from mlip_jax.simulation.relaxation.compiled import CompiledRelaxation
from mlip_jax.simulation.relaxation.result import build_frame
from tests.compilation import xla_flags
from tests.simulation.analytic import pairwise

REPOSITORY = Path(__file__).parents[3]


def displaced_methanol(count, amplitude=0.08, seed=0):
    """Return displaced copies of methanol, far from the origin."""
    rng = np.random.default_rng(seed)
    molecules = []
    for _ in range(count):
        atoms = molecule("CH3OH")
        atoms.positions += rng.normal(0, amplitude, (len(atoms), 3)) + 7.0
        molecules.append(atoms)
    return molecules


def under_ase(potential, atoms, fmax, steps=500, dtype="float64"):
    """Return frames and number of steps of ASE's BFGS with our calculator."""
    atoms, frames = atoms.copy(), []
    atoms.calc = MLIPCalculator(potential, dtype=dtype)
    with BFGS(atoms, logfile=None) as run:
        run.attach(lambda: frames.append(atoms.positions.copy()))
        run.run(fmax=fmax, steps=steps)
    return frames, run.nsteps, atoms


@pytest.fixture(scope="module")
def in_float64(morse_potential):
    """Relaxer in float64 that keeps each step."""
    return Relaxer(morse_potential, fmax=0.01, dtype="float64", trajectory_every=1, batch_atoms=18)


def test_steps_and_energies_equal_those_of_ase(morse_potential, in_float64):
    starts = displaced_methanol(6)
    results = dict(in_float64.stream(enumerate(starts)))
    for n, start in enumerate(starts):
        frames, steps, atoms = under_ase(morse_potential, start, 0.01)
        result = results[n]
        assert (
            result.status == "converged"
            and result.steps == steps
            and len(result.frames) == steps + 1
        )
        for ours, theirs in zip(result.frames, frames):
            np.testing.assert_allclose(ours.positions, theirs, rtol=0, atol=1e-6)
        assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
        assert (
            result.fmax == pytest.approx(np.linalg.norm(atoms.get_forces(), axis=1).max(), abs=1e-7)
            and steps > 5
        )
        np.testing.assert_allclose(result.atoms.get_forces(), atoms.get_forces(), atol=1e-7)
        assert result.frames[0].get_potential_energy() == pytest.approx(
            result.energy_start, abs=1e-12
        )
    assert in_float64.num_compiles <= 2


@pytest.mark.slow
def test_results_do_not_depend_on_the_batch(morse_potential):
    starts = displaced_methanol(9, seed=1)
    relaxer = Relaxer(morse_potential, fmax=0.01, dtype="float64", batch_atoms=24)
    together = dict(relaxer.stream(enumerate(starts)))
    compiles = relaxer.num_compiles
    for n in (0, 4, 8):
        separate = dict(relaxer.stream([(n, starts[n])]))[n]
        assert separate.steps == together[n].steps
        np.testing.assert_allclose(
            separate.atoms.positions, together[n].atoms.positions, rtol=0, atol=1e-9
        )
    assert relaxer.num_compiles == compiles <= 2, "the programs serve molecules that come later"
    assert relaxer.statistics()["evaluated"] >= sum(r.steps + 1 for r in together.values())


@pytest.mark.slow
def test_float32_finds_the_same_minimum(morse_potential):
    starts = displaced_methanol(5, seed=2)
    for single, double in zip(
        relax(starts, morse_potential, fmax=0.02),
        relax(starts, morse_potential, fmax=0.02, dtype="float64"),
    ):
        assert single.converged and double.converged
        assert single.energy == pytest.approx(double.energy, abs=2e-3)
        assert single.atoms.positions.mean() == pytest.approx(7.0, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lbfgs", "fire"])
def test_other_minimizers_find_the_minimum(morse_potential, optimizer):
    starts = displaced_methanol(4, seed=3)
    for ours, bfgs in zip(
        relax(starts, morse_potential, fmax=0.01, optimizer=optimizer, dtype="float64"),
        relax(starts, morse_potential, fmax=0.01, dtype="float64"),
    ):
        assert ours.converged and ours.energy == pytest.approx(bfgs.energy, abs=2e-3)


@pytest.mark.slow
def test_fixed_atoms_stay_exactly(morse_potential):
    start = displaced_methanol(1, seed=4)[0]
    start.set_constraint(FixAtoms([0, 3]))
    (result,) = relax([start], morse_potential, fmax=0.01, dtype="float64")
    _, steps, atoms = under_ase(morse_potential, start, 0.01)
    assert result.converged and result.steps == steps
    np.testing.assert_array_equal(result.atoms.positions[[0, 3]], start.positions[[0, 3]])
    np.testing.assert_allclose(result.atoms.positions, atoms.positions, rtol=0, atol=1e-6)
    assert (
        np.abs(result.atoms.positions - start.positions).max() > 0.01 and result.atoms.constraints
    )


def test_momenta_of_the_input_are_not_those_of_the_relaxed_geometry():
    """Detects dynamics that would continue with momenta of another geometry."""
    atoms = Atoms("Ar2", [[0, 0, 0], [0, 0, 3]], momenta=np.ones((2, 3)))
    outcome = SimpleNamespace(
        forces=np.zeros((2, 3)), positions=atoms.positions, energy=0.0, stress=None
    )
    assert not build_frame(pairwise(), atoms, outcome).has("momenta") and atoms.has("momenta")


def test_one_step_with_a_charge_and_fixed_atoms(make_potential):
    """The energy is that of the final geometry with the charge of the molecule."""
    potential, start = make_potential("charged"), displaced_methanol(1, seed=4)[0]
    start.set_constraint(FixAtoms([0, 3]))
    start.info["charge"] = 1.0
    (result,) = relax([start], potential, fmax=1e-3, max_steps=1)
    assert (result.status, result.steps) == ("step limit", 1)
    np.testing.assert_array_equal(result.atoms.positions[[0, 3]], start.positions[[0, 3]])
    assert np.abs(result.atoms.positions - start.positions).max() > 0.01
    with pytest.warns(UserWarning, match="whose total charge is"):
        expected = MLIPCalculator(potential).get_potential_energy(result.atoms)
    assert result.energy == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_step_limit_and_frames(morse_potential):
    start = displaced_methanol(1, seed=5)[0]
    (result,) = relax(
        [start], morse_potential, fmax=1e-3, max_steps=7, trajectory_every=3, dtype="float64"
    )
    assert (result.status, result.steps, result.converged) == ("step limit", 7, False)
    frames, _, _ = under_ase(morse_potential, start, 1e-3, steps=7)
    assert len(result.frames) == 4  # steps 0, 3, 6 and the last
    for ours, theirs in zip(result.frames, [frames[0], frames[3], frames[6], frames[7]]):
        np.testing.assert_allclose(ours.positions, theirs, rtol=0, atol=1e-6)
    (nothing,) = relax([start], morse_potential, fmax=1e-3, max_steps=0)
    assert nothing.steps == 0 and nothing.energy == nothing.energy_start


def bad_molecules():
    overlapping, unknown, lost = molecule("CH3OH"), molecule("PH3"), molecule("CH3OH")
    overlapping.positions[3] = overlapping.positions[5] + 1e-3
    lost.positions[2] = np.nan
    periodic = molecule("CH3OH", pbc=True)  # without a cell
    bonded = molecule("CH3OH")
    bonded.set_constraint(FixBondLength(0, 1))
    charged = molecule("CH3OH")
    charged.info["charge"] = "many"
    return {
        "overlap": (overlapping, "atoms 3 and 5 overlap"),
        "unknown": (unknown, "was not trained on P"),
        "nan": (lost, "atom 2 is at"),
        "periodic": (periodic, "lattice vector of length zero"),
        "empty": (Atoms(), "no atoms"),
        "constraint": (bonded, "FixBondLength"),
        "charge": (charged, "charge"),
    }


def test_invalid_molecules_are_reported_and_the_others_relaxed(morse_potential):
    bad = bad_molecules()
    good = dict(enumerate(displaced_methanol(3, seed=6)))
    mixed = {
        0: good[0],
        **{k: a for k, (a, _) in bad.items()},
        1: good[1],
        "single": Atoms("C"),
        2: good[2],
    }
    results = dict(Relaxer(morse_potential).stream(mixed.items()))
    assert results.keys() == mixed.keys()
    for name, (atoms, words) in bad.items():
        assert results[name].status == "failed" and words in results[name].reason, name
        assert (
            results[name].atoms is atoms
            and np.isnan(results[name].energy)
            and results[name].steps == 0
        )
    assert all(results[n].converged for n in good)
    assert (
        results["single"].converged and results["single"].steps == 0 and results["single"].fmax == 0
    )
    assert results["single"].energy == pytest.approx(
        MLIPCalculator(morse_potential).get_potential_energy(Atoms("C")), abs=1e-3
    )


def test_failures_cause_a_warning(morse_potential):
    """A script that prints energies showed only NaN."""
    with pytest.warns(UserWarning, match="1 of 1 molecule failed or diverged; the first: .*atoms"):
        (result,) = relax(Atoms(), morse_potential)
    assert result.status == "failed"


@pytest.mark.slow
def test_divergence_is_reported(make_potential, morse_potential):
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), morse_potential.params)
    (result,) = relax(displaced_methanol(1), dataclasses.replace(morse_potential, params=params))
    assert result.status == "diverged" and "not finite" in result.reason
    # a random energy surface dissociates methanol or presses atoms together
    statuses = [
        r for r in relax(displaced_methanol(12, 0.2), make_potential("tiny", 3), max_steps=200)
    ]
    diverged = [r for r in statuses if r.status == "diverged"]
    assert diverged and all(r.reason for r in diverged), [r.status for r in statuses]
    assert all(np.isfinite(r.atoms.positions).all() for r in statuses)


@pytest.mark.slow
def test_all_sizes_share_few_programs(make_potential):
    potential = make_potential("tiny", 1)
    names = [
        "H2O",
        "CH4",
        "CH3CH2OH",
        "C6H6",
        "C3H8",
        "isobutane",
        "C2H2",
        "CH3SH",
        "trans-butane",
        "H2",
    ]
    starts = [molecule(name) for name in names] * 3
    relaxer = Relaxer(potential, max_steps=3, batch_atoms=40)
    results = dict(relaxer.stream(enumerate(starts)))
    assert sorted(results) == list(range(len(starts)))
    for n, start in enumerate(starts):
        calculated = MLIPCalculator(potential)
        assert results[n].energy_start == pytest.approx(
            calculated.get_potential_energy(start), abs=2e-3
        )
        np.testing.assert_array_equal(results[n].atoms.numbers, start.numbers)
    assert relaxer.num_compiles <= 2 and {pool.slot_size(len(a)) for a in starts} == {16}


def test_a_few_molecules_of_all_sizes_share_one_program(make_potential):
    potential = make_potential("tiny", 1)
    starts = [molecule("H2O"), molecule("CH3CH2OH"), molecule("C6H6") + molecule("C2H6")]
    starts[2].positions[12:] += [0, 0, 4.0]
    assert len({pool.slot_size(len(a)) for a in starts}) == 2
    relaxer = Relaxer(potential, max_steps=3)
    results = dict(relaxer.stream(enumerate(starts)))
    assert relaxer.num_compiles == 1
    for n, start in enumerate(starts):
        assert (
            results[n].steps <= 3
            and results[n].atoms.get_chemical_formula() == start.get_chemical_formula()
        )
        assert results[n].energy_start == pytest.approx(
            MLIPCalculator(potential).get_potential_energy(start), abs=2e-3
        )


def test_the_budget_grows_for_more_edges(make_potential):
    """Stretched molecules without edges determine the budget before dense ones arrive."""
    potential = make_potential("tiny", 1)
    stretched = [Atoms("CHHH", np.diag([0.0, 9, 18, 27])[:, :3]) for _ in range(60)]
    dense = molecule("isobutane")
    relaxer = Relaxer(potential, max_steps=0, batch_atoms=16)
    results = dict(relaxer.stream([*enumerate(stretched), ("dense", dense)]))
    assert len(results) == 61
    assert results["dense"].energy == pytest.approx(
        MLIPCalculator(potential).get_potential_energy(dense), abs=2e-3
    )


@pytest.mark.slow
def test_molecules_are_read_on_demand(morse_potential):
    taken = []

    def endless():
        for n in range(10**6):
            taken.append(n)
            yield n, displaced_methanol(1, seed=n)[0]

    stream = Relaxer(morse_potential, batch_atoms=24).stream(endless())
    keys = [next(stream)[0] for _ in range(10)]
    assert len(set(keys)) == 10 and len(taken) < 100
    stream.close()


def test_an_accelerator_relaxes_while_its_results_are_written(in_float64, monkeypatch):
    """Detects a GPU that waits while the caller writes; on a CPU, both would share the cores."""
    starts, taken = displaced_methanol(12), []

    def molecules():
        for item in enumerate(starts):
            taken.append(item[0])
            yield item

    expected = dict(in_float64.stream(enumerate(starts)))
    monkeypatch.setattr(in_float64, "_in_threads", True)
    stream = in_float64.stream(molecules())
    results = dict([next(stream)])
    for _ in range(600):  # the caller takes no further result
        if len(taken) == len(starts):
            break
        time.sleep(0.1)
    assert len(taken) == len(starts)
    results |= dict(stream)
    for n, result in expected.items():
        np.testing.assert_array_equal(results[n].atoms.positions, result.atoms.positions)


def test_molecules_are_computed_by_the_selected_executor(in_float64, monkeypatch):
    """Detects a GPU, whose thread reads the molecules, that embeds them on this machine."""
    monkeypatch.setattr(in_float64, "_in_threads", True)
    found = []

    def molecules():
        found.append(executors.selected())
        yield "empty", Atoms()

    with ThreadPoolExecutor(1) as executor, executors.use_executor(executor):
        ((_, result),) = in_float64.stream(molecules())
    assert found == [executor] and result.status == "failed"


@pytest.mark.slow
def test_charge_and_spin_reach_the_force_field(make_potential):
    base = make_potential("so3krates")
    from mlip_jax import models
    from mlip_jax.potential import example_graph

    model = models.create(
        "so3krates",
        num_features=16,
        num_layers=1,
        degrees=(1, 2),
        cutoff=4.0,
        zero_init=False,
        charge_embedding=True,
        spin_embedding=True,
    )
    potential = dataclasses.replace(
        base, model=model, params=model.init(jax.random.key(0), example_graph())
    )
    start = molecule("CH3OH")
    charged = start.copy()
    charged.info |= {"charge": 1.0, "num_unpaired_electrons": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [MLIPCalculator(potential).get_potential_energy(a) for a in (start, charged)]
    results = relax([start, charged], potential, max_steps=0)
    np.testing.assert_allclose([r.energy for r in results], expected, atol=2e-3)
    assert abs(expected[0] - expected[1]) > 0.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fmax": 0}, "fmax must be positive"),
        ({"max_steps": -1}, "max_steps"),
        ({"dtype": "float16"}, "dtype"),
        ({"optimizer": "newton"}, "Known: bfgs, fire, lbfgs"),
        ({"trajectory_every": 1.5}, "integer"),
    ],
)
def test_invalid_arguments_are_rejected(morse_potential, arguments, words):
    with pytest.raises(ValueError, match=words):
        relax([], morse_potential, **arguments)
    assert relax([], morse_potential) == []


@pytest.mark.slow
def test_several_devices_share_the_molecules(tmp_path):
    """In separate processes, since the number of devices is fixed when JAX starts."""
    outputs = {}
    for devices in (1, 3):
        output = tmp_path / f"{devices}.npz"
        environment = dict(
            os.environ,
            PYTHONPATH=str(REPOSITORY),
            JAX_PLATFORMS="cpu",
            XLA_FLAGS=xla_flags(f"--xla_force_host_platform_device_count={devices}"),
        )
        done = subprocess.run(
            [sys.executable, "-m", "tests.simulation.relaxation.devices_program", str(output)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outputs[devices] = np.load(output)
        assert outputs[devices]["devices"] == devices
        assert outputs[devices]["used"] >= min(
            devices, 2
        )  # all molecules may be taken before the last device starts
    np.testing.assert_allclose(outputs[3]["positions"], outputs[1]["positions"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(outputs[3]["energies"], outputs[1]["energies"], rtol=1e-12)


def test_fewer_molecules_in_parallel_without_memory(monkeypatch, caplog):
    """Each molecule has one result; frames of an interrupted start are gone."""
    starts = {k: Atoms("Ar2", [[0, 0, 0], [0, 0, 3.0 + 0.1 * k]]) for k in range(5)}
    relaxer = Relaxer(pairwise(), trajectory_every=1, max_steps=3)
    run, calls = CompiledRelaxation.run, []

    def fail_once(self, *args, **options):
        calls.append(self.loop.num)
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return run(self, *args, **options)

    monkeypatch.setattr(CompiledRelaxation, "run", fail_once)
    results = dict(relaxer.stream(starts.items()))
    assert calls[:3] == [6, 6, 3] and "continuing with 3" in caplog.text and len(results) == 5
    assert all(len(result.frames) == result.steps + 1 for result in results.values())
    assert relaxer.num_compiles == 2 and relaxer.statistics()["evaluated"] >= 5 + 4 * 5

    def fail(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(CompiledRelaxation, "run", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        dict(relaxer.stream(starts.items()))


def test_batches_are_chosen_for_the_memory_of_the_device(monkeypatch, caplog):
    """Three times the memory of the device is needed: fewer molecules, with the same results."""
    caplog.set_level(logging.INFO, compiled.__name__)
    starts = {k: Atoms("Ar2", [[0, 0, 0], [0, 0, 3.0 + 0.02 * k]]) for k in range(48)}

    def relaxed():
        relaxer = Relaxer(pairwise(), max_steps=3)
        results = dict(relaxer.stream(starts.items()))
        (used,) = relaxer.pools.values()
        return used, [results[k].energy for k in starts]

    large, expected = relaxed()
    compiles = caplog.text.count("compiling the relaxation")
    relaxed()  # the same programs serve another relaxer
    assert caplog.text.count("compiling the relaxation") == compiles
    limit = max(large.program.needed.values()) // 3
    monkeypatch.setattr(device_memory, "available_bytes", lambda device: limit)
    small, energies = relaxed()
    needed = max(small.program.needed.values())
    assert needed <= limit and small.program.loop.num > large.program.loop.num / 6
    assert small.predicted_bytes == pytest.approx(needed, rel=0.2)
    assert "may be used with 49 molecules in parallel; continuing with" in caplog.text
    np.testing.assert_allclose(energies, expected, rtol=1e-5)

"""Tests for the reference method: tblite's numbers, ASE's minima, failures, and caching."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed
from ase.calculators.lj import LennardJones
from ase.optimize import BFGS

from mlip_jax.config import ConfigError
from mlip_jax.datasets.builtin.labels import energy_and_gradient
from mlip_jax.simulation.reference import oracle as oracle_module
from mlip_jax.simulation.reference.oracle import Method, Oracle, OracleError
from mlip_jax.simulation.reference.result_cache import ResultCache


class Counting(LennardJones):
    """Lennard-Jones calculator that fails on request and counts its calls in this process."""

    calls = 0

    def calculate(self, atoms=None, *args, **kwargs):
        type(self).calls += 1
        if atoms.info.get("charge") == 1:
            raise CalculationFailed("the SCF\n did not converge")
        if atoms.info.get("charge") == 2:
            raise OSError("the disk is full")
        super().calculate(atoms, *args, **kwargs)


@pytest.fixture
def make(tmp_path):
    """Function make(method, **options) that returns an oracle with one cache, in this process."""
    caches = []

    def one(method=None, **options):
        caches.append(ResultCache(tmp_path / "oracle.jsonl"))
        return Oracle(
            method or Method(), caches[-1], **({"num_processes": 1, "progress": False} | options)
        )

    yield one
    for cache in caches:
        cache.close()


@pytest.fixture
def counting(monkeypatch):
    """Return the class above as a method.

    pytest imports each test module by its path, under a name that cannot be imported.
    """
    monkeypatch.setattr(oracle_module.Method, "calculator_class", lambda self: Counting)
    Counting.calls = 0
    return Method("some.module:Counting", {"sigma": 1.0})


def rattled(name, seed=0, amplitude=0.1):
    atoms = molecule(name)
    atoms.rattle(amplitude, seed=seed)
    return atoms


MOLECULES = {"methane": rattled("CH4"), "water": rattled("H2O"), "ethanol": rattled("CH3CH2OH")}


def test_energies_and_forces_equal_those_of_tblite(make):
    results = make().evaluate(MOLECULES)
    assert list(results) == list(MOLECULES)
    for name, atoms in MOLECULES.items():
        energy, gradient = energy_and_gradient(atoms.numbers, atoms.positions / units.Bohr)
        assert results[name].energy == pytest.approx(energy * units.Hartree, abs=1e-6)
        np.testing.assert_allclose(
            results[name].forces, -gradient * units.Hartree / units.Bohr, atol=1e-5
        )
        assert results[name].fmax == pytest.approx(
            np.linalg.norm(results[name].forces, axis=1).max()
        )


def test_minima_equal_those_of_ase_bfgs_with_tblite(make):
    from tblite.ase import TBLite

    results = make(Method("GFN1-xTB")).minimize(MOLECULES, fmax=0.02)
    for name, atoms in MOLECULES.items():
        atoms = atoms.copy()
        atoms.calc = TBLite(method="GFN1-xTB", verbosity=0)
        optimizer = BFGS(atoms, logfile=None)
        optimizer.run(fmax=0.02, steps=500)
        minimum = results[name]
        np.testing.assert_allclose(minimum.positions, atoms.positions, atol=1e-8)
        assert minimum.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
        assert (minimum.steps, minimum.converged, minimum.error) == (optimizer.nsteps, True, "")
        assert minimum.fmax < 0.02
    few = make().minimize({"ethanol": MOLECULES["ethanol"]}, max_steps=2)["ethanol"]
    assert (few.steps, few.converged) == (2, False) and few.fmax > 0.05


def test_worker_processes_give_the_same(make, tmp_path):
    results = make().evaluate(MOLECULES)
    with ResultCache(tmp_path / "other.jsonl") as cache:
        there = Oracle(Method(), cache, num_processes=2, progress=False).evaluate(MOLECULES)
    assert {n: e.energy for n, e in there.items()} == pytest.approx(
        {n: e.energy for n, e in results.items()}, abs=1e-9
    )


def test_nothing_is_computed_twice_and_a_truncated_cache_loses_one_result(make, counting, tmp_path):
    atoms = {str(n): Atoms("Ar2", [[0, 0, 0], [0, 0, 1.1 + n / 10]]) for n in range(4)}
    first = make(counting).evaluate(atoms)
    assert Counting.calls == 4
    again = make(counting).evaluate(atoms)
    assert Counting.calls == 4
    assert all(
        again[n].energy == first[n].energy and (again[n].forces == first[n].forces).all()
        for n in atoms
    )
    path = tmp_path / "oracle.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    cut = make(counting).evaluate(atoms)
    assert Counting.calls == 5 and {n: e.energy for n, e in cut.items()} == {
        n: e.energy for n, e in first.items()
    }
    make(Method("some.module:Counting", {"sigma": 1.1})).evaluate(atoms)  # another method
    assert Counting.calls == 9


def test_failures_are_reported_by_name_and_the_others_finish(make, counting, caplog):
    pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 1.2]])
    atoms = {"sound": pair, "scf": pair.copy(), "disk": pair.copy(), "nan": pair.copy()}
    atoms["scf"].info["charge"], atoms["disk"].info["charge"] = 1, 2
    atoms["nan"].positions[1] = np.nan
    for _ in range(2):
        results = make(counting).evaluate(atoms)
        assert np.isfinite(results["sound"].energy) and results["sound"].error == ""
        assert results["scf"].error == "the SCF did not converge"
        assert results["disk"].error == "OSError: the disk is full"
        assert "not finite" in results["nan"].error
        assert all(
            np.isnan(results[n].energy) and np.isnan(results[n].fmax)
            for n in ("scf", "disk", "nan")
        )
    assert "disk: OSError" in caplog.text
    assert Counting.calls == 4  # a failure that is not the molecule's is tried again
    assert make(counting).minimize({"scf": atoms["scf"]})["scf"].positions is None
    with pytest.raises(
        OracleError, match="all 1 molecules; the first reason: disk: OSError: the disk is full"
    ):
        make(counting).evaluate({"disk": atoms["disk"]})


def test_charge_and_unpaired_electrons_matter(make):
    ammonia, methyl = molecule("NH3"), molecule("CH3")
    cation = Atoms("NH4", np.vstack([ammonia.positions, [[0, 0, 1.14]]]), info={"charge": 1})
    neutral = Atoms("NH4", cation.positions)
    results = make().evaluate({"cation": cation, "radical": methyl, "neutral": neutral})
    for name, atoms, state in (
        ("cation", cation, (1, 0)),
        ("radical", methyl, (0, 1)),
        ("neutral", neutral, (0, 1)),
    ):
        energy, _ = energy_and_gradient(atoms.numbers, atoms.positions / units.Bohr, *state)
        assert results[name].energy == pytest.approx(energy * units.Hartree, abs=1e-5), name


def test_any_ase_calculator(make):
    method = Method("ase.calculators.lj:LennardJones", {"sigma": 1.0, "epsilon": 2.0, "rc": 10.0})
    minimum = make(method).minimize({"pair": Atoms("Ar2", [[0, 0, 0], [0, 0, 1.2]])}, fmax=1e-4)[
        "pair"
    ]
    assert np.linalg.norm(minimum.positions[1] - minimum.positions[0]) == pytest.approx(
        2 ** (1 / 6), abs=1e-3
    )
    assert minimum.energy == pytest.approx(-2.0, abs=1e-3)


def test_methods_that_do_not_exist():
    with pytest.raises(ConfigError, match="GFN2-xTB"):
        Method("GFN2")
    with pytest.raises(ImportError, match="no_such_package"):
        Method("no_such_package:Calculator")
    with pytest.raises(ConfigError, match="no class 'Lenard'"):
        Method("ase.calculators.lj:Lenard")

"""The reference method: tblite's numbers, ASE's minima, failures by name, nothing twice."""

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
    """Lennard-Jones, fails on request; counts its calls in this process."""

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
    """make(method, **options): an oracle on one cache, in this process."""
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
    """The class above as a method; each test module is imported by its path, so that its name is no module's."""
    monkeypatch.setattr(oracle_module.Method, "calculator_class", lambda self: Counting)
    Counting.calls = 0
    return Method("some.module:Counting", {"sigma": 1.0})


def rattled(name, seed=0, amplitude=0.1):
    atoms = molecule(name)
    atoms.rattle(amplitude, seed=seed)
    return atoms


MOLECULES = {"methane": rattled("CH4"), "water": rattled("H2O"), "ethanol": rattled("CH3CH2OH")}


def test_energies_and_forces_are_tblites(make):
    found = make().evaluate(MOLECULES)
    assert list(found) == list(MOLECULES)
    for name, atoms in MOLECULES.items():
        energy, gradient = energy_and_gradient(atoms.numbers, atoms.positions / units.Bohr)
        assert found[name].energy == pytest.approx(energy * units.Hartree, abs=1e-6)
        np.testing.assert_allclose(
            found[name].forces, -gradient * units.Hartree / units.Bohr, atol=1e-5
        )
        assert found[name].fmax == pytest.approx(np.linalg.norm(found[name].forces, axis=1).max())


def test_minima_are_those_of_ases_bfgs_with_tblites_calculator(make):
    from tblite.ase import TBLite

    found = make(Method("GFN1-xTB")).minimize(MOLECULES, fmax=0.02)
    for name, atoms in MOLECULES.items():
        atoms = atoms.copy()
        atoms.calc = TBLite(method="GFN1-xTB", verbosity=0)
        optimizer = BFGS(atoms, logfile=None)
        optimizer.run(fmax=0.02, steps=500)
        minimum = found[name]
        np.testing.assert_allclose(minimum.positions, atoms.positions, atol=1e-8)
        assert minimum.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
        assert (minimum.steps, minimum.converged, minimum.error) == (optimizer.nsteps, True, "")
        assert minimum.fmax < 0.02
    few = make().minimize({"ethanol": MOLECULES["ethanol"]}, max_steps=2)["ethanol"]
    assert (few.steps, few.converged) == (2, False) and few.fmax > 0.05


def test_worker_processes_give_the_same(make, tmp_path):
    here = make().evaluate(MOLECULES)
    with ResultCache(tmp_path / "other.jsonl") as cache:
        there = Oracle(Method(), cache, num_processes=2, progress=False).evaluate(MOLECULES)
    assert {n: e.energy for n, e in there.items()} == pytest.approx(
        {n: e.energy for n, e in here.items()}, abs=1e-9
    )


def test_nothing_is_computed_twice_and_a_cut_off_cache_loses_one(make, counting, tmp_path):
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


def test_failures_are_told_by_name_and_the_others_finished(make, counting, caplog):
    pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 1.2]])
    atoms = {"sound": pair, "scf": pair.copy(), "disk": pair.copy(), "nan": pair.copy()}
    atoms["scf"].info["charge"], atoms["disk"].info["charge"] = 1, 2
    atoms["nan"].positions[1] = np.nan
    for _ in range(2):
        found = make(counting).evaluate(atoms)
        assert np.isfinite(found["sound"].energy) and found["sound"].error == ""
        assert found["scf"].error == "the SCF did not converge"
        assert found["disk"].error == "OSError: the disk is full"
        assert "not finite" in found["nan"].error
        assert all(
            np.isnan(found[n].energy) and np.isnan(found[n].fmax) for n in ("scf", "disk", "nan")
        )
    assert "disk: OSError" in caplog.text
    assert Counting.calls == 4  # the failure that is no molecule's is tried again
    assert make(counting).minimize({"scf": atoms["scf"]})["scf"].positions is None
    with pytest.raises(
        OracleError, match="every one of 1 molecules; disk: OSError: the disk is full"
    ):
        make(counting).evaluate({"disk": atoms["disk"]})


def test_charge_and_unpaired_electrons_count(make):
    ammonia, methyl = molecule("NH3"), molecule("CH3")
    cation = Atoms("NH4", np.vstack([ammonia.positions, [[0, 0, 1.14]]]), info={"charge": 1})
    neutral = Atoms("NH4", cation.positions)
    found = make().evaluate({"cation": cation, "radical": methyl, "neutral": neutral})
    for name, atoms, state in (
        ("cation", cation, (1, 0)),
        ("radical", methyl, (0, 1)),
        ("neutral", neutral, (0, 1)),
    ):
        energy, _ = energy_and_gradient(atoms.numbers, atoms.positions / units.Bohr, *state)
        assert found[name].energy == pytest.approx(energy * units.Hartree, abs=1e-5), name


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

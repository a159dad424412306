"""Tests for labels: failures are reported, and wrong signs are detected before the budget is spent."""

import dataclasses
import time

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed
from ase.calculators.lj import LennardJones

from mlip_jax.datasets.columns import Columns
from mlip_jax.label_budget.labels import check_oracle, energy_outliers, label
from mlip_jax.label_budget.pool import PoolMolecule
from mlip_jax.simulation.reference import oracle as oracle_module
from mlip_jax.simulation.reference.oracle import Method, Oracle, OracleError
from mlip_jax.simulation.reference.result_cache import ResultCache
from mlip_jax.structure import Structure


class Faulty(LennardJones):
    """Lennard-Jones calculator with a fault for each charge of the molecule."""

    def calculate(self, atoms=None, *args, **kwargs):
        charge = atoms.info.get("charge")
        if charge == 1:
            raise CalculationFailed("the SCF did not converge")
        if charge == 2:
            time.sleep(60)
        super().calculate(atoms, *args, **kwargs)
        if charge == 3:
            self.results["forces"][0] = np.nan
        if charge == 4:
            self.results["forces"] = self.results["forces"] + 5.0
        if charge == 5:
            self.results["forces"] = 1e4 * self.results["forces"]


@pytest.fixture
def make_oracle(tmp_path, monkeypatch):
    """Function make_oracle(calculator_class, timeout) that returns an oracle in this process.

    pytest imports each test module by its path, under a name that cannot be imported.
    """
    caches = []

    def make(calculator, timeout=60.0):
        monkeypatch.setattr(oracle_module.Method, "calculator_class", lambda self: calculator)
        caches.append(ResultCache(tmp_path / "oracle.jsonl"))
        method = Method("some.module:Class")
        return Oracle(method, caches[-1], num_processes=1, progress=False, timeout=timeout)

    yield make
    for cache in caches:
        cache.close()


def dimers(charges):
    """Return dimers with these charges, 1.1 Å apart."""
    return Columns.from_structures(
        Structure(
            np.array([1, 1], np.int32),
            np.array([[0, 0, 0], [1.1 + 0.01 * k, 0, 0]], np.float64),
            charge=charge,
            molecule=f"m{k}",
            subset="random",
        )
        for k, charge in enumerate(charges)
    )


def test_every_failure_is_named_and_the_other_labels_are_kept(make_oracle):
    """Detects a lost label, NaN in the labels, and an oracle that hangs."""
    result = label(make_oracle(Faulty, timeout=0.3), dimers([0, 1, 2, 3, 4, 5, 0]), "round 1")
    assert result.rows.tolist() == [0, 6]
    assert np.isfinite(result.columns.energy).all() and np.isfinite(result.columns.forces).all()
    reasons = [reason for _, reason in sorted(result.failures.items())]
    for text, reason in zip(
        ("SCF", "took longer than 0.3 s", "not finite", "sum to", "beyond 100"),
        reasons,
        strict=True,
    ):
        assert text in reason
    assert 0.3 < result.seconds < 5


def test_an_oracle_without_any_label_is_an_error_with_the_reason(make_oracle):
    with pytest.raises(OracleError, match="no usable label for 2 structures.*SCF did not converge"):
        label(make_oracle(Faulty), dimers([1, 1]), "round 1")


def test_a_later_round_without_any_label_has_the_reasons(make_oracle):
    """Detects a run that stops, and stops again when it is resumed, at a batch that fails."""
    result = label(make_oracle(Faulty), dimers([1, 1]), "round 2", required=False)
    assert len(result.columns) == len(result.rows) == 0 and len(result.failures) == 2
    known = dataclasses.replace(dimers([0, 0]), energy=np.array([-1.0, -1.1]))
    assert not len(energy_outliers(result.columns, known))


def pool():
    return [
        PoolMolecule(name, "", (molecule(name),), False)
        for name in ("CH4", "CH3OH", "H2CO", "C6H6")
    ]


@pytest.mark.parametrize(
    ("factor", "message"), [(-1.0, "gradients"), (0.0194469, "hartree"), (1.0, None)]
)
def test_wrong_signs_and_units_are_found_before_the_budget_is_spent(make_oracle, factor, message):
    """Detects a check that labels a whole round first, or that rejects correct forces."""
    tblite = pytest.importorskip("tblite.ase").TBLite

    class Scaled(tblite):
        def __init__(self, **kwargs):
            super().__init__(method="GFN2-xTB", verbosity=0, **kwargs)

        def calculate(self, *args, **kwargs):
            super().calculate(*args, **kwargs)
            self.results["forces"] = factor * self.results["forces"]

    oracle = make_oracle(Scaled)
    if message is None:
        assert check_oracle(oracle, pool(), 0) == 12
        return
    with pytest.raises(OracleError, match=message) as raised:
        check_oracle(oracle, pool(), 0)
    assert "12 calculations checked the method" in str(raised.value)


def test_single_atoms_have_no_forces_to_check(make_oracle, caplog):
    """Detects a check of nothing that ends the run with an error of NumPy."""
    atoms = [PoolMolecule(name, "", (Atoms(name),), False) for name in ("He", "Ne")]
    assert check_oracle(make_oracle(Faulty), atoms, 0) == 0
    assert "all molecules are single atoms" in caplog.text


def test_energy_outliers_are_found_among_molecules_of_several_elements():
    rng = np.random.default_rng(0)
    structures = []
    for k in range(60):
        numbers = rng.choice([1, 6, 8], 8).astype(np.int32)
        energy = -10.0 * numbers.sum() + 0.1 * rng.standard_normal()
        energy += 100.0 * (k == 55)
        structures.append(Structure(numbers, np.zeros((8, 3)), energy=energy))
    columns = Columns.from_structures(structures)
    first, last = columns.take(np.arange(40)), columns.take(np.arange(40, 60))
    assert np.flatnonzero(energy_outliers(last, first)).tolist() == [15]
    assert not energy_outliers(first, first.take(np.zeros(0, np.int64))).any()

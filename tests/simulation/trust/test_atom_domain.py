"""Tests for the domain of a force field and its results in the calculator."""

import dataclasses
import pickle
import re
import warnings

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from mlip_jax import MolecularDynamics, find_minima, relax, vibrations
from mlip_jax.datasets.columns import Columns
from mlip_jax.models import create
from mlip_jax.potential import Potential, example_graph
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.energies import atom_features
from mlip_jax.simulation.force_fields import TrustCheck
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.coverage import unseen_states
from mlip_jax.simulation.trust.domain import FILE, Domain
from mlip_jax.simulation.user_warnings import OutsideDomainWarning
from mlip_jax.structure import Structure

WATER = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])


@pytest.fixture(scope="module")
def potential():
    model = create("schnet", num_features=8, num_layers=1, cutoff=4.0, num_radial=6)
    return Potential(
        model=model,
        params=jax.jit(model.init)(jax.random.key(0), example_graph()),
        cutoff=4.0,
        reference_energies=np.zeros(119),
        energy_scale=1.0,
        elements=(1, 8),
        metadata={},
    )


def waters(count, seed, noise=0.05):
    rng = np.random.default_rng(seed)
    return Columns.from_structures(
        [
            Structure(numbers=np.array([8, 1, 1]), positions=WATER + rng.normal(0, noise, (3, 3)))
            for _ in range(count)
        ]
    )


@pytest.fixture(scope="module")
def domain(potential):
    valid = waters(80, 1)
    return atom_domain.fit(potential, waters(200, 0), valid, np.full((240, 3), 0.02))


def test_features_of_atoms_do_not_depend_on_the_batches(potential):
    columns = waters(9, 2)
    whole = atom_features(potential, columns)
    assert whole.shape == (27, 8)
    np.testing.assert_allclose(whole, atom_features(potential, columns, batch_size=2), atol=1e-6)
    np.testing.assert_allclose(whole[12:15], atom_features(potential, columns.take([4])), atol=1e-6)


def test_border_refers_to_the_farthest_atom(potential, domain):
    near = atom_domain.evaluate(
        potential, domain, waters(200, 3), np.full(200, -0.3), np.full((600, 3), -0.1)
    )
    far = atom_domain.evaluate(
        potential, domain, waters(200, 3, noise=0.25), np.zeros(200), np.zeros((600, 3))
    )
    assert (near.distance > 1).mean() < 0.06 and (far.distance > 1).mean() > 0.5
    np.testing.assert_allclose(near.energy_error, 0.1)
    np.testing.assert_allclose(near.force_error, 0.1)


def test_rare_elements_are_kept(potential):
    numbers = np.array([1] * 5000 + [8] * 3)
    kept = atom_domain.sample_per_element(numbers, np.random.default_rng(0))
    assert (numbers[kept] == 8).sum() == 3 and (numbers[kept] == 1).sum() == 1024


def test_no_structures(potential):
    with pytest.raises(ValueError, match="needs training and validation"):
        atom_domain.fit(potential, waters(2, 0), waters(0, 0), np.zeros((0, 3)))


def test_calculator_computes_the_domain_on_request(potential, domain):
    calculator = MLIPCalculator(potential, domain=domain)
    atoms = Atoms("OHH", WATER, calculator=calculator)
    energy, compiles = atoms.get_potential_energy(), calculator.num_compiles
    assert "outside_domain" not in calculator.results
    assert calculator.get_property("outside_domain", atoms) is False
    distance = calculator.get_property("domain_distance", atoms)
    assert distance.shape == (3,) and (distance < 1).all()
    np.testing.assert_allclose(calculator.get_property("forces_expected_error", atoms), 0.02)
    assert calculator.num_compiles == compiles and atoms.get_potential_energy() == energy
    atoms.positions[1] *= 1.8
    assert calculator.get_property("outside_domain", atoms) is True
    assert calculator.get_property("domain_distance", atoms).max() > 1
    calculator.export_properties()  # ASE has no names for these
    again = pickle.loads(pickle.dumps(calculator))
    assert again.get_property("outside_domain", atoms) is True
    twice = MLIPCalculator(potential, "float64", domain)
    np.testing.assert_allclose(
        twice.get_property("domain_distance", atoms),
        calculator.get_property("domain_distance", atoms),
        rtol=1e-3,
    )


def test_a_calculator_without_a_domain_has_no_such_properties(potential):
    atoms = Atoms("OHH", WATER)
    with pytest.raises(PropertyNotImplementedError):
        MLIPCalculator(potential).get_property("outside_domain", atoms)


def test_no_expected_error_without_forces(potential, tmp_path):
    domain = atom_domain.fit(potential, waters(20, 0), waters(8, 1), np.full((24, 3), np.nan))
    domain.save(tmp_path / FILE)
    calculator = MLIPCalculator(potential, domain=Domain.load(tmp_path / FILE))
    atoms = Atoms("OHH", WATER)
    assert isinstance(calculator.get_property("outside_domain", atoms), bool)
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property("forces_expected_error", atoms)


@pytest.mark.parametrize(
    ("statistics", "changes", "unseen"),
    [
        ({"charges": [0.0], "periodic": False}, {}, False),
        ({"charges": [0.0], "periodic": False}, {"charge": -1}, True),
        ({"charges": [0.0, -1.0], "periodic": False}, {"charge": -1}, False),
        ({"charges": None}, {"charge": -1}, False),  # imported: unknown
        ({"charges": [0.0]}, {"num_unpaired_electrons": 1}, True),
        ({"charges": [0.0], "periodic": False}, {"cell": 9.0}, True),
        ({"charges": [0.0], "periodic": True}, {"cell": 9.0}, False),
        ({"charges": [0.0]}, {"cell": 9.0}, False),  # not recorded
    ],
)
def test_unseen_charge_spin_and_periodicity_are_outside(
    potential, domain, statistics, changes, unseen
):
    """The features of a neutral model are those of the neutral molecule, deep inside."""
    atoms = Atoms("OHH", WATER)
    if "cell" in changes:
        atoms.set_cell([changes.pop("cell")] * 3)
        atoms.pbc = True
    atoms.info |= changes
    known = dataclasses.replace(potential, metadata={"statistics": statistics})
    assert bool(unseen_states(atoms, [known])) == unseen
    calculator = MLIPCalculator(known, domain=domain)
    if unseen:
        with pytest.warns(UserWarning, match="trained only on"):
            assert calculator.get_property("outside_domain", atoms) is True
        assert np.isnan(calculator.get_property("forces_expected_error", atoms)).all()
    else:
        assert calculator.get_property("outside_domain", atoms) is False


def test_every_door_warns_of_an_ion(make_potential, zero_steps):
    """Relaxation, dynamics, minima and vibrations warn as the calculator does.

    Only a warning that points to a line of this file, which is the user's, is an error here.
    """
    known = dataclasses.replace(make_potential("tiny"), metadata={"statistics": {"charges": [0.0]}})
    ion = Atoms("OHH", WATER, info={"charge": -1})
    for door in (relax, MolecularDynamics, find_minima, vibrations):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "", OutsideDomainWarning, module=re.escape(__name__))
            with pytest.raises(OutsideDomainWarning, match="charge.* is -1"):
                door(ion, known)


def test_molecules_outside_the_domain_are_named(potential, domain):
    check = TrustCheck((potential,), (domain,))
    molecules = [Atoms("OHH", WATER), Atoms("OHH", 1.8 * WATER)]
    assert [bool(reason) for reason in check.reasons(molecules)] == [False, True]
    assert check.message(molecules, "molecules").startswith("1 of 2 molecules are outside")
    assert check.message(molecules[:1], "molecules") == ""

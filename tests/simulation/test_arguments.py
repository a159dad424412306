"""Tests for the arguments of functions: molecules and force fields in every form, at every door."""

import dataclasses
import io

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import write

from mlip_jax import EnsembleCalculator, MLIPCalculator, MolecularDynamics, find_minima, relax
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.molecules.arguments import molecule_list, molecule_records
from mlip_jax.importers import parameters
from mlip_jax.simulation.ensemble_mean import mean_potential, members_of
from mlip_jax.simulation.force_fields import load_mean_force_field
from mlip_jax.simulation.relaxation.outputs import domain_cells
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.coverage import has_unseen_state, unseen_states
from mlip_jax.structure import from_ase
from tests.simulation import analytic
from tests.simulation.analytic import PartOfTheGradient, pairwise

PAIR = Atoms("H2", [[0, 0, 0], [0, 0, 0.8]])


@pytest.fixture(scope="module")
def springs():
    return pairwise("harmonic", length=0.74, stiffness=20.0)


def test_every_form_of_molecules(tmp_path):
    write(tmp_path / "two.xyz", [PAIR, molecule("H2O")])
    (tmp_path / "one.smi").write_text("CO methanol\n")
    for given, formulas in (
        (PAIR, ["H2"]),
        ("CO", ["CH4O"]),
        ([PAIR, "O"], ["H2", "H2O"]),
        (str(tmp_path / "two.xyz"), ["H2", "H2O"]),
        (tmp_path / "two.xyz", ["H2", "H2O"]),
        ([tmp_path / "one.smi", PAIR], ["CH4O", "H2"]),
        ((PAIR,), ["H2"]),
    ):
        assert [a.get_chemical_formula() for a in molecule_list(given)] == formulas
    conformers = molecule_records(["CCO", PAIR, [PAIR, PAIR]], num_conformers=3)
    assert [len(group) for group in conformers] == [3, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("C(", "not a file, and not a SMILES"),
        ("missing.xyz", "no such file"),
        (3, "expected ASE's Atoms, a SMILES"),
        ([PAIR[0]], "in a list; expected ASE's Atoms"),
        (None, "expected ASE's Atoms, a SMILES"),
    ],
)
def test_other_molecules_are_refused(given, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        molecule_list(given)


def test_relaxation_of_every_form(springs, tmp_path):
    forms = [PAIR, "[H][H]", [PAIR, "C(", PAIR]]
    outcomes = [relax(given, springs) for given in forms]
    assert [[r.status for r in results] for results in outcomes] == [
        ["converged"],
        ["converged"],
        ["converged", "failed", "converged"],
    ]
    assert outcomes[0][0].atoms.get_distance(0, 1) == pytest.approx(0.74, abs=1e-3)
    assert "C(" in outcomes[2][1].reason


def test_dynamics_and_minima_of_every_form(springs, zero_steps):
    dynamics = MolecularDynamics("[H][H]", springs)
    assert [len(a) for a in dynamics.molecules] == [2]
    for given, count in (("[H][H]", 2), ([[PAIR, PAIR]], 2)):
        (result,) = find_minima(given, springs, rounds=0, num_conformers=2)
        assert result.relaxed == [count]


def test_force_fields_of_every_form(make_potential, tmp_path):
    potential = make_potential("tiny")
    parameters.save(potential, tmp_path / "ff")
    location = f"parameters:{tmp_path / 'ff'}"
    for given in (potential, location, MLIPCalculator(potential), [potential]):
        assert load_mean_force_field(given).digest() == potential.digest()
    several = [potential, make_potential("tiny", 1)]
    for given in (several, EnsembleCalculator(several), [location, several[1]]):
        assert len(members_of(load_mean_force_field(given))) == 2
    for given in (EMT(), 3, "", "runs/a,,runs/b", []):
        with pytest.raises((ValueError, RuntimeError)):
            load_mean_force_field(given)
    with pytest.raises(ValueError, match="Potential or a calculator"):
        relax(PAIR, EMT())


def test_mean_of_an_ensemble(make_potential):
    members = [make_potential("tiny"), make_potential("tiny", 1)]
    atoms = molecule("CH3OH")
    calculators = [
        EnsembleCalculator(members, dtype="float64"),
        MLIPCalculator(mean_potential(members), dtype="float64"),
    ]
    energies, forces = zip(
        *((c.get_potential_energy(atoms), c.get_forces(atoms)) for c in calculators)
    )
    assert energies[1] == pytest.approx(energies[0], abs=1e-8)
    np.testing.assert_allclose(forces[1], forces[0], atol=1e-8)


def test_mean_of_forces_that_are_no_gradient():
    """Detects dynamics that run without consent, and Hessians, because an ensemble hides it."""
    members = [
        dataclasses.replace(analytic.springs(), model=PartOfTheGradient(r)) for r in (1.0, 1.2)
    ]
    assert not mean_potential(members).conservative
    with pytest.raises(ValueError, match="a part of the gradient"):
        MolecularDynamics(PAIR, members)


def test_states_that_the_members_were_trained_on(make_potential):
    """Detects warnings about charges of every kind for the mean of an ensemble."""
    members = [
        dataclasses.replace(
            make_potential("tiny", k), metadata={"statistics": {"charges": [0.0, 1.0]}}
        )
        for k in (0, 1)
    ]
    ion = PAIR.copy()
    for charge, unseen in ((1, []), (2, ["charge"])):
        ion.info["charge"] = charge
        assert [state.name for state in unseen_states(ion, [mean_potential(members)])] == unseen


def test_an_odd_number_of_electrons_without_a_spin_is_unseen(make_potential):
    """A wrong charge, or a radical, used to count as inside the domain of closed-shell data."""
    for trained, expected in ((False, True), (True, False), (None, False)):
        statistics = {"charges": [0.0, 1.0], "spins": [0.0, 1.0], "odd_electrons": trained}
        members = [dataclasses.replace(make_potential("tiny"), metadata={"statistics": statistics})]
        for info, unseen in (
            ({}, False),
            ({"charge": 1}, expected),
            ({"charge": 1, "num_unpaired_electrons": 1}, False),
        ):
            atoms = PAIR.copy()
            atoms.info = info
            names = [state.name for state in unseen_states(atoms, members)]
            assert names == ["num_unpaired_electrons"] * unseen
            columns = Columns.from_structures([from_ase(atoms)])
            assert has_unseen_state(columns, members).tolist() == [unseen]


def test_molecules_smaller_or_far_larger_than_those_of_training_are_unseen(make_potential):
    """Atoms of diatomics look like training atoms, so H2 was inside the domain with large errors."""
    for sizes, expected in (((3, 9), {2: True, 3: False, 45: False, 46: True}), (None, {2: False})):
        statistics = {"charges": [0.0], "spins": [0.0], "sizes": sizes}
        members = [dataclasses.replace(make_potential("tiny"), metadata={"statistics": statistics})]
        for count, unseen in expected.items():
            atoms = Atoms("H" * count, np.arange(3.0 * count).reshape(-1, 3))
            states = unseen_states(atoms, members)
            assert [state.name for state in states] == ["size"] * unseen
            assert all("3 to 9 atoms" in state.message for state in states)
            columns = Columns.from_structures([from_ase(atoms)])
            assert has_unseen_state(columns, members).tolist() == [unseen]
            frame = io.StringIO()
            write(frame, atoms, format="extxyz")
            (cells,) = domain_cells(members[0], [None], [frame.getvalue().encode()])
            assert cells == ("", 1 if unseen else "")
            atoms.pbc, atoms.cell = True, np.eye(3)  # the size of a cell is arbitrary
            assert not unseen_states(atoms, members)


def test_relaxed_radicals_are_outside_without_a_domain(make_potential):
    """Exported force fields have no domain, and their tables did not mention radicals."""
    statistics = {"charges": [0.0], "spins": [0.0], "odd_electrons": False}
    potential = dataclasses.replace(make_potential("tiny"), metadata={"statistics": statistics})
    frames = []
    for name in ("CH3", "CH4"):
        frames.append(io.StringIO())
        write(frames[-1], molecule(name, magmoms=None), format="extxyz")
    cells = domain_cells(potential, [None], [f.getvalue().encode() for f in frames])
    assert cells == [("", 1), ("", "")]


def test_relaxed_molecules_of_an_ensemble_have_a_distance_from_training(make_potential):
    """Detects tables that are empty because the domain of several workdirs is not searched."""
    members = [make_potential("tiny"), make_potential("tiny", 1)]
    columns = Columns.from_structures(from_ase(molecule(name)) for name in ("H2O", "CH4"))
    errors = np.zeros((len(columns.numbers), 3))
    domains = [atom_domain.fit(member, columns, columns, errors) for member in members]
    water = io.StringIO()
    write(water, molecule("H2O"), format="extxyz")
    ((distance, outside),) = domain_cells(
        mean_potential(members), domains, [water.getvalue().encode()]
    )
    alone = [atom_domain.farthest(m, d, columns)[0] for m, d in zip(members, domains)]
    assert float(distance) == pytest.approx(max(alone), rel=1e-4)
    assert outside == (float(distance) > 1)

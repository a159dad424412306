"""Tests for the force field that comes with the package: its file, its errors, its use by default."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from mlip_jax import MLIPCalculator
from mlip_jax.checkpoint import CheckpointError
from mlip_jax.datasets.columns import Columns
from mlip_jax.defaults import evaluate_defaults, md_defaults, relax_defaults
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.importers import load_force_field, published
from mlip_jax.importers.catalog.published_list import find
from mlip_jax.simulation.energies import energies_and_forces
from mlip_jax.simulation.trust.coverage import unseen_states
from mlip_jax.structure import Structure

FOLDER = Path(__file__).parents[1] / "data"
# conformations of 12 molecules of the test split, and 19 dimers, ions, small and turned molecules
DATA, KINDS = FOLDER / "bundled_gfn2.npz", FOLDER / "bundled_kinds_gfn2.npz"
MAX_BYTES = 2_000_000
# bounds of mean errors on these molecules, a third above the measured ones: meV/atom, meV/Å
MAX_ENERGY_ERROR, MAX_FORCE_ERROR = 7.0, 102.0
MAX_KINDS_ENERGY_ERROR, MAX_KINDS_FORCE_ERROR = 10.0, 81.0


def unseen_molecules(path: Path = DATA) -> list[Structure]:
    """Return structures of molecules that training excludes, with GFN2-xTB labels (tblite 0.8)."""
    with np.load(path) as data:
        ends = np.cumsum(data["n_atoms"])
        return [
            Structure(
                numbers=data["numbers"][end - count : end].astype(np.int32),
                positions=data["positions"][end - count : end].astype(np.float64),
                forces=data["forces"][end - count : end].astype(np.float64),
                energy=float(energy),
                charge=float(charge),
            )
            for end, count, energy, charge in zip(
                ends, data["n_atoms"], data["energy"], data["charge"]
            )
        ]


def test_files_are_small_and_those_of_the_list():
    """Detects a file that was replaced without its checksum, and paths of the training machine."""
    entry, folder = find(BUNDLED), published.own_folder(BUNDLED)
    path = published.locate(entry)
    content = path.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.size, entry.sha256)
    assert sum(p.stat().st_size for p in folder.iterdir()) <= MAX_BYTES
    assert "/" not in load_force_field(BUNDLED).metadata["config"]["data"]["path"]


def test_errors_on_unseen_molecules():
    """Guards the errors of docs/force_field.md: parameters, reference energies, charges."""
    first = unseen_molecules()
    columns = Columns.from_structures([*first, *unseen_molecules(KINDS)])
    energies, forces = energies_and_forces(
        load_force_field(BUNDLED), columns, np.arange(len(columns))
    )
    energy_errors = 1e3 * np.abs(energies - columns.energy) / columns.n_atoms
    force_errors = 1e3 * np.abs(forces - columns.forces).mean(1)
    border = columns.offsets[len(first)]
    for errors, atom_errors, max_energy, max_force in (
        (energy_errors[: len(first)], force_errors[:border], MAX_ENERGY_ERROR, MAX_FORCE_ERROR),
        (
            energy_errors[len(first) :],
            force_errors[border:],
            MAX_KINDS_ENERGY_ERROR,
            MAX_KINDS_FORCE_ERROR,
        ),
    ):
        assert errors.mean() < max_energy and errors.max() < 5 * max_energy
        assert atom_errors.mean() < max_force


def test_it_is_used_by_default_with_its_domain():
    for config in (relax_defaults(), md_defaults(), evaluate_defaults()):
        assert config.force_field == BUNDLED
    calculator = MLIPCalculator.pretrained()
    assert calculator.potential.digest() == load_force_field(BUNDLED.upper()).digest()
    assert "forces_expected_error" in calculator.implemented_properties
    assert MLIPCalculator(BUNDLED).domain.border == calculator.domain.border


@pytest.mark.parametrize("charge, known", [(-1, True), (1, True), (-2, False)])
def test_charges_of_the_training_data_are_known(charge, known):
    atoms = molecule("CH3O")  # an even number of electrons with charges of -1 and +1
    atoms.set_initial_magnetic_moments(None)
    atoms.info["charge"] = charge
    assert (not unseen_states(atoms, [load_force_field(BUNDLED)])) == known


@pytest.mark.filterwarnings("ignore:.*odd number")
def test_radicals_without_a_label_are_outside_the_domain():
    """Without a label or magnetic moments; the training data have no odd number of electrons."""
    calculator = MLIPCalculator(BUNDLED)
    for name, outside in (("C2H5", True), ("CH3OH", False)):
        atoms = molecule(name)
        atoms.set_initial_magnetic_moments(None)
        assert calculator.get_property("outside_domain", atoms) == outside


@pytest.mark.parametrize("count, known", [(2, False), (5, True), (46, True), (300, False)])
def test_sizes_of_the_training_data_are_known(count, known):
    """Diatomics, whose errors are up to 724 meV/atom, were inside the domain."""
    atoms = Atoms("C" * count, np.arange(3.0 * count).reshape(-1, 3))
    assert (not unseen_states(atoms, [load_force_field(BUNDLED)])) == known


def test_other_elements_are_rejected():
    with pytest.raises(ValueError, match="not trained on Si"):
        load_force_field(BUNDLED).check_elements(np.array([14]))


def test_log_names_method_and_purpose_once(caplog, monkeypatch):
    monkeypatch.setattr(published, "_logged", set())
    load_force_field(BUNDLED)
    load_force_field(BUNDLED)
    assert f"force field {BUNDLED}: GFN2-xTB" in caplog.text and "drug-like" in caplog.text
    assert caplog.text.count("drug-like") == 1


@pytest.mark.parametrize("name", ["drug-gfn2", "Drugs_GFN2"])
def test_misspelled_name_gets_a_suggestion(name):
    """The error used to ask for the workdir of a training run."""
    with pytest.raises(CheckpointError, match="no such directory.*Did you mean 'drugs-gfn2'"):
        load_force_field(name)

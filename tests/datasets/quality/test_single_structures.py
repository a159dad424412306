"""Tests for wrong units and signs in data with one structure per molecule.

Each row of the table injects one error into correct labels: of density functionals (all-electron
energies) and of GFN2-xTB. Each must be an error or a question; the correct labels must be neither.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

from mlip_jax.datasets import readers
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.checks import examine
from mlip_jax.datasets.quality.diagnosis import diagnose
from mlip_jax.datasets.quality.problems import UNCONFIRMED
from mlip_jax.datasets.quality.single_structures import GFN2_XTB, bond_forces, energy_ratios
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store.finalize import reject_if_invalid
from mlip_jax.structure import Structure

HARTREE, BOHR, KCAL, KJ = 27.211386, 0.529177, 0.04336411, 0.01036427
DATA = Path(__file__).parents[2] / "data"
FILES = {
    "GFN2-xTB": ("gfn2_small.hdf5",),
    "density functionals": (
        "readers/qm7x/qm7x_small.npz",
        "spice_1.1.4_small.hdf5",
        "readers/ani/ani1x_small.hdf5",
        "readers/nabladft/test_database.db",
    ),
}

REAL = (
    *FILES["density functionals"],
    "readers/qm9/qm9_first.xyz",
    "readers/md17/rmd17_ethanol.npz",
)


@functools.cache
def one_per_molecule(method):
    """Return the structure with the most stretched bond of each molecule."""
    structures = []
    for name in FILES[method]:
        with readers.open_data(DATA / name) as reader:
            structures += [s for s in reader if np.isfinite(s.energy) and s.forces is not None]
    molecules = {}
    for s in structures:  # the largest forces belong to the most distorted structures
        molecules.setdefault((s.molecule, s.source.split(":")[0]), []).append(s)
    chosen = [max(group, key=lambda s: np.abs(s.forces).max()) for group in molecules.values()]
    return Columns.from_structures(chosen)


def problems(columns, **factors):
    changed = {name: getattr(columns, name) * factor for name, factor in factors.items()}
    found: dict[str, list] = {}
    for p in diagnose(examine(dataclasses.replace(columns, **changed))):
        if p.severity == "error" and p.what != "large forces":
            found.setdefault(p.what, []).append(p)
    return found


@pytest.mark.parametrize("method", FILES)
def test_correct_labels_have_no_problem_and_no_warning(method):
    columns = one_per_molecule(method)
    assert len(np.unique(columns.molecule)) == len(columns)
    assert not [p for p in diagnose(examine(columns)) if p.what in ("few pairs", UNCONFIRMED)]
    assert not problems(columns)


@pytest.mark.parametrize("method", FILES)
@pytest.mark.parametrize(
    ("factors", "what", "words"),
    [
        ({"forces": -1}, "gradients", "look like gradients (dE/dx), not forces"),
        ({"forces": -BOHR / HARTREE}, "gradients", "in hartree/bohr"),
        ({"forces": BOHR}, UNCONFIRMED, "they were in eV/bohr"),
        ({"forces": 1 / BOHR}, UNCONFIRMED, "converted twice from eV/bohr"),
        ({"forces": BOHR / HARTREE}, "units", "in hartree/bohr"),
        ({"forces": HARTREE / BOHR}, "units", "converted twice from hartree/bohr"),
        ({"forces": 1 / HARTREE}, "units", "they were in hartree/Å"),
        ({"forces": HARTREE}, "units", "too large"),
        ({"forces": 1 / KCAL}, "units", "they were in kcal/mol/Å"),
        ({"forces": 1 / KJ}, "units", "they were in kJ/mol/Å"),
        ({"energy": 1 / HARTREE}, "units", "energies look as if they were in hartree"),
        ({"energy": HARTREE}, "units", "converted twice from hartree"),
        ({"energy": 1 / KCAL}, "units", "in kcal/mol"),
        ({"energy": 1 / KJ}, "units", "in kJ/mol"),
        ({"energy": -1}, "units", "energies have the wrong sign"),
        ({"energy": 1 / HARTREE, "forces": 1 / HARTREE}, "units", "forces are about"),
        ({"energy": 1 / HARTREE, "forces": BOHR / HARTREE}, "units", "hartree"),
    ],
)
def test_injected_errors_are_found(method, factors, what, words):
    """Detects a wrong unit or sign that is accepted, because there are no conformations to compare."""
    found = problems(one_per_molecule(method), **factors)
    assert list(found) == [what]
    assert words in " ".join(p.message for p in found[what])


def test_a_question_is_answered_and_a_clear_error_is_not():
    columns = one_per_molecule("GFN2-xTB")
    (question,) = problems(columns, forces=BOHR).values()
    with pytest.raises(DatasetError, match="are the forces in eV/Å, and not gradients"):
        reject_if_invalid(question, "a.xyz")
    reject_if_invalid(question, "a.xyz", confirm_units=True)
    with pytest.raises(DatasetError, match="look like gradients"):
        reject_if_invalid(problems(columns, forces=-1)["gradients"], "a.xyz", confirm_units=True)


def test_without_evidence_the_units_are_a_warning():
    """Crystals of silicon have no bonds of H, and the energies of their pseudo-atoms vary."""
    rng = np.random.default_rng(0)
    columns = Columns.from_structures(
        Structure(np.full(n, 14), 2.5 * rng.random((n, 3)) * n, -5.4 * n, rng.normal(size=(n, 3)))
        for n in range(2, 12)
    )
    found = {p.what: p.severity for p in diagnose(examine(columns))}
    assert found["few pairs"] == "warning" and UNCONFIRMED not in found and "units" not in found


def test_few_compositions_prove_nothing():
    """Detects a rejection because of a coincidence: -1 eV of CH3 is like 1 kJ/mol, read twice."""
    columns = Columns.from_structures([Structure(np.array([6, 1, 1, 1]), np.eye(4)[:, :3], -1.0)])
    assert not {"units", UNCONFIRMED} & {p.what for p in diagnose(examine(columns))}
    some = one_per_molecule("density functionals").take(np.arange(4))
    some = dataclasses.replace(some, energy=some.energy / HARTREE)
    assert [p.what for p in diagnose(examine(some)) if p.severity == "error"] == [UNCONFIRMED]


@pytest.mark.parametrize("name", REAL)
def test_files_of_the_readers_have_known_units(name):
    """Detects a reader that converts an energy or a force by a wrong factor."""
    with readers.open_data(DATA / name) as reader:
        findings = examine(Columns.from_structures(reader)).distributions
    ratio = findings["energy ratio all-electron"]
    assert ratio.count and 0.99 < ratio.smallest and ratio.largest < 1.03
    force = findings["bond force"]
    assert not force.count or 0.2 < force.median < 1.0


def test_large_forces_on_bonds_at_rest():
    """Detects kcal/mol/Å in nearly relaxed structures, which have no stretched bonds."""
    rng, n = np.random.default_rng(1), 40
    water = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    forces = rng.normal(size=(n, 3, 3))
    relaxed = [
        Structure(np.array([8, 1, 1]), water, -2079.0, f - f.mean(0), molecule=f"w{k}")
        for k, f in enumerate(forces)
    ]
    columns = Columns.from_structures(relaxed)
    assert not problems(columns)
    assert "they were in kcal/mol/Å" in problems(columns, forces=1 / KCAL)["units"][0].message


def test_stiffness_of_a_morse_bond_is_exact():
    """Bonds with 33 eV/Å² and 4.6 eV: both values must be independent of the length."""
    lengths = 0.96 + np.array([0.0, 0.0, 0.0, 0.1, -0.1, 0.2, 0.02])
    decay = np.exp(-1.9 * (lengths - 0.96))
    force = -33 / 1.9 * (1 - decay) * decay
    columns = Columns.from_structures(
        Structure(
            np.array([8, 1]),
            np.array([[0, 0, 0], [0, r, 0]]),
            forces=np.array([[0, -f, 0], [0, f, 0]]),
        )
        for r, f in zip(lengths, force)
    )
    stiffness, at_rest = bond_forces(columns, np.ones(7, bool))
    np.testing.assert_allclose(stiffness, 33.0)
    np.testing.assert_allclose(np.sort(at_rest), np.sort(np.abs(force[[0, 1, 2, 6]])), atol=1e-9)


def test_energy_ratios_are_one_per_composition():
    water = Structure(np.array([8, 1, 1]), np.arange(9.0).reshape(3, 3), energy=-138.0)
    others = [
        dataclasses.replace(water, energy=-137.0),
        Structure(np.array([1, 1]), np.eye(3)[:2], energy=-26.0),
        Structure(np.array([92, 1]), np.eye(3)[:2], energy=-26.0),
        Structure(np.array([6, 1]), np.eye(3)[:2]),
    ]
    ratios = energy_ratios(Columns.from_structures([water, *others]), GFN2_XTB)
    np.testing.assert_allclose(ratios, [138.0 / ((3.7676 + 2 * 0.3935) * HARTREE)], rtol=1e-6)

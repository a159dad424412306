"""Tests with programs written for any ASE calculator, run unchanged."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import ase.db
import ase.io
import numpy as np
import pytest
from ase import units
from ase.build import molecule
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.mep import NEB
from ase.optimize import BFGS, FIRE, LBFGS
from ase.phonons import Phonons

from mlip_jax import EnsembleCalculator, MLIPCalculator
from mlip_jax.importers import parameters
from mlip_jax.simulation.dynamics.velocities import maxwell_boltzmann
from tests.simulation.structures import crystal, random_molecule


@pytest.fixture(scope="module")
def methanol(morse_potential):
    """Methanol at the minimum of a force field, with a calculator that is compiled once for all
    tests.
    """
    atoms = molecule("CH3OH")
    atoms.calc = MLIPCalculator(morse_potential, "float64")
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=200)
    return atoms


@pytest.fixture(scope="module")
def periodic(make_potential):
    return MLIPCalculator(make_potential("tiny"), "float64")


@pytest.mark.parametrize("optimizer", [BFGS, LBFGS, FIRE])
def test_optimizers(methanol, optimizer):
    atoms = methanol.copy()
    atoms.rattle(0.05, seed=1)
    atoms.calc = methanol.calc
    assert optimizer(atoms, logfile=None).run(fmax=0.02, steps=300)
    assert atoms.get_potential_energy() == pytest.approx(methanol.get_potential_energy(), abs=0.01)


def test_cell_filter(periodic):
    """Cell and positions relax together, along stress and forces."""
    atoms = crystal(3.0)
    atoms.calc = periodic
    start = atoms.get_potential_energy()
    BFGS(FrechetCellFilter(atoms), logfile=None, maxstep=0.02).run(fmax=1e-3, steps=5)
    assert atoms.get_potential_energy() < start - 1e-3
    assert np.abs(atoms.cell.array - crystal(3.0).cell.array).max() > 1e-3


def test_nudged_elastic_band(methanol):
    """Between two orientations of a molecule.

    Straight lines strain it; the band finds the path without a barrier.
    """
    images = [methanol.copy() for _ in range(5)]
    images[-1].rotate(30, "z", center="COM")
    band = NEB(images, allow_shared_calculator=True, method="improvedtangent")
    band.interpolate()
    for image in images:
        image.calc = methanol.calc

    def barrier():
        return (
            max(image.get_potential_energy() for image in images) - images[0].get_potential_energy()
        )

    before = barrier()
    assert before > 0.01
    FIRE(band, logfile=None).run(fmax=0.02, steps=60)
    assert barrier() < 0.2 * before


def test_langevin_dynamics(methanol):
    atoms = methanol.copy()
    atoms.calc = methanol.calc
    rng = np.random.default_rng(0)
    atoms.set_momenta(maxwell_boltzmann(atoms.get_masses(), 300, rng))
    before = atoms.calc.num_compiles
    temperatures = []
    dynamics = Langevin(
        atoms, 0.5 * units.fs, temperature_K=300, friction=0.05 / units.fs, rng=rng, fixcm=False
    )
    dynamics.attach(lambda: temperatures.append(atoms.get_temperature()))
    dynamics.run(300)
    assert 100 < np.mean(temperatures) < 600
    assert np.abs(atoms.get_all_distances() - methanol.get_all_distances()).max() < 0.6
    assert atoms.calc.num_compiles == before


def test_phonons(periodic, tmp_path):
    """Zone-center phonons from displacements in a supercell equal those of the exact Hessian of the
    cell.
    """
    atoms = crystal(3.0)
    phonons = Phonons(
        atoms, periodic, supercell=(2, 2, 2), delta=0.001, name=str(tmp_path / "phonons")
    )
    phonons.run()
    phonons.read(symmetrize=0, acoustic=False)
    frequencies = phonons.band_structure([[0, 0, 0]])[
        0
    ]  # imaginary frequencies are stored as negative numbers
    exact = periodic.get_vibrations(atoms).get_energies()
    np.testing.assert_allclose(
        np.sort(np.sign(frequencies) * frequencies**2),
        np.sort((exact**2).real),
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj", "a.json", "a.db"])
@pytest.mark.parametrize("kind", ["one", "ensemble"])
def test_files_keep_the_results(make_potential, periodic, tmp_path, name, kind):
    if kind == "one":
        atoms, known = crystal(3.0), ("energy", "forces", "stress", "energies")
        atoms.calc = periodic
    else:
        atoms, known = random_molecule(5), ("energy", "forces")
        atoms.calc = EnsembleCalculator([make_potential("tiny"), make_potential("tiny", 1)])
        # only the fields matter here, not the numbers
        atoms.calc.compiled.run = lambda bucket, *_: (
            np.random.default_rng(0).normal(size=(2, bucket.budget.n_node, 4)),
            None,
        )
    atoms.get_forces()
    if name.endswith(("db", "json")):
        with ase.db.connect(tmp_path / name) as database:
            database.write(atoms)
            row = database.get(1)
            read = row.toatoms()
        assert row.calculator == atoms.calc.name and "energies" not in known[:2]
        known = [k for k in known if k in row]
    else:
        ase.io.write(tmp_path / name, atoms)
        read = ase.io.read(tmp_path / name)
    assert "energy" in known and "forces" in known
    for prop in known:
        np.testing.assert_allclose(
            read.calc.results[prop], atoms.calc.results[prop], rtol=0, atol=1e-7
        )


@pytest.fixture
def saved(methanol, tmp_path):
    """Folder with a force field and start.xyz, and its location as programs receive it."""
    atoms = methanol.copy()
    atoms.rattle(0.05, seed=1)
    ase.io.write(tmp_path / "start.xyz", atoms, format="xyz")
    return f"parameters:{parameters.save(methanol.calc.potential, tmp_path / 'ff')}"


def test_geometric_optimize(methanol, saved, tmp_path):
    """Run its command line, which creates the calculator from text."""
    pytest.importorskip("geometric")
    command = [
        sys.executable,
        "-m",
        "geometric.optimize",
        "start.xyz",
        "--engine",
        "ase",
        "--ase-class",
        "mlip_jax.MLIPCalculator",
        "--ase-kwargs",
        f'{{"potential": "{saved}", "dtype": "float64"}}',
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Converged!" in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )
    end = ase.io.read(tmp_path / "start_optim.xyz", ":")[-1]
    end.calc = methanol.calc
    assert end.get_potential_energy() == pytest.approx(methanol.get_potential_energy(), abs=1e-3)


def test_sella(methanol, saved, tmp_path):
    """Relax to the minimum with exact Hessians.

    In its own process, since importing Sella sets JAX's x64 flag.
    """
    if importlib.util.find_spec("sella") is None:
        pytest.skip("Sella is not installed; the extra clients has it")
    script = f"""
import ase.io
from sella import Sella
from mlip_jax import MLIPCalculator
atoms = ase.io.read("start.xyz")
atoms.calc = MLIPCalculator({saved!r}, "float64")
assert Sella(atoms, order=0, eig=True, hessian_function=atoms.calc.get_hessian, logfile=None).run(fmax=1e-3, steps=60)
assert atoms.calc.num_compiles == 2, atoms.calc.num_compiles  # forces, and Hessian
ase.io.write("end.xyz", atoms, format="xyz")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    end = ase.io.read(tmp_path / "end.xyz")
    end.calc = methanol.calc
    assert end.get_potential_energy() == pytest.approx(methanol.get_potential_energy(), abs=1e-3)

"""Tests for the relaxation of cells: each step equals that of ASE's cell filters."""

import jax
import numpy as np
import pytest
import scipy.linalg
from ase import Atoms
from ase.constraints import FixAtoms, FixSymmetry
from ase.filters import FrechetCellFilter, UnitCellFilter
from ase.optimize import BFGS, FIRE, LBFGS
from ase.spacegroup.symmetrize import check_symmetry, symmetrize_rank1, symmetrize_rank2

from mlip_jax import MLIPCalculator, relax
from mlip_jax.simulation.relaxation.cells import matrices
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.cells.inputs import find_cell_obstacle
from mlip_jax.simulation.relaxation.cells.symmetry import operations
from mlip_jax.simulation.relaxation.inputs import find_obstacle
from tests.simulation.analytic import pairwise, springs

FILTERS = {"frechet": FrechetCellFilter, "unitcell": UnitCellFilter}
MINIMIZERS = {"bfgs": BFGS, "lbfgs": LBFGS, "fire": FIRE}
POTENTIAL = pairwise(depth=0.05, length=2.6, cutoff=5.0)


def triclinic(seed=0):
    """Return a compressed triclinic cell of three atoms, smaller than the cutoff, far away."""
    rng = np.random.default_rng(seed)
    cell = np.array([[4.0, 0.2, 0.1], [-0.5, 3.6, 0.3], [0.4, 0.7, 4.1]])
    scaled = np.array([[0.0, 0.0, 0.0], [0.45, 0.5, 0.1], [0.5, 0.05, 0.55]])
    atoms = Atoms("Ar3", scaled_positions=scaled, cell=cell, pbc=True)
    atoms.positions += rng.normal(0, 0.05, (3, 3)) + 3.0
    return atoms


def slab():
    """Return two layers, periodic along x and y, with a fixed atom."""
    cell = np.array([[2.9, 0.1, 0.0], [0.2, 2.7, 0.0], [0.0, 0.0, 12.0]])
    scaled = np.array([[0.0, 0.0, 0.4], [0.5, 0.45, 0.58]])
    atoms = Atoms("Ar2", scaled_positions=scaled, cell=cell, pbc=(True, True, False))
    atoms.set_constraint(FixAtoms([0]))
    return atoms


def frames_of_ase(atoms, optimizer, name, steps, **options):
    """Return the atoms after each step of ASE with our calculator, with energy and stress."""
    atoms, frames = atoms.copy(), []
    atoms.pbc = True  # the stress of ASE's calculators requires it
    atoms.calc = MLIPCalculator(POTENTIAL, dtype="float64")
    run = MINIMIZERS[optimizer](FILTERS[name](atoms, **options), logfile=None)

    def keep():
        frame = atoms.copy()
        frame.info = {"energy": atoms.get_potential_energy(), "stress": atoms.get_stress()}
        frames.append(frame)

    run.attach(keep)
    run.run(fmax=1e-4, steps=steps)
    return frames


@pytest.mark.parametrize(
    ("optimizer", "name", "options"),
    [
        ("bfgs", "frechet", {"scalar_pressure": 0.02}),
        pytest.param("bfgs", "frechet", {}, marks=pytest.mark.slow),
        pytest.param("bfgs", "unitcell", {"scalar_pressure": 0.02}, marks=pytest.mark.slow),
        pytest.param("fire", "frechet", {"hydrostatic_strain": True}, marks=pytest.mark.slow),
        pytest.param("lbfgs", "frechet", {"scalar_pressure": 0.05}, marks=pytest.mark.slow),
        pytest.param("fire", "unitcell", {"constant_volume": True}, marks=pytest.mark.slow),
        pytest.param("bfgs", "unitcell", {"hydrostatic_strain": True}, marks=pytest.mark.slow),
        pytest.param("bfgs", "frechet", {"mask": (1, 0, 1, 0, 1, 0)}, marks=pytest.mark.slow),
        pytest.param("bfgs", "unitcell", {"mask": (1, 1, 0, 0, 0, 1)}, marks=pytest.mark.slow),
    ],
)
def test_steps_equal_those_of_ase(optimizer, name, options):
    """A triclinic cell and a slab, whose open direction is masked, in one batch."""
    steps, pressure = 12, options.get("scalar_pressure", 0.0)
    starts = [triclinic(), *([] if pressure else [slab()])]
    results = relax(
        starts,
        POTENTIAL,
        optimizer=optimizer,
        fmax=1e-4,
        max_steps=steps,
        dtype="float64",
        trajectory_every=1,
        cell=CellFilter(name, **options),
    )
    for start, result in zip(starts, results, strict=True):
        mask = options.get("mask", (1,) * 6)
        if not start.pbc.all():
            mask = np.multiply(mask, (1, 1, 0, 0, 0, 1))
        expected = frames_of_ase(start, optimizer, name, steps, **options | {"mask": mask})
        assert len(result.frames) == len(expected) > 8
        for ours, theirs in zip(result.frames, expected):
            np.testing.assert_allclose(ours.cell, theirs.cell, rtol=0, atol=1e-8)
            np.testing.assert_allclose(ours.positions, theirs.positions, rtol=0, atol=1e-8)
            assert ours.get_potential_energy() == pytest.approx(theirs.info["energy"], abs=1e-8)
            if start.pbc.all():
                np.testing.assert_allclose(ours.get_stress(), theirs.info["stress"], atol=1e-8)
        assert np.abs(result.atoms.cell - start.cell).max() > 0.01


def rutile():
    """Return a distorted rutile cell: tetragonal after it is refined with a tolerance of 0.05 Å."""
    u, cell = 0.305, np.diag([3.9, 3.9, 2.7])
    scaled = [[0, 0, 0], [0.5, 0.5, 0.5]]
    scaled += [[u, u, 0], [-u, -u, 0], [0.5 + u, 0.5 - u, 0.5], [0.5 - u, 0.5 + u, 0.5]]
    atoms = Atoms("Ar2H4", scaled_positions=scaled, cell=cell, pbc=True)
    atoms.positions += np.random.default_rng(1).normal(0, 0.004, (6, 3))
    return atoms


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frechet", "unitcell"])
def test_the_space_group_is_kept_as_in_ase(name):
    """Each step equals that with ASE's FixSymmetry; without it, the noise of the start remains."""
    pytest.importorskip("spglib", reason="spglib determines space groups (extra crystals)")
    start = rutile()
    start.set_constraint(FixSymmetry(start, symprec=0.05))
    expected = frames_of_ase(start, "bfgs", name, 12)
    options = {"fmax": 1e-4, "max_steps": 12, "dtype": "float64", "trajectory_every": 1}
    ours, by_tolerance = relax([start, rutile()], POTENTIAL, cell=name, symprec=0.05, **options)
    for result in (ours, by_tolerance):
        assert len(result.frames) == len(expected) == 13
        for frame, theirs in zip(result.frames, expected):
            np.testing.assert_allclose(frame.cell, theirs.cell, rtol=0, atol=1e-8)
            np.testing.assert_allclose(frame.positions, theirs.positions, rtol=0, atol=1e-8)
            assert frame.get_potential_energy() == pytest.approx(theirs.info["energy"], abs=1e-8)
            np.testing.assert_allclose(frame.get_stress(), theirs.info["stress"], atol=1e-8)
    assert np.abs(ours.atoms.cell - start.cell).max() > 0.05
    assert check_symmetry(ours.atoms, 1e-6).number == check_symmetry(start, 1e-6).number == 136
    assert check_symmetry(rutile(), 1e-6).number == 1


def test_symmetrized_forces_equal_those_of_ase():
    """Forces and stress of a cell that is not orthogonal, with a glide plane and translations."""
    cell = np.array([[3.0, 0.4, 0.0], [3.0, -0.4, 0.0], [0.0, 0.0, 4.0]])
    single = Atoms("Ar2", [[1.0, 0.1, 0.3], [1.0, -0.1, 2.3]], cell=cell, pbc=True)
    repeats, n = 9, 18
    atoms = single.repeat((1, 1, repeats))
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    rotations = [turn for turn in (np.eye(3, dtype=int), swap) for _ in range(repeats)]
    one = np.arange(n)
    images = [
        (image + 2 * move) % n
        for image in (one, one + 1 - 2 * (one % 2))
        for move in range(repeats)
    ]
    rng, zero = np.random.default_rng(0), np.zeros((2 * repeats, 3))
    forces, stress = rng.normal(size=(1, n, 3)), rng.normal(size=(1, 3, 3))
    inverse = np.linalg.inv(atoms.cell)
    found = operations(symmetric(atoms, rotations, images))
    assert sum(part.size for part in found) < 50 * n + 600  # not of the order n²
    with jax.enable_x64(True):
        ours = jax.tree.map(lambda part: part[None], found)
        forces_kept, stress_kept = ours.of_forces(forces)[0], ours.of_stress(stress)[0]
    expected = symmetrize_rank1(atoms.cell, inverse, forces[0], rotations, zero, images)
    np.testing.assert_allclose(forces_kept, expected, atol=1e-14)
    np.testing.assert_allclose(
        stress_kept, symmetrize_rank2(atoms.cell, inverse, stress[0], rotations), atol=1e-14
    )


def symmetric(atoms, rotations, images):
    """Return the structure with the constraint FixSymmetry, without spglib."""
    constraint = FixSymmetry.__new__(FixSymmetry)
    constraint.rotations, constraint.symm_map = np.array(rotations), images
    atoms.set_constraint([constraint, *atoms.constraints])
    return atoms


def test_obstacles_of_symmetry():
    one, swap = np.eye(3, dtype=int), np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    square = Atoms("Ar2", [[1.0, 0, 0], [0, 1.0, 0]], cell=(3, 3, 4), pbc=True)
    mirror = [one, swap], [[0, 1], [1, 0]]
    molecule, long, half = square.copy(), square.copy(), square.copy()
    molecule.pbc = False
    long.cell[0, 0] = 3.3
    half.set_constraint(FixAtoms([0]))
    for atoms, cell_filter, words in (
        (square.copy(), CellFilter(), ""),
        (molecule, None, "requires a periodic"),
        (long, CellFilter(), "does not have the symmetry"),
        (half, None, "FixAtoms must fix all or none"),
        (square.copy(), CellFilter(mask=(1, 0, 1, 1, 1, 1)), "mask must treat components"),
    ):
        reason = find_obstacle(symmetric(atoms, *mirror), POTENTIAL, cell_filter)
        assert words in reason and bool(words) == bool(reason), (words, reason)
    other = symmetric(Atoms("Ar", cell=(3, 3, 4), pbc=True), *mirror)
    assert "another number of atoms" in find_obstacle(other, POTENTIAL)
    twice = symmetric(symmetric(square.copy(), *mirror), *mirror)
    assert "several constraints" in find_obstacle(twice, POTENTIAL)
    with pytest.raises(ValueError, match="symprec must be positive"):
        relax(square, POTENTIAL, symprec=0.0)


def test_exponential_and_logarithm():
    """The digits of small strains are kept, also in float32."""
    sizes = np.repeat([1e-6, 0.05, 0.3], 3)[:, None, None]
    a = sizes * np.random.default_rng(0).normal(size=(9, 3, 3))
    both = jax.jit(lambda a: (matrices.expm1(a), matrices.log1p(matrices.expm1(a))))
    expected = [scipy.linalg.expm(x) - np.eye(3) for x in a]
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 3e-5)):
        with jax.enable_x64(dtype == np.float64):
            e, back = map(np.asarray, both(a.astype(dtype)))
        for error in (e - expected, back - a):
            assert (np.abs(error) < tolerance * sizes + 1e-15).all(), dtype


@pytest.mark.slow
def test_molecules_and_fixed_cells_in_one_call():
    """Molecules have their own program; cells are fixed without a filter, as in ASE."""
    start, pair = triclinic(), Atoms("Ar2", [[0, 0, 0], [0, 0, 3.2]])
    single, crystal = relax([pair, start], POTENTIAL, fmax=0.01, dtype="float64")
    expected = start.copy()
    expected.calc = MLIPCalculator(POTENTIAL, dtype="float64")
    BFGS(expected, logfile=None).run(fmax=0.01)
    assert single.converged and single.cell_start is None and np.isnan(single.pressure)
    np.testing.assert_array_equal(crystal.atoms.cell, start.cell)
    np.testing.assert_allclose(crystal.atoms.positions, expected.positions, rtol=0, atol=1e-7)
    single, crystal = relax([pair, start], POTENTIAL, fmax=0.01, cell="frechet")  # float32
    assert single.converged and crystal.converged
    assert abs(crystal.pressure) < 0.1 and np.ptp(crystal.atoms.cell - start.cell) > 0.1


def test_obstacles_of_cells():
    tilted = slab()
    tilted.set_cell([[2.9, 0.1, 0.4], [0.2, 2.7, 0.0], [0.0, 0.0, 12.0]])
    pressure, mask = CellFilter(scalar_pressure=0.1), CellFilter(mask=(0, 0, 1, 0, 0, 0))
    for atoms, potential, cell_filter, words in (
        (tilted, POTENTIAL, CellFilter(), "must be along x, y or z"),
        (slab(), POTENTIAL, pressure, "a pressure requires"),
        (slab(), POTENTIAL, mask, "mask fixes all"),
        (triclinic(), springs(), CellFilter(), "not the gradient"),
        (Atoms("Ar", cell=np.ones((3, 3)), pbc=True), POTENTIAL, None, "coplanar"),
    ):
        assert words in find_cell_obstacle(atoms, potential, cell_filter)
    for atoms in (triclinic(), slab()):
        assert find_cell_obstacle(atoms, POTENTIAL, CellFilter()) == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "frechett"}, "Did you mean 'frechet'"),
        ({"mask": (1, 2, 0, 0, 0, 0)}, "mask must have six values"),
        ({"mask": (0,) * 6}, "fixes all"),
        ({"scalar_pressure": np.nan}, "scalar_pressure"),
    ],
)
def test_invalid_filters_are_rejected(arguments, words):
    with pytest.raises(ValueError, match=words):
        CellFilter(**arguments)

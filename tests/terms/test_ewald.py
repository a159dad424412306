"""Tests for Ewald sums of the electrostatics term, against constants and an independent sum."""

import copy
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.units import Bohr, Hartree
from scipy.special import erf, erfc

from mlip_jax import MLIPCalculator, terms
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.edge_counts import count_all_pairs
from mlip_jax.graphs.graph import example_graph
from mlip_jax.graphs.long_range import LatticeSum, LatticeSumCutoff, count_vectors
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import Potential, evaluate
from mlip_jax.simulation import export
from mlip_jax.simulation.relaxation.inputs import find_obstacle
from mlip_jax.structure import Structure, from_ase
from mlip_jax.terms.layers.ewald import Splitting, _shells, reciprocal_energies
from tests.simulation.analytic import Pairwise
from tests.terms.test_terms import Neighbors

pytestmark = pytest.mark.usefixtures("double_precision")

COULOMB = Hartree * Bohr  # eV Å
# CHARGES: partial charges of the elements (e) before the total charge is distributed.
CHARGES = {11: 1.0, 17: -1.0, 8: -0.8, 1: 0.4}
OPTIONS = {"method": "ewald", "cutoff": 6.0, "damping": 0.0, "accuracy": 1e-11, "k_vectors": 2000}


def potential(model=None, **options) -> Potential:
    """Return a force field of ions whose partial charges are those of their elements."""
    model = terms.with_terms(model or Neighbors(), {"electrostatics": OPTIONS | options})
    params = jax.jit(model.init)(jax.random.key(0), example_graph(np.float64))
    params = jax.tree.map(np.asarray, params)
    head = jax.tree.map(np.zeros_like, params["params"]["electrostatics"])
    for number, charge in CHARGES.items():
        head["bias"][number] = charge
    params = {"params": {**params["params"], "electrostatics": head}}
    return Potential(model, params, model.cutoff, np.zeros(119), 1.0, tuple(CHARGES))


def salt(kind, a):
    return bulk("NaCl", kind, a=a, cubic=kind != "cesiumchloride")


def triclinic(charge=0.0):
    cell = np.array([[4.1, 0.2, 0.1], [-0.9, 3.8, 0.3], [0.4, 0.7, 5.0]])
    scaled = [[0.1, 0.2, 0.3], [0.6, 0.7, 0.1], [0.4, 0.1, 0.8], [0.9, 0.6, 0.55]]
    atoms = Atoms("NaClOH", scaled_positions=scaled, cell=cell, pbc=True)
    atoms.info["charge"] = charge
    return atoms


def molecule():
    """Return a molecule that is longer than the cutoff of crystals."""
    return Atoms("OHHNa", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [0.5, 0.4, 9.0]])


def charges_of(atoms, total=0.0):
    q = np.array([CHARGES[z] for z in atoms.numbers])
    return q + (total - q.sum()) / len(q)


def ewald(positions, cell, q, alpha, damping=0.0):
    """Return the energy (eV) of charges in a cell by direct loops over images and vectors.

    Cutoffs are such that the terms left out are below 1e-12.
    """
    reach, energy = 5.3 / min(alpha, 1 / damping if damping else alpha), 0.0
    shells = np.ceil(reach * np.linalg.norm(np.linalg.inv(cell), axis=0)).astype(int) + 1
    images = np.stack(np.meshgrid(*(np.arange(-s, s + 1) for s in shells)), -1).reshape(-1, 3)
    for shift in images:
        r = np.linalg.norm(positions[:, None] - positions + shift @ cell, axis=-1)
        r[r == 0] = np.inf
        short = erfc(alpha * r) - (erfc(r / damping) if damping else 0)
        energy += 0.5 * np.sum(np.outer(q, q) * short / r)
    volume = abs(np.linalg.det(cell))
    k_max = 2 * 5.3 * alpha
    shells = np.floor(k_max * np.linalg.norm(cell, axis=1) / (2 * np.pi)).astype(int)
    n = np.stack(np.meshgrid(*(np.arange(-s, s + 1) for s in shells)), -1).reshape(-1, 3)
    k = 2 * np.pi * n[n.any(axis=1)] @ np.linalg.inv(cell).T
    squared = (k * k).sum(1)
    structure_factor = np.abs(np.exp(1j * positions @ k.T).T @ q) ** 2
    energy += (2 * np.pi / volume * np.exp(-squared / (4 * alpha**2)) / squared) @ structure_factor
    energy -= alpha / np.sqrt(np.pi) * (q * q).sum()
    return COULOMB * (energy - np.pi / (2 * volume) * (alpha**-2 - damping**2) * q.sum() ** 2)


def grown():
    """Return a cell that needs more vectors than the force field accepts, as after a relaxation."""
    atoms = triclinic()
    atoms.set_cell(1.9 * atoms.cell.array, scale_atoms=True)
    return atoms


def batch(force_field, *structures, any_cell=False):
    columns = Columns.from_structures(
        s if isinstance(s, Structure) else from_ase(s) for s in structures
    )
    budget = PaddingBudget(len(columns.numbers) + 2, 700, len(columns) + 1, 900)
    far = force_field.long_range_cutoff
    if any_cell:
        far = LatticeSumCutoff(far.periodic, [s._replace(num_vectors=10**6) for s in far.sums])
    return build_batch(columns, budget, 4.0, dtype=np.float64, long_range_cutoff=far)


@pytest.fixture(scope="module")
def mixture():
    """Return structures and the evaluation of a batch of crystals and a molecule."""
    with jax.enable_x64(True):
        ions = potential()
        structures = [
            salt("rocksalt", 5.64),
            triclinic(1.0),
            molecule(),
            salt("cesiumchloride", 4.12),
            salt("zincblende", 5.41),
            grown(),
        ]
        graph = batch(ions, *structures, any_cell=True)
        result = jax.jit(lambda p, g: evaluate(ions.model, p, g, 1.0, True))(ions.params, graph)
        return structures, jax.tree.map(np.asarray, result)


def test_madelung_constants(mixture):
    structures, result = mixture
    for index, constant, pairs, nearest in (
        (0, 1.7475645946331822, 4, 5.64 / 2),
        (3, 1.7626747730709884, 1, 4.12 * np.sqrt(3) / 2),
        (4, 1.6380550533887892, 4, 5.41 * np.sqrt(3) / 4),
    ):
        madelung = -result.energy[index] / pairs * nearest / COULOMB
        assert madelung == pytest.approx(constant, abs=1e-8), structures[index]


def test_a_charged_triclinic_cell_and_a_molecule(mixture):
    """Energy, forces and stress equal an independent sum with other splitting parameters."""
    structures, result = mixture
    atoms, first = structures[1], len(structures[0])
    q, cell, x = charges_of(atoms, 1.0), atoms.cell.array, atoms.positions
    for alpha in (0.4, 0.7):
        assert result.energy[1] == pytest.approx(ewald(x, cell, q, alpha), abs=1e-9)
    rng = np.random.default_rng(0)
    move, strain = rng.normal(size=(4, 3)), rng.normal(size=(3, 3))
    strain = strain + strain.T

    def slope(energy):
        return (8 * (energy(1e-3) - energy(-1e-3)) - energy(2e-3) + energy(-2e-3)) / 12e-3

    along = slope(lambda h: ewald(x + h * move, cell, q, 0.5))
    assert -(result.forces[first : first + 4] * move).sum() == pytest.approx(along, rel=1e-7)
    deform = slope(lambda h: ewald(*(a @ (np.eye(3) + h * strain) for a in (x, cell)), q, 0.5))
    volume = abs(np.linalg.det(cell))
    assert (result.stress[1] * strain).sum() * volume == pytest.approx(deform, rel=1e-7)
    single = structures[2]
    r, q = single.get_all_distances() + np.diag([np.inf] * 4), charges_of(single)
    assert result.energy[2] == pytest.approx(0.5 * COULOMB * (np.outer(q, q) / r).sum(), rel=1e-12)
    assert result.energy[6] == 0 and not result.forces[-2:].any()


def test_a_cell_that_has_grown(mixture):
    """Programs have room for cells of twice the length, so relaxations and dynamics continue."""
    (atoms, result), q = (mixture[0][5], mixture[1]), charges_of(grown())
    assert "k_vectors" in find_obstacle(atoms, potential())
    expected = ewald(atoms.positions, atoms.cell.array, q, 0.4)
    assert result.energy[5] == pytest.approx(expected, abs=1e-9)
    for cell, accepted in ((np.eye(3) * 9.0, 62), (np.diag([3.0, 3.0, 40.0]), 12)):
        lattice = LatticeSum(2.0, accepted)
        assert count_vectors(cell, lattice.k_max) == accepted
        assert count_vectors(2 * cell, lattice.k_max) <= lattice.room


@pytest.mark.slow
def test_smeared_charges_train_on_forces():
    """Damped charges, without a pair sum; the gradient of a loss of forces by parameters is exact.

    A crystal far from the origin and one with further images of its atoms have the same energy.
    """
    smeared = potential(damping=1.5, accuracy=1e-9, k_vectors=900)
    atoms = triclinic()
    moved = Structure(atoms.numbers, atoms.positions + 7.3, cell=atoms.cell.array, pbc=atoms.pbc)
    double = from_ase(atoms.repeat((1, 2, 1)))
    graph = batch(smeared, atoms, moved, double, molecule())

    def loss(params):
        out = evaluate(smeared.model, params, graph, 1.0)
        return (out.forces**2).sum(), out.energy

    derivative = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, energies), gradient = derivative(smeared.params)
    expected = ewald(atoms.positions, atoms.cell.array, charges_of(atoms), 0.6, 1.5)
    np.testing.assert_allclose(energies[:3], expected * np.array([1, 1, 2]), rtol=1e-9)
    r, q = molecule().get_all_distances() + np.eye(4), charges_of(molecule())
    pairs = np.outer(q, q) * erf(r / 1.5) / r
    inside = 0.5 * COULOMB * (pairs.sum() - np.trace(pairs))
    assert float(energies[3]) == pytest.approx(inside, rel=1e-12)
    h, parameters = 1e-4, smeared.params["params"]
    slopes = []
    for sign in (1, -1):
        head = jax.tree.map(np.copy, parameters["electrostatics"])
        head["bias"][11] += sign * h
        slopes.append(derivative({"params": {**parameters, "electrostatics": head}})[0][0])
    by_charge = gradient["params"]["electrostatics"]["bias"][11]
    assert float(by_charge) == pytest.approx(float(slopes[0] - slopes[1]) / (2 * h), rel=1e-7)
    # too many vectors for the doubled cell: not a number on the device, an error on the host
    few = potential(damping=1.5, accuracy=1e-9, k_vectors=300)
    with pytest.raises(ValueError, match="needs .* reciprocal vectors for this cell"):
        batch(few, double)
    splitting = Splitting.of(OPTIONS["cutoff"], 1e-9, 1.5)
    charges = jnp.ones(graph.nodes["numbers"].size)
    out = reciprocal_energies(graph, charges, splitting, 300, 1.5)
    assert np.isnan(out[8:16]).all() and np.isfinite(out[:8]).all()


def test_cells_that_do_not_suit():
    cutoff = potential().long_range_cutoff
    assert cutoff != np.inf and float(cutoff) == np.inf
    assert cutoff == pickle.loads(pickle.dumps(cutoff)) == copy.deepcopy(cutoff)  # noqa: S301
    assert cutoff != LatticeSumCutoff(7.0, cutoff.sums) and hash(cutoff) == hash(copy.copy(cutoff))
    slab = triclinic()
    slab.pbc = (True, True, False)
    large = triclinic().repeat(6)
    ions = potential()
    for atoms, words in (
        (slab, "Ewald sums require periodicity in all three"),
        (large, "k_vectors"),
        (triclinic(), ""),
        (molecule(), ""),
    ):
        reason = find_obstacle(atoms, ions)
        assert words in reason and bool(words) == bool(reason)
        if words and atoms.pbc.any():
            with pytest.raises(ValueError, match=words):
                MLIPCalculator(ions).get_potential_energy(atoms)
            with pytest.raises(ValueError, match=words):
                count_all_pairs(Columns.from_structures([from_ase(atoms)]), cutoff)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ewld"}, "Did you mean 'ewald'"),
        ({"damping": -1.0}, "damping must not be negative"),
        ({"cutoff": None}, "needs a finite cutoff"),
        ({"accuracy": 0.0}, "accuracy must be between 0 and 0.1"),
        ({"k_vectors": 0}, "k_vectors at least 1"),
    ],
)
def test_invalid_options_of_the_sums(options, message):
    model = terms.with_terms(Neighbors(), {"electrostatics": OPTIONS | options})
    with pytest.raises(ValueError, match=message):
        _ = model.long_range_cutoff


@pytest.mark.slow
def test_relaxation_and_dynamics():
    """Cells relax as with ASE's filter and optimizer; dynamics conserve the energy; Hessians exist."""
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS

    from mlip_jax import relax
    from mlip_jax.simulation.dynamics.md import MolecularDynamics

    model = Pairwise(depth=0.1, length=2.5, cutoff=5.0)
    salt_ff = potential(model, damping=1.0, accuracy=1e-11, k_vectors=3000)
    start = salt("rocksalt", 5.5)
    start.rattle(0.1, seed=1)
    (ours,) = relax([start], salt_ff, cell="frechet", max_steps=6, dtype="float64", fmax=1e-4)
    theirs = start.copy()
    theirs.calc = MLIPCalculator(salt_ff, "float64")
    BFGS(FrechetCellFilter(theirs), logfile=None).run(fmax=1e-4, steps=6)
    np.testing.assert_allclose(ours.atoms.cell, theirs.cell, atol=1e-7)
    np.testing.assert_allclose(ours.atoms.positions, theirs.positions, atol=1e-7)
    hessian = theirs.calc.get_hessian(theirs)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-9)
    np.testing.assert_allclose(hessian.reshape(24, 8, 3).sum(1), 0, atol=1e-9)
    pair = Atoms("NaCl", [[0, 0, 0], [0, 0, 9.0]])  # longer than the cutoff of crystals
    (far,) = relax([pair], salt_ff, max_steps=0, dtype="float64")
    assert far.energy == pytest.approx(-COULOMB / 9.0 * erf(9.0), abs=1e-9)
    start = theirs.copy()
    settings = {"ensemble": "nve", "temperature": 300, "dtype": "float64", "timestep": 1.0}
    dynamics = MolecularDynamics(start, salt_ff, **settings)
    (run,) = dynamics.run(60)
    total = run.thermo.potential + run.thermo.kinetic
    assert not dynamics.broken and np.ptp(total) < 0.1 * np.ptp(run.thermo.kinetic)


def test_vectors_at_the_limit_are_counted():
    """In float32 a vector at the limit may be one more than the check allowed: NaN."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    for k_max, shells, change in itertools.product((0.73, 1.1), (1, 5, 12), (-1e-7, -1e-9, 1e-9)):
        cell = 2 * np.pi * shells / k_max * (1 + change) * rotation
        number = count_vectors(cell, k_max)
        needed = _shells(jnp.asarray(cell[None], jnp.float32), k_max, number)[1]
        assert int(needed[0]) <= number == ((2 * shells + 1) ** 3 - 1) // 2


def test_exported_limits_of_the_sums():
    """A program in another language can tell beforehand which cells have no energy."""
    ions = potential(k_vectors=500)
    (sums,) = export.describe_lattice_sums(ions.long_range_cutoff, periodic=True)
    assert sums == {"k_max": pytest.approx(8.44, abs=0.01), "max_vectors": 8000}
    assert export.describe_lattice_sums(ions.long_range_cutoff, periodic=False) == []
    assert export.describe_lattice_sums(12.0, periodic=True) == []
    formula = "(np.prod(2 * np.floor(k_max * lengths / (2 * np.pi)) + 1) - 1) / 2"
    assert formula in export.__doc__
    cell, k_max = triclinic().cell.array, sums["k_max"]
    names = {"np": np, "k_max": k_max, "lengths": np.linalg.norm(cell, axis=1)}
    assert eval(formula, names) == count_vectors(cell, k_max)  # noqa: S307


@pytest.mark.slow
def test_cells_that_expand():
    """Relaxations and barostats continue with cells that need more vectors than those accepted."""
    from mlip_jax import relax
    from mlip_jax.simulation.dynamics.md import MolecularDynamics

    model = Pairwise(depth=0.1, length=2.5, cutoff=5.0)
    start = salt("rocksalt", 4.4)
    options = {"damping": 1.0, "accuracy": 1e-7}
    (lattice,) = potential(model, **options).long_range_cutoff.sums
    few = potential(model, **options, k_vectors=count_vectors(start.cell.array, lattice.k_max))
    many = potential(model, **options, k_vectors=4000)
    results = [
        relax([start], ions, cell="frechet", max_steps=40, dtype="float64")[0]
        for ions in (few, many)
    ]
    assert results[0].converged and results[0].energy == pytest.approx(results[1].energy, abs=1e-12)
    assert find_obstacle(results[0].atoms, few) and not find_obstacle(results[0].atoms, many)
    start = salt("rocksalt", 4.66)  # one more shell of vectors from 4.68 Å on
    few = potential(model, **options, k_vectors=count_vectors(start.cell.array, lattice.k_max))
    settings = {"ensemble": "npt", "temperature": 300, "frame_every": 50}
    settings |= {"barostat_time": 100.0, "compressibility": 1e-6, "dtype": "float64"}
    settings |= {"stop_on_bond_break": False, "max_temperature": 1e6}
    dynamics = MolecularDynamics(start, few, **settings)
    (run,) = dynamics.run(300)
    assert not dynamics.broken and np.isfinite(run.thermo.potential).all()
    assert run.thermo.volume[-1] > 1.02 * start.cell.volume and find_obstacle(run.frames[-1], few)

"""Tests for long-range pairs, charges and spin through the calculator.

The model is one of point charges, whose energy a loop confirms.
"""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.graph import long_range_pairs, node_graph_index
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.models.layers.basic import segment_sum
from mlip_jax.models.layers.heads import AtomOutputs
from mlip_jax.potential import Potential, evaluate
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.structure import from_ase

COULOMB = 14.399645351950548  # eV Å
CHARGES = np.zeros(119)
CHARGES[[1, 6, 7, 8]] = 0.4, 0.1, -0.3, -0.7
SPIN_ENERGY = 0.25


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Compile without optimization: programs run only a few times here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class PointCharges(nn.Module):
    """Coulomb energy of charges per element, times the smooth cutoff (1 - (r / cutoff)²)².

    A term of the number of unpaired electrons is added.
    """

    cutoff: float = 2.0
    long_range_cutoff: float | None = float("inf")

    @nn.compact
    def __call__(self, graph):
        scale = self.param("scale", nn.initializers.ones, ())
        dtype = graph.nodes["positions"].dtype
        numbers, num = graph.nodes["numbers"], graph.nodes["numbers"].shape[0]
        charges = jnp.asarray(CHARGES, dtype)[numbers] * scale.astype(dtype)
        edge = long_range_pairs(graph)
        squared = (edge.displacements**2).sum(-1)
        real = squared > 0
        r = jnp.sqrt(jnp.where(real, squared, 1.0))
        u = jnp.clip(r / self.long_range_cutoff, 0.0, 1.0)
        pair = jnp.where(
            real,
            COULOMB * charges[edge.receivers] * charges[edge.senders] / r * (1 - u**2) ** 2,
            0.0,
        )
        coulomb = segment_sum(0.5 * pair, edge.receivers, num) + segment_sum(
            0.5 * pair, edge.senders, num
        )
        spin = (
            SPIN_ENERGY
            * (graph.globals["spin"] / jnp.maximum(graph.n_node, 1))[node_graph_index(graph)]
        )
        return AtomOutputs(
            jnp.zeros(num, dtype) + 1.0,
            jnp.zeros((num, 1, 1, 1), dtype),
            {"coulomb": coulomb, "spin": spin.astype(dtype)},
            {"partial_charges": charges},
        )


def potential(cutoff=np.inf):
    model = PointCharges(long_range_cutoff=cutoff)
    # each atom has 0.5 eV, one unit of the model's output; terms are not scaled
    return Potential(
        model, {"params": {"scale": np.ones(())}}, model.cutoff, np.arange(119.0), 0.5, (1, 6, 7, 8)
    )


@pytest.fixture(scope="module")
def calculators():
    return {cutoff: MLIPCalculator(potential(cutoff), "float64") for cutoff in (np.inf, 6.0)}


def by_hand(atoms, cutoff):
    """Return the energy by a loop over atoms and images."""
    reach = [
        int(np.ceil(cutoff / h)) + 1 if p else 0
        for h, p in zip(
            1 / np.linalg.norm(np.linalg.pinv(atoms.cell.array), axis=0)
            if atoms.pbc.any()
            else np.ones(3),
            atoms.pbc,
        )
    ]
    q, total = CHARGES[atoms.numbers], 0.0
    for shift in itertools.product(*(range(-r, r + 1) for r in reach)):
        images = atoms.positions + np.array(shift) @ atoms.cell.array
        r = np.linalg.norm(images[None] - atoms.positions[:, None], axis=2)
        near = (r > 0) & (r < cutoff)
        r = np.where(near, r, 1.0)
        total += (
            0.5 * COULOMB * np.sum(near * q[:, None] * q[None] / r * (1 - (r / cutoff) ** 2) ** 2)
        )
    return (
        total
        + np.sum(0.5 + atoms.numbers)
        + SPIN_ENERGY * atoms.info.get("num_unpaired_electrons", 0)
    )


def crystal():
    cell = 3.4 * np.array([[1.0, 0.0, 0.0], [0.3, 0.9, 0.0], [-0.2, 0.1, 1.1]])
    scaled = np.array([[0.02, 0.0, 1.1], [0.5, -0.55, 0.1], [0.0, 0.55, 0.52], [0.45, 0.05, 0.6]])
    return Atoms("CONH", scaled_positions=scaled, cell=cell, pbc=True)


def far_apart():
    """Return two molecules without an edge between them."""
    atoms = molecule("CH3OH") + molecule("H2O")
    atoms.positions[6:] += [3.5, 1.0, 0.5]
    return atoms


@pytest.mark.parametrize("cutoff", [np.inf, 6.0])
def test_molecule(calculators, cutoff):
    atoms = far_apart()
    atoms.calc = calculators[cutoff]
    assert atoms.get_potential_energy() == pytest.approx(by_hand(atoms, cutoff), abs=1e-10)
    assert atoms.get_potential_energies().sum() == pytest.approx(
        atoms.get_potential_energy(), abs=1e-10
    )
    numerical = calculate_numerical_forces(atoms, 1e-4)
    assert np.abs(numerical).max() > 0.1
    np.testing.assert_allclose(atoms.get_forces(), numerical, atol=1e-6)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True)])
def test_periodic(calculators, pbc):
    atoms = crystal()
    atoms.pbc = pbc
    atoms.calc = calculators[6.0]
    assert atoms.get_potential_energy() == pytest.approx(by_hand(atoms, 6.0), abs=1e-10)
    np.testing.assert_allclose(
        atoms.get_forces(), calculate_numerical_forces(atoms, 1e-4), atol=1e-6
    )
    if all(pbc):
        numerical = calculate_numerical_stress(atoms, 1e-4)
        assert np.abs(numerical).max() > 1e-3
        np.testing.assert_allclose(atoms.get_stress(), numerical, rtol=1e-5, atol=1e-7)


def test_a_cell_and_its_supercell(calculators):
    atoms = crystal()
    calculator = calculators[6.0]
    energy = calculator.get_property("energy", atoms)
    assert calculator.get_property("energy", atoms.repeat((2, 1, 1))) == pytest.approx(
        2 * energy, abs=1e-9
    )


def test_all_pairs_of_a_periodic_structure_are_rejected(calculators):
    with pytest.raises(ValueError, match="infinitely many pairs"):
        calculators[np.inf].get_property("energy", crystal())


def test_a_periodic_direction_without_a_lattice_vector_is_rejected(calculators):
    atoms = Atoms("HO", [[0, 0, 0], [0, 0, 1]], cell=[5, 5, 0], pbc=True)
    atoms.calc = calculators[6.0]
    with pytest.raises(ValueError, match="a periodic direction has no lattice vector"):
        atoms.get_potential_energy()


def test_a_slab_that_drifted_away_keeps_its_digits():
    atoms = Atoms(
        "HOCH",
        [[0, 0, 0], [0, 0.3, 1], [1.2, 2, 0.1], [3, 3, 1.9]],
        cell=[5, 5, 0],
        pbc=[True, True, False],
    )
    atoms.calc = MLIPCalculator(potential(6.0))
    forces = atoms.get_forces()
    atoms.positions += [0, 0, 1e5]
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-5 * np.abs(forces).max())


def test_charges_and_dipole(calculators):
    atoms = far_apart()
    atoms.calc = calculators[np.inf]
    charges = CHARGES[atoms.numbers]
    np.testing.assert_allclose(atoms.get_charges(), charges, atol=1e-12)
    centered = atoms.positions - atoms.positions.mean(axis=0)
    np.testing.assert_allclose(atoms.get_dipole_moment(), charges @ centered, atol=1e-12)
    atoms.get_charges()[:] = 7
    np.testing.assert_allclose(atoms.get_charges(), charges)
    moved = atoms.copy()
    moved.positions += 100.0
    np.testing.assert_allclose(
        calculators[np.inf].get_property("dipole", moved), charges @ centered, atol=1e-10
    )


def test_a_periodic_structure_has_charges_but_no_dipole(calculators):
    atoms = crystal()
    atoms.calc = calculators[6.0]
    np.testing.assert_allclose(atoms.get_charges(), CHARGES[atoms.numbers])
    with pytest.raises(PropertyNotImplementedError, match="dipole moment"):
        atoms.get_dipole_moment()


def test_only_a_force_field_with_charges_offers_them(calculators, make_potential):
    assert {"charges", "dipole"} <= set(calculators[6.0].implemented_properties)
    without = MLIPCalculator(make_potential("tiny"))
    assert without.implemented_properties == [
        "energy",
        "free_energy",
        "forces",
        "energies",
        "stress",
    ]
    with pytest.raises(PropertyNotImplementedError):
        without.get_property("charges", molecule("H2O"))


def test_unpaired_electrons(calculators):
    atoms = molecule("O2")
    atoms.set_initial_magnetic_moments(None)
    atoms.calc = calculators[np.inf]
    energy = atoms.get_potential_energy()
    atoms.info["num_unpaired_electrons"] = 2
    assert "num_unpaired_electrons" in atoms.calc.check_state(atoms)
    with pytest.warns(UserWarning, match=r"atoms.info\['num_unpaired_electrons'\] is 2"):
        assert atoms.get_potential_energy() == pytest.approx(energy + 2 * SPIN_ENERGY, abs=1e-12)
    assert energy == pytest.approx(by_hand(molecule("O2"), np.inf))


@pytest.mark.parametrize("key", ["charge", "num_unpaired_electrons"])
@pytest.mark.parametrize("value", [None, "one", np.array([1.0, 2.0]), np.nan])
def test_a_charge_that_is_not_a_number_is_rejected(calculators, key, value):
    atoms = molecule("H2O")
    atoms.calc = calculators[np.inf]
    atoms.get_potential_energy()
    atoms.info[key] = value
    with pytest.raises(ValueError, match=f"'{key}'.*must be a finite number, received"):
        atoms.get_potential_energy()


def test_unpaired_electrons_of_the_training_data_give_no_warning(calculators, recwarn):
    known = dataclasses.replace(potential(), metadata={"statistics": {"spins": [0.0, 2.0]}})
    atoms = molecule("O2")
    atoms.info["num_unpaired_electrons"] = 2
    MLIPCalculator(known).get_property("energy", atoms)
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.parametrize("cutoff", [np.inf, 6.0])
def test_compiles_once_while_the_number_of_pairs_changes(cutoff):
    calculator, rng = MLIPCalculator(potential(cutoff)), np.random.default_rng(0)
    start = rng.uniform(0, 9.0, (30, 3))
    pairs = set()
    for _ in range(50):
        atoms = Atoms("H30", positions=start + rng.normal(0, 0.1, start.shape))
        pairs.add(int((atoms.get_all_distances() < cutoff).sum()))
        calculator.get_property("forces", atoms)
    assert len(pairs) > 5 or cutoff == np.inf
    assert calculator.num_compiles == 1


def test_few_compiles_for_molecules_of_changing_size():
    calculator, rng = MLIPCalculator(potential()), np.random.default_rng(0)
    for n in rng.integers(8, 40, 30):
        calculator.get_property("energy", Atoms(f"H{n}", positions=rng.uniform(0, 8.0, (n, 3))))
    assert calculator.num_compiles <= 6


@pytest.mark.parametrize("cutoff", [np.inf, 6.0])
def test_a_batch_equals_its_structures(calculators, cutoff):
    """Terms and predictions of a padded batch equal those of its structures.

    With a finite cutoff some structures are periodic.
    """
    structures = [far_apart(), molecule("H2O"), Atoms("O")] + (
        [crystal()] if np.isfinite(cutoff) else []
    )
    columns = Columns.from_structures([from_ase(atoms) for atoms in structures])
    budget = choose_budget(graph_sizes(columns, 2.0, cutoff), len(structures) + 1)
    batch = build_batch(columns, budget, 2.0, dtype=np.float64, long_range_cutoff=cutoff)
    batch.globals["spin"] = np.zeros(budget.n_graph)
    with jax.enable_x64(True):
        p = potential(cutoff)
        out = jax.device_get(
            jax.jit(lambda params, g: evaluate(p.model, params, g, p.energy_scale))(p.params, batch)
        )
    for g, atoms in enumerate(structures):
        rows = slice(columns.offsets[g], columns.offsets[g + 1])
        reference = np.sum(atoms.numbers)
        assert out.energy[g] + reference == pytest.approx(
            calculators[cutoff].get_property("energy", atoms), abs=1e-9
        )
        np.testing.assert_allclose(
            out.forces[rows], calculators[cutoff].get_property("forces", atoms), atol=1e-9
        )
        np.testing.assert_allclose(out.properties["partial_charges"][rows], CHARGES[atoms.numbers])
    assert not out.energies[columns.offsets[-1] :].any() and not out.energy[len(structures) :].any()
    assert not out.properties["partial_charges"][columns.offsets[-1] :].any()

"""Tests for energies of many structures: equal to the calculator's, in order, for any batches."""

import jax
import numpy as np
import pytest
from ase import Atoms

from mlip_jax.datasets.columns import Columns
from mlip_jax.models import create
from mlip_jax.potential import Potential, example_graph
from mlip_jax.simulation import energies as module
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.energies import energies, energies_and_forces
from mlip_jax.structure import Structure
from tests.models.parameters import quick_parameters


@pytest.fixture(scope="module")
def potential():
    model = create("schnet", num_features=8, num_layers=1, cutoff=4.0, num_radial=6)
    reference = np.zeros(119)
    reference[[1, 6, 8]] = -13.6, -1030.0, -2040.0
    return Potential(
        model=model,
        params=quick_parameters(model, example_graph()),
        cutoff=4.0,
        reference_energies=reference,
        energy_scale=1.3,
        elements=(1, 6, 8),
        metadata={},
    )


def structures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Structure(
            numbers=rng.choice([1, 6, 8], n), positions=rng.uniform(0, 2 * n ** (1 / 3), (n, 3))
        )
        for n in rng.integers(1, 24, count)
    ]


def by_calculator(potential, molecules, some, name):
    """Return a property of the molecules `some` by the calculator, in order.

    The largest is the first one, whose compiled program also holds smaller ones.
    """
    calculator, results = MLIPCalculator(potential), {}
    for s in sorted(some, key=lambda s: -len(molecules[s])):
        atoms = Atoms(molecules[s].numbers, molecules[s].positions)
        results[s] = calculator.get_property(name, atoms)
    return [results[s] for s in some]


def test_energies_equal_those_of_the_calculator(potential):
    molecules = structures(30)
    some = np.random.default_rng(1).permutation(30)[:17]
    totals = energies(potential, Columns.from_structures(molecules), some, batch_size=4)
    assert totals.shape == (17,) and totals.dtype == np.float64
    expected = by_calculator(potential, molecules, some, "energy")
    np.testing.assert_allclose(totals, expected, rtol=0, atol=2e-4)


def test_parameters_are_sent_to_the_device_once(potential, monkeypatch):
    calls = []

    def without_model(model, scale, params, graph):
        calls.append(jax.tree.leaves(params))
        return np.zeros(len(graph.n_node))

    monkeypatch.setattr(module, "batch_energies", without_model)
    energies(potential, Columns.from_structures(structures(30)), np.arange(30), batch_size=4)
    first, *others = calls
    assert len(others) > 1 and all(isinstance(x, jax.Array) for x in first)
    assert all(a is b for leaves in others for a, b in zip(leaves, first, strict=True))


def test_energies_and_forces(potential):
    molecules = structures(30)
    columns = Columns.from_structures(molecules)
    some = np.random.default_rng(1).permutation(30)[:9]
    energy, forces = energies_and_forces(potential, columns, some, batch_size=4)
    np.testing.assert_allclose(energy, energies(potential, columns, some), atol=2e-4)
    expected = by_calculator(potential, molecules, some, "forces")
    np.testing.assert_allclose(forces, np.concatenate(expected), atol=1e-4 * np.abs(forces).max())
    assert energies_and_forces(potential, columns, some[:0])[1].shape == (0, 3)


def test_several_pieces(potential, monkeypatch):
    """A later piece contains a larger structure than all before it."""
    from mlip_jax.simulation import energies as module

    molecules = sorted(structures(25, 2), key=len)
    columns = Columns.from_structures(molecules)
    expected = energies(potential, columns, np.arange(25))
    monkeypatch.setattr(module, "_PIECE_SIZE", 10)
    np.testing.assert_allclose(
        energies(potential, columns, np.arange(25), batch_size=3), expected, atol=2e-4
    )
    assert energies(potential, columns, np.zeros(0, int)).shape == (0,)


def test_unknown_elements_are_an_error(potential):
    columns = Columns.from_structures(
        [Structure(numbers=np.array([7]), positions=np.zeros((1, 3)))]
    )
    with pytest.raises(ValueError, match="was not trained on N"):
        energies(potential, columns, np.arange(1))

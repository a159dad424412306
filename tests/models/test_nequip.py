"""Tests for NequIP and SevenNet: agreement with the reference implementations, mirror images.

Golden values are outputs of nequip 0.19.1 and sevenn 0.13.0 in float64 for random weights; the
fixtures hold weights, settings, structures, energies, forces and stress. They reach energies
through odd scalars, per-type cutoffs and neighbors, both self-connections, and harmonics of other
degrees than the features.
"""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.importers import nequip, sevennet
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.structure import Structure

DATA = Path(__file__).parents[1] / "data"
FIXTURES = (
    "nequip_parity",
    "nequip_odd",
    "nequip_natural",
    "nequip_even",
    "sevennet_nequip",
    "sevennet_linear",
    "sevennet_mixed",
)
pytestmark = pytest.mark.usefixtures("double_precision")


def batch_of(structures, cutoff, dtype):
    columns = Columns.from_structures(structures)
    sizes = graph_sizes(columns, cutoff)
    budget = PaddingBudget(
        int(sizes.n_node.sum()) + 3, int(sizes.n_edge.sum()) + 6, len(structures) + 2
    )
    return build_batch(columns, budget, cutoff, dtype=dtype)


def predict(potential, structures, dtype, **what):
    """Total energies (S,), forces and stress of one batch."""
    batch = batch_of(structures, potential.cutoff, dtype)
    params = jax.tree.map(lambda p: np.asarray(p, dtype), potential.params)
    result = jax.jit(lambda p, g: evaluate(potential.model, p, g, potential.energy_scale, **what))(
        params, batch
    )
    references = [potential.reference_energies[s.numbers].sum() for s in structures]
    atoms = sum(len(s) for s in structures)
    stress = None if result.stress is None else np.asarray(result.stress)[0]
    return (
        np.asarray(result.energy)[: len(structures)] + references,
        np.asarray(result.forces)[:atoms],
        stress,
    )


def read(name):
    """Force field and {group: structures}, and the arrays of a fixture."""
    with np.load(DATA / f"parity_{name}.npz") as data:
        arrays = dict(data)
    settings = ast.literal_eval(str(arrays["config"]))
    state = {
        key.removeprefix("weights/"): array
        for key, array in arrays.items()
        if key.startswith("weights/")
    }
    potential = (nequip if name.startswith("nequip") else sevennet).potential(state, settings)
    return potential, arrays


def molecules(arrays):
    return [
        Structure(arrays[f"structures/{k}/numbers"], arrays[f"structures/{k}/positions"])
        for k in range(5)
    ]


def crystal(arrays, k=0):
    name = f"periodic/{k}/"
    return Structure(
        arrays[f"{name}numbers"],
        arrays[f"{name}positions"],
        cell=arrays[f"{name}cell"],
        pbc=np.ones(3, bool),
    )


def assert_agree(found, expected, relative):
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


def of_molecules(arrays, what):
    return np.concatenate(
        [
            arrays[f"structures/{k}/{what}"].reshape(-1, 3 if what == "forces" else 1)
            for k in range(5)
        ]
    )


@pytest.mark.parametrize("name", FIXTURES)
def test_energies_agree(name):
    """Catches any wrong order of weights, normalization, constant or sign: all of these are equivariant.

    Features that are all even know the handedness of a molecule, as published; others do not.
    """
    potential, arrays = read(name)
    chiral = max(molecules(arrays), key=len)
    mirrored = Structure(chiral.numbers, chiral.positions * [1.0, -1.0, 1.0])
    energies, _, _ = predict(
        potential, [*molecules(arrays), chiral, mirrored], np.float64, with_forces=False
    )
    assert_agree(energies[:5], of_molecules(arrays, "energy")[:, 0], 1e-12)
    difference = abs(energies[5] - energies[6]) / abs(energies[5])
    assert difference > 1e-9 if potential.model.parity == "even" else difference < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURES)
def test_forces_and_stress_agree(name):
    potential, arrays = read(name)
    energies, forces, stress = predict(
        potential, [crystal(arrays), *molecules(arrays)], np.float64, with_stress=True
    )
    assert_agree(energies[0], arrays["periodic/0/energy"][0], 1e-9)
    assert_agree(forces[: len(crystal(arrays))], arrays["periodic/0/forces"], 1e-9)
    assert_agree(forces[len(crystal(arrays)) :], of_molecules(arrays, "forces"), 1e-9)
    assert_agree(stress, arrays["periodic/0/stress"], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURES)
def test_single_precision(name):
    potential, arrays = read(name)
    with jax.enable_x64(False):
        energies, forces, _ = predict(potential, molecules(arrays), np.float32)
    assert_agree(energies, of_molecules(arrays, "energy")[:, 0], 1e-5)
    assert_agree(forces, of_molecules(arrays, "forces"), 1e-5)


def test_options_that_do_not_fit():
    graph = example_graph(np.float64)
    for name, options, message in (
        ("nequip", {"parity": "odd"}, "parity must be one of"),
        ("nequip", {"num_features": (8, 4, 2)}, "one per degree from 0 to 1"),
        ("nequip", {"radial_roots": (1.0, 2.0)}, "must have 8 numbers"),
        (
            "nequip",
            {"pair_cutoffs": (4.0,)},
            "pair_cutoffs must have a number for each pair of elements",
        ),
        (
            "nequip",
            {"avg_num_neighbors": (4.0, 5.0)},
            "avg_num_neighbors must be a number or one for each",
        ),
        ("sevennet", {"parity": "natural"}, "parity must be one of"),
        ("sevennet", {"self_connection": ("linear",)}, "one value or one per layer"),
        ("sevennet", {"self_connection": "residual"}, "self_connection must be one of"),
        ("sevennet", {"radial_centers": (1.0,)}, "must have 8 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(models.create(name, **options).init, jax.random.key(0), graph)

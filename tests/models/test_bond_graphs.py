"""Tests for every model of bonds, in float64. Each file of the folder is tested."""

import jax
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.smiles.bond_graph import bond_graph
from mlip_jax.graphs.bonds import bond_sizes, build_bond_batch, is_in_order
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models.bond_graphs import names
from mlip_jax.models.layers.batch_norm import STATISTICS
from mlip_jax.models.layers.readouts import with_heads
from mlip_jax.potential import example_graph
from mlip_jax.structure import Structure
from tests.models.parameters import quick_parameters

SMILES = ["CCO", "C", "c1ccccc1C(=O)N", "[Na+].[Cl-]", "OCC"]
SMALL = {
    "gin_virtual": {"num_features": 8, "num_layers": 2},
    "unimol_plus": {
        "num_features": 8,
        "pair_features": 4,
        "pair_width": 2,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_width": 8,
        "num_radial": 4,
        "num_tokens": 12,
    },
}


def structure(smiles):
    """Return heavy atoms at random positions; those of equal molecules are equal."""
    numbers = bond_graph(smiles).atoms[:, 0].astype(int) + 1
    positions = np.random.default_rng(len(smiles)).normal(0, 1, (len(numbers), 3))
    if smiles == SMILES[-1]:  # the first molecule, in the opposite order
        positions = positions[::-1]
    return Structure(numbers, positions, smiles=smiles)


def batch(smiles, budget=None, dtype=np.float64):
    columns = Columns.from_structures(map(structure, smiles))
    sizes = bond_sizes(smiles)
    tight = PaddingBudget(int(sizes.n_node.sum()) + 1, int(sizes.n_edge.sum()), len(smiles) + 1)
    return build_bond_batch(columns, budget or tight, dtype=dtype)


@pytest.fixture(scope="module", params=names())
def case(request):
    """A model with a head, and its parameters, also of the last layer and the statistics."""
    with jax.enable_x64(True):
        backbone = models.create(request.param, **SMALL[request.param])
        model = with_heads(backbone, {"gap": {"pooling": "sum"}})
        params = quick_parameters(model, example_graph(np.float64))
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: np.asarray(x) + rng.uniform(0.1, 0.3, x.shape), params)
        return model, params, jax.jit(model.apply)


@pytest.mark.usefixtures("double_precision")
def test_neighbors_in_the_batch_padding_and_the_order_of_atoms_do_not_matter(case):
    """The first and the last molecule are the same."""
    model, params, apply = case
    assert model.cutoff == 0 and models.reads_bonds(model)
    together, padded = (
        np.asarray(apply(params, graph)["gap"])
        for graph in (batch(SMILES), batch(SMILES[:3], PaddingBudget(40, 60, 9)))
    )
    np.testing.assert_allclose(padded[:3], together[:3], rtol=1e-12)
    assert together[0] == pytest.approx(together[4], rel=1e-12) and np.ptp(together[:4]) > 1e-3
    assert not padded[3:].any() and np.isfinite(together).all()


@pytest.mark.usefixtures("double_precision")
def test_padding_is_not_in_the_statistics_of_a_training_batch(case):
    """Detects that atoms of padding, which have the features of hydrogen, count in training."""
    model, params, _ = case
    if STATISTICS not in params:
        pytest.skip("this model has no statistics")

    @jax.jit
    def train(params, graph):
        return model.apply(params, graph, mutable=[STATISTICS])

    tight, loose = (train(params, batch(SMILES[:3], b)) for b in (None, PaddingBudget(40, 60, 9)))
    np.testing.assert_allclose(loose[0]["gap"][:3], tight[0]["gap"][:3], rtol=1e-10)
    for a, b in zip(jax.tree.leaves(tight[1]), jax.tree.leaves(loose[1])):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double_precision")
def test_displacements_of_a_model_that_refines_positions(case):
    """Detects displacements that include the center of the input, or those of padding."""
    model, params, _ = case
    if not models.reads_positions(model):
        pytest.skip("this model does not read positions")
    graph = batch(SMILES[:3], PaddingBudget(40, 60, 9))
    moved = graph._replace(nodes={**graph.nodes, "positions": graph.nodes["positions"] + 3.0})
    refine = jax.jit(lambda p, g: model.apply(p, g, method="with_refinement"))
    first, second = (np.asarray(refine(params, g)["displacement"]) for g in (graph, moved))
    np.testing.assert_allclose(first, second, atol=1e-9)
    count = int(graph.n_node[:3].sum())
    assert np.abs(first[:count]).max() > 1e-3 and not first[count:].any()


def test_labels_of_atoms_are_those_of_the_heavy_atoms():
    """Detects labels of hydrogens at the nodes of a graph, and bonds between distant atoms."""
    numbers, values = np.array([6, 8, 1, 1, 1, 1]), np.arange(6.0)
    positions = np.array([[0, 0, 0], [1.4, 0, 0], *[[9, 9, k] for k in range(4)]], float)
    molecule = Structure(numbers, positions, smiles="CO", atom_properties={"label": values})
    columns = Columns.from_structures([molecule])
    graph = build_bond_batch(columns, PaddingBudget(4, 4, 2), properties=("label",))
    assert graph.nodes["properties"]["label"].tolist() == [0, 1, 0, 0]
    assert is_in_order(columns, 0, bond_graph("CO"))
    assert not is_in_order(columns, 0, bond_graph("OC"))
    columns.positions[1, 0] = 2.5
    assert not is_in_order(columns, 0, bond_graph("CO"))


def test_unreadable_smiles_are_named():
    assert bond_graph("C1CC") is None and bond_graph("") is None
    with pytest.raises(ValueError, match="no molecular graph for the SMILES 'C1CC'"):
        bond_sizes(["CC", "C1CC"])


@pytest.mark.parametrize("name", names())
def test_a_force_field_of_bonds_is_an_error(name):
    with pytest.raises(ValueError, match="reads the bonds of a SMILES"):
        models.check_positions(name)

"""Loss sums: what is unknown or padding counts nowhere, and sums of parts are the sums of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batching import Budget, build_batch
from mlip_jax.potential import Evaluation
from mlip_jax.structure import Structure
from mlip_jax.training.losses import PENALTIES, Sums, beta_schedule, combine, sums


def structure(n, seed, energy=None, forces=True):
    rng = np.random.default_rng(seed)
    return Structure(np.full(n, 6), rng.uniform(0, 3, (n, 3)), energy=rng.normal() if energy is None else energy,
                     forces=rng.normal(size=(n, 3)) if forces is True else forces)


def batch_of(structures, spare=0):
    """One shape for all, unless `spare` says otherwise: eager operations are compiled by shape."""
    columns = Columns.from_structures(structures)
    budget = Budget(16 + spare, 200, 6 + spare)
    return jax.tree.map(jnp.asarray, build_batch(columns, budget, 2.0))


def evaluation_of(graph, seed=0, padding=0.0):
    """Predictions at random; `padding` stands where padding is."""
    rng = np.random.default_rng(seed)
    nodes, graphs = graph.nodes["forces"].shape[0], graph.n_node.shape[0]
    forces, energy = rng.normal(size=(nodes, 3)), rng.normal(size=graphs)
    real_graphs = int(np.flatnonzero(np.asarray(graph.globals["energy"]) != 0)[-1]) + 1
    real_nodes = int(np.asarray(graph.n_node)[:real_graphs].sum())
    forces[real_nodes:], energy[real_graphs:] = padding, padding
    return Evaluation(jnp.asarray(energy, jnp.float32), jnp.asarray(forces, jnp.float32), jnp.zeros(nodes))


def test_sums_of_known_numbers():
    s = Structure(np.array([6, 6]), np.eye(2, 3), energy=1.0, forces=np.zeros((2, 3)))
    graph = batch_of([s])
    nodes = graph.nodes["forces"].shape[0]
    evaluation = Evaluation(jnp.zeros(6).at[0].set(4.0), jnp.zeros((nodes, 3)).at[1, 2].set(2.0), jnp.zeros(nodes))
    found = sums(evaluation, graph)
    assert found == Sums(energy_loss=2.25, force_loss=4.0, energy_abs=1.5, force_abs=2.0, energies=1.0, forces=6.0)
    assert sums(evaluation, graph, energy_per_atom=False).energy_loss == 9.0
    assert sums(evaluation, graph, energy_per_atom=False).energy_abs == 1.5
    assert combine(found, found, 0.75) == pytest.approx(0.25 * 2.25 + 0.75 * 4.0 / 6)


@pytest.mark.parametrize("penalty", sorted(PENALTIES))
def test_missing_labels_count_nowhere_and_keep_gradients_finite(penalty):
    some = np.random.default_rng(1).normal(size=(3, 3))
    some[1, 2] = np.nan
    graph = batch_of([structure(2, 0), structure(3, 1, energy=float("nan"), forces=some),
                      structure(4, 2, forces=None)])
    evaluation = evaluation_of(graph)

    def loss(energy, forces):
        part = sums(Evaluation(energy, forces, evaluation.energies), graph, penalty=penalty)
        return combine(part, part, 0.9), part

    (value, part), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(evaluation.energy, evaluation.forces)
    assert np.isfinite(value) and all(np.isfinite(x) for x in part)
    assert part.energies == 2 and part.forces == 6 + 8
    by_energy, by_forces = gradients
    assert np.isfinite(by_energy).all() and np.isfinite(by_forces).all()
    assert by_energy[1] == 0 and by_forces[3, 2] == 0 and not by_forces[5:].any()
    assert by_energy[0] != 0 and by_forces[:2].all()


def test_no_label_at_all_is_zero_loss():
    graph = batch_of([structure(2, 0, energy=float("nan"), forces=None)])
    evaluation = Evaluation(jnp.ones(6), jnp.ones((16, 3)), jnp.zeros(16))
    part = sums(evaluation, graph)
    assert part == Sums(0, 0, 0, 0, 0, 0) and combine(part, part, 0.5) == 0


@pytest.mark.parametrize("padding", [0.0, 1e6, np.nan])
def test_padding_counts_nowhere(padding):
    structures = [structure(3, 0), structure(2, 1)]
    graph, wide = batch_of(structures, 0), batch_of(structures, 9)
    expected = sums(evaluation_of(graph), graph)
    narrow = evaluation_of(graph)
    evaluation = Evaluation(
        jnp.full(wide.n_node.shape, padding, jnp.float32).at[:2].set(narrow.energy[:2]),
        jnp.full(wide.nodes["forces"].shape, padding, jnp.float32).at[:5].set(narrow.forces[:5]), narrow.energies)
    np.testing.assert_allclose(sums(evaluation, wide), expected, rtol=1e-6)


@pytest.mark.parametrize("penalty", sorted(PENALTIES))
def test_two_half_batches_are_the_whole(penalty):
    """Also where one half holds nothing that is known: sums over counts, no mean of means."""
    structures = [structure(3, 0), structure(5, 1), structure(2, 2, energy=float("nan")), structure(4, 3, forces=None)]
    rng = np.random.default_rng(0)
    energy, forces = rng.normal(size=4), rng.normal(size=(14, 3))

    def part(chosen, atoms):
        graph = batch_of([structures[c] for c in chosen])
        nodes = graph.nodes["forces"].shape[0]
        evaluation = Evaluation(jnp.zeros(graph.n_node.shape).at[:len(chosen)].set(energy[list(chosen)]),
                                jnp.zeros((nodes, 3)).at[:len(atoms)].set(forces[atoms]), jnp.zeros(nodes))
        return sums(evaluation, graph, penalty=penalty)

    whole = part((0, 1, 2, 3), np.arange(14))
    for halves in ((((0, 1), np.arange(8)), ((2, 3), np.arange(8, 14))),
                   (((0,), np.arange(3)), ((1, 2, 3), np.arange(3, 14)))):
        parts = [part(*half) for half in halves]
        total = jax.tree.map(lambda a, b: a + b, *parts)
        np.testing.assert_allclose(total, whole, rtol=1e-5)
        assert sum(combine(p, total, 0.9) for p in parts) == pytest.approx(float(combine(whole, whole, 0.9)), rel=1e-5)


def test_penalties():
    errors = jnp.array([-2.0, -0.01, 0.0, 0.03, 1.0])
    np.testing.assert_allclose(PENALTIES["mse"](errors, 0.05), errors ** 2)
    np.testing.assert_allclose(PENALTIES["mae"](errors, 0.05), abs(errors))
    huber = PENALTIES["huber"](errors, 0.05)
    np.testing.assert_allclose(huber[jnp.array([1, 2, 3])], 0.5 * errors[jnp.array([1, 2, 3])] ** 2, rtol=1e-6)
    np.testing.assert_allclose(huber[jnp.array([0, 4])], [0.05 * 1.975, 0.05 * 0.975], rtol=1e-6)
    below, above = (float(PENALTIES["huber"](jnp.float32(0.05 + d), 0.05)) for d in (-1e-5, 1e-5))
    assert below == pytest.approx(above, rel=1e-3)


def test_unknown_penalty_names_the_nearest():
    graph = batch_of([structure(2, 0)])
    with pytest.raises(ValueError, match="unknown loss.penalty 'hubert'. Did you mean 'huber'"):
        sums(evaluation_of(graph), graph, penalty="hubert")


def test_beta_is_constant_then_geometric():
    beta = beta_schedule(0.99, 0.5, 0.5, 1000)
    assert beta(0) == beta(250) == beta(500) == pytest.approx(0.99)
    assert float(beta(1000)) == pytest.approx(0.5, abs=1e-6)
    assert 1 - float(beta(750)) == pytest.approx(np.sqrt(0.01 * 0.5), rel=1e-4)
    assert float(beta(5000)) == pytest.approx(0.5, abs=1e-6)
    values = [float(beta(s)) for s in range(500, 1001, 50)]
    assert all(a > b for a, b in zip(values, values[1:]))


@pytest.mark.parametrize("ends", [(0.9, 0.9), (1.0, 1.0)])
def test_beta_without_a_change(ends):
    beta = beta_schedule(*ends, 0.5, 100)
    assert all(float(beta(s)) == pytest.approx(ends[0]) for s in (0, 50, 99, 100))


@pytest.mark.parametrize("ends", [(1.0, 0.5), (0.9, 1.0)])
def test_beta_reaches_its_end_from_or_to_one(ends):
    """A weight of exactly one at an end is allowed, and the other end must not be ignored in silence."""
    beta = beta_schedule(*ends, 0.5, 100)
    assert float(beta(0)) == pytest.approx(ends[0], abs=1e-3)
    assert float(beta(100)) == pytest.approx(ends[1], abs=1e-3)


@pytest.mark.parametrize("ends", [(-0.1, 0.5), (0.5, 1.1)])
def test_beta_outside_of_its_range(ends):
    with pytest.raises(ValueError, match="between 0 and 1"):
        beta_schedule(*ends, 0.5, 100)


def test_beta_can_be_traced():
    beta = beta_schedule(0.99, 0.9, 0.8, 100)
    assert float(jax.jit(beta)(jnp.int32(90))) == pytest.approx(float(beta(90)), rel=1e-6)

"""Tests for loss sums: unknown labels and padding are ignored, and sums of parts add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import Evaluation
from mlip_jax.structure import Structure
from mlip_jax.training.losses import (
    BETA_SCHEDULES,
    FORCE_PENALTIES,
    PENALTIES,
    LossSums,
    averages,
    beta_schedule,
    check_penalties,
    combine,
    sums,
)

# of energies, of forces
PAIRS = [
    *((name, None) for name in PENALTIES),
    ("mae", "norm"),
    ("huber", "rmse"),
    ("rmse", "mse"),
    ("mse", "relative"),
]
FLOOR = 0.3  # of "relative", eV/Å
compiled = jax.jit(
    sums,
    static_argnames=("penalty", "force_penalty", "energy_per_atom", "huber_delta", "force_floor"),
)


def structure(n, seed, energy=None, forces=True):
    rng = np.random.default_rng(seed)
    return Structure(
        np.full(n, 6),
        rng.uniform(0, 3, (n, 3)),
        energy=rng.normal() if energy is None else energy,
        forces=rng.normal(size=(n, 3)) if forces is True else forces,
    )


def batch_of(structures, spare=0):
    """Return a batch, by default of one shape, because eager operations are compiled per shape."""
    columns = Columns.from_structures(structures)
    budget = PaddingBudget(16 + spare, 200, 6 + spare)
    return jax.tree.map(jnp.asarray, build_batch(columns, budget, 2.0))


def evaluation_of(graph, seed=0, padding=0.0):
    """Return random predictions, with the value `padding` for padding."""
    rng = np.random.default_rng(seed)
    nodes, graphs = graph.nodes["forces"].shape[0], graph.n_node.shape[0]
    forces, energy = rng.normal(size=(nodes, 3)), rng.normal(size=graphs)
    real_graphs = int(np.flatnonzero(np.asarray(graph.globals["energy"]) != 0)[-1]) + 1
    real_nodes = int(np.asarray(graph.n_node)[:real_graphs].sum())
    forces[real_nodes:], energy[real_graphs:] = padding, padding
    return Evaluation(
        jnp.asarray(energy, jnp.float32), jnp.asarray(forces, jnp.float32), jnp.zeros(nodes)
    )


def test_sums_of_known_numbers():
    s = Structure(np.array([6, 6]), np.eye(2, 3), energy=1.0, forces=np.zeros((2, 3)))
    graph = batch_of([s])
    nodes = graph.nodes["forces"].shape[0]
    evaluation = Evaluation(
        jnp.zeros(6).at[0].set(4.0), jnp.zeros((nodes, 3)).at[1, 2].set(2.0), jnp.zeros(nodes)
    )
    found = sums(evaluation, graph)
    expected = LossSums(
        energy_loss=2.25,
        force_loss=4.0,
        energy_abs=1.5,
        force_abs=2.0,
        energies=1.0,
        forces=6.0,
        energy_total_abs=3.0,
        force_terms=6.0,
    )
    assert found == expected
    for name, loss, terms in (("norm", 2.0, 2.0), ("rmse", (4 / 6) ** 0.5, 1.0), ("mae", 2.0, 6.0)):
        other = sums(evaluation, graph, force_penalty=name)
        assert other.force_loss == pytest.approx(loss) and other.force_terms == terms
        assert other == expected._replace(
            force_loss=other.force_loss, force_terms=other.force_terms
        )
        assert combine(other, other, 0.75) == pytest.approx(0.25 * 2.25 + 0.75 * loss / terms)
    assert sums(evaluation, graph, penalty="rmse").energy_loss == 1.5
    assert sums(evaluation, graph, energy_per_atom=False).energy_loss == 9.0
    assert sums(evaluation, graph, energy_per_atom=False).energy_abs == 1.5
    assert combine(found, found, 0.75) == pytest.approx(0.25 * 2.25 + 0.75 * 4.0 / 6)


@pytest.mark.parametrize(("penalty", "force_penalty"), PAIRS)
def test_missing_labels_are_ignored_and_keep_gradients_finite(penalty, force_penalty):
    some = np.random.default_rng(1).normal(size=(3, 3))
    some[1, 2] = np.nan
    graph = batch_of(
        [
            structure(2, 0),
            structure(3, 1, energy=float("nan"), forces=some),
            structure(4, 2, forces=None),
        ]
    )
    evaluation = evaluation_of(graph)

    @jax.jit
    def loss(energy, forces):
        part = sums(
            Evaluation(energy, forces, evaluation.energies),
            graph,
            penalty=penalty,
            force_penalty=force_penalty,
        )
        return combine(part, part, 0.9), part

    (value, part), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        evaluation.energy, evaluation.forces
    )
    assert np.isfinite(value) and all(np.isfinite(x) for x in part)
    assert part.energies == 2 and part.forces == 6 + 8
    # of 2 + 3 atoms in 2 structures; an atom with an unknown component has no error vector
    assert part.force_terms == {"norm": 4, "relative": 4, "rmse": 2}.get(
        force_penalty or penalty, 6 + 8
    )
    by_energy, by_forces = gradients
    assert np.isfinite(by_energy).all() and np.isfinite(by_forces).all()
    assert by_energy[1] == 0 and by_forces[3, 2] == 0 and not by_forces[5:].any()
    assert by_energy[0] != 0 and by_forces[:2].all()
    assert by_forces[3, :2].all() == (force_penalty not in ("norm", "relative"))


def test_the_loss_without_labels_is_zero():
    graph = batch_of([structure(2, 0, energy=float("nan"), forces=None)])
    evaluation = Evaluation(jnp.ones(6), jnp.ones((16, 3)), jnp.zeros(16))
    for penalty in FORCE_PENALTIES:
        part = compiled(evaluation, graph, penalty="mse", force_penalty=penalty)
        assert part == LossSums(*[0] * len(LossSums._fields)) and combine(part, part, 0.5) == 0


@pytest.mark.parametrize("padding", [0.0, 1e6, np.nan])
@pytest.mark.parametrize("force_penalty", ["mse", "norm", "rmse"])
def test_padding_is_ignored(padding, force_penalty):
    structures = [structure(3, 0), structure(2, 1)]
    graph, wide = batch_of(structures, 0), batch_of(structures, 9)
    expected = compiled(evaluation_of(graph), graph, force_penalty=force_penalty)
    narrow = evaluation_of(graph)
    evaluation = Evaluation(
        jnp.full(wide.n_node.shape, padding, jnp.float32).at[:2].set(narrow.energy[:2]),
        jnp.full(wide.nodes["forces"].shape, padding, jnp.float32).at[:5].set(narrow.forces[:5]),
        narrow.energies,
    )
    np.testing.assert_allclose(
        compiled(evaluation, wide, force_penalty=force_penalty), expected, rtol=1e-6
    )


def reference_sums(structures, energies, forces, penalty, force_penalty, per_atom, delta):
    """Compute the sums in a loop over structures and numbers."""
    total = dict.fromkeys(LossSums._fields, 0.0)
    single = {
        "mse": lambda x: x * x,
        "mae": abs,
        "rmse": abs,
        "huber": lambda x: x * x / 2 if abs(x) < delta else delta * (abs(x) - delta / 2),
    }
    for s, energy, force in zip(structures, energies, forces):
        n = len(s.numbers)
        if np.isfinite(s.energy):
            error = energy - s.energy
            total["energies"] += 1
            total["energy_abs"] += abs(error) / n
            total["energy_total_abs"] += abs(error)
            total["energy_loss"] += single[penalty](error / n if per_atom else error)
        errors = (force - s.forces)[np.isfinite(s.forces)]
        whole = [e for e in force - s.forces if np.isfinite(e).all()]
        labels = [f for f in s.forces if np.isfinite(f).all()]
        total["forces"] += len(errors)
        total["force_abs"] += abs(errors).sum()
        terms = {
            "norm": [np.linalg.norm(e) for e in whole],
            "relative": [e @ e / (f @ f + FLOOR**2) for e, f in zip(whole, labels)],
            "rmse": [np.sqrt(np.mean(errors**2))] if len(errors) else [],
        }
        terms = (
            terms[force_penalty]
            if force_penalty in terms
            else [single[force_penalty](e) for e in errors]
        )
        total["force_loss"] += sum(terms)
        total["force_terms"] += len(terms)
    return LossSums(**total)


@pytest.mark.parametrize(("penalty", "force_penalty"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    cut=st.integers(0, 3),
    seed=st.integers(0, 999),
    missing=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    per_atom=st.booleans(),
)
def test_sums_equal_those_of_a_plain_loop_and_parts_add_up(
    penalty, force_penalty, sizes, cut, seed, missing, per_atom
):
    """Parts may have no labels or no structures: the loss is not a mean of means."""
    rng = np.random.default_rng(seed)
    structures = [
        structure(
            n,
            seed + i,
            energy=np.nan if rng.random() < missing else rng.normal(),
            forces=np.where(rng.random((n, 3)) < missing, np.nan, rng.normal(size=(n, 3))),
        )
        for i, n in enumerate(sizes)
    ]
    energies, forces = rng.normal(size=len(sizes)), [rng.normal(size=(n, 3)) for n in sizes]

    def part(chosen):
        graph = batch_of(structures[chosen])
        predicted = np.concatenate([np.zeros((0, 3)), *forces[chosen]])
        evaluation = Evaluation(
            jnp.asarray(np.resize(np.append(energies[chosen], 0), 6), jnp.float32),
            jnp.zeros((16, 3)).at[: len(predicted)].set(predicted),
            jnp.zeros(16),
        )
        return compiled(
            evaluation,
            graph,
            penalty=penalty,
            force_penalty=force_penalty,
            energy_per_atom=per_atom,
            huber_delta=0.5,
            force_floor=FLOOR,
        )

    whole, parts = part(slice(None)), [part(slice(0, cut)), part(slice(cut, None))]
    expected = reference_sums(
        structures, energies, forces, penalty, force_penalty or penalty, per_atom, 0.5
    )
    np.testing.assert_allclose(whole, expected, rtol=2e-5, atol=1e-6)
    total = jax.tree.map(lambda a, b: a + b, *parts)
    np.testing.assert_allclose(total, whole, rtol=2e-5, atol=1e-6)
    assert sum(combine(p, total, 0.9) for p in parts) == pytest.approx(
        float(combine(whole, whole, 0.9)), rel=2e-5
    )


@pytest.mark.parametrize(("penalty", "force_penalty"), PAIRS)
def test_counts_do_not_depend_on_predictions(penalty, force_penalty):
    """Exact predictions are counted as well."""
    graph = batch_of([structure(2, 0), structure(3, 1)])
    right = Evaluation(graph.globals["energy"], graph.nodes["forces"], jnp.zeros(16))
    options = {"penalty": penalty, "force_penalty": force_penalty}
    none, some = compiled(right, graph, **options), compiled(evaluation_of(graph), graph, **options)
    for field in ("energies", "forces", "force_terms"):
        assert getattr(none, field) == getattr(some, field) > 0
    assert none.energy_loss == none.force_loss == 0 and some.energy_loss > 0 and some.force_loss > 0


@pytest.mark.parametrize(("penalty", "force_penalty"), PAIRS)
def test_derivatives_are_finite_at_zero_error(penalty, force_penalty):
    graph = batch_of([structure(2, 0), structure(1, 1)])

    def loss(errors):
        evaluation = Evaluation(
            graph.globals["energy"] + errors[:6],
            graph.nodes["forces"] + errors[6:].reshape(16, 3),
            jnp.zeros(16),
        )
        part = sums(evaluation, graph, penalty=penalty, force_penalty=force_penalty)
        return combine(part, part, 0.5)

    first, second = jax.jit(lambda x: (jax.grad(loss)(x), jax.hessian(loss)(x)))(jnp.zeros(6 + 48))
    assert not first.any() and np.isfinite(second).all()


@pytest.mark.parametrize("force_penalty", sorted(FORCE_PENALTIES))
def test_forces_can_be_trained(force_penalty, double_precision):
    """The derivative of a force loss with respect to a parameter equals finite differences."""
    graph = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if x.dtype.kind == "f" else x,
        batch_of([structure(3, 0), structure(2, 1)]),
    )
    positions = graph.nodes["positions"]

    @jax.jit
    def loss(stiffness):
        forces = -jax.grad(lambda x: jnp.sum(jnp.sin(stiffness * x) ** 2))(positions)
        part = sums(
            Evaluation(graph.globals["energy"], forces, jnp.zeros(16)),
            graph,
            force_penalty=force_penalty,
        )
        return combine(part, part, 1.0)

    difference = (loss(0.7 + 1e-5) - loss(0.7 - 1e-5)) / 2e-5
    assert float(jax.jit(jax.grad(loss))(0.7)) == pytest.approx(float(difference), rel=1e-7)
    assert abs(difference) > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("penalty", "force_penalty"), PAIRS)
def test_a_nonfinite_prediction_makes_the_loss_nonfinite(penalty, force_penalty, value):
    graph = batch_of([structure(2, 0)])
    evaluation = evaluation_of(graph)
    broken = evaluation._replace(
        energy=evaluation.energy.at[0].set(value), forces=evaluation.forces.at[1, 2].set(value)
    )
    part = compiled(broken, graph, penalty=penalty, force_penalty=force_penalty)
    assert not np.isfinite(part.energy_loss) and not np.isfinite(part.force_loss)
    assert not np.isfinite(averages(jax.tree.map(float, part), 0.5, "train")["train_loss"])


def test_averages_of_known_numbers():
    part = LossSums(
        energy_loss=6.0,
        force_loss=8.0,
        energy_abs=0.3,
        force_abs=1.2,
        energies=3.0,
        forces=12.0,
        energy_total_abs=1.5,
        force_terms=4.0,
    )
    assert averages(part, 0.75, "valid") == pytest.approx(
        {
            "valid_loss": 0.25 * 2.0 + 0.75 * 2.0,
            "valid_energy_mae_mev_per_atom": 100.0,
            "valid_energy_mae_mev": 500.0,
            "valid_force_mae_mev_per_ang": 100.0,
        }
    )


def test_averages_without_labels():
    """A term without labels is not part of the loss, but a non-finite term is."""
    part = LossSums(
        energy_loss=0.0,
        force_loss=8.0,
        energy_abs=0.0,
        force_abs=1.2,
        energies=0.0,
        forces=12.0,
        energy_total_abs=0.0,
        force_terms=4.0,
    )
    found = averages(part, 0.75, "x")
    assert found["x_loss"] == 1.5 and np.isnan(found["x_energy_mae_mev"])
    assert np.isnan(found["x_energy_mae_mev_per_atom"]) and found[
        "x_force_mae_mev_per_ang"
    ] == pytest.approx(100.0)
    assert np.isnan(averages(part._replace(force_loss=np.nan), 0.75, "x")["x_loss"])


def test_penalties():
    errors = jnp.array([-2.0, -0.01, 0.0, 0.03, 1.0])
    np.testing.assert_allclose(PENALTIES["mse"](errors, 0.05), errors**2)
    np.testing.assert_allclose(PENALTIES["mae"](errors, 0.05), abs(errors))
    huber = PENALTIES["huber"](errors, 0.05)
    np.testing.assert_allclose(
        huber[jnp.array([1, 2, 3])], 0.5 * errors[jnp.array([1, 2, 3])] ** 2, rtol=1e-6
    )
    np.testing.assert_allclose(huber[jnp.array([0, 4])], [0.05 * 1.975, 0.05 * 0.975], rtol=1e-6)
    below, above = (float(PENALTIES["huber"](jnp.float32(0.05 + d), 0.05)) for d in (-1e-5, 1e-5))
    assert below == pytest.approx(above, rel=1e-3)


def test_an_unknown_penalty_is_an_error_with_the_nearest_name():
    graph = batch_of([structure(2, 0)])
    with pytest.raises(ValueError, match="unknown loss.penalty 'hubert'. Did you mean 'huber'"):
        sums(evaluation_of(graph), graph, penalty="hubert")
    with pytest.raises(ValueError, match="unknown loss.force_penalty 'norms'. Did you mean 'norm'"):
        sums(evaluation_of(graph), graph, force_penalty="norms")


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan"), float("inf")])
def test_huber_delta_must_be_positive(delta):
    """Infinity would mean MSE, but its gradient is NaN."""
    with pytest.raises(ValueError, match="loss.huber_delta must be a positive number"):
        check_penalties("huber", None, delta)
    check_penalties("mse", "norm", delta)


def test_relative_weights_the_direction_of_small_forces():
    """A force with the wrong direction has the same loss whether it is large or small."""
    labels = np.array([[5.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    graph = batch_of([Structure(np.array([6, 6]), np.eye(2, 3), energy=0.0, forces=labels)])

    def loss(predicted):
        evaluation = Evaluation(
            jnp.zeros(6), jnp.zeros((16, 3)).at[:2].set(predicted), jnp.zeros(16)
        )
        return float(sums(evaluation, graph, force_penalty="relative", force_floor=1e-3).force_loss)

    turned = np.array([[0.0, 5.0, 0.0], [0.0, 0.5, 0.0]])
    assert loss(turned) == pytest.approx(4.0, rel=1e-4)
    assert loss(np.array([turned[0], labels[1]])) == pytest.approx(
        loss(np.array([labels[0], turned[1]])), rel=1e-4
    )


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan"), float("inf")])
def test_force_floor_must_be_positive(floor):
    with pytest.raises(ValueError, match="loss.force_floor must be a positive number"):
        check_penalties("mse", "relative", 0.05, floor)
    check_penalties("mse", "mae", 0.05, floor)


def test_inconsistent_penalties_are_errors():
    graph = batch_of([structure(2, 0)])
    with pytest.raises(
        ValueError, match="Set loss.force_penalty to 'norm' and loss.penalty to one of huber, mae"
    ):
        sums(evaluation_of(graph), graph, penalty="norm")
    with pytest.raises(ValueError, match="Set loss.force_penalty to 'relative'"):
        sums(evaluation_of(graph), graph, penalty="relative")
    for options in ({"penalty": "huber"}, {"force_penalty": "huber"}):
        with pytest.raises(
            ValueError, match="huber_delta must be a positive number .*, received 0.0"
        ):
            sums(evaluation_of(graph), graph, huber_delta=0.0, **options)


def test_beta_is_constant_then_geometric():
    beta = beta_schedule(0.99, 0.5, 0.5, 1000)
    assert beta(0) == beta(250) == beta(500) == pytest.approx(0.99)
    assert float(beta(1000)) == pytest.approx(0.5, abs=1e-6)
    assert 1 - float(beta(750)) == pytest.approx(np.sqrt(0.01 * 0.5), rel=1e-4)
    assert float(beta(5000)) == pytest.approx(0.5, abs=1e-6)
    values = [float(beta(s)) for s in range(500, 1001, 50)]
    assert all(a > b for a, b in zip(values, values[1:]))


def test_beta_changes_linearly():
    beta = beta_schedule(0.99, 0.5, 0.5, 1000, "linear")
    np.testing.assert_allclose(
        [float(beta(s)) for s in (0, 500, 600, 750, 1000, 2000)],
        [0.99, 0.99, 0.99 - 0.2 * 0.49, 0.745, 0.5, 0.5],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("begin", "num_steps", "first"),
    [(0.0, 10, 0), (0.5, 1000, 500), (0.07, 100, 7), (0.75, 10, 8), (1.0, 10, 10)],
)
def test_beta_jumps_at_the_first_step_of_its_fraction(begin, num_steps, first):
    beta = beta_schedule(0.9, 0.2, begin, num_steps, "step")
    found = [float(beta(s)) for s in range(num_steps + 1)]
    np.testing.assert_allclose(found, [0.9] * first + [0.2] * (num_steps + 1 - first), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    begin=st.just(0.0) | st.floats(0.01, 0.9),
    num_steps=st.integers(1, 1000),
    kind=st.sampled_from(BETA_SCHEDULES),
)
def test_beta_stays_between_its_ends_and_reaches_them(ends, begin, num_steps, kind):
    beta = beta_schedule(*ends, begin, num_steps, kind)
    values = [float(beta(s)) for s in (0, num_steps // 3, num_steps // 2, num_steps)]
    assert values[-1] == pytest.approx(ends[1], abs=1e-5)
    assert all(min(ends) - 1e-5 <= v <= max(ends) + 1e-5 for v in values)
    if begin > 0:
        assert values[0] == pytest.approx(ends[0], abs=1e-5)


@pytest.mark.parametrize("ends", [(0.9, 0.9), (1.0, 1.0)])
def test_beta_without_a_change(ends):
    beta = beta_schedule(*ends, 0.5, 100)
    assert all(float(beta(s)) == pytest.approx(ends[0]) for s in (0, 50, 99, 100))


@pytest.mark.parametrize("ends", [(1.0, 0.5), (0.9, 1.0)])
def test_beta_reaches_its_end_from_or_to_one(ends):
    """A weight of one at either end is allowed; the other end must not be ignored silently."""
    beta = beta_schedule(*ends, 0.5, 100)
    assert float(beta(0)) == pytest.approx(ends[0], abs=1e-3)
    assert float(beta(100)) == pytest.approx(ends[1], abs=1e-3)


@pytest.mark.parametrize("ends", [(-0.1, 0.5), (0.5, 1.1)])
def test_beta_outside_of_its_range_is_an_error(ends):
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        beta_schedule(*ends, 0.5, 100)


def test_invalid_beta_schedules_are_errors():
    with pytest.raises(
        ValueError, match="unknown loss.beta_schedule 'liner'. Did you mean 'linear'"
    ):
        beta_schedule(0.9, 0.5, 0.5, 100, "liner")
    with pytest.raises(ValueError, match="beta_begin is a fraction .*, received 50"):
        beta_schedule(0.9, 0.5, 50, 100)


@pytest.mark.parametrize("kind", BETA_SCHEDULES)
def test_beta_can_be_traced(kind):
    beta = beta_schedule(0.99, 0.9, 0.8, 100, kind)
    assert float(jax.jit(beta)(jnp.int32(90))) == pytest.approx(float(beta(90)), rel=1e-6)


def test_only_known_stresses_of_crystals_count():
    """Padding graphs and structures without a label contribute nothing, also to the gradient."""
    label = np.arange(9.0).reshape(3, 3)
    crystals = [
        Structure(
            np.array([6, 6]),
            np.eye(2, 3),
            energy=0.0,
            forces=np.zeros((2, 3)),
            cell=4 * np.eye(3),
            pbc=np.ones(3, bool),
            properties={"stress": value},
        )
        for value in (label, np.full((3, 3), np.nan))
    ]
    columns = Columns.from_structures(crystals)
    graph = build_batch(columns, PaddingBudget(8, 40, 4), 1.5, properties=("stress",))
    predicted = jnp.ones((4, 3, 3))

    def total(stress):
        return sums(Evaluation(jnp.zeros(4), jnp.zeros((8, 3)), jnp.zeros(8), stress), graph)

    found = total(predicted)
    assert (found.stress_loss, found.stresses) == (((label - 1) ** 2).sum(), 9)
    assert found.stress_abs == np.abs(label - 1).sum()
    gradient = jax.grad(lambda stress: combine(total(stress), found, 0.5, 3.0))(predicted)
    np.testing.assert_allclose(gradient[0], 3 * 2 * (1 - label) / 9, rtol=1e-6)
    assert not gradient[1:].any()
    row = averages(jax.tree.map(float, found), 0.5, "valid", 3.0)
    assert row["valid_loss"] == pytest.approx(3 * found.stress_loss / 9)
    assert row["valid_stress_mae_mev_per_ang3"] == pytest.approx(1e3 * found.stress_abs / 9)
    assert "valid_stress_mae_mev_per_ang3" not in averages(found, 0.5, "valid")

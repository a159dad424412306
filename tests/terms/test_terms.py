"""Tests for energy terms against plain formulas, and for the contract of all terms, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from mlip_jax import models, terms
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.graph import pairs
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models.layers.basic import cosine_cutoff, gather, safe_norm, segment_sum
from mlip_jax.models.layers.heads import AtomOutputs, embed_elements
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.structure import Structure
from tests.models.parameters import UNIT_VARIANCE, quick_parameters

BUDGET = PaddingBudget(n_node=16, n_edge=96, n_graph=4, n_pair=80)
COULOMB, BOHR, HARTREE = 14.3996454, 0.529177211, 27.2113860  # eV Å, Å, eV
TERMS = {
    "zbl": {},
    "electrostatics": {"cutoff": 6.0, "damping": 1.7},
    "dispersion": {"cutoff": 6.0},
    "d3": {"cutoff": 6.0, "coordination_cutoff": 6.0},
}
CUTOFF = 4.0


pytestmark = pytest.mark.usefixtures("double_precision")


class Neighbors(nn.Module):
    """Features of the elements and of the neighbors, without energies."""

    cutoff: float = CUTOFF

    @nn.compact
    def __call__(self, graph):
        edge, numbers = pairs(graph, False), graph.nodes["numbers"]
        distances = safe_norm(edge.displacements)
        f = embed_elements(self, numbers, 8, distances.dtype)
        weights = (cosine_cutoff(distances, self.cutoff) ** 2)[:, None]
        f = f + segment_sum(weights * gather(f, edge.senders), edge.receivers, len(numbers))
        return AtomOutputs(jnp.zeros_like(f[:, 0]), f[:, None, None, :])


def random_parameters(model, seed=0):
    """Return generic parameters that float32 represents exactly."""
    params = jax.jit(model.init)(jax.random.key(seed), example_graph(np.float64))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: (
            (np.asarray(p) + 0.1 * rng.standard_normal(p.shape)).astype(np.float32).astype(float)
        ),
        params,
    )


class Case:
    """Model with terms and its parameters; evaluations share one shape."""

    def __init__(self, options, params=None):
        self.model = terms.with_terms(Neighbors(), options)
        self.params = random_parameters(self.model) if params is None else params
        self.evaluate = jax.jit(lambda params, graph: evaluate(self.model, params, graph, 1.0))
        self.apply = jax.jit(self.model.apply)

    def graph(self, structures, budget=BUDGET, dtype=np.float64):
        return build_batch(
            Columns.from_structures(structures),
            budget,
            CUTOFF,
            dtype=dtype,
            long_range_cutoff=self.model.long_range_cutoff,
        )

    def __call__(self, *structures):
        result = self.evaluate(self.params, self.graph(structures))
        atoms = sum(len(s) for s in structures)
        return (
            np.asarray(result.energy)[: len(structures)],
            np.asarray(result.forces)[:atoms],
            result,
        )


@functools.cache
def case_of(*names):
    return Case({name: TERMS[name] for name in names})


def molecule(seed=0, numbers=(6, 1, 8, 7, 1, 16), box=3.0, closest=0.7, charge=0.0):
    rng = np.random.default_rng(seed)
    while True:
        positions = rng.uniform(0, box, (len(numbers), 3))
        if distances(positions).min() > closest:
            return Structure(np.array(numbers), positions, charge=charge)


def distances(positions):
    return np.linalg.norm(positions[:, None] - positions[None], axis=-1)[
        np.triu_indices(len(positions), 1)
    ]


def moved(structure, positions):
    return Structure(structure.numbers, np.asarray(positions), charge=structure.charge)


LARGE, ION, ATOM = (
    molecule(),
    molecule(1, (8, 1, 1), 1.6, charge=-1.0),
    Structure(np.array([8]), np.zeros((1, 3))),
)


def switch(d, start, end):
    """Return the switch as in the literature: f(1 - c) / (f(1 - c) + f(c)), f(x) = exp(-1 / x)."""

    def f(x):
        return np.exp(-1 / x) if x > 0 else 0.0

    c = (d - start) / (end - start)
    return f(1 - c) / (f(1 - c) + f(c))


def pair_sum(structure, energy):
    """Return the sum of energy(i, j, d) over all pairs."""
    return sum(
        energy(i, j, np.linalg.norm(structure.positions[i] - structure.positions[j]))
        for i in range(len(structure))
        for j in range(i)
    )


# --- Against plain formulas ---


def test_zbl_starts_as_the_universal_potential():
    case = Case({"zbl": {"cutoff_fn": "cosine", "end": 2.0}})
    initial = jax.jit(case.model.init)(jax.random.key(0), example_graph(np.float64))
    case = Case({"zbl": {"cutoff_fn": "cosine", "end": 2.0}}, initial)
    z = LARGE.numbers

    def universal(i, j, d):
        length = 0.8854 * BOHR / (z[i] ** 0.23 + z[j] ** 0.23)
        x = d / length
        screening = (
            0.1818 * np.exp(-3.2 * x)
            + 0.5099 * np.exp(-0.9423 * x)
            + 0.2802 * np.exp(-0.4029 * x)
            + 0.02817 * np.exp(-0.2016 * x)
        )
        envelope = (
            switch(d, 0.0, 2.0) * 0.5 * (1 + np.cos(np.pi * d / CUTOFF))
            if d < min(CUTOFF, 2.0)
            else 0.0
        )
        return COULOMB * z[i] * z[j] / d * screening * envelope

    energies, _, _ = case(LARGE)
    assert energies[0] > 0.1
    assert energies[0] == pytest.approx(
        pair_sum(LARGE, universal), rel=1e-3
    )  # textbooks give four digits


@pytest.mark.parametrize("cutoff", [None, 3.0])
def test_electrostatics_is_the_sum_over_pairs(cutoff):
    case = Case({"electrostatics": {"cutoff": cutoff, "damping": 1.3}})
    for structure in (LARGE, ION):
        energies, _, result = case(structure)
        q = np.asarray(result.properties["partial_charges"])[: len(structure)]
        assert np.abs(q).max() > 0.05

        def damped(d):
            return erf(d / 1.3) / d

        def pair(i, j, d, q=q):
            if cutoff is None:
                return COULOMB * q[i] * q[j] * damped(d)
            if d >= cutoff:
                return 0.0
            slope = (damped(cutoff + 1e-5) - damped(cutoff - 1e-5)) / 2e-5
            s, shifted = switch(d, 0.45 * cutoff, cutoff), damped(d) - damped(cutoff)
            return (
                COULOMB * q[i] * q[j] * (s * shifted + (1 - s) * (shifted - slope * (d - cutoff)))
            )

        assert energies[0] == pytest.approx(pair_sum(structure, pair), rel=1e-7)


@pytest.mark.parametrize("cutoff", [None, 4.0])
def test_dispersion_of_a_dimer(cutoff):
    """Compare with the energy by hand, in hartree and bohr, for carbon and oxygen."""
    case = Case({"dispersion": {"cutoff": cutoff, "switch_width": 1.5}})
    for distance in (1.2, 2.9, 3.6):
        dimer = Structure(np.array([6, 8]), np.array([[0.0, 0.0, 0.0], [0.0, 0.6, 0.8]]) * distance)
        energies, _, result = case(dimer)
        h_c, h_o = np.asarray(result.properties["hirshfeld_ratios"])[:2]
        alpha_c, alpha_o, c6_c, c6_o = 12 * h_c, 5.4 * h_o, 46.6 * h_c**2, 15.6 * h_o**2
        c6 = 2 * c6_c * c6_o / (alpha_c / alpha_o * c6_o + alpha_o / alpha_c * c6_c)
        alpha = (alpha_c + alpha_o) / 2
        radius = (1 / 137.035999) ** (-4 / 21) * alpha ** (1 / 7)
        width = -0.00433008 + 0.24428889 * radius + 0.04125273 * radius**2 - 0.00078893 * radius**3
        gamma = 1 / (2 * width**2)
        p, r = 1.2 * 2 * 2.54 * alpha ** (1 / 7), distance / BOHR
        expected = -HARTREE * (
            c6 / (r**6 + p**6)
            + 5 * c6 / gamma / (r**8 + p**8)
            + 245 * c6 / (8 * gamma**2) / (r**10 + p**10)
        )
        if cutoff is not None:
            expected *= switch(distance, 2.5, 4.0) if distance > 2.5 else 1.0
        assert expected < -1e-5
        assert energies[0] == pytest.approx(expected, rel=1e-7)


def test_hirshfeld_ratios_start_at_one():
    model = terms.with_terms(Neighbors(), {"dispersion": {}})
    params = jax.jit(model.init)(jax.random.key(0), example_graph(np.float64))
    ratios = Case({"dispersion": {}}, params)(LARGE)[2].properties["hirshfeld_ratios"]
    np.testing.assert_array_equal(np.asarray(ratios)[: len(LARGE)], 1.0)


def test_charges_add_up_to_the_total_charge():
    case = case_of("electrostatics")
    q = np.asarray(case(LARGE, ION, ATOM)[2].properties["partial_charges"])
    assert q[:6].sum() == pytest.approx(0.0, abs=1e-14)
    assert q[6:9].sum() == pytest.approx(-1.0, abs=1e-14)
    assert q[9] == 0.0 and not q[10:].any()
    single = case.apply(
        jax.tree.map(np.float32, case.params), case.graph([LARGE, ION], dtype=np.float32)
    )
    assert abs(np.asarray(single.properties["partial_charges"])[6:9].sum() + 1.0) < 3e-7


# --- Contract of all terms ---


@pytest.mark.parametrize("name", terms.names())
def test_forces_are_minus_the_gradient(name):
    case, rng = case_of(name), np.random.default_rng(0)
    _, forces, _ = case(LARGE, ION)
    assert np.abs(forces).max() > 1e-3 and np.isfinite(forces).all()
    for structure, rows in ((LARGE, slice(0, 6)), (ION, slice(6, 9))):
        for _ in range(3):
            direction = rng.standard_normal(structure.positions.shape)

            def energy(h, s=structure, along=direction):
                return case(moved(s, s.positions + h * along))[0][0]

            numeric = (8 * (energy(2e-4) - energy(-2e-4)) - (energy(4e-4) - energy(-4e-4))) / 24e-4
            assert -(forces[rows] * direction).sum() == pytest.approx(numeric, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", terms.names())
def test_order_padding_and_batch_change_nothing(name):
    case = case_of(name)
    energies, forces, result = case(LARGE, ION, ATOM)
    order = np.random.default_rng(2).permutation(len(LARGE))
    shuffled, shuffled_forces, _ = case(Structure(LARGE.numbers[order], LARGE.positions[order]))
    np.testing.assert_allclose(shuffled, energies[:1], rtol=1e-12)
    np.testing.assert_allclose(
        shuffled_forces, forces[:6][order], atol=1e-12 * np.abs(forces).max()
    )
    separate, alone_forces, _ = case(ION)
    np.testing.assert_allclose(separate, energies[1:2], rtol=1e-12)
    np.testing.assert_allclose(alone_forces, forces[6:9], atol=1e-12 * np.abs(forces).max())
    assert not np.asarray(result.energies)[10:].any() and not np.asarray(result.forces)[10:].any()
    assert energies[2] == 0 and not forces[9].any()


def test_no_pairs_at_all():
    """A graph without any edge or pair."""
    case = case_of(*terms.names())
    graph = case.graph([ATOM], PaddingBudget(n_node=2, n_edge=0, n_graph=2, n_pair=0))
    assert graph.senders.shape == (0,)
    result = case.evaluate(case.params, graph)
    assert not np.asarray(result.energy).any() and not np.asarray(result.forces).any()


@pytest.mark.parametrize("name", terms.names())
def test_float32_stays_float32(name):
    case = case_of(name)
    energies, forces, _ = case(LARGE)
    params = jax.tree.map(np.float32, case.params)
    result = case.evaluate(params, case.graph([LARGE], dtype=np.float32))
    assert result.energy.dtype == result.forces.dtype == np.float32
    assert all(v.dtype == np.float32 for v in result.properties.values())
    np.testing.assert_allclose(np.asarray(result.energy)[:1], energies, rtol=1e-4)
    np.testing.assert_allclose(
        np.asarray(result.forces)[:6], forces, atol=1e-4 * np.abs(forces).max()
    )


BORDERS = {
    "zbl": (1.5,),
    "electrostatics": (0.45 * 6.0, 6.0),
    "dispersion": (4.0, 6.0),
    "d3": (4.0, 6.0),
}


@pytest.mark.parametrize("name", terms.names())
def test_smooth_at_the_borders(name):
    """Energy and force of a pair do not jump where it is switched off, and are zero beyond."""
    case = case_of(name)

    def dimer(d):
        energies, forces, _ = case(
            Structure(np.array([6, 8]), np.array([[0.0, 0, 0], [0, 0.6, 0.8]]) * d)
        )
        return energies[0], forces

    scale = max(abs(dimer(1.0)[0]), 1e-3)
    for border in BORDERS[name]:
        (low, low_forces), (high, high_forces) = dimer(border - 1e-7), dimer(border + 1e-7)
        assert abs(low - high) < 1e-6 * scale
        np.testing.assert_allclose(low_forces, high_forces, atol=1e-6 * scale)
    end = BORDERS[name][-1]
    assert dimer(end + 1e-3)[0] == 0 and not dimer(end + 1e-3)[1].any()
    assert dimer(end - 0.3)[0] != 0


def test_trains_on_forces():
    """The parameter gradient of a loss of forces equals finite differences for all terms."""
    case, rng = case_of(*terms.names()), np.random.default_rng(4)
    graph, target = case.graph([LARGE, ATOM, ION]), rng.standard_normal((BUDGET.n_node, 3))

    def loss(params, evaluated):
        return ((evaluated(params, graph).forces - target) ** 2).sum()

    gradient_of = jax.jit(
        jax.grad(lambda params: loss(params, lambda *given: evaluate(case.model, *given, 1.0)))
    )
    gradient = jax.tree.map(np.asarray, gradient_of(case.params))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    for name in case.params["params"].keys() - {"model"}:
        leaves, structure = jax.tree.flatten(case.params["params"][name])
        grads = jax.tree.leaves(gradient["params"][name])
        assert all(np.abs(g).max() > 0 for g in grads)
        direction = [rng.standard_normal(p.shape) for p in leaves]
        length = np.sqrt(sum((d * d).sum() for d in direction))

        def moved_loss(
            h, name=name, leaves=leaves, direction=direction, structure=structure, length=length
        ):
            changed = jax.tree.unflatten(
                structure, [p + h / length * d for p, d in zip(leaves, direction)]
            )
            params = {"params": {**case.params["params"], name: changed}}
            return float(
                loss(params, lambda *given: jax.tree.map(np.asarray, case.evaluate(*given)))
            )

        numeric = (
            8 * (moved_loss(1e-3) - moved_loss(-1e-3)) - (moved_loss(2e-3) - moved_loss(-2e-3))
        ) / 12e-3
        analytic = sum(float((g * d).sum()) for g, d in zip(grads, direction)) / length
        assert analytic == pytest.approx(numeric, rel=1e-6)


def test_a_doubled_cell_has_twice_the_energy():
    """Includes pairs of an atom with its own images."""
    cell = np.array([[3.1, 0.0, 0.0], [0.4, 3.6, 0.0], [-0.5, 0.3, 4.2]])
    one = Structure(
        np.array([6, 8]),
        np.array([[0.1, 0.2, 0.3], [1.1, 0.9, 1.0]]),
        cell=cell,
        pbc=np.ones(3, bool),
    )
    two = Structure(
        np.tile(one.numbers, 2),
        np.concatenate([one.positions, one.positions + cell[1]]),
        cell=cell * [[1], [2], [1]],
        pbc=np.ones(3, bool),
    )
    case, budget = case_of(*terms.names()), PaddingBudget(8, 220, 2, 320)
    single, double = (
        jax.tree.map(np.asarray, case.evaluate(case.params, case.graph([s], budget)))
        for s in (one, two)
    )
    assert double.energy[0] == pytest.approx(2 * float(single.energy[0]), rel=1e-12)
    np.testing.assert_allclose(double.forces[2:4], single.forces[:2], atol=1e-10)


# --- Terms on models ---

SMALL = {
    "num_features": 8,
    "num_layers": 1,
    "num_heads": 2,
    "degrees": (1, 2),
    "max_degree": 1,
    "num_radial": 8,
    "correlation": 2,
    "zero_init": False,
}


@pytest.mark.parametrize(
    "name",
    [
        # terms do not depend on the model; these two are meant for properties
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("spherenet", "comenet")))
        for name in models.names()
    ],
)
def test_every_model_supports_every_term(name):
    plain = models.create(name)
    plain = models.create(
        name, **{k: v for k, v in SMALL.items() if k in plain.__dataclass_fields__}
    )
    model = terms.with_terms(plain, {**TERMS, "electrostatics": {"cutoff": 7.0}})
    assert model.cutoff == plain.cutoff and model.long_range_cutoff == 7.0
    graph = build_batch(
        Columns.from_structures([LARGE, ION]),
        BUDGET,
        model.cutoff,
        dtype=np.float64,
        long_range_cutoff=7.0,
    )
    unit_variance = name in UNIT_VARIANCE
    params = quick_parameters(model, example_graph(np.float64), unit_variance=unit_variance)
    assert set(params["params"]) == {"model", *terms.names()} - {"d3"}
    outputs = jax.jit(model.apply)(params, graph)
    assert list(outputs.terms) == terms.names()
    assert all(
        np.isfinite(values).all() and np.abs(values[:9]).max() > 1e-4
        for values in outputs.terms.values()
    )
    assert set(outputs.properties) == {"partial_charges", "hirshfeld_ratios"}


def test_no_terms_is_the_model_itself():
    model = Neighbors()
    assert terms.with_terms(model, {}) is model


def test_a_term_of_short_range_has_the_cutoff_of_the_model():
    with_zbl = terms.with_terms(Neighbors(cutoff=3.25), {"zbl": {}})
    assert dict(with_zbl.terms)["zbl"] == (("cutoff", 3.25),)
    assert with_zbl.long_range_cutoff is None
    hash(with_zbl)
    with pytest.raises(ValueError, match="cutoff=4 Å, but the model's edges end at 3.25 Å"):
        terms.with_terms(Neighbors(cutoff=3.25), {"zbl": {"cutoff": 4.0}})


def test_no_cutoff_requires_all_pairs():
    model = terms.with_terms(
        Neighbors(), {"electrostatics": {"cutoff": None}, "dispersion": {"cutoff": 9.0}}
    )
    assert model.long_range_cutoff == np.inf


@pytest.mark.parametrize("name", ["electrostatics", "dispersion"])
def test_an_infinite_cutoff_is_none(name):
    endless = terms.with_terms(Neighbors(), {name: {"cutoff": float("inf")}})
    assert endless == terms.with_terms(Neighbors(), {name: {"cutoff": None}})
    energies, forces, _ = Case({name: {"cutoff": float("inf")}})(LARGE)
    assert energies[0] != 0 and np.isfinite(forces).all()


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan"), "6"])
@pytest.mark.parametrize("name", terms.names())
def test_a_cutoff_is_a_positive_number(name, cutoff):
    with pytest.raises(ValueError, match=f"'{name}' has cutoff=.*expected a positive number"):
        terms.with_terms(Neighbors(), {name: {"cutoff": cutoff}})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zbl", {"end": 0.0}, "start must be below its end"),
        ("zbl", {"cutoff": None}, "cutoff=None"),
        ("electrostatics", {"damping": 0.0}, "damping must be positive"),
        ("dispersion", {"switch_width": 0.0}, "switch_width must be positive"),
    ],
)
def test_invalid_options_are_rejected(name, options, message):
    with pytest.raises(ValueError, match=message):
        Case({name: options})


def test_unknown_names_are_reported():
    with pytest.raises(ValueError, match="Did you mean 'dispersion'"):
        terms.create("dispersio")
    with pytest.raises(ValueError, match="Did you mean 'damping'"):
        terms.create("electrostatics", dampin=1.0)
    with pytest.raises(ValueError, match="energy term"):
        terms.with_terms(Neighbors(), {"pairwise": {}})


def test_elements_without_free_atom_values_are_rejected():
    terms.check_elements(set(terms.names()) - {"d3"}, [1, 6, 102])
    with pytest.raises(ValueError, match="Lr, Og, only for elements 1 to 102"):
        terms.check_elements(["dispersion"], [6, 118, 103])
    heavy = Structure(np.array([103, 1]), np.array([[0.0, 0, 0], [0, 0, 2.0]]))
    assert np.isnan(case_of("dispersion")(heavy, LARGE)[0]).tolist() == [True, False]


def test_a_graph_without_long_range_pairs_is_an_error():
    case = case_of("dispersion")
    graph = case.graph([LARGE])
    del graph.edges["long_range"]
    with pytest.raises(ValueError, match="no long-range pairs"):
        case.model.apply(case.params, graph)


def test_far_molecules_in_float32():
    """Without a cutoff, pairs at any distance have finite energies and forces."""
    case = Case({"dispersion": {"cutoff": None}, "electrostatics": {"cutoff": None}})
    far = Structure(
        np.tile(ION.numbers, 2), np.concatenate([ION.positions, ION.positions + [3e5, 0, 0]])
    )
    result = case.evaluate(
        jax.tree.map(np.float32, case.params), case.graph([far], dtype=np.float32)
    )
    assert np.isfinite(result.energy).all() and np.isfinite(result.forces).all()

"""What every architecture must keep to, checked in float64 for each file of the folder of models.

A check is a function of a `Case` (a model with parameters). A new model is covered by lying in the folder; it
needs no options, but those of `SMALL` that it has make it quick. Properties of its class say which checks apply:
`conservative` (forces are minus the gradient of the energy), `smooth` (no jump at the cutoff), `extensive`
(energies of distant structures add up), `local` (atoms without neighbors do not depend on others),
`mirror_symmetric` (a mirror image has the same energy).
"""

import dataclasses
import functools
import importlib
import sys
import textwrap
from typing import Any

import e3x
import flax.linen as nn
import jax
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models.layers.heads import AtomOutputs
from mlip_jax.potential import evaluate, example_graph, has_energy_derivatives, is_conservative
from mlip_jax.structure import Structure
from tests.models.parameters import UNIT_VARIANCE, quick_parameters

SMALL = {
    "num_features": 32,
    "num_layers": 2,
    "num_heads": 4,
    "degrees": (1, 2),
    "max_degree": 1,
    "num_radial": 12,
    "correlation": 2,
    "feature_degree": 1,
    "radial_network": (16,),
    "zero_init": False,
}
# Sizes of models with many parameters, which take long to compile.
SMALLER = {
    "dimenetpp": {
        "num_layers": 1,
        "num_features": 16,
        "num_triplet_features": 8,
        "energy_width": 16,
        "num_energy_layers": 1,
        "num_before_skip": 0,
        "num_after_skip": 1,
    },
    "spherenet": {
        "num_layers": 1,
        "num_features": 16,
        "num_radial": 4,
        "num_triplet_features": 8,
        "num_basis_features": 4,
        "energy_width": 16,
        "num_energy_layers": 1,
        "num_before_skip": 0,
        "num_after_skip": 1,
    },
    "comenet": {
        "num_layers": 1,
        "num_features": 16,
        "num_radial": 4,
        "num_basis_features": 8,
        "num_dense_layers": 1,
        "cutoff": 5.0,
    },
    "equiformer": {"num_layers": 1, "max_degree": 1},
    "mace": {"num_features": 8},
    "nequix": {"num_features": 8, "elements": (1, 6, 7, 8, 16)},
    "pace": {"num_features": 8},
    "painn_oc": {"cutoff": 6.0},
}
FURTHER_OPTIONS = {
    "so3krates": [
        {"radial_filter": "spline", "num_knots": 24, "energy_act": "silu", "learned_scale": True},
        {
            "radial_basis": "bernstein",
            "cutoff_fn": "exponential",
            "message_normalization": "avg_num_neighbors",
            "avg_num_neighbors": 6.0,
            "layer_norm_1": True,
            "layer_norm_2": True,
            "residual_mlp_1": True,
            "residual_mlp_2": True,
        },
    ],
    "painn": [{"radial_basis": "bessel", "cutoff_fn": "phys"}],
    "painn_oc": [
        {
            "cutoff_fn": "phys",
            "activation": "silu",
            "unit_directions": False,
            "envelope_exponent": None,
            "direct_forces": True,
            "layer_scales": (0.9, 1.1),
        }
    ],
    "dimenetpp": [{"max_degree": 3, "angle": "bond", "energy_bias": True, "rounded_bessel": True}],
    "spherenet": [{"max_degree": 2, "energy_bias": False, "rounded_bessel": True}],
    "comenet": [{"max_degree": 2, "num_dense_layers": 2, "rounded_bessel": True}],
    "faenet": [
        {
            "frames": "proper",
            "cutoff_fn": "step",
            "element_features": "table",
            "two_layers": False,
            "two_layer_updates": True,
            "skip": "add",
            "weighted": True,
        }
    ],
    "schnet": [
        {
            "num_filters": 24,
            "radial_basis": "bessel",
            "cutoff_fn": "phys",
            "activation": "silu",
            "learned_scale": True,
        }
    ],
    "nequip": [
        {
            "num_features": (8, 4, 4),
            "max_degree": 2,
            "parity": "natural",
            "elements": (1, 6, 7, 8, 16),
            "avg_num_neighbors": (4.0, 5.0, 6.0, 7.0, 8.0),
            "learned_roots": True,
            "energy_widths": (8,),
            "learned_scale": True,
            "remat": True,
        }
    ],
    "nequix": [
        {
            "num_features": (8, 4),
            "harmonics_degree": 2,
            "self_connection": "elements",
            "rms_norm": False,
            "elements": (1, 6, 7, 8, 16),
            "learned_scale": True,
            "remat": True,
        }
    ],
    "sevennet": [
        {
            "num_features": 8,
            "harmonics_degree": 2,
            "cutoff_onset": 3.5,
            "normalize_harmonics": False,
            "self_connection": ("linear", "elements"),
            "energy_widths": (8,),
            "use_bias": True,
            "learned_centers": False,
            "elements": (1, 6, 7, 8, 16),
        }
    ],
    "equivariant_transformer": [
        {
            "radial_filter": "spline",
            "num_knots": 24,
            "attn_activation": "tanh",
            "cutoff_lower": 0.7,
        },
        {
            "radial_basis": "gaussian",
            "trainable_rbf": True,
            "distance_influence": "values",
            "neighbor_embedding": False,
            "activation": "mish",
        },
        {"distance_influence": "none", "head": "scalar", "cutoff_fn": "phys"},
    ],
    "mace": [
        {
            "first_interaction": "agnostic_density",
            "interaction": "residual_density",
            "distance_transform": "agnesi",
            "zbl": True,
            "elements": (1, 6, 7, 8, 16),
        }
    ],
    "pace": [
        {
            "radial_basis": "bernstein",
            "learned_scale": True,
            "num_layers": 1,
            "elements": (1, 6, 7, 8, 16),
        }
    ],
    "allegro": [
        {
            "parity": "natural",
            "embedding": "spline",
            "num_splines": 6,
            "spline_span": 4,
            "elements": (1, 6, 7, 8, 16),
            "avg_num_neighbors": (3.0, 5.0, 4.0, 3.5, 6.0),
            "pair_cutoffs": (*[4.0] * 12, *[5.0] * 13),
            "path_channel_coupling": False,
            "latent_widths": (),
            "energy_widths": (),
            "learned_scale": True,
        }
    ],
}
DIRECT = {"direct_forces": True}  # of models that have this option
SCALE = 1.7  # eV per unit of the model's output
BUDGET = PaddingBudget(n_node=16, n_edge=72, n_graph=5)
RELATIVE = 1e-10


wigner_d = jax.jit(e3x.so3.wigner_d, static_argnums=1)
pytestmark = pytest.mark.usefixtures("double_precision")


@dataclasses.dataclass(eq=False)
class Case:
    """Model with generic parameters: biases and shifts are not zero."""

    model: nn.Module

    def __post_init__(self):
        self.cutoff = getattr(self.model, "cutoff", 5.0)
        self.conservative, self.smooth = (
            is_conservative(self.model),
            getattr(self.model, "smooth", True),
        )
        self.extensive = getattr(self.model, "extensive", True)
        params = quick_parameters(
            self.model,
            example_graph(np.float64),
            unit_variance=type(self.model).__module__.rpartition(".")[2] in UNIT_VARIANCE,
        )
        rng = np.random.default_rng(5)
        self.params = jax.tree.map(
            lambda p: (
                np.asarray(p, np.float32).astype(np.float64)
                + 0.05 * rng.standard_normal(np.shape(p))
            ),
            params,
        )
        # float32 represents these values exactly, for the comparison of precisions
        self.params = jax.tree.map(lambda p: p.astype(np.float32).astype(np.float64), self.params)
        self.apply = jax.jit(self.model.apply)
        self._evaluate = jax.jit(
            functools.partial(evaluate, self.model, energy_scale=SCALE),
            static_argnames="with_stress",
        )

    def graph(self, structures, budget=BUDGET, dtype=np.float64):
        columns = Columns.from_structures(structures)
        return build_batch(columns, budget, self.cutoff, dtype=dtype)

    def evaluate(self, params, graph):
        """Return energies, forces and, if the energy has derivatives, stress, as NumPy arrays.

        One compiled program serves molecules and crystals.
        """
        with_stress = has_energy_derivatives(self.model)
        result = self._evaluate(params, graph=with_cells(graph), with_stress=with_stress)
        return jax.tree.map(np.asarray, result)

    def __call__(self, *structures, budget=BUDGET, params=None):
        """Return energies (S,), forces (atoms, 3) and the scale of rounding.

        The scale is the sum of the absolute atomic energies.
        """
        result = self.evaluate(
            self.params if params is None else params, self.graph(structures, budget)
        )
        atoms = sum(len(s) for s in structures)
        return (
            result.energy[: len(structures)],
            result.forces[:atoms],
            float(np.abs(result.energies).sum()),
        )


def with_cells(graph):
    """Add cells and shifts of zero to a graph without them."""
    if "cell" in graph.globals:
        return graph
    dtype = graph.nodes["positions"].dtype
    cells, shifts = np.zeros((len(graph.n_node), 3, 3), dtype), np.zeros((len(graph.senders), 3))
    return graph._replace(
        globals={**graph.globals, "cell": cells},
        edges={**graph.edges, "shifts": shifts.astype(np.int32)},
    )


def further_options(name):
    """Combinations of options that are checked besides the defaults.

    One of them has direct forces if the model has this option.
    """
    options = FURTHER_OPTIONS.get(name, [])
    fields = models.find(name).__dataclass_fields__
    missing = "direct_forces" in fields and not any(o.get("direct_forces") for o in options)
    return [*options, DIRECT] if missing else options


def small_options(name):
    """Options that make the model `name` quick."""
    fields = models.find(name).__dataclass_fields__
    return {k: v for k, v in SMALL.items() if k in fields} | SMALLER.get(name, {})


@functools.cache
def case_of(name, further=-1):
    """Return the case of the model `name`, compiled once for all checks."""
    options = small_options(name)
    if further >= 0:
        options |= further_options(name)[further]
    return Case(models.create(name, **options))


def molecule(seed=0, numbers=(6, 1, 8, 7, 1, 16), box=3.0):
    """Return random atoms, at least 0.9 Å apart."""
    rng = np.random.default_rng(seed)
    while True:
        positions = rng.uniform(0, box, (len(numbers), 3))
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)[
            np.triu_indices(len(numbers), 1)
        ]
        if distances.min(initial=9.0) > 0.9:
            return Structure(np.array(numbers), positions)


def at(structure, positions):
    return dataclasses.replace(structure, positions=np.asarray(positions))


LARGE, SMALL_ONE, ATOM = (
    molecule(),
    molecule(1, (8, 1, 1), 2.0),
    Structure(np.array([8]), np.array([[1.0, 2.0, 3.0]])),
)


def assert_same(a, b, scale, relative=RELATIVE):
    np.testing.assert_allclose(a, b, rtol=0, atol=relative * scale)


def tight_graph(case, structure):
    """Return a graph without spare edges."""
    edges = int(graph_sizes(Columns.from_structures([structure]), case.cutoff).n_edge[0])
    return case.graph([structure], budget=PaddingBudget(len(structure) + 1, edges, 2))


def check_outputs(case):
    """Atomic energies are (N,), features (N, 1 or 2, (max_degree + 1)**2, F), in the graph's
    precision.
    """
    outputs = case.apply(case.params, tight_graph(case, LARGE))
    assert isinstance(outputs, AtomOutputs)
    num = len(LARGE) + 1
    assert outputs.energies.shape == (num,) and outputs.energies.dtype == np.float64
    atoms, parities, components, _ = outputs.features.shape
    assert atoms == num and parities in (1, 2) and np.sqrt(components).is_integer()
    assert outputs.features.dtype == np.float64


def check_atoms_interact(case):
    """Forces are not zero; otherwise the other checks would be vacuous."""
    energies, forces, _ = case(LARGE, SMALL_ONE)
    assert np.isfinite(energies).all() and np.isfinite(forces).all()
    assert np.abs(forces).max() > 1e-6


def check_rotation_and_reflection(case):
    energies, forces, scale = case(LARGE, SMALL_ONE)
    mirror = np.diag([1.0, -1.0, 1.0])
    turns = [*Rotation.random(2, rng=np.random.default_rng(0)).as_matrix()]
    if getattr(case.model, "mirror_symmetric", True):
        turns.append(mirror)
    else:  # as its class says, so it must differ
        mirrored, mirrored_forces, _ = case(at(LARGE, LARGE.positions @ mirror))
        change = np.abs(mirrored_forces @ mirror - forces[: len(LARGE)]).max()
        assert np.abs(mirrored - energies[0]) > 1e-8 * scale or change > 1e-8 * scale
    for turn in turns:
        turned = [at(s, s.positions @ turn.T) for s in (LARGE, SMALL_ONE)]
        turned_energies, turned_forces, _ = case(*turned)
        assert_same(turned_energies, energies, scale)
        assert_same(turned_forces, forces @ turn.T, max(np.abs(forces).max(), 1e-3 * scale))


def check_features_rotate(case):
    """Features of degree l rotate with the Wigner matrix of degree l."""
    features = np.asarray(case.apply(case.params, tight_graph(case, LARGE)).features)
    max_degree = int(np.sqrt(features.shape[2])) - 1
    # rows and columns in e3x's order; its points are row vectors
    turn = Rotation.random(rng=np.random.default_rng(1)).as_matrix()
    turned = at(LARGE, LARGE.positions @ turn)
    wigner = np.asarray(wigner_d(turn, max_degree))
    expected = np.einsum("npaf,ab->npbf", features, wigner)[: len(LARGE)]
    found = np.asarray(case.apply(case.params, tight_graph(case, turned)).features)[: len(LARGE)]
    assert_same(found, expected, np.abs(features).max())


def check_translation(case):
    energies, forces, scale = case(LARGE, SMALL_ONE)
    moved = [at(s, s.positions + np.array([1.3, -7.1, 2.9])) for s in (LARGE, SMALL_ONE)]
    moved_energies, moved_forces, _ = case(*moved)
    assert_same(moved_energies, energies, scale)
    assert_same(moved_forces, forces, max(np.abs(forces).max(), 1e-3 * scale))


def check_permutation(case):
    energies, forces, scale = case(LARGE)
    order = np.random.default_rng(2).permutation(len(LARGE))
    shuffled = Structure(LARGE.numbers[order], LARGE.positions[order])
    shuffled_energies, shuffled_forces, _ = case(shuffled)
    assert_same(shuffled_energies, energies, scale)
    assert_same(shuffled_forces, forces[order], max(np.abs(forces).max(), 1e-3 * scale))


def check_padding_and_batching(case):
    """Spare edges, other structures of a batch and padding do not change a result."""
    structures = (SMALL_ONE, ATOM, LARGE)
    energies, forces, scale = case(*structures)
    for alone, rows, s in ((LARGE, slice(4, 10), 2), (SMALL_ONE, slice(0, 3), 0)):
        alone_energies, alone_forces, _ = case(alone)
        assert_same(alone_energies, energies[s : s + 1], scale)
        assert_same(alone_forces, forces[rows], max(np.abs(forces).max(), 1e-3 * scale))
    # without spare edges; energies only, because forces would be another compiled program
    tight = case.apply(case.params, tight_graph(case, LARGE)).energies
    tight_energies = np.asarray(tight)[: len(LARGE)]
    assert_same(SCALE * tight_energies.sum(), energies[2], scale)


def check_padding_is_exactly_zero(case):
    result = case.evaluate(case.params, case.graph([SMALL_ONE, LARGE]))
    assert not np.asarray(result.forces)[9:].any()
    assert not np.asarray(result.energies)[9:].any()
    assert not np.asarray(result.energy)[2:].any()


def central_difference(function, step):
    """Return the fourth-order derivative at 0 of a function of one number."""
    return (8 * (function(step) - function(-step)) - (function(2 * step) - function(-2 * step))) / (
        12 * step
    )


def check_forces_are_minus_the_gradient(case):
    if not case.conservative:
        pytest.skip("the forces of this model are not the gradient of its energy")
    for structure in (LARGE, SMALL_ONE):
        _, forces, _ = case(structure)
        numeric = np.zeros_like(forces)
        for n, x in np.ndindex(forces.shape):
            unit = np.zeros_like(forces)
            unit[n, x] = 1.0
            numeric[n, x] = -central_difference(
                lambda h, s=structure, u=unit: case(at(s, s.positions + h * u))[0][0], 1e-4
            )
        assert_same(forces, numeric, np.abs(forces).max(), 1e-6)


def check_smooth_at_the_cutoff(case):
    """Energies and forces do not jump where a pair comes within the cutoff."""
    if not case.smooth:
        pytest.skip("the published form of this model jumps at the cutoff")

    def pair(distance):
        return case(
            Structure(np.array([6, 8]), np.array([[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]]) * [[distance]])
        )

    _, bonded, scale = pair(1.5)
    energy_in, force_in, _ = pair(case.cutoff - 1e-7)
    energy_out, force_out, _ = pair(case.cutoff + 1e-7)
    assert_same(energy_in, energy_out, max(scale, 1.0), 1e-6)
    assert_same(force_in, force_out, max(scale, np.abs(bonded).max()), 1e-6)
    assert_same(force_out, 0.0, scale, 1e-12)


def check_trains_on_forces(case):
    """The parameter gradient of a loss of forces is finite and equals finite differences."""
    graph = case.graph([LARGE, ATOM, SMALL_ONE])
    target = np.random.default_rng(4).standard_normal((BUDGET.n_node, 3))

    def loss(result):
        return ((result.forces - target) ** 2).sum() + (result.energy**2).sum()

    gradient_of = jax.jit(
        jax.grad(lambda params, graph: loss(evaluate(case.model, params, graph, SCALE)))
    )
    gradient = gradient_of(case.params, graph)
    again = gradient_of(case.params, graph)
    jax.tree.map(np.testing.assert_array_equal, gradient, again)  # identical each time
    leaves, structure = jax.tree.flatten(case.params)
    grads = [np.asarray(g) for g in jax.tree.leaves(gradient)]

    def loss_of(leaves):
        return loss(case.evaluate(jax.tree.unflatten(structure, leaves), graph))

    assert all(np.isfinite(g).all() for g in grads)
    assert max(np.abs(g).max() for g in grads) > 0
    rng = np.random.default_rng(6)
    for picked in [*rng.permutation(len(leaves))[:4][:, None], np.arange(len(leaves))]:
        direction = [
            rng.standard_normal(p.shape) if n in picked else np.zeros(p.shape)
            for n, p in enumerate(leaves)
        ]
        length = np.sqrt(sum((d * d).sum() for d in direction))
        direction = [d / length for d in direction]
        numeric = central_difference(
            lambda h, along=direction: loss_of([p + h * d for p, d in zip(leaves, along)]), 2e-4
        )
        analytic = sum(float((g * d).sum()) for g, d in zip(grads, direction))
        assert analytic == pytest.approx(numeric, rel=2e-5, abs=1e-7 * loss_of(leaves))


def check_isolated_atoms(case):
    """The energy of an atom without neighbors is independent of its position."""
    far = Structure(np.array([8, 6]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 50.0]]))
    graph = case.graph([ATOM, far])
    assert not graph.n_edge[:2].any()
    result = case.evaluate(case.params, graph)
    assert np.isfinite(result.energy).all() and not np.asarray(result.forces).any()
    again = case.evaluate(case.params, case.graph([at(ATOM, [[9.0, 9.0, 9.0]]), far]))
    np.testing.assert_array_equal(result.energy, again.energy)
    if getattr(case.model, "local", True):
        scale = np.abs(np.asarray(result.energies)).sum()
        assert_same(result.energies[0], result.energies[1], scale)


def check_batch_of_padding_alone(case):
    result = case.evaluate(
        case.params,
        case.graph([ATOM])._replace(
            n_node=np.array([0, BUDGET.n_node, 0, 0, 0], np.int32),
            n_edge=np.array([0, BUDGET.n_edge, 0, 0, 0], np.int32),
        ),
    )
    assert np.isfinite(result.energy).all() and not np.asarray(result.forces).any()


def check_padding_atoms_stay_small(case):
    """Thousands of padding edges join one padding atom to itself: overflow would make everything
    NaN.
    """
    graph = case.graph([LARGE], budget=PaddingBudget(len(LARGE) + 4, 20_000, 3))
    features = np.abs(np.asarray(case.apply(case.params, graph).features))
    assert features[len(LARGE) :].max() < 100 * features[: len(LARGE)].max()


def check_linear_molecule(case):
    """Carbon dioxide: forces are finite and along the axis, in any orientation."""
    for axis in (
        np.array([0.0, 0.0, 1.0]),
        np.array([1.0, 0.0, 0.0]),
        np.array([0.6, -0.48, 0.64]),
    ):
        _, forces, scale = case(
            Structure(np.array([8, 6, 8]), np.array([[-1.2], [0.0], [1.1]]) * axis)
        )
        assert np.isfinite(forces).all() and np.abs(forces).max() > 1e-6
        assert_same(
            forces - (forces @ axis)[:, None] * axis, 0.0, max(np.abs(forces).max(), 1e-3 * scale)
        )


def check_float32(case):
    """Results in single precision equal those in double precision.

    A model that lists each pair once processes it in both directions here, and the other way round,
    so that one compiled program serves this and `check_undirected`, which is more exact.
    """
    energies, forces, scale = case(LARGE, SMALL_ONE)
    model = case.model
    if "undirected" in model.__dataclass_fields__:
        model = model.clone(undirected=not model.undirected)
    evaluate_other = jax.jit(functools.partial(evaluate, model, energy_scale=SCALE))
    with jax.enable_x64(False):
        params = jax.tree.map(lambda p: np.asarray(p, np.float32), case.params)
        graph = case.graph([LARGE, SMALL_ONE], dtype=np.float32)
        result = jax.tree.map(np.asarray, evaluate_other(params, graph=graph))
        assert result.energy.dtype == np.float32 and result.forces.dtype == np.float32
        assert_same(result.energy[:2], energies, scale, 1e-4)
        assert_same(result.forces[:9], forces, max(np.abs(forces).max(), 1e-2 * scale), 1e-4)


def check_extensive(case):
    """Two copies that are far apart have twice the energy, and each the forces of one."""
    if not case.extensive:
        pytest.skip("the energy of this model is not extensive")
    energies, forces, scale = case(LARGE)
    both = Structure(
        np.tile(LARGE.numbers, 2),
        np.concatenate([LARGE.positions, LARGE.positions + [100.0, 0.0, 0.0]]),
    )
    double, double_forces, _ = case(both)
    assert_same(double, 2 * energies, scale)
    assert_same(double_forces, np.tile(forces, (2, 1)), max(np.abs(forces).max(), 1e-3 * scale))


def check_undirected(case):
    """Processing each pair once equals the directed list; models without this option accept any
    list.
    """
    if "undirected" not in case.model.__dataclass_fields__:
        graph = tight_graph(case, LARGE)
        energies = np.asarray(case.apply(case.params, graph).energies)
        again = case.apply(case.params, graph._replace(edges={})).energies
        assert_same(again, energies, float(np.abs(energies).sum()))
        return
    graph = case.graph([LARGE, SMALL_ONE])
    result = case.evaluate(case.params, graph)
    scale, force = float(np.abs(result.energies).sum()), float(np.abs(result.forces).max())
    other = case.model.clone(undirected=not case.model.undirected)
    again = jax.jit(lambda params, g: evaluate(other, params, g, SCALE))(case.params, graph)
    assert_same(again.energy, result.energy, scale)
    assert_same(again.forces, result.forces, max(force, 1e-3 * scale))


def check_periodic(case):
    """A doubled cell has twice the energy; forces and stress are derivatives of it."""
    cell = np.array([[4.1, 0.0, 0.0], [0.4, 4.6, 0.0], [-0.5, 0.3, 5.2]])
    crystal = Structure(
        np.array([6, 8]),
        np.array([[0.1, 0.2, 0.3], [1.6, 2.1, 2.4]]),
        cell=cell,
        pbc=np.ones(3, bool),
    )
    doubled = Structure(
        np.tile(crystal.numbers, 2),
        np.concatenate([crystal.positions, crystal.positions + cell[1]]),
        cell=cell * [[1], [2], [1]],
        pbc=np.ones(3, bool),
    )
    with_stress = has_energy_derivatives(case.model)

    def run(structure):
        return case.evaluate(case.params, case.graph([structure]))

    one, two = run(crystal), run(doubled)
    scale = float(np.abs(two.energies).sum())
    force = max(float(np.abs(one.forces).max()), 1e-3 * scale)
    if case.extensive:
        assert_same(two.energy[0], 2 * one.energy[0], scale)
        assert_same(two.forces[:4], np.tile(one.forces[:2], (2, 1)), force)
    if case.conservative:
        assert_same(one.forces.sum(0), 0.0, force)
    if not with_stress:
        return
    assert_same(two.stress[0], one.stress[0], max(float(np.abs(one.stress).max()), 1e-4 * scale))

    def strained(h):
        deformation = np.eye(3)
        deformation[0, 1] = deformation[1, 0] = h / 2
        deformation[2, 2] = 1 + h
        return float(
            run(
                dataclasses.replace(
                    crystal, positions=crystal.positions @ deformation, cell=cell @ deformation
                )
            ).energy[0]
        )

    numeric = central_difference(strained, 1e-4) / abs(np.linalg.det(cell))
    stress = np.asarray(one.stress[0])
    assert_same(stress[0, 1] + stress[2, 2], numeric, np.abs(stress).max(), 1e-6)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
CASES = [(name, n) for name in models.names() for n in range(-1, len(further_options(name)))]


# Checks with programs of their own, which are slow tests for models that are meant for properties,
# and for one whose layers are those of NequIP.
COSTLY = (check_trains_on_forces, check_float32, check_undirected, check_padding_atoms_stay_small)


def is_slow(name, check):
    """Return whether a check of a model is a slow test.

    `check_float32` detects faults of the list of pairs as well, so `check_undirected` is slow where
    it has to compile a program.
    """
    if name in ("spherenet", "comenet", "nequix") and check in COSTLY:
        return True
    return check is check_undirected and "undirected" in models.find(name).__dataclass_fields__


def contract_cases():
    """Yield each check of each model."""
    for name in models.names():
        for check in CHECKS:
            marks = [pytest.mark.slow] * is_slow(name, check)
            identity = f"{name}-{check.__name__.removeprefix('check_')}"
            yield pytest.param(name, check, id=identity, marks=marks)


@pytest.mark.parametrize(("name", "check"), list(contract_cases()))
def test_contract(name, check):
    check(case_of(name))


QUICK = (
    check_rotation_and_reflection,
    check_forces_are_minus_the_gradient,
    check_smooth_at_the_cutoff,
    check_isolated_atoms,
    check_linear_molecule,
)  # one compilation serves them all


def further_cases():
    """Yield the cases with further options.

    Most of them are slow tests: the fast tests of the importers compare such options with the
    reference implementations. Direct forces run, because most checks treat them differently.
    """
    for name, further in CASES:
        if further >= 0:
            slow = name != "painn_oc" or not further_options(name)[further].get("direct_forces")
            yield pytest.param(name, further, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(
    "check",
    [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CHECKS],
    ids=lambda c: c.__name__.removeprefix("check_"),
)
@pytest.mark.parametrize(("name", "further"), list(further_cases()))
def test_contract_with_further_options(name, further, check):
    check(case_of(name, further))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow)
        if n in ("so3krates", "equivariant_transformer", "painn_oc", "faenet", "equiformer")
        else n
        for n in models.names()
        if "cutoff_fn" in models.create(n).__dataclass_fields__
    ],
)
def test_second_derivatives_go_to_zero_at_the_cutoff(name):
    """With a sufficiently flat cutoff function; with the published cosine they jump."""
    case = Case(models.create(name, **small_options(name), cutoff_fn="phys"))

    def force(distance):
        positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance]])
        return case(Structure(np.array([6, 8]), positions))[1][1, 2]

    def curvature(distance, step=5e-7):
        return (force(distance + step) - force(distance - step)) / (2 * step)

    inside = abs(curvature(0.6 * case.cutoff))
    assert inside > 1e-6
    assert abs(curvature(case.cutoff - 1e-6)) < 1e-4 * inside


@pytest.mark.slow
def test_neighborhood_start_is_smooth_at_the_cutoff():
    options = small_options("so3krates")
    check_smooth_at_the_cutoff(Case(models.create("so3krates", **options, ev_init="neighborhood")))


TINY = '''
"""Pairs of atoms alone, in a file that lies in the folder of models."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from mlip_jax.graphs.graph import pairs
from mlip_jax.models.layers.heads import AtomicEnergy, AtomOutputs, embed_elements
from mlip_jax.models.layers.basic import Dense, cosine_cutoff, gather, physnet_basis, safe_norm, segment_sum


class Model(nn.Module):

    @nn.compact
    def __call__(self, graph):
        edge, numbers = pairs(graph, False), graph.nodes["numbers"]
        distances = safe_norm(edge.displacements)
        filters = Dense(8, name="filters")(physnet_basis(distances, 8, 5.0)) * cosine_cutoff(distances, 5.0)[:, None]
        features = embed_elements(self, numbers, 8, distances.dtype)
        features = features + segment_sum(filters * gather(features, edge.senders), edge.receivers, len(numbers))
        energies = AtomicEnergy(8, "silu", zero_init=False, name="energy")(jax.nn.silu(features), numbers)
        return AtomOutputs(energies, features[:, None, None, :])
'''


@pytest.fixture
def new_model(tmp_path, monkeypatch):
    """Function that adds a file with the given text to the models and returns its case."""
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    made = []

    def make(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        made.append(name)
        assert name in models.names()
        return Case(models.create(name))

    yield make
    for name in made:
        sys.modules.pop(f"mlip_jax.models.{name}", None)
        if hasattr(models, name):
            delattr(models, name)


def test_a_new_file_is_found_and_keeps_the_contract(new_model):
    assert len(TINY.strip().splitlines()) < 40
    case = new_model("tiny_pairs", TINY)
    for check in CHECKS:
        check(case)


FAULTS = {
    "depends_on_direction": (
        "safe_norm(edge.displacements)",
        "safe_norm(edge.displacements * jnp.array([1.0, 1.0, 1.1]))",
        check_rotation_and_reflection,
    ),
    "depends_on_place": (
        "energies = Atomic",
        "features += 1e-6 * graph.nodes['positions'][:, :1]; energies = Atomic",
        check_translation,
    ),
    "jumps_at_the_cutoff": (
        "* cosine_cutoff(distances, 5.0)[:, None]",
        "* (distances > 0)[:, None]",
        check_smooth_at_the_cutoff,
    ),
    "unsafe_root": (
        "energies = Atomic",
        "features += jnp.sqrt(jnp.square(features - jax.lax.stop_gradient(features))); energies = Atomic",
        check_trains_on_forces,
    ),
    "padding_edges_count": (
        "* cosine_cutoff(distances, 5.0)[:, None]",
        "",
        check_padding_atoms_stay_small,
    ),
    "mean_over_atoms": (
        "energies = Atomic",
        "features = features - features.mean(0); energies = Atomic",
        check_padding_and_batching,
    ),
    "depends_on_order": (
        "energies = Atomic",
        "features = features * jnp.arange(len(numbers))[:, None]; energies = Atomic",
        check_permutation,
    ),
    "gradient_is_cut": (
        "filters = Dense",
        "distances = jax.lax.stop_gradient(distances); filters = Dense",
        check_forces_are_minus_the_gradient,
    ),
    "single_precision": (
        "energies = Atomic",
        "features = features.astype(jnp.float32); energies = Atomic",
        check_outputs,
    ),
}


DIRECT_TINY = TINY.replace(
    "(nn.Module):\n", "(nn.Module):\n    direct_forces: bool = True\n"
).replace(
    "return AtomOutputs(energies, features[:, None, None, :])",
    "pulled = features[:, :1] * segment_sum(edge.displacements * filters[:, :1], edge.receivers, len(numbers))\n"
    "        return AtomOutputs(energies, features[:, None, None, :], forces=pulled)",
)


def test_direct_forces_turn_with_the_molecule(new_model):
    case = new_model("tiny_direct", DIRECT_TINY)
    assert not case.conservative
    _, forces, _ = case(LARGE)
    assert np.abs(forces.sum(0)).max() > 1e-6  # the forces of a gradient add up to zero
    for check in (check_rotation_and_reflection, check_trains_on_forces):
        check(case)
    with pytest.raises(AssertionError):
        check_rotation_and_reflection(
            new_model(
                "tiny_direct_fault",
                DIRECT_TINY.replace("forces=pulled", "forces=pulled + jnp.abs(pulled)"),
            )
        )


@pytest.mark.parametrize(
    ("old", "new"), [("forces=pulled", ""), ("direct_forces: bool = True", "nothing: int = 0")]
)
def test_forces_are_returned_if_and_only_if_the_model_says_so(new_model, old, new):
    case = new_model("tiny_direct_unsaid", DIRECT_TINY.replace(old, new))
    with pytest.raises(ValueError, match="if and only if"):
        case(LARGE)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(new_model, fault):
    """The checks can fail: each of these small faults is seen by the check that is for it."""
    old, new, check = FAULTS[fault]
    assert TINY.count(old) == 1
    with pytest.raises(AssertionError):
        check(new_model(f"fault_{fault}", TINY.replace(old, new)))


def test_every_name_is_a_model():
    for name in models.names():
        assert issubclass(importlib.import_module(f"mlip_jax.models.{name}").Model, nn.Module)


@pytest.mark.parametrize("name", models.names())
def test_parameters_have_shapes_without_compilation(name):
    """As when a checkpoint is opened: outside of jit, atomic numbers are NumPy arrays."""
    model = models.create(name, **small_options(name))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph()))
    assert jax.tree.leaves(shapes)


def test_unknown_model_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'so3krates'.*painn"):
        models.create("so3krate")


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'num_features'"):
        models.create("painn", num_feature=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("radial_basis", "gausian"),
        ("cutoff_fn", "cosin"),
        ("qk_activation", "silo"),
        ("energy_act", "silo"),
        ("ev_init", "zero"),
        ("message_normalization", "sqrt"),
        ("radial_filter", "splines"),
        ("num_features", 30),
    ],
)
def test_invalid_option_value_is_reported(option, value):
    model: Any = models.create("so3krates", **{option: value})
    with pytest.raises(ValueError, match=str(value)):
        jax.eval_shape(model.init, jax.random.key(0), example_graph())

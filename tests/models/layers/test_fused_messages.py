"""Tests for the fused kernels of PaiNN's messages, interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.graph import SlotGeometry
from mlip_jax.graphs.neighbor_slots import add_neighbor_slots
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models import create
from mlip_jax.models.layers.fused_kernels import FormSizes, evaluate
from mlip_jax.models.layers.fused_messages import fused_messages, wants_fused
from mlip_jax.models.layers.slot_messages import SlotFilters, slot_messages
from mlip_jax.potential import evaluate as evaluate_model
from mlip_jax.potential import example_graph, hessian_columns
from mlip_jax.structure import Structure
from mlip_jax.target_device import compiling_for, fused_kernels, portable_programs

# more atoms and slots than a block of a program has, and not multiples of them
ATOMS, SLOTS, BASIS, FEATURES = 5, 9, 3, 16


def plain_form(arrays, bases, senders):
    """Compute the form of fused_kernels.py as it is written there."""
    x = arrays["x"].reshape(ATOMS, 5, FEATURES)[senders]  # (N, K, 5, F)
    y = arrays["y"].reshape(ATOMS, 1, 4, FEATURES)
    pairs = jnp.concatenate([x[:, :, :1] * y[:, :, :1], x[:, :, 1:2] * y[:, :, 1:]], axis=2)
    last = (x[:, :, 2:] * y[:, :, 1:]).sum(2, keepdims=True)
    pairs = jnp.concatenate([pairs, last], axis=2)  # (N, K, 5, F)
    tables = arrays["tables"].reshape(BASIS, 3, FEATURES)[:, jnp.array([0, 1, 1, 1, 2])]
    terms = zip(arrays["coefficients"], bases)
    return sum(jnp.einsum("qnk,nkb,bqf,nkqf->", c, h, tables, pairs) for c, h in terms)


def test_each_kernel_is_a_derivative_of_the_form():
    """Catches wrong indices, signs, masks of padding and parts of the arrays."""
    rng = np.random.default_rng(0)
    atoms = np.arange(ATOMS)
    # symmetric slots: all other atoms, itself, and empty ones, whose basis is zero
    senders = np.concatenate([np.tile(atoms, (ATOMS, 1)), np.tile(atoms[:, None], 4)], axis=1)
    bases = [np.zeros((ATOMS, SLOTS, BASIS)) for _ in range(2)]
    coefficients = [np.zeros((5, ATOMS, SLOTS)) for _ in range(2)]
    sign = np.array([1, -1, -1, -1, 1])[:, None, None]
    for h, c in zip(bases, coefficients):
        half = rng.normal(size=(ATOMS, ATOMS, BASIS))
        h[:, :ATOMS] = half + half.transpose(1, 0, 2)
        half = rng.normal(size=(5, ATOMS, ATOMS))
        c[:, :, :ATOMS] = half + sign * half.transpose(0, 2, 1)
    arrays = {
        "x": rng.normal(size=(ATOMS, 5 * FEATURES)),
        "y": rng.normal(size=(ATOMS, 4 * FEATURES)),
        "tables": rng.normal(size=(BASIS, 3 * FEATURES)),
        "coefficients": coefficients,
    }
    sizes = FormSizes(ATOMS, SLOTS, BASIS, FEATURES, True, True, True)
    with jax.enable_x64(True):
        arrays, bases, senders = jax.tree.map(jnp.asarray, (arrays, bases, senders))
        expected = jax.jit(jax.grad(plain_form))(arrays, bases, senders)
        results = {"send": "y", "back": "x", "edge": "coefficients", "table": "tables"}
        for face, name in results.items():
            given = {key: value for key, value in arrays.items() if key != name}
            found = evaluate(face, sizes, given, bases, senders.astype(jnp.int32))
            exact = expected[name] if name == "coefficients" else [expected[name]]
            for a, b in zip(found, exact, strict=True):
                # rows of the basis are zero in empty slots
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_nan_of_an_atom_stays_in_its_rows():
    """Catches padding of the kernels that reads the first atom, whose molecule may be broken."""
    senders = jnp.tile(jnp.arange(ATOMS, dtype=jnp.int32)[:, None], SLOTS)
    sizes = FormSizes(ATOMS, SLOTS, BASIS, FEATURES, False, True, True)
    arrays = {
        "x": jnp.ones((ATOMS, 2 * FEATURES)).at[0].set(jnp.nan),
        "tables": jnp.ones((BASIS, 2 * FEATURES)),
        "coefficients": [jnp.ones((5, ATOMS, SLOTS)).at[:, 0].set(jnp.nan)],
    }
    (found,) = evaluate("send", sizes, arrays, [jnp.ones((ATOMS, SLOTS, BASIS))], senders)
    np.testing.assert_array_equal(np.isnan(found).any(1), [True] + [False] * (ATOMS - 1))


@pytest.mark.parametrize("has_vectors", [False, True])
def test_messages_equal_those_of_the_usual_sums(has_vectors):
    """Catches arrays that are packed in another order than the kernels read them."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        tables = [jnp.asarray(rng.normal(size=(BASIS, FEATURES))) for _ in range(3)]
        phi = jnp.asarray(rng.normal(size=(ATOMS, 3 * FEATURES)))
        v = jnp.asarray(rng.normal(size=(ATOMS, 3, FEATURES))) if has_vectors else None
        distances = jnp.asarray(rng.uniform(0.5, 1.5, (ATOMS, SLOTS)))
        geometry = SlotGeometry(
            jnp.asarray(rng.integers(0, ATOMS, (ATOMS, SLOTS)), jnp.int32),
            None,
            jnp.asarray(rng.normal(size=(ATOMS, SLOTS, 3))),
        )
        filters = SlotFilters(lambda d: jnp.stack([d, d**2, d**3], axis=-1), distances)
        expected = slot_messages(phi, v, [filters(table) for table in tables], geometry)
        found = fused_messages(phi, v, tables, filters.bases, distances, geometry)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("face", ["send", "back", "edge", "table"])
def test_kernels_are_translated_for_gpus(face):
    """Catches operations that the interpreter knows but the compiler for GPUs does not."""
    sizes = FormSizes(ATOMS, SLOTS, BASIS, FEATURES, True, True, False)

    def shape(*dimensions):
        return jax.ShapeDtypeStruct(dimensions, jnp.float32)

    arrays = {
        "x": shape(ATOMS, 5 * FEATURES),
        "y": shape(ATOMS, 4 * FEATURES),
        "tables": shape(BASIS, 3 * FEATURES),
        "coefficients": [shape(5, ATOMS, SLOTS)] * 2,
    }
    del arrays[{"send": "y", "back": "x", "edge": "coefficients", "table": "tables"}[face]]
    bases = [shape(ATOMS, SLOTS, BASIS)] * 2
    senders = jax.ShapeDtypeStruct((ATOMS, SLOTS), jnp.int32)
    function = jax.jit(lambda *args: evaluate(face, sizes, *args))
    text = function.trace(arrays, bases, senders).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1


def test_kernels_are_used_only_on_request_and_for_sizes_that_they_support(monkeypatch):
    monkeypatch.delenv("MLIP_JAX_FUSED_KERNELS", raising=False)
    with compiling_for("gpu"):
        assert not wants_fused(128, jnp.float32)
        monkeypatch.setenv("MLIP_JAX_FUSED_KERNELS", "1")
        assert wants_fused(128, jnp.float32)
        assert not wants_fused(132, jnp.float32) and not wants_fused(128, jnp.float64)
        with portable_programs():  # other platforms read them, too
            assert not wants_fused(128, jnp.float32)
    for platform in ("cpu", "tpu"):
        with compiling_for(platform):
            assert not wants_fused(128, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_kernels_change_no_energy_force_gradient_or_hessian(dtype, tolerance):
    rng = np.random.default_rng(3)
    model = create(
        "painn", cutoff=2.2, num_features=16, num_layers=2, num_radial=5, zero_init=False
    )
    grid = 1.1 * np.array([[x, y, z] for x in range(2) for y in range(2) for z in range(2)])
    molecules = [
        Structure(numbers=rng.choice([1, 6, 8], n), positions=grid[:n] + rng.normal(0, 0.1, (n, 3)))
        for n in (5, 1, 7)
    ]
    with jax.enable_x64(dtype == np.float64):
        columns = Columns.from_structures(molecules)
        graph = build_batch(columns, PaddingBudget(16, 160, 5), 2.2, dtype=dtype)
        outline = jax.eval_shape(model.init, jax.random.key(0), example_graph())
        params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(dtype), outline)
        directions = rng.normal(size=(1, 16, 3)).astype(dtype)

        def loss(params, graph):
            out = evaluate_model(model, params, graph, 1.0)
            return (out.energy**2).sum() + (out.forces**2).sum(), (out.energy, out.forces)

        def compute(params):
            slotted = add_neighbor_slots(jax.tree.map(jnp.asarray, graph), 8)
            columns = hessian_columns(model, params, slotted, 1.0, directions)
            return jax.value_and_grad(loss, has_aux=True)(params, slotted), columns

        expected = jax.jit(lambda p: compute(p))(params)
        with fused_kernels(True):
            found = jax.jit(lambda p: compute(p))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (np.abs(b).max() + 1e-2))

"""Tests for irreps, linear maps, networks and gates of equivariant features.

Expected values follow e3nn's definitions, written with loops.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers.tensor_products.gates import gate_for, layout
from mlip_jax.models.layers.tensor_products.irreps import (
    Irrep,
    merge,
    natural,
    parse,
    product,
    to_text,
)
from mlip_jax.models.layers.tensor_products.linear import (
    NORMALIZATION,
    ElementLinear,
    IrrepsLinear,
    ScalarNetwork,
)

pytestmark = pytest.mark.usefixtures("double_precision")
RNG = np.random.default_rng(1)


def features_of(text, num=4):
    return {irrep: jnp.asarray(RNG.normal(size=(num, irrep.size, channels))) for channels, irrep in parse(text)}


def initialized(module, *args, **kwargs):
    """Parameters in float64 that float32 does not have."""
    params = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)
    return jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape)), params)


def test_irreps():
    assert parse("32x0e+16x1o + 2e") == ((32, Irrep(0, 1)), (16, Irrep(1, -1)), (1, Irrep(2, 1)))
    assert to_text(parse("32x0e+16x1o")) == "32x0e+16x1o"
    assert [str(irrep) for irrep in sorted(irrep for _, irrep in parse("2e+1e+1o+0e+0o"))] == \
        ["0o", "0e", "1o", "1e", "2e"]
    assert [str(irrep) for irrep in product(Irrep(1, -1), Irrep(2, 1))] == ["1o", "2o", "3o"]
    assert merge(parse("2x0e+3x1o+4x0e")) == parse("6x0e+3x1o")
    assert [str(irrep) for irrep in natural(2)] == ["0e", "1o", "2e"]
    with pytest.raises(ValueError, match="must have the form '32x0e"):
        parse("32x0")


def test_linear_divides_by_the_root_of_its_inputs():
    x = features_of("3x0e+5x1o")
    module = IrrepsLinear(parse("2x0e+4x1o+6x1e"))
    params = initialized(module, x)
    out = module.apply(params, x)
    for irrep, num in ((Irrep(0, 1), 3), (Irrep(1, -1), 5)):
        expected = np.einsum("ncu,uw->ncw", x[irrep], params["params"][str(irrep)]) / np.sqrt(num)
        np.testing.assert_allclose(out[irrep], expected, rtol=1e-12)
    assert out[Irrep(1, 1)].shape == (4, 3, 6) and not np.asarray(out[Irrep(1, 1)]).any()


@pytest.mark.parametrize("elements", [None, (1, 6, 8)])
@pytest.mark.parametrize("num", [4, 200])
def test_element_linear_is_the_product_with_attributes(num, elements):
    """Few and many atoms take the weights in different orders."""
    numbers = jnp.asarray(RNG.choice([1, 6, 8], num))
    x = features_of("3x0e+2x1o", num)
    rows = 119 if elements is None else 3
    index = np.asarray(numbers) if elements is None else np.searchsorted(elements, numbers)
    module = ElementLinear(parse("2x0e+4x1o+6x1e"), elements)
    apply = jax.jit(module.apply)
    one_hot = initialized(module, x, numbers)
    attributes = jnp.asarray(RNG.normal(size=(rows, 5)))
    dense = initialized(module, x, numbers, attributes)
    for irrep, channels in ((Irrep(0, 1), 3), (Irrep(1, -1), 2)):
        weights = one_hot["params"][str(irrep)][index]
        expected = np.einsum("ncu,nuw->ncw", x[irrep], weights) / np.sqrt(channels)
        np.testing.assert_allclose(apply(one_hot, x, numbers)[irrep], expected, rtol=1e-10, atol=1e-12)
        expected = np.einsum("ncu,nv,vuw->ncw", x[irrep], attributes[index], dense["params"][str(irrep)])
        out = apply(dense, x, numbers, attributes)
        np.testing.assert_allclose(out[irrep], expected / np.sqrt(5 * channels), rtol=1e-10, atol=1e-12)
        assert Irrep(1, 1) not in out


def silu(x):
    return x / (1 + np.exp(-x))


def test_networks_of_both_forms():
    x = jnp.asarray(RNG.normal(size=(4, 5)))
    for form, act, gain in (("e3nn", lambda x: 1.6791767923989418 * silu(x), 1), ("nequip", silu, 2)):
        module = ScalarNetwork((7, 6, 3), form=form)
        params = initialized(module, x)
        w = [params["params"][f"kernel_{n}"] for n in range(3)]
        hidden = act(act(x @ w[0] / np.sqrt(5)) @ w[1] * np.sqrt(gain / 7))
        np.testing.assert_allclose(module.apply(params, x), hidden @ w[2] * np.sqrt(gain / 6), rtol=1e-10)
        filters = module.apply(params, x, method="path_weights")
        np.testing.assert_allclose(filters.hidden, hidden, rtol=1e-10)
        np.testing.assert_allclose(filters.values(), module.apply(params, x), rtol=1e-10)
    with pytest.raises(ValueError, match="form must be"):
        initialized(ScalarNetwork((3,), form="other"), x)


def test_normalization_constants_are_near_the_integrals():
    """They are estimates, within 0.3 % of the integrals: a slipped digit would be farther off."""
    z = np.linspace(-12, 12, 200001)
    weight = np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    for name, function in (("silu", silu), ("tanh", np.tanh), ("relu", lambda x: np.maximum(x, 0)), ("abs", np.abs)):
        assert NORMALIZATION[name] == pytest.approx(1 / np.sqrt((function(z) ** 2 * weight).sum()), rel=3e-3)


def test_gate_with_even_gates():
    """Blocks of the input: 0o scalars, then 0e scalars with the gates, in the order of the output."""
    gate = gate_for(parse("3x0e+2x0o+4x1e+5x1o"), [irrep for _, irrep in parse("0e+1o+1e")], natural(1))
    assert to_text(gate.inputs) == "2x0o+12x0e+5x1o+4x1e" and to_text(gate.output) == "3x0e+2x0o+4x1e+5x1o"
    x = features_of("2x0o+12x0e+5x1o+4x1e")
    out = gate(x)
    gates = 1.6791767923989418 * silu(np.asarray(x[Irrep(0, 1)]))
    np.testing.assert_allclose(out[Irrep(0, 1)], gates[..., :3], rtol=1e-12)
    np.testing.assert_allclose(out[Irrep(0, -1)], 1.5937334472592695 * np.tanh(x[Irrep(0, -1)]), rtol=1e-12)
    np.testing.assert_allclose(out[Irrep(1, 1)], x[Irrep(1, 1)] * gates[..., 3:7], rtol=1e-12)
    np.testing.assert_allclose(out[Irrep(1, -1)], x[Irrep(1, -1)] * gates[..., 7:], rtol=1e-12)


def test_gate_with_odd_gates_and_unreached_irreps():
    gate = gate_for(parse("3x0e+2x0o+4x1e"), [Irrep(1, 1)], [Irrep(1, -1)])
    assert to_text(gate.inputs) == "2x0o" and gate.parity == -1
    assert list(gate(features_of("2x0o"))) == [Irrep(0, -1)]


def test_layout_is_that_of_e3x():
    x = features_of("3x0e+2x1o+2x1e")
    joined = layout(x, 2, True)
    assert joined.shape == (4, 2, 9, 3)
    np.testing.assert_array_equal(joined[:, 1, 1:4, :2], x[Irrep(1, -1)])
    np.testing.assert_array_equal(joined[:, 0, 1:4, :2], x[Irrep(1, 1)])
    assert not np.asarray(joined[:, :, 4:]).any() and not np.asarray(joined[:, :, 1:4, 2]).any()
    assert layout({Irrep(0, 1): x[Irrep(0, 1)], Irrep(1, 1): x[Irrep(1, 1)]}, 1, False).shape == (4, 1, 4, 3)

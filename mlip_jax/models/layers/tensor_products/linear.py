"""Linear maps of equivariant features, and networks of scalars, with the normalizations of e3nn.

Parameters start with unit variance; the root of the number of inputs divides the result. All maps
act on the channels of each irrep separately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.graphs.element_rows import element_rows
from mlip_jax.models.layers.basic import ACTIVATIONS, gather
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, Features, Irreps
from mlip_jax.target_device import target_platform

# _MAX_PRODUCTS: number of elements up to which a device multiplies by the matrices of all of them.
_MAX_PRODUCTS = 16
FORMS = ("e3nn", "nequip", "nequix")  # normalizations of networks and gates

# Factors that give activations a unit second moment for normally distributed inputs. They are
# e3nn's estimates from a million random numbers; the integrals differ by 0.2 %.
NORMALIZATION = {
    "silu": 1.6791767923989418,
    "tanh": 1.5937334472592695,
    "relu": 1.4163393446331365,
    "sigmoid": 1.8467055342154763,
    "abs": 1.001110600838467,
    "shifted_softplus": 1.878204668541552,
    "elu": 1.2467863885570512,
    "gelu": 1.5360642850770576,
    "mish": 1.4891609082630328,
}

# The same factors of e3nn-jax, from a million quantiles; the integrals differ by 0.002 %.
QUANTILE_NORMALIZATION = {"silu": 1.6765620560798837, "tanh": 1.5925386426301724}


def normalized_activation(name: str, factors: Mapping[str, float] = NORMALIZATION) -> Callable:
    """Return the activation `name` (layers.ACTIVATIONS) times its normalization constant."""
    if name not in factors or name not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(set(factors) & set(ACTIVATIONS))}, "
            f"received {name!r}"
        )
    return lambda x: factors[name] * ACTIVATIONS[name](x)


class IrrepsLinear(nn.Module):
    """Linear map of the channels of each irrep: x @ W / sqrt(number of inputs).

    Output irreps that the input does not have are zero.

    Attributes:
      irreps: Irreps of the output, each at most once.
      use_bias: Whether even scalars have a bias.
    """

    irreps: Irreps
    use_bias: bool = False

    @nn.compact
    def __call__(self, features: Features) -> Features:
        out = {}
        for channels, irrep in self.irreps:
            if irrep not in features:
                some = next(iter(features.values()))
                out[irrep] = jnp.zeros((len(some), irrep.size, channels), some.dtype)
                continue
            x = features[irrep]
            kernel = self.param(str(irrep), nn.initializers.normal(1.0), (x.shape[-1], channels))
            out[irrep] = x @ (kernel / sqrt(x.shape[-1])).astype(x.dtype)
            if self.use_bias and irrep == SCALAR:
                bias = self.param("bias", nn.initializers.zeros, (channels,))
                out[irrep] = out[irrep] + bias.astype(x.dtype)
        return out


class ElementLinear(nn.Module):
    """Linear map with weights for each element, without bias.

    With one-hot attributes this is e3nn's FullyConnectedTensorProduct of features and elements; the
    weights of an atom's element are read from a table. With attributes, rows of the table are sums
    over the attributes of an element.

    Attributes:
      irreps: Irreps of the output, each at most once. Those that the input does not have are left
        out.
      elements: Atomic numbers with weights; None for all.
      scale: Factor of the result. e3nn's one-hot attributes have 1/sqrt(number of elements).
    """

    irreps: Irreps
    elements: tuple[int, ...] | None = None
    scale: float = 1.0

    @nn.compact
    def __call__(
        self, features: Features, numbers: jax.Array, attributes: jax.Array | None = None
    ) -> Features:
        """Compute the map.

        Args:
          features: Features of the atoms.
          numbers: Atomic numbers, shape (N,).
          attributes: Table of attributes of the elements, shape (number of elements, V); None for
            one-hot attributes.
        """
        index, num = element_index(numbers, self.elements)
        if attributes is not None and len(numbers) < num:  # few atoms: weights of each atom
            attributes, index = table_rows(attributes, index), None
        out = {}
        for channels, irrep in self.irreps:
            if irrep not in features:
                continue
            x = features[irrep]
            rows = num if attributes is None else attributes.shape[-1]
            table = self.param(
                str(irrep), nn.initializers.normal(1.0), (rows, x.shape[-1], channels)
            ).astype(x.dtype)
            table = table * (self.scale / sqrt(x.shape[-1]))
            if attributes is not None:
                table = jnp.tensordot(attributes.astype(x.dtype) / sqrt(rows), table, 1)
            if index is None:
                out[irrep] = jnp.einsum("ncu,nuw->ncw", x, table)
            else:
                out[irrep] = _apply_rows(table, index, x)
        return out


def _apply_rows(table, index, x):
    """Multiply by the matrix of each atom's element: (Z, U, W), (N,), (N, c, U) -> (N, c, W)."""
    if target_platform() == "cpu" or len(table) > _MAX_PRODUCTS:
        return jnp.einsum("ncu,nuw->ncw", x, table_rows(table, index))
    # the matrices of all elements: less memory traffic than a matrix per atom
    products = jnp.einsum("ncu,zuw->nczw", x, table)
    return (products * jax.nn.one_hot(index, len(table), dtype=x.dtype)[:, None, :, None]).sum(2)


def table_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return rows of a table of elements: (Z, ...), (N,) -> (N, ...)."""
    if target_platform() == "cpu":
        return gather(table, index)
    return element_rows(table, index, table.dtype)


def element_index(numbers: jax.Array, elements: Sequence[int] | None) -> tuple[jax.Array, int]:
    """Return the row of each atom in a table of elements, and the number of rows.

    Args:
      numbers: Atomic numbers, shape (N,).
      elements: Atomic numbers of the rows; None for one row per atomic number up to 118. Other
        elements get row 0; force fields reject them (Potential.check_elements).
    """
    if elements is None:
        return numbers, MAX_ATOMIC_NUMBER + 1
    rows = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int32)
    rows[list(elements)] = np.arange(len(elements))
    return jnp.asarray(rows)[numbers], len(elements)


class PathWeights(NamedTuple):
    """Weights of edges as a product hidden @ kernel, which is not stored.

    Attributes:
      hidden: Last hidden layer of a radial network, shape (P, H).
      kernel: Last kernel with its normalization, shape (H, number of weights).
    """

    hidden: jax.Array
    kernel: jax.Array

    def values(self) -> jax.Array:
        """Compute the weights, shape (P, number of weights)."""
        return self.hidden @ self.kernel


class ScalarNetwork(nn.Module):
    """Multilayer perceptron without biases, in the form of e3nn, NequIP or Nequix.

    The first two divide by the root of the number of inputs. e3nn ("FullyConnectedNet") multiplies
    each activation by its normalization constant. NequIP multiplies every layer except the first by
    sqrt(2) instead, and starts from uniform weights. Nequix has plain products; the initial
    weights contain the factors.

    Attributes:
      widths: Widths of the layers, the last one of the output.
      act: Activation between the layers (layers.ACTIVATIONS).
      form: One of FORMS.
      zero_init: Whether the last kernel starts at zero.
    """

    widths: tuple[int, ...]
    act: str = "silu"
    form: str = "e3nn"
    zero_init: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute the output: (P, inputs) -> (P, widths[-1])."""
        return self.path_weights(x).values()

    @nn.compact
    def path_weights(self, x: jax.Array) -> PathWeights:
        """Compute the last hidden layer, and return it with the last kernel."""
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, received {self.form!r}")
        act = normalized_activation(self.act) if self.form == "e3nn" else ACTIVATIONS[self.act]
        for n, width in enumerate(self.widths):
            last, inputs = n == len(self.widths) - 1, x.shape[-1]
            init = {
                "e3nn": nn.initializers.normal(1.0),
                "nequip": _uniform,
                "nequix": nn.initializers.normal((1.0 if last else 2.0) / sqrt(inputs)),
            }[self.form]
            kernel = self.param(
                f"kernel_{n}",
                nn.initializers.zeros if last and self.zero_init else init,
                (inputs, width),
            ).astype(x.dtype)
            gain = sqrt(2.0) if self.form == "nequip" and n > 0 else 1.0
            kernel = kernel if self.form == "nequix" else kernel * (gain / sqrt(inputs))
            if last:
                return PathWeights(x, kernel)
            x = act(x @ kernel)


def _uniform(key, shape, dtype=jnp.float32):
    """Draw numbers of unit variance from a uniform distribution."""
    return jax.random.uniform(key, shape, dtype, -sqrt(3.0), sqrt(3.0))


def scalars(features: Features) -> jax.Array:
    """Return the even scalars of features, shape (N, channels)."""
    return features[SCALAR][:, 0]

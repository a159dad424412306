"""Linear maps that are kept as factors, and networks whose last layer is such a map.

A network that ends with a linear layer often feeds other linear layers. `Factored` keeps x @ kernel
as the two factors, so that a further map acts on the kernel, which is small, instead of on the
rows of x, which are as many as there are edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class Factored:
    """Array x @ kernel of shape (E, F), kept as its factors.

    Attributes:
      x: Array, shape (E, K).
      kernel: Kernel, shape (K, F); None: identity.
    """

    def __init__(self, x: jax.Array, kernel: jax.Array | None = None):
        self.x, self.kernel = x, kernel

    @property
    def width(self) -> int:
        """Number of columns F."""
        return (self.x if self.kernel is None else self.kernel).shape[-1]

    def value(self) -> jax.Array:
        """Return the product, shape (E, F)."""
        return self.x if self.kernel is None else self.x @ self.kernel

    def columns(self, start: int, stop: int) -> Factored:
        """Return the columns from `start` to `stop`, multiplied out if they are fewer than x has.

        Fewer columns than those of x make further products cheaper than the factors do.
        """
        if self.kernel is None:
            return Factored(self.x[:, start:stop])
        part = Factored(self.x, self.kernel[:, start:stop])
        return part if self.x.shape[-1] <= stop - start else Factored(part.value())

    def __matmul__(self, kernel: jax.Array) -> Factored:
        return Factored(self.x, kernel if self.kernel is None else self.kernel @ kernel)


def uniform(key, shape, dtype=jnp.float32, variance: float = 1.0) -> jax.Array:
    """Draw numbers from the uniform distribution with mean zero and this variance."""
    bound = math.sqrt(3.0 * variance)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class FactoredMLP(nn.Module):
    """Network without biases with silu between its layers; the last product is not carried out.

    The first layer is divided by sqrt(fan-in), later ones by sqrt(fan-in / 2), so that kernels of
    unit variance keep the size of the features.

    Attributes:
      hidden: Widths of the hidden layers.
      width: Number of outputs.
      zero_init: Whether the last kernel starts at zero.
    """

    hidden: Sequence[int]
    width: int
    zero_init: bool = False

    @nn.compact
    def __call__(self, inputs: Sequence[Factored]) -> Factored:
        """Apply the network to the concatenation of `inputs`, shape (E, width)."""
        for n, width in enumerate((*self.hidden, self.width)):
            last = n == len(self.hidden)
            init = nn.initializers.zeros if last and self.zero_init else uniform
            fan_in = sum(part.width for part in inputs)
            kernel = self.param(f"kernel_{n}", init, (fan_in, width)).astype(inputs[0].x.dtype)
            kernel = kernel * math.sqrt((2.0 if n else 1.0) / fan_in)
            inputs = products(inputs, kernel)
            if not last:
                inputs = [Factored(jax.nn.silu(total(inputs)))]
        return inputs[0] if len(inputs) == 1 else Factored(total(inputs))


def products(inputs: Sequence[Factored], kernel: jax.Array) -> list[Factored]:
    """Multiply each input with its rows of the kernel of their concatenation."""
    outputs, row = [], 0
    for part in inputs:
        outputs.append(part @ kernel[row : row + part.width])
        row += part.width
    return outputs


def total(terms: Sequence[Factored]) -> jax.Array:
    """Return the sum of `terms`, multiplied out."""
    return sum(term.value() for term in terms[1:]) + terms[0].value()

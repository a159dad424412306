"""Building blocks of several architectures: radial bases, cutoffs, safe norms, activations, layers.

Functions of a distance are smooth where required and have no NaN in any derivative, neither at zero
distance (padding edges) nor beyond the cutoff.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.graphs.slot_sums import SlotIndex, rows, take, total


def safe_norm(vectors: jax.Array) -> jax.Array:
    """Compute the length of vectors: (..., 3) -> (...).

    The derivative at zero length is zero instead of NaN.
    """
    squared = jnp.sum(vectors * vectors, axis=-1)
    zero = squared == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))


def unit_vectors(vectors: jax.Array, distances: jax.Array) -> jax.Array:
    """Compute vectors / distances, zero for zero distance."""
    zero = distances == 0
    return jnp.where(zero[:, None], 0.0, vectors / jnp.where(zero, 1.0, distances)[:, None])


ACTIVATIONS: dict[str, Callable] = {
    "identity": lambda x: x,
    "silu": jax.nn.silu,
    "scaled_silu": lambda x: jax.nn.silu(x) / 0.6,  # keeps the variance of normal inputs roughly
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "mish": jax.nn.mish,
    "shifted_softplus": lambda x: jax.nn.softplus(x) - float(np.log(2.0)),
    # TorchMD-Net rounds ln 2 to float32; imported force fields must reproduce the last digits
    "shifted_softplus_float32": lambda x: jax.nn.softplus(x) - float(np.log(np.float32(2.0))),
}


def activation(name: str) -> Callable:
    """Return the activation function `name`."""
    return _lookup(ACTIVATIONS, "activation", name)


def cosine_cutoff(d, cutoff):
    """Compute (cos(pi d / cutoff) + 1) / 2 inside the cutoff, 0 outside."""
    return jnp.where(
        d < cutoff, 0.5 * (jnp.cos(jnp.pi * jnp.minimum(d, cutoff) / cutoff) + 1.0), 0.0
    )


def phys_cutoff(d, cutoff):
    """Compute 1 - 6 u^5 + 15 u^4 - 10 u^3 with u = d / cutoff inside the cutoff, 0 outside.

    It is twice continuously differentiable.
    """
    u = jnp.minimum(d / cutoff, 1.0)
    return 1.0 - u * u * u * (10.0 + u * (6.0 * u - 15.0))


def exponential_cutoff(d, cutoff):
    """Compute exp(-d² / ((cutoff - d)(cutoff + d))) inside the cutoff, 0 outside.

    It is infinitely differentiable.
    """
    import e3x  # builds tables of Clebsch-Gordan coefficients for 0.4 s

    return e3x.nn.smooth_cutoff(d, cutoff)


def polynomial_cutoff(d, cutoff, power):
    """Compute 1 - (p+1)(p+2)/2 u^p + p(p+2) u^(p+1) - p(p+1)/2 u^(p+2), with u = d / cutoff.

    It is 0 outside the cutoff. With a power p, it has p - 1 continuous derivatives at zero and two
    at the cutoff.
    """
    p, u = power, jnp.minimum(d / cutoff, 1.0)
    inside = 1.0 - u**p * ((p + 1) * (p + 2) / 2 - u * (p * (p + 2) - u * (p * (p + 1) / 2)))
    return jnp.where(d < cutoff, inside, 0.0)


def xplor_cutoff(d, cutoff, onset):
    """Compute a switch from 1 at `onset` to 0 at the cutoff, a cubic polynomial of d².

    Its first derivative is continuous.
    """
    squared, on, off = jnp.square(jnp.minimum(d, cutoff)), onset**2, cutoff**2
    switch = (off - squared) ** 2 * (off + 2 * squared - 3 * on) / (off - on) ** 3
    return jnp.where(d < onset, 1.0, switch)


def step_cutoff(d, cutoff):
    """Compute 1 inside the cutoff, 0 outside.

    With it energies and forces jump where a pair crosses the cutoff, as in models that are
    published without a cutoff function.
    """
    return jnp.where(d < cutoff, 1.0, 0.0).astype(d.dtype)


STEP = "step"
CUTOFFS: dict[str, Callable] = {
    "cosine": cosine_cutoff,
    "phys": phys_cutoff,
    "exponential": exponential_cutoff,
    STEP: step_cutoff,
}


def cutoff_function(name: str) -> Callable:
    """Return the cutoff function `name`, (d, cutoff) -> [0, 1]."""
    return _lookup(CUTOFFS, "cutoff function", name)


def physnet_basis(d, num, cutoff):
    """Compute exp(-b (exp(-d) - c_k)²), the radial basis of PhysNet (eq. 7).

    The centers c_k are evenly spaced from exp(-cutoff) to 1. The shape (E,) becomes (E, num).
    """
    low = float(np.exp(-cutoff))
    centers = jnp.asarray(np.linspace(low, 1.0, num), d.dtype)
    width = (2.0 / num * (1.0 - low)) ** -2
    return jnp.exp(-width * (jnp.exp(-d)[:, None] - centers) ** 2)


# 0.5 / bohr in 1/Å, rounded to float32 as in mlff; imported force fields must reproduce the last
# digits.
_BERNSTEIN_GAMMA = float(np.float32(0.9448630629184640))


def bernstein_basis(d, num, cutoff, gamma=_BERNSTEIN_GAMMA):
    """Compute Bernstein polynomials of degree num - 1 in exp(-gamma d) (SpookyNet, eq. 12).

    The shape (E,) becomes (E, num).
    """
    from scipy.special import gammaln  # whose import takes a tenth of a second

    k = np.arange(num)
    log_binomial = jnp.asarray(gammaln(num) - gammaln(k + 1) - gammaln(num - k), d.dtype)
    x = -gamma * d[:, None]
    # At d = 0, log(1 - exp(x)) is -inf. Only the function k = num - 1 is not zero there, and the
    # logarithm has a factor of 0 in it.
    zero = x == 0
    log_rest = jnp.log(-jnp.expm1(jnp.where(zero, -1.0, x)))
    inside = jnp.exp(log_binomial + k * x + (num - 1 - k) * log_rest)
    return jnp.where(zero, jnp.asarray(k == num - 1, d.dtype), inside)


def gaussian_basis(d, num, cutoff, centers=None, widths=None):
    """Compute Gaussians exp(-(d - c_k)² / (2 w_k²)) of the distance.

    Unless they are given, the c_k are evenly spaced from 0 to the cutoff and the w_k equal their
    spacing. The shape (E,) becomes (E, num).
    """
    centers = _constants("centers", centers, np.linspace(0.0, cutoff, num))
    widths = _constants("widths", widths, np.full(num, cutoff / (num - 1)))
    return jnp.exp(
        jnp.asarray(-0.5 / widths**2, d.dtype) * (d[:, None] - jnp.asarray(centers, d.dtype)) ** 2
    )


def bessel_basis(d, num, cutoff, wave_numbers=None):
    """Compute the spherical Bessel functions of DimeNet, sin(k_n d) / d times sqrt(2 / cutoff).

    Unless they are given, the wave numbers are k_n = n pi / cutoff. The shape (E,) becomes
    (E, num).
    """
    k = _constants("wave numbers", wave_numbers, np.arange(1, num + 1) * np.pi / cutoff)
    scale = jnp.asarray(np.sqrt(2.0 / cutoff) * k, d.dtype)
    return scale * jnp.sinc(jnp.asarray(k / np.pi, d.dtype) * d[:, None])


def _constants(name, values, defaults):
    """Return the given constants, checked, or the computed ones."""
    if values is None:
        return defaults
    if len(values) != len(defaults):
        raise ValueError(
            f"the radial basis has {len(defaults)} functions (num_radial), received {len(values)} "
            f"{name}"
        )
    return np.asarray(values, np.float64)


RADIAL_BASES: dict[str, Callable] = {
    "physnet": physnet_basis,
    "bernstein": bernstein_basis,
    "gaussian": gaussian_basis,
    "bessel": bessel_basis,
}


def radial_basis(
    name: str, centers: Sequence[float] | None = None, widths: Sequence[float] | None = None
) -> Callable:
    """Return the radial basis `name`, a function (d, num, cutoff) -> (E, num).

    Args:
      name: Key of RADIAL_BASES.
      centers: Centers of "gaussian" (Å) or wave numbers of "bessel" (1/Å), to use in place of the
        computed ones, for example as another program has rounded them.
      widths: Widths of "gaussian" (Å), likewise.
    """
    basis = _lookup(RADIAL_BASES, "radial basis", name)
    if centers is None and widths is None:
        return basis
    if name == "gaussian":
        return functools.partial(basis, centers=centers, widths=widths)
    if name == "bessel" and widths is None:
        return functools.partial(basis, wave_numbers=centers)
    raise ValueError(
        "radial_centers are only valid for the radial bases 'gaussian' and 'bessel', and "
        f"radial_widths for 'gaussian'; received them for {name!r}"
    )


def segment_sum(values: jax.Array, index: jax.Array | SlotIndex, num: int) -> jax.Array:
    """Sum the rows of `values` by `index`: (E, ...) -> (num, ...)."""
    if isinstance(index, SlotIndex):
        return total(values, index)
    return jax.ops.segment_sum(values, index, num, mode="promise_in_bounds")


def segment_max(values: jax.Array, index: jax.Array | SlotIndex, num: int) -> jax.Array:
    """Return the largest of the rows of each index: (E, F) -> (num, F).

    Without any rows it is the lowest finite number if the index is a `SlotIndex`, else -inf.
    """
    if isinstance(index, SlotIndex):
        lowest = jnp.finfo(values.dtype).min
        return jnp.where(index.used[..., None], rows(values, index.rows), lowest).max(1)
    return jax.ops.segment_max(values, index, num)


def gather(values: jax.Array, index: jax.Array | SlotIndex) -> jax.Array:
    """Return the rows `index` of `values`.

    Bounds are not checked, unlike with the default mode of XLA.
    """
    if isinstance(index, SlotIndex):
        return take(jnp.asarray(values), index)
    # outside of jit, as when the shapes of parameters are computed, arrays can be NumPy's
    return jnp.asarray(values).at[index].get(mode="promise_in_bounds")


def to_first_dtype(first, *others, dtype=None, inexact=True):
    """Cast all arrays to the dtype of the first one; None stays None.

    This replaces the type promotion of flax, which would select the widest dtype.
    """
    return [None if x is None else jnp.asarray(x, first.dtype) for x in (first, *others)]


class Dense(nn.Dense):
    """Dense layer of flax that computes in the dtype of its input, not of its parameters."""

    promote_dtype: Callable = to_first_dtype


class SplitDense(nn.Module):
    """Dense layer with its output in `parts` of equal width: (P, K) -> `parts` times (P, width).

    It is meant for edges: each part is a separate product, since on a CPU splitting an array of
    edges, and concatenating the parts of its derivative, costs more than the product.

    Attributes:
      parts: Number of parts.
      width: Number of features of each part.
      kernel_init: Initializer of the kernel of all parts.
    """

    parts: int
    width: int
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.parts * self.width)
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:]).astype(x.dtype)
        return [
            x @ k + b
            for k, b in zip(jnp.split(kernel, self.parts, axis=1), jnp.split(bias, self.parts))
        ]


class TwoLayers(nn.Module):
    """Dense -> activation -> Dense.

    Attributes:
      widths: Widths of the two layers.
      act: Activation.
    """

    widths: tuple[int, int]
    act: str = "silu"

    @nn.compact
    def __call__(self, x):
        hidden = activation(self.act)(Dense(self.widths[0], name="layer_1")(x))
        return Dense(self.widths[1], name="layer_2")(hidden)


class ResidualMLP(nn.Module):
    """Residual block x + W2 act(W1 act(x)) that keeps the shape.

    Attributes:
      act: Activation.
      use_bias: Whether both layers have a bias.
    """

    act: str = "silu"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        act, width = activation(self.act), x.shape[-1]
        y = Dense(width, use_bias=self.use_bias, name="layer_1")(act(x))
        return x + Dense(width, use_bias=self.use_bias, name="layer_2")(act(y))


def _lookup(table, kind, name):
    if name not in table:
        from mlip_jax.config import unknown_name

        raise ValueError(unknown_name(kind, name, table))
    return table[name]

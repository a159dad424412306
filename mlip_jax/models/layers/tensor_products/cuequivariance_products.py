"""Convolution with NVIDIA's cuEquivariance instead of the loops of chunks.py.

    MLIP_JAX_TENSOR_PRODUCTS=cuequivariance python -m mlip_jax.main ...

The same sums are one polynomial per group of paths, which cuEquivariance evaluates and
differentiates: with its CUDA kernel "uniform_1d" on a GPU, which gathers, multiplies and sums
without storing messages, and with plain JAX elsewhere. Results agree up to rounding, so the choice
belongs to the machine and is not saved with a model.

Source: https://docs.nvidia.com/cuda/cuequivariance (cuequivariance_jax.segmented_polynomial)
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.compilation_cache import EXTERNAL_KERNELS
from mlip_jax.models.layers.tensor_products.chunks import PathGroup
from mlip_jax.models.layers.tensor_products.couplings import coupling, nonzero
from mlip_jax.target_device import is_portable, target_platform

BACKENDS = ("jax", "cuequivariance")
PACKAGES = ("cuequivariance", "cuequivariance_jax")
GPU_PACKAGE = "cuequivariance_ops_jax"


def is_chosen() -> bool:
    """Return whether the environment chooses cuEquivariance, and this program may use it.

    Raises:
      ValueError: The environment variable has another value than those of BACKENDS.
      ImportError: cuEquivariance is chosen, but not installed or not compatible with JAX.
    """
    name = os.environ.get(EXTERNAL_KERNELS) or "jax"
    if name not in BACKENDS:
        raise ValueError(
            f"{EXTERNAL_KERNELS}: received {name!r}, expected one of {', '.join(BACKENDS)}"
        )
    if name == "jax" or is_portable():
        return False
    _check_packages()
    return True


def _check_packages() -> None:
    """Raise ImportError if a package is missing or not compatible with JAX."""
    on_gpu = target_platform() == "gpu"
    extra = "cuequivariance-cuda13" if on_gpu else "cuequivariance"
    remedy = f"pip install 'mlip-flax[{extra}]', or unset {EXTERNAL_KERNELS}"
    needed = (*PACKAGES, GPU_PACKAGE) if on_gpu else PACKAGES
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"{EXTERNAL_KERNELS}=cuequivariance requires {', '.join(missing)}: {remedy}"
        )
    version = importlib.metadata.version("cuequivariance-jax")
    if version.startswith("0.13.") and jax.__version_info__ >= (0, 12):
        raise ImportError(
            f"cuequivariance-jax {version} does not work with JAX {jax.__version__}, but with JAX "
            f"0.10 and 0.11: {remedy}"
        )


def sum_products(groups: tuple[PathGroup, ...], x, y, w, senders, receivers, undirected, old_signs):
    """Compute chunks.forward, an array (N, c, U) per group and path; same arguments."""
    sums = []
    for group, features, weights in zip(groups, x, w):
        summed = _sum_group(group, features, y, weights, senders, receivers, old_signs)
        if undirected:
            back = _sum_group(
                group, features, y * _signs(y), weights, receivers, senders, old_signs
            )
            summed = [a + b for a, b in zip(summed, back)]
        sums.append(summed)
    return sums


def _sum_group(group: PathGroup, x, y, w, senders, receivers, old_signs):
    """Sum the messages of a group in one direction."""
    import cuequivariance_jax

    num, _, channels = x.shape
    outputs = [jax.ShapeDtypeStruct((num, (2 * c + 1) * channels), x.dtype) for _, c in group.paths]
    sums = cuequivariance_jax.segmented_polynomial(
        _polynomial(group, channels, y.shape[-1], old_signs),
        [x.reshape(num, -1), y, *w],
        outputs,
        [senders, None, *[None] * len(w), *[receivers] * len(outputs)],
        method="uniform_1d" if target_platform() == "gpu" else "naive",
        options={"math_dtype": x.dtype.name},
        name="convolution",
    )
    return [values.reshape(num, 2 * c + 1, channels) for values, (_, c) in zip(sums, group.paths)]


@functools.lru_cache(maxsize=64)
def _polynomial(group: PathGroup, channels: int, num_harmonics: int, old_signs: bool):
    """Return the polynomial of a group: inputs x, Y and a weight per path, an output per path."""
    import cuequivariance as cue

    operations, weights, outputs = [], [], []
    for p, (degree, target) in enumerate(group.paths):
        # features, harmonics, weights, output; u: channel
        product = cue.SegmentedTensorProduct.from_subscripts("u,,u,u")
        product.add_segments(0, (2 * group.degree + 1) * [(channels,)])
        product.add_segments(1, num_harmonics * [()])
        product.add_segment(2, (channels,))
        product.add_segments(3, (2 * target + 1) * [(channels,)])
        table = np.asarray(coupling(group.degree, degree, target, old_signs))
        for a, b, c, value in nonzero(table):
            product.add_path(a, degree**2 + b, 0, c, c=value)
        weights.append(product.operands[2])
        outputs.append(product.operands[3])
        operations.append((cue.Operation([0, 1, 2 + p, 2 + len(group.paths) + p]), product))
    inputs = [product.operands[0], product.operands[1], *weights]
    return cue.SegmentedPolynomial(inputs, outputs, operations)


def _signs(y) -> jax.Array:
    """Return the signs of harmonics of the opposite direction, shape (B,)."""
    degrees = np.floor(np.sqrt(np.arange(y.shape[-1])))
    return jnp.asarray((-1.0) ** degrees, y.dtype)

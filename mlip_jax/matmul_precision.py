"""Precision of matrix products in float32.

GPUs and TPUs multiply float32 matrices as TF32 or bfloat16 unless another precision is requested.
TF32 rounds the factors to 10 bits, and the error differs between programs. Therefore:

    training steps     config.train.matmul_precision, by default that of the device
    everything else    float32: calculators, relaxation, dynamics, vibrations, evaluation,
                       validation, predictors, exported programs

JAX's own option replaces both defaults: JAX_DEFAULT_MATMUL_PRECISION in the environment, or
jax.config.update("jax_default_matmul_precision", "tensorfloat32"). CPUs always multiply in full
precision. float64 is not affected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import jax

F = TypeVar("F", bound=Callable)

FULL, OF_DEVICE = "float32", "default"  # names of JAX


def full_precision() -> AbstractContextManager:
    """Return a context in which products are traced in full precision.

    An explicit choice, by JAX's option or `training_precision`, is kept.
    """
    return jax.default_matmul_precision(jax.config.jax_default_matmul_precision or FULL)


def at_full_precision(function: F) -> F:
    """Decorate a function so that it is traced in a context of `full_precision`."""

    @functools.wraps(function)
    def at_precision(*args, **kwargs):
        with full_precision():
            return function(*args, **kwargs)

    return at_precision


def training_precision(name: str | None) -> AbstractContextManager:
    """Return a context in which the products of a training step are traced.

    Args:
      name: JAX's name of a precision; None uses JAX's option, or the precision of the device.
    """
    return jax.default_matmul_precision(
        name or jax.config.jax_default_matmul_precision or OF_DEVICE
    )


def products_are_exact() -> bool:
    """Return whether products of float32 matrices are traced in full precision."""
    return jax.config.jax_default_matmul_precision in (FULL, "highest", "F32_F32_F32")

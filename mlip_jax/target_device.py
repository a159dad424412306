"""Kind of the device that programs are compiled for.

Some sums and products have a fast form for CPUs and another one for GPUs and TPUs. Code that chooses
between them asks `target_platform`, not JAX, because programs can also be compiled for a device that
is absent. Kernels that are compiled outside of XLA ask `is_portable`, because they work only in the
process that compiled them.

MLIP_JAX_FUSED_KERNELS=1 in the environment switches on Pallas kernels for GPUs where a model has them
(PaiNN). They were compiled for GPUs, but not run on one, so they are off by default.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)
_fused: contextvars.ContextVar[bool | None] = contextvars.ContextVar("fused", default=None)
_portable: contextvars.ContextVar[bool] = contextvars.ContextVar("portable", default=False)


def target_platform() -> str:
    """Return "cpu", "gpu" or "tpu": the platform of JAX, or that of `compiling_for`."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Return a context in which programs are traced for a platform: "cpu", "gpu" or "tpu"."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def uses_fused_kernels() -> bool:
    """Return whether models are to use Pallas kernels, by the environment or `fused_kernels`."""
    chosen = _fused.get()
    if chosen is not None:
        return chosen
    wanted = os.environ.get("MLIP_JAX_FUSED_KERNELS", "0") == "1"
    return wanted and target_platform() == "gpu" and not is_portable()


@contextlib.contextmanager
def fused_kernels(use: bool) -> Iterator[None]:
    """Return a context in which programs are traced with or without Pallas kernels.

    On a CPU the kernels are interpreted, which is slow; this is for tests.
    """
    token = _fused.set(use)
    try:
        yield
    finally:
        _fused.reset(token)


def is_portable() -> bool:
    """Return whether the program that is traced must also run in other processes."""
    return _portable.get()


@contextlib.contextmanager
def portable_programs() -> Iterator[None]:
    """Return a context in which programs are traced for other processes, as in exports."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)

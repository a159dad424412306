"""Update rules that compute all parameters in few operations on GPUs and TPUs.

The rules and their states are those of optax; only the arrays that optax sees are different. The
matrices of one shape are a stack, and all other parameters of one type are a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
import optax.contrib

from mlip_jax.target_device import target_platform
from mlip_jax.training.device.groups import Groups, over_groups

# Prefixes of the names of groups: stacks of matrices of Muon, and parameters that AdamW decays.
_STACK, _DECAYED, _OTHERS = "matrices", "decayed", "others"


def adam(rate: Any, moments: Mapping[str, float]) -> optax.GradientTransformation:
    """Create Adam."""
    rule = optax.adam(rate, **moments)
    return over_groups(rule, rule, _by_type)


def amsgrad(rate: Any, moments: Mapping[str, float]) -> optax.GradientTransformation:
    """Create AMSGrad."""
    rule = optax.amsgrad(rate, **moments)
    return over_groups(rule, rule, _by_type)


def adamw(
    rate: Any, weight_decay: float, moments: Mapping[str, float]
) -> optax.GradientTransformation:
    """Create AdamW, whose weight decay applies to arrays of two or more axes."""

    def rule(decayed):
        return optax.adamw(rate, weight_decay=weight_decay, mask=decayed, **moments)

    def of_leaves(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def of_groups(groups):
        return {name: name.startswith(_DECAYED) for name in groups}

    return over_groups(
        rule(of_leaves),
        rule(of_groups),
        lambda tree: Groups(
            tree, lambda path, x: f"{_DECAYED if x.ndim > 1 else _OTHERS} {x.dtype}"
        ),
    )


def muon(
    rate: Any, weight_decay: float, moments: Mapping[str, float]
) -> optax.GradientTransformation:
    """Create Muon for matrices and Adam for the other parameters."""

    def rule(matrix_axes):
        return optax.contrib.muon(
            rate,
            weight_decay=weight_decay,
            adam_b1=moments["b1"],
            adam_b2=moments["b2"],
            eps=moments["eps"],
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=0.2,
        )

    return over_groups(rule(_axes_of_leaves), rule(_axes_of_groups), _by_matrix)


def clip(max_norm: float) -> optax.GradientTransformation:
    """Create the clipping of gradients by their global norm."""
    rule = optax.clip_by_global_norm(max_norm)
    return over_groups(rule, rule, _by_type)


def norm(tree: Any) -> jax.Array:
    """Return the global norm of a tree, in one operation per type except on CPUs."""
    return optax.tree.norm(tree if target_platform() == "cpu" else _by_type(tree).pack(tree))


def _by_type(tree: Any) -> Groups:
    """Return one group per type."""
    return Groups(tree, lambda path, x: f"{_OTHERS} {x.dtype}")


def _by_matrix(tree: Any) -> Groups:
    """Return one group per shape of the matrices, and one of all other parameters."""

    def group_of(path, x):
        shape = "x".join(map(str, x.shape[-2:]))
        return f"{_STACK} {shape} {x.dtype}" if _is_matrix(path, x) else f"{_OTHERS} {x.dtype}"

    return Groups(tree, group_of, lambda name: name.startswith(_STACK))


_MATRIX = optax.contrib.MuonDimensionNumbers(-2, -1)


def _axes_of_leaves(params: Any) -> Any:
    """Return the input and output axes of each matrix, None for other parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: _MATRIX if _is_matrix(path, p) else None, params
    )


def _axes_of_groups(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return the input and output axes of each stack of matrices, None for other groups."""
    return {name: _MATRIX if name.startswith(_STACK) else None for name in groups}


def _is_matrix(path: Any, p: Any) -> bool:
    """Return whether a parameter is a kernel that Muon treats as a matrix.

    Kernels with one input or output are not treated as matrices. Axes before the last two are
    heads, each with its own matrix.
    """
    name = jax.tree_util.keystr(tuple(path[-1:]), simple=True)
    return name == "kernel" and p.ndim > 1 and min(p.shape[-2:]) > 1

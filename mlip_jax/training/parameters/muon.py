"""Muon: orthogonalized updates of matrices."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax
import optax.contrib

from mlip_jax.training.parameters.paths import parameter_path


def muon(rate, weight_decay: float, moments: Mapping[str, float]) -> optax.GradientTransformation:
    """Create Muon for matrices and Adam for the other parameters."""
    return optax.contrib.muon(
        rate,
        weight_decay=weight_decay,
        adam_b1=moments["b1"],
        adam_b2=moments["b2"],
        eps=moments["eps"],
        muon_weight_dimension_numbers=_matrix_axes,
        consistent_rms=0.2,
    )


def _matrix_axes(params):
    """Return the input and output axes of each kernel that is a matrix, None for other parameters.

    Kernels with one input or output are not treated as matrices. Axes before the last two are
    heads, each with its own matrix.
    """

    def axes(path, p):
        is_matrix = parameter_path(path[-1:]) == "kernel" and p.ndim > 1 and min(p.shape[-2:]) > 1
        return optax.contrib.MuonDimensionNumbers(-2, -1) if is_matrix else None

    return jax.tree_util.tree_map_with_path(axes, params)

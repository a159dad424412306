"""Paths of parameters, and the linear maps among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

# Names of the weights of linear maps: dense layers have "kernel", maps of irreps also "kernel_1"
# for each degree, or the irrep, such as "0e".
_LINEAR = re.compile(r"kernel(_\d+)?|\d+[eo]")


def parameter_path(path: Sequence[Any]) -> str:
    """Format a path of jax.tree_util as in checkpoints: "params/embedding/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def is_linear_map(path: Sequence[Any], parameter: Any) -> bool:
    """Return whether a parameter is the weight of a linear map.

    Its last two axes are inputs and outputs. Axes before them are separate maps, for instance of
    heads or elements.

    Args:
      path: Path of jax.tree_util.
      parameter: Array, or its shape.
    """
    return _LINEAR.fullmatch(parameter_path(path[-1:])) is not None and parameter.ndim > 1

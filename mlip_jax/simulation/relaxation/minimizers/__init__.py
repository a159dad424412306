"""Minimizers of many molecules at once: one file each, found by its name. All are pure functions of an explicit state.

    M   molecules        D   3 times the atoms of the largest one

`mlip_jax/simulation/relaxation/minimizers/<name>.py` holds one class that fulfills `Minimizer` and has a name that is
<name> in any case. Positions and forces are (M, D). Padding and fixed atoms have no force, so they never move.
Molecules that are not `active` in a step keep positions and state to the last bit. A molecule that is `fresh` starts
from the initial state, whatever its state holds.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import NamedTuple, Protocol

import jax
import numpy as np

from mlip_jax.config import unknown_name


class Minimizer(Protocol):
    """Interface of a minimizer."""

    def init(self, num: int, size: int, dtype) -> NamedTuple:
        """Return the initial state of `num` molecules with `size` coordinates each."""

    def step(self, state, positions: jax.Array, forces: jax.Array, fresh: jax.Array, active: jax.Array
             ) -> tuple[jax.Array, NamedTuple]:
        """Return the next positions (M, D) and state.

        Args:
          positions, forces: (M, D) in Å and eV/Å.
          fresh, active: Molecules that start, and molecules that move, (M,), bool.
        """


def names() -> list[str]:
    """Return the names of all minimizers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def create(name: str, maxstep: float = 0.2) -> Minimizer:
    """Return the minimizer `name` ("bfgs", "lbfgs", "fire") with ASE's parameters.

    Args:
      maxstep: Longest step, Å.

    Raises:
      ValueError: No such name, or a step that is not positive.
    """
    if name not in names():
        raise ValueError(unknown_name("optimizer", name, names()))
    if not (np.isfinite(maxstep) and maxstep > 0):
        raise ValueError(f"maxstep must be positive (Å), received {maxstep}")
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, name.upper())(maxstep=maxstep)

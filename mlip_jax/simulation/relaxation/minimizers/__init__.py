"""Batched minimizers, one file each, found by name. All are pure functions of an explicit state.

    M   molecules        D   3 times the atoms of the largest one

`mlip_jax/simulation/relaxation/minimizers/<name>.py` contains one class that implements
`Minimizer`; its name is <name> in upper case. Positions and forces are (M, D). Padding and fixed
atoms have no force, so they never move. Molecules that are not `active` in a step keep positions
and state exactly. A molecule that is `fresh` starts from the initial state, whatever its state
contains.
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

    def step(
        self, state, positions: jax.Array, forces: jax.Array, fresh: jax.Array, active: jax.Array
    ) -> tuple[jax.Array, NamedTuple]:
        """Return the next positions (M, D) and state.

        Args:
          state: State of the minimizer.
          positions: Positions (Å), (M, D).
          forces: Forces (eV/Å), (M, D).
          fresh: Whether a molecule starts with this step, (M,), bool.
          active: Whether a molecule moves in this step, (M,), bool.
        """


def names() -> list[str]:
    """Return the names of all minimizers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def create(name: str, maxstep: float = 0.2) -> Minimizer:
    """Return the minimizer `name` ("bfgs", "lbfgs", "fire") with ASE's parameters.

    Args:
      name: Name of the minimizer.
      maxstep: Longest step (Å).

    Raises:
      ValueError: If there is no such minimizer, or if maxstep is not positive.
    """
    if name not in names():
        raise ValueError(unknown_name("optimizer", name, names()))
    if not (np.isfinite(maxstep) and maxstep > 0):
        raise ValueError(f"maxstep must be positive (Å), received {maxstep}")
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, name.upper())(maxstep=maxstep)

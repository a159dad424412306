"""Warnings of force fields whose forces are not the gradient of their energy.

Dynamics and vibrations refuse them. Calculators, relaxations and searches for minima or reaction
paths warn; each issues one warning.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

from ase.calculators.calculator import PropertyNotImplementedError

from mlip_jax.potential import NO_ENERGY_DERIVATIVES, Potential, has_energy_derivatives
from mlip_jax.simulation.user_warnings import warn

_MESSAGE = (
    "the forces of this force field are not the gradient of its energy (they are {}). With "
    "them the energy drifts in dynamics, and they do not vanish at the minima of the energy"
)


class NonConservativeWarning(UserWarning):
    """Warning that the forces of a force field are not the gradient of its energy."""


def warn_if_not_conservative(potentials: Sequence[Potential]) -> bool:
    """Return whether all force fields are conservative; warn if one of them is not."""
    origins = {potential.origin_of_forces for potential in potentials if not potential.conservative}
    if origins:
        warn(_MESSAGE.format(" or ".join(sorted(origins))), NonConservativeWarning)
    return not origins


@contextlib.contextmanager
def already_warned() -> Iterator[None]:
    """Hide `NonConservativeWarning` in the body, for parts of a calculation that has warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonConservativeWarning)
        yield


def properties(potentials: Sequence[Potential], names: Sequence[str]) -> list[str]:
    """Return the properties that all force fields have: `names`, without the stress if need be."""
    return [name for name in names if name != "stress" or _have_derivatives(potentials)]


def check_hessian(potentials: Sequence[Potential]) -> None:
    """Raise PropertyNotImplementedError if the energy of a force field has no derivatives."""
    if not _have_derivatives(potentials):
        raise PropertyNotImplementedError(NO_ENERGY_DERIVATIVES.format(what="Hessian"))


def _have_derivatives(potentials: Sequence[Potential]) -> bool:
    return all(has_energy_derivatives(potential.model) for potential in potentials)

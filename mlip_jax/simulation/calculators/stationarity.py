"""Check that a structure is at a stationary point, which frequencies require."""

from __future__ import annotations

import numpy as np

from mlip_jax.simulation.user_warnings import warn

# MAX_FORCE: largest force on an atom (eV/Å) above which frequencies get a warning.
MAX_FORCE = 0.01


class NotStationaryWarning(UserWarning):
    """Warning that forces are too large for frequencies."""


def warn_if_not_stationary(forces: np.ndarray) -> None:
    """Warn if forces (eV/Å), (n, 3), on the mobile atoms are too large for frequencies."""
    largest = float(np.linalg.norm(forces, axis=-1).max(initial=0.0))
    if largest > MAX_FORCE:
        warn(
            f"the largest force is {largest:.2g} eV/Å, more than {MAX_FORCE:g} eV/Å: the structure "
            "is not at a minimum, and low frequencies may be wrong or imaginary. Relax it first, "
            'for example with relax(atoms, force_field, fmax=0.001, dtype="float64")',
            NotStationaryWarning,
        )

"""Status of a molecule in a batched relaxation."""

from __future__ import annotations

import enum


class RelaxationStatus(enum.IntEnum):
    """Status of a molecule, with the words that describe it in a result.

    Attributes:
      label: Status of the result: "running", "converged", "step limit" or "diverged".
      message: Reason for "diverged", with the field {nearest}, the distance of the closest two
        atoms (Å); otherwise "".
    """

    RUNNING = 0, "running", ""
    CONVERGED = 1, "converged", ""
    STEP_LIMIT = 2, "step limit", ""
    NOT_FINITE = 3, "diverged", "energy or forces are not finite"
    ATOMS_OVERLAP = 4, "diverged", "two atoms came within {nearest:.2f} Å of each other"
    DISSOCIATED = 5, "diverged", "an atom moved beyond the cutoff from all others"
    COLLAPSED = 6, "diverged", "the cell collapsed: its lattice planes are too close"

    label: str
    message: str

    def __new__(cls, code: int, label: str, message: str):
        status = int.__new__(cls, code)
        status._value_, status.label, status.message = code, label, message
        return status


# RUNNING: status code of a molecule that is not done, as a plain integer for use in JAX.
RUNNING = int(RelaxationStatus.RUNNING)
